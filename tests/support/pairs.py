"""Tests of many parameters at once: every two of their values meet, though not every three.

What goes wrong for some values alone goes wrong for one of them or for two together. Where three
are known to depend on each other, two of them are one parameter here (`together`).
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def in_pairs(*marks: pytest.MarkDecorator) -> pytest.MarkDecorator:
    """One mark in place of several marks of pytest.mark.parametrize, one below the other."""
    tables = [_rows(mark) for mark in marks]
    indices = covering([len(table) for table in tables])
    return _joined(
        marks, [[table[i] for table, i in zip(tables, row, strict=True)] for row in indices]
    )


def together(*marks: pytest.MarkDecorator) -> pytest.MarkDecorator:
    """One mark for all combinations: for what is one parameter to `in_pairs`."""
    return _joined(marks, itertools.product(*map(_rows, marks)))


def covering(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Rows of indices below these sizes, in which any two of any two columns occur together.

    They are all of the two largest columns. The others get what has been beside these two, and
    beside each other, least often.
    """
    largest = sorted(range(len(sizes)), key=lambda column: -sizes[column])
    uses: dict[tuple[int, int, int, int], int] = {}

    def fill(row: dict[int, int]) -> tuple[int, ...]:
        for column in largest:
            if column not in row:
                row[column] = min(range(sizes[column]), key=lambda at: _cost(uses, row, column, at))
        for one, other in itertools.permutations(row, 2):
            key = (one, row[one], other, row[other])
            uses[key] = uses.get(key, 0) + 1
        return tuple(row[column] for column in range(len(sizes)))

    found = [
        fill(dict(zip(largest, indices, strict=False)))
        for indices in itertools.product(*(range(sizes[column]) for column in largest[:2]))
    ]
    for one, other in itertools.combinations(largest, 2):
        for first, second in itertools.product(range(sizes[one]), range(sizes[other])):
            if (one, first, other, second) not in uses:
                found.append(fill({one: first, other: second}))
    return found


def _cost(
    uses: dict[tuple[int, int, int, int], int], row: dict[int, int], column: int, at: int
) -> tuple[int, int]:
    """How many of the pairs that this would make are there, and how often."""
    counts = [uses.get((column, at, other, index), 0) for other, index in row.items()]
    return sum(map(bool, counts)), sum(counts)


def _joined(
    marks: Sequence[pytest.MarkDecorator], rows: Iterable[Sequence[tuple[str, tuple[Any, ...]]]]
) -> pytest.MarkDecorator:
    rows = list(rows)
    return pytest.mark.parametrize(
        [name for mark in marks for name in _names(mark)],
        [sum((values for _, values in row), ()) for row in rows],
        ids=["-".join(key for key, _ in row) for row in rows],
    )


def _names(mark: pytest.MarkDecorator) -> list[str]:
    names = mark.args[0]
    return [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)


def _rows(mark: pytest.MarkDecorator) -> list[tuple[str, tuple[Any, ...]]]:
    """The id and the values of each row of a mark."""
    values = list(mark.args[1] if len(mark.args) > 1 else mark.kwargs["argvalues"])
    if any(isinstance(value, type(pytest.param())) for value in values):
        raise TypeError("pytest.param() is not for these tables: its id and marks would be lost")
    ids = mark.kwargs.get("ids") or str
    keys = [str(ids(value)) for value in values] if callable(ids) else list(ids)
    many = len(_names(mark)) > 1
    return [
        (key, tuple(value) if many else (value,)) for key, value in zip(keys, values, strict=True)
    ]
