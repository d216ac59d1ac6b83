"""Tables that stand for all combinations: every two values of different parameters meet."""

import itertools

import pytest

from support.pairs import covering, in_pairs, together

pytestmark = [pytest.mark.cpu_only, pytest.mark.unsanitized]


@pytest.mark.parametrize(
    "sizes",
    [(1,), (4,), (3, 5), (2, 2, 2, 2), (3, 29, 36), (2, 4, 231), (17, 4, 5, 2), (2, 5, 6, 3, 2, 2)],
    ids=str,
)
def test_any_two_values_meet(sizes: tuple[int, ...]) -> None:
    rows = covering(sizes)
    assert len(set(rows)) == len(rows)
    for one, other in itertools.combinations(range(len(sizes)), 2):
        met = {(row[one], row[other]) for row in rows}
        assert met == set(itertools.product(range(sizes[one]), range(sizes[other])))


def test_ids_and_values_stay_together() -> None:
    sign = pytest.mark.parametrize("sign", [1, -1], ids=["plus", "minus"])
    pair = pytest.mark.parametrize(("x", "y"), [(0, 0), (2, 3)], ids=lambda pair: f"x{pair[0]}")
    kind = pytest.mark.parametrize("kind", ["a", "b", "c"])
    mark = in_pairs(kind, together(sign, pair))
    names, rows = mark.args
    assert names == ["kind", "sign", "x", "y"]
    assert len(set(mark.kwargs["ids"])) == len(rows) == 12
    for (kind_, sign_, x, y), key in zip(rows, mark.kwargs["ids"], strict=True):
        assert key == f"{kind_}-{'plus' if sign_ > 0 else 'minus'}-x{x}"
        assert y == (3 if x else 0)


def test_values_with_marks_of_their_own_are_refused() -> None:
    marked = pytest.param("b", marks=pytest.mark.skip)
    with pytest.raises(TypeError, match=r"pytest\.param\(\) is not for these tables"):
        in_pairs(pytest.mark.parametrize("kind", ["a", marked]))
