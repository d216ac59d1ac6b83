"""What the tests of the interface share: optimizers to try, small models, snapshots."""

import io
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from support.device import DEVICE

SHAPES = [(3,), (4, 5), (), (0,), (2, 3, 4), (17,), (3, 3)]
NAMES = ["SGD", "Adam", "AdamW"]


@dataclass(frozen=True)
class Case:
    """An optimizer with options that make it keep as much state as it can."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def ours(self, params: Any, **more: Any) -> Any:
        return getattr(fusedopt, self.name)(params, **{**self.options, **more})

    def torchs(self, params: Any, **more: Any) -> Any:
        """The unfused twin: torch's fused CPU kernels are no oracle (DESIGN, section 4)."""
        options = {"foreach": False, **self.options, **more}
        return getattr(torch.optim, self.name)(params, **options)

    @property
    def state_names(self) -> set[str]:
        if self.name == "SGD":
            return {"momentum_buffer"} if self.options.get("momentum") else set()
        names = {"step", "exp_avg", "exp_avg_sq"}
        return names | ({"max_exp_avg_sq"} if self.options.get("amsgrad") else set())


CASES = {
    "sgd": Case("SGD", {"lr": 0.1}),
    "sgd-momentum": Case("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "sgd-dampening": Case("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    "sgd-nesterov": Case("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adam": Case("Adam", {"lr": 0.01}),
    "adam-l2-amsgrad": Case("Adam", {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True}),
    "adamw": Case("AdamW", {"lr": 0.01, "weight_decay": 0.1}),
    "adamw-amsgrad": Case("AdamW", {"lr": 0.01, "amsgrad": True}),
}
# One optimizer each: for what does not depend on its options.
MAIN_CASES = {name: CASES[name] for name in ("sgd-momentum", "adam", "adamw")}


def by_id(cases: dict[str, Any]) -> dict[str, Any]:
    """Arguments of pytest.mark.parametrize for a table whose keys are the ids."""
    return {"argvalues": list(cases.values()), "ids": list(cases)}


def draw(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Numbers on the CPU, so that they are the same on every device."""
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


def make_params(dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [Parameter(draw(shape, generator).to(dtype).to(DEVICE)) for shape in SHAPES]


def set_grads(params: Iterable[Tensor], seed: int) -> None:
    """Gives each parameter a grad that depends on its place and the seed alone."""
    generator = torch.Generator().manual_seed(1000 + seed)
    for param in params:
        param.grad = draw(param.shape, generator).to(param.dtype).to(param.device)


def train(optimizer: Any, steps: int = 3, first: int = 0) -> None:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for seed in range(first, first + steps):
        set_grads(params, seed)
        optimizer.step()


def params_of(optimizer: Any) -> list[Tensor]:
    return [param.detach() for group in optimizer.param_groups for param in group["params"]]


def all_of(optimizer: Any) -> list[Any]:
    """Parameters and state, to be compared."""
    return [params_of(optimizer), list(optimizer.state.values())]


def assert_equal(ours: Any, theirs: Any) -> None:
    """Bit for bit, dtype and shape included."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def assert_same_math(ours: Any, theirs: Any) -> None:
    """Float64 results of the same formula: a few roundings apart."""
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-14)


def tensor_bytes(tensor: Tensor) -> bytes:
    """All of the storage: what lies around a slice counts too."""
    storage = tensor.detach().untyped_storage().cpu()
    return torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage).numpy().tobytes()


def photograph(value: Any, values_only: bool = False) -> Any:
    """Something that is equal later if and only if nothing was written to.

    With `values_only`, a tensor may have been moved, copied or written to with what it held.
    """
    if not isinstance(value, Tensor):
        return repr(value)
    if values_only:
        return f"{value.dtype}: {value.tolist()}"
    value = getattr(value, "wrapped", value)  # a wrapper subclass of these tests
    what = (id(value), value._version, value.dtype, tuple(value.shape), value.device.type)
    if value.layout != torch.strided:
        return (*what, tensor_bytes(value._values()))
    return what if value.is_meta else (*what, tensor_bytes(value))


def snapshot(optimizer: Any, values_only: bool = False) -> dict[str, Any]:
    """Params, grads, state and groups of an optimizer, versions of its tensors included."""

    def look(value: Any) -> Any:
        return photograph(value, values_only)

    photo: dict[str, Any] = {"number of states": len(optimizer.state)}
    for g, group in enumerate(optimizer.param_groups):
        photo[f"group {g}"] = {k: look(v) for k, v in group.items() if k != "params"}
        for i, param in enumerate(group["params"]):
            photo[f"param {g}.{i}"] = look(param)
            photo[f"grad {g}.{i}"] = look(param.grad)
            if param in optimizer.state:
                entries = optimizer.state[param]
                photo[f"state {g}.{i}"] = {k: look(v) for k, v in entries.items()}
    return photo


def copy_params(optimizer: Any) -> list[Parameter]:
    return [Parameter(param.clone()) for param in params_of(optimizer)]


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resumed(build: Callable[..., Any], saved: Any) -> Any:
    """A new optimizer over copies of the parameters, with the other's state loaded from a file."""
    optimizer = build(copy_params(saved))
    optimizer.load_state_dict(through_a_file(saved.state_dict()))
    return optimizer


def run_in_threads(work: Callable[[int], None], count: int = 2) -> list[BaseException]:
    """Runs work(0), work(1) ... at once; what they raised."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(count)

    def guarded(index: int) -> None:
        barrier.wait()
        try:
            work(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


class Wrapper(torch.Tensor):
    """A tensor subclass without memory of its own, as quantized and lazy tensors are."""

    wrapped: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Wrapper":
        like = {"dtype": inner.dtype, "device": inner.device}
        wrapper = torch.Tensor._make_wrapper_subclass(cls, inner.shape, **like)
        wrapper.wrapped = inner
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        unwrapped = [arg.wrapped if isinstance(arg, Wrapper) else arg for arg in args]
        out = func(*unwrapped, **(kwargs or {}))
        return Wrapper(out) if isinstance(out, Tensor) else out
