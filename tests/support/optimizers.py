"""The optimizers under test: one row for each case, and the ways to run it."""

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor

import fusedopt
from support import oracles, references
from support.equality import assert_equal, assert_same_math, without_parameter
from support.tensors import make_params, params_of, set_grads

NAMES = [  # torch's
    *("SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Adadelta", "Adamax"),
    *("NAdam", "RAdam", "ASGD", "Rprop"),
]
ALL_NAMES = [*NAMES, "Lion"]
each_name = pytest.mark.parametrize("name", NAMES)
each_of_all_names = pytest.mark.parametrize("name", ALL_NAMES)
# For what is read and done alike for all: one of those that share a kernel.
FEW_NAMES = ["SGD", "Adam", "AdamW", "NAdam"]
each_of_few_names = pytest.mark.parametrize("name", FEW_NAMES)
each_adam = pytest.mark.parametrize("name", ["Adam", "AdamW"])


def torch_reference(name: str, params: Any, **options: Any) -> Any:
    """torch's plain loop. Its fused=True is no measure: it updates 16-bit params wrongly.

    Decay that torch lacks is what its AdamW has: a multiplication before the update.
    """
    lr_independent = options.pop("lr_independent_weight_decay", False)
    sgdw = name == "SGD" and options.pop("decoupled_weight_decay", False)
    by_hand = lr_independent or sgdw
    decay = options.pop("weight_decay") if by_hand else 0.0
    options = {"foreach": False, **options, **({"weight_decay": 0} if by_hand else {})}
    reference = getattr(references, name, None) or getattr(torch.optim, name)
    optimizer = reference(params, **options)

    def decay_params(optimizer: Any, *_: Any) -> None:
        for group in optimizer.param_groups:
            rate = 1.0 if lr_independent and group["lr"] != 0 else float(group["lr"])
            for param in group["params"]:
                if param.grad is not None:
                    param.detach().mul_(1 - rate * decay)

    if by_hand:
        optimizer.register_step_pre_hook(decay_params)
    return optimizer


@dataclass(frozen=True)
class Case:
    """An optimizer's name and options, and the three ways to run it."""

    optimizer: str
    options: dict[str, Any] = field(default_factory=dict)

    def ours(self, params: Any, **more: Any) -> Any:
        return getattr(fusedopt, self.optimizer)(params, **{**self.options, **more})

    def theirs(self, params: Any, **more: Any) -> Any:
        return torch_reference(self.optimizer, params, **{**self.options, **more})

    def oracle(self, param: Tensor, **more: Any) -> oracles.Oracle:
        return oracles.BY_NAME[self.optimizer](param, **{**self.options, **more})

    def but(self, **options: Any) -> "Case":
        return replace(self, options={**self.options, **options})

    def suited_to(self, dtype: torch.dtype) -> "Case":
        """float16 has no number near Adam's usual eps: torch would divide by zero."""
        return self.but(eps=1e-3) if self.takes("eps") and dtype == torch.float16 else self

    def takes(self, option: str) -> bool:
        return option in inspect.signature(getattr(fusedopt, self.optimizer)).parameters

    @property
    def state_names(self) -> set[str]:
        """What a step makes, with torch's options alone."""
        oracle = self.oracle(torch.zeros(1))
        oracle.step(torch.zeros(1))
        return {*oracle.results().keys() - {"param"}, *(["step"] if oracle.counts_steps else [])}


