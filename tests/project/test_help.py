"""What ``help()`` says: complete for each class on its own, true to the signatures, and it runs."""

import ast
import doctest
import inspect
import re
import typing
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fusedopt
from support.optimizers import ALL_NAMES as DENSE
from support.tensors import values

ENTRY = re.compile(r"^ {4}(\w+) \((.*), default (.*?)\): (.*(?:\n {8}.*)*)$", re.MULTILINE)
# All else that several classes have is described in the same words.
DIFFERS = {"weight_decay", "decoupled_weight_decay", "stochastic_rounding"}
DIFFERS |= {"lr", "betas", "eps", "momentum", "alpha"}  # what they are is the formula's to say
# With these, a step makes all the states that there can be.
MOST_STATES: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9},
    "Adam": {"amsgrad": True},
    "AdamW": {"amsgrad": True},
    "RMSprop": {"momentum": 0.9, "centered": True},
}
ALL_NAMES = [*DENSE, "SparseAdam"]
each_of_all = pytest.mark.parametrize("name", ALL_NAMES)


def doc_of(name: str) -> str:
    return inspect.cleandoc(getattr(fusedopt, name).__doc__)


def section(name: str, start: str) -> str:
    """From the line that starts so to the next empty one."""
    found = re.search(rf"^{start}.*?(?=\n\n|\Z)", doc_of(name), re.MULTILINE | re.DOTALL)
    assert found, start
    return found[0]


def entries(name: str) -> dict[str, tuple[str, str, str]]:
    """Type, default and description of every argument."""
    found = ENTRY.findall(section(name, "Args:"))
    assert len(found) == len({entry[0] for entry in found})
    return {
        argument: (kind, default, " ".join(text.split())) for argument, kind, default, text in found
    }


@pytest.mark.cpu_only
@pytest.mark.parametrize("name", ["fusedopt", *fusedopt.__all__])
def test_examples_run(name: str) -> None:
    """There is one for everything that is public, and those of the optimizers make a step."""
    thing = fusedopt if name == "fusedopt" else getattr(fusedopt, name)
    names = {"torch": torch, "fusedopt": fusedopt}
    (test,) = doctest.DocTestFinder(recurse=False).find(thing, name, globs=names)
    assert test.examples
    assert name not in ALL_NAMES or "optimizer.step()\n" in {each.source for each in test.examples}
    failures: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=failures.append)
    assert failures == []


@pytest.mark.cpu_only
@each_of_all
def test_arguments_are_those_of_the_signature(name: str) -> None:
    """In its order, with its types and defaults; options are written out there."""
    signature = list(inspect.signature(getattr(fusedopt, name)).parameters.values())
    described = entries(name)
    assert re.search(r"^ {4}params \(iterable\): ", section(name, "Args:"), re.MULTILINE)
    assert [p.name for p in signature] == ["params", *described]
    for p in signature[1:]:
        assert p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        kind, default, text = described[p.name]
        assert kind.replace('"', "'") == p.annotation
        assert ast.literal_eval(default) == p.default
        assert len(text) > 20


@pytest.mark.cpu_only
def test_same_words_for_the_same_arguments() -> None:
    described = {name: entries(name) for name in ALL_NAMES}
    for argument in set.union(*(set(found) for found in described.values())) - DIFFERS:
        texts = {found[argument] for found in described.values() if argument in found}
        needs = " Needs ``decoupled_weight_decay``."  # which is an option of these
        if argument in ("lr_independent_weight_decay", "cautious_weight_decay"):
            for name, found in described.items():
                if argument in found:
                    is_needed = "decoupled_weight_decay" in found
                    assert found[argument][-1].endswith(needs) == is_needed, name
        kinds = 1
        if argument == "state_dtype":  # some have states in 8 bits
            of_codes = {text for *_, text in texts if "q8" in text}
            assert len(of_codes) == 1
            kinds = 2
        assert len({(*rest, text.removesuffix(needs)) for *rest, text in texts}) == kinds, argument
    for start in ("Attributes:", "Methods:", "Raises:"):
        assert len({section(name, start) for name in ALL_NAMES}) == 1, start


@each_of_all
def test_states_are_described(name: str) -> None:
    """All that a step leaves there, with the dtypes that it has."""
    text = section(name, "State of a parameter")
    dtype = torch.bfloat16
    for masters in ("float32", "split"):
        param = values(8, dtype=dtype)
        options = {**MOST_STATES.get(name, {}), "master_weights": masters}
        if name != "SparseAdam":
            options["ema_decay"] = 0.9
        optimizer = getattr(fusedopt, name)([param], **options)
        param.grad = values(8, dtype=dtype)
        optimizer.step()
        for key, entry in optimizer.state[param].items():
            found = re.search(
                rf"^ {{4}}(?:\w+, )*{key}\b.*?: (.*(?:\n {{8}}.*)*)$", text, re.MULTILINE
            )
            assert found, key
            if entry.dtype != dtype:
                assert found[1].startswith(str(entry.dtype).removeprefix("torch.")), key


@pytest.mark.cpu_only
@each_of_all
def test_additions_to_the_interface_are_described(name: str) -> None:
    cls = getattr(fusedopt, name)
    torchs = getattr(torch.optim, name, torch.optim.Optimizer)
    added = {key for key in dir(cls) if not key.startswith("_")} - set(dir(torchs))
    described = re.findall(
        r"^ {4}(\w+) ?\(", section(name, "Attributes:") + section(name, "Methods:"), re.MULTILINE
    )
    assert sorted(described) == sorted(added)
    for key in added:
        assert inspect.getdoc(getattr(cls, key))


@pytest.mark.cpu_only
@each_of_all
def test_a_paper_and_the_formula_are_named(name: str) -> None:
    assert re.search(r"\(arXiv \d{4}\.\d{4,5}\)|\(\d{4}\)", doc_of(name).partition("Args:")[0])
    assert ".. math::" in doc_of(name)


def public_functions() -> dict[str, Callable[..., Any]]:
    """Ours: what is inherited from torch as it is, is torch's."""
    found = {}
    for name in fusedopt.__all__:
        thing = getattr(fusedopt, name)
        if not isinstance(thing, type):
            found[name] = thing
            continue
        for key in dir(thing):
            member = inspect.getattr_static(thing, key)
            function = member.fget if isinstance(member, property) else getattr(thing, key)
            function = inspect.unwrap(function) if callable(function) else function
            is_ours = str(getattr(function, "__module__", "")).startswith("fusedopt")
            if inspect.isfunction(function) and is_ours and (key == "__init__" or key[0] != "_"):
                found[f"{name}.{key}"] = function
    return found


@pytest.mark.cpu_only
@pytest.mark.unsanitized  # of Python alone
@pytest.mark.parametrize("name", public_functions())
def test_type_hints(name: str) -> None:
    """Tools that read signatures (command lines, configurations) get at every type."""
    function = public_functions()[name]
    hints = typing.get_type_hints(function)
    parameters = [key for key in inspect.signature(function).parameters if key != "self"]
    assert hints.keys() == {*parameters, "return"}


@pytest.mark.cpu_only
def test_type_hints_cover_the_constructors() -> None:
    names = public_functions()
    assert {f"{name}.__init__" for name in ALL_NAMES} <= set(names)
    assert {"show_config", "SGD.swap_ema", "Adam.grad_norm", "AdamW.step"} <= set(names)