CASES: dict[str, Case] = {
    "sgd": Case("SGD", {"lr": 0.05}),
    "sgd-l2": Case("SGD", {"lr": 0.05, "weight_decay": 0.1}),
    "sgd-maximize": Case("SGD", {"lr": 0.05, "weight_decay": 0.1, "maximize": True}),
    "momentum": Case("SGD", {"lr": 0.02, "momentum": 0.9}),
    "momentum-l2": Case("SGD", {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.05}),
    "momentum-damped": Case("SGD", {"lr": 0.05, "momentum": 0.8, "dampening": 0.3}),
    "momentum-maximize": Case("SGD", {"lr": 0.02, "momentum": 0.5, "maximize": True}),
    "nesterov": Case("SGD", {"lr": 0.02, "momentum": 0.9, "nesterov": True}),
    "nesterov-l2": Case(
        "SGD", {"lr": 0.02, "momentum": 0.7, "nesterov": True, "weight_decay": 0.05}
    ),
    "sgdw": Case("SGD", {"lr": 0.05, "weight_decay": 0.5, "decoupled_weight_decay": True}),
    "sgdw-momentum": Case(
        "SGD", {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.5, "decoupled_weight_decay": True}
    ),
    "sgdw-lr-independent": Case(
        "SGD",
        {
            **{"lr": 0.02, "momentum": 0.7, "nesterov": True, "weight_decay": 0.02},
            **{"decoupled_weight_decay": True, "lr_independent_weight_decay": True},
        },
    ),
    "adam": Case("Adam", {"lr": 0.01}),
    "adam-l2": Case("Adam", {"lr": 0.01, "weight_decay": 0.1}),
    "adam-decoupled": Case(
        "Adam", {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}
    ),
    "adam-lr-independent": Case(
        "Adam",
        {
            **{"lr": 0.01, "weight_decay": 0.01},
            **{"decoupled_weight_decay": True, "lr_independent_weight_decay": True},
        },
    ),
    "adam-amsgrad": Case("Adam", {"lr": 0.01, "betas": (0.9, 0.9), "amsgrad": True}),
    "adam-amsgrad-l2": Case("Adam", {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True}),
    "adam-maximize": Case("Adam", {"lr": 0.01, "weight_decay": 0.1, "maximize": True}),
    "adam-low-betas": Case("Adam", {"lr": 0.01, "betas": (0.3, 0.7), "eps": 1e-3}),
    "adam-no-beta1": Case("Adam", {"lr": 0.01, "betas": (0.0, 0.99)}),
    "adam-no-beta1-amsgrad": Case("Adam", {"lr": 0.01, "betas": (0.0, 0.99), "amsgrad": True}),
    "adamw": Case("AdamW", {"lr": 0.01}),
    "adamw-strong-decay": Case("AdamW", {"lr": 0.01, "weight_decay": 0.5}),
    "adamw-amsgrad": Case("AdamW", {"lr": 0.01, "betas": (0.8, 0.9), "amsgrad": True}),
    "adamw-maximize": Case("AdamW", {"lr": 0.01, "maximize": True}),
    "adamw-lr-independent": Case(
        "AdamW", {"lr": 0.01, "weight_decay": 0.01, "lr_independent_weight_decay": True}
    ),
    "rmsprop": Case("RMSprop", {"lr": 0.01}),
    "rmsprop-momentum": Case("RMSprop", {"lr": 0.01, "momentum": 0.9, "maximize": True}),
    "rmsprop-centered": Case("RMSprop", {"lr": 0.01, "alpha": 0.9, "centered": True}),
    "rmsprop-all": Case(
        "RMSprop",
        {"lr": 0.01, "momentum": 0.7, "centered": True, "weight_decay": 0.1, "eps": 0.1},
    ),
    "adagrad": Case("Adagrad", {"lr": 0.05, "maximize": True}),
    "adagrad-l2": Case("Adagrad", {"lr": 0.05, "lr_decay": 0.2, "weight_decay": 0.1}),
    "adagrad-initial": Case("Adagrad", {"lr": 0.1, "initial_accumulator_value": 0.25, "eps": 1e-3}),
    "adadelta": Case("Adadelta", {"lr": 1.0}),
    "adadelta-l2": Case("Adadelta", {"lr": 0.5, "rho": 0.7, "weight_decay": 0.1, "eps": 1e-4}),
    "adamax": Case("Adamax", {"lr": 0.01}),
    "adamax-l2": Case("Adamax", {"lr": 0.01, "betas": (0.4, 0.8), "weight_decay": 0.1}),
    "nadam": Case("NAdam", {"lr": 0.01}),
    "nadam-l2": Case("NAdam", {"lr": 0.01, "momentum_decay": 0.5, "weight_decay": 0.1}),
    "nadam-decoupled": Case(
        "NAdam", {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}
    ),
    "nadam-lr-independent": Case(
        "NAdam",
        {
            **{"lr": 0.01, "weight_decay": 0.01, "betas": (0.8, 0.9)},
            **{"decoupled_weight_decay": True, "lr_independent_weight_decay": True},
        },
    ),
    # With a beta2 of 0.999 it divides by the second moment from step 6 on; with 0.5, never.
    "radam": Case("RAdam", {"lr": 0.01}),
    "radam-l2": Case("RAdam", {"lr": 0.01, "betas": (0.8, 0.5), "weight_decay": 0.1}),
    "radam-decoupled": Case(
        "RAdam", {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}
    ),
    "radam-lr-independent": Case(
        "RAdam",
        {
            **{"lr": 0.01, "weight_decay": 0.01, "betas": (0.0, 0.9)},
            **{"decoupled_weight_decay": True, "lr_independent_weight_decay": True},
        },
    ),
    "asgd": Case("ASGD", {"lr": 0.05}),
    "asgd-averaged": Case("ASGD", {"lr": 0.05, "lambd": 0.5, "alpha": 0.6, "t0": 1}),
    "asgd-l2": Case("ASGD", {"lr": 0.05, "t0": 0, "weight_decay": 0.1, "maximize": True}),
    # What states begin with is a number in every format.
    "rprop": Case("Rprop", {"lr": 2.0**-6}),
    "rprop-steps": Case(
        "Rprop", {"lr": 2.0**-6, "etas": (0.3, 1.5), "step_sizes": (5e-3, 0.02), "maximize": True}
    ),
    "lion": Case("Lion", {"lr": 0.01, "maximize": True}),
    "lion-decay": Case("Lion", {"lr": 0.01, "betas": (0.4, 0.8), "weight_decay": 0.1}),
    "lion-lr-independent": Case(
        "Lion", {"lr": 0.01, "weight_decay": 0.01, "lr_independent_weight_decay": True}
    ),
}


def some_cases(*ids: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [CASES[case] for case in ids], ids=ids)


each_case = some_cases(*CASES)
# One for each kind of state; one for each optimizer, for what does not depend on its options.
VARIED = ["sgd", "momentum-l2", "momentum-damped", "nesterov"]
VARIED += ["adam", "adam-amsgrad-l2", "adamw", "adamw-amsgrad"]
VARIED += ["rmsprop-all", "adagrad-initial", "adadelta", "adamax-l2", "nadam-l2", "radam"]
VARIED += ["asgd-averaged", "rprop", "lion-decay"]
MAIN = ["momentum-l2", "adam", "adamw", "nadam"]
# All of the rules that have a kernel of their own, and those of VARIED: where there are many rows.
MOST = [key for key in CASES if key in VARIED or CASES[key].optimizer in ("SGD", "Adam", "AdamW")]
varied_cases, main_cases, most_cases = (some_cases(*keys) for keys in (VARIED, MAIN, MOST))


def step_with(optimizer: Any, grads: Iterable[Tensor]) -> None:
    """One step for each grad; all params of the optimizer get the same one."""
    for grad in grads:
        for param in params_of(optimizer):
            param.grad = grad
        optimizer.step()


def take_step(optimizer: Any, seed: int) -> None:
    """With new grads, those of that seed."""
    set_grads(optimizer, seed)
    optimizer.step()


def train(optimizer: Any, steps: int = 3, first: int = 0) -> None:
    """Steps with the grads of the seeds from `first` on."""
    for seed in range(first, first + steps):
        take_step(optimizer, seed)


def assert_params_after(optimizer: Any, case: Case, *seeds: int, **more: Any) -> None:
    """Its params are those of a new optimizer that made the steps of these seeds, bit for bit."""
    plain = case.ours(make_params(params_of(optimizer)[0].dtype), **more)
    for seed in seeds:
        take_step(plain, seed)
    assert_equal(params_of(optimizer), params_of(plain))


Build: TypeAlias = Callable[..., Any]


def like_torch(run: Callable[..., Any]) -> Callable[..., None]:
    """Makes a test of a function of `build`, which builds ours, and then what to compare with.

    What it returns of the two must be the same math.
    """
    takes_case = "case" in inspect.signature(run).parameters

    @functools.wraps(run)
    def test(case: Case, **given: Any) -> None:
        if takes_case:
            given["case"] = case
        ours, theirs = (run(build, **given) for build in (case.ours, case.theirs))
        assert_same_math(ours, theirs)

    test.__signature__ = without_parameter(run, "build", "case")  # which pytest reads
    return test


# Steps that have a kernel of their own on a GPU, in the formats for which there is one, and steps
# that are near to them and have not.
NEAR_ADAMW: dict[str, dict[str, Any]] = {
    "decay": {"weight_decay": 0.1},
    "no-decay": {"weight_decay": 0.0},
    "l2": {"optimizer": "Adam", "weight_decay": 0.1},
    "amsgrad": {"amsgrad": True},
    "no-beta1": {"betas": (0.0, 0.99)},
    "nearest": {"stochastic_rounding": False},
    "maximize-clip": {"maximize": True, "max_grad_norm": 0.5},
}
