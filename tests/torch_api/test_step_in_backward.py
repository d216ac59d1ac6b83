"""Steps while the backward runs: the results of ordinary ones, and grads that are gone."""

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fusedopt
from support.device import DEVICE
from support.equality import bits, same_bits
from support.interrupts import interrupted_at
from support.optimizers import ALL_NAMES
from support.tensors import by_id, values

BFLOAT16 = torch.bfloat16
SETTINGS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "amsgrad": {"amsgrad": True, "maximize": True},
    "bf16 states": {"state_dtype": BFLOAT16},
    "averages": {"ema_decay": 0.9, "ema_bias_correction": True},
    "cautious": {"cautious_update": True, "cautious_weight_decay": True},
}
MASTERS: dict[str, dict[str, Any]] = {
    "float32 masters": {"master_weights": "float32", "ema_decay": 0.5},
    "split": {"master_weights": "split", "state_dtype": BFLOAT16, "stochastic_rounding": True},
    "rounded": {"stochastic_rounding": True, "rounding_seed": 7},
}
each_bucket = pytest.mark.parametrize("bucket_bytes", [1, 600, 10**9], ids=["1 B", "600 B", "1 GB"])


class Net(nn.Module):
    """Of 6 params, of which one is used twice, one never and one is frozen."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        with torch.device("cpu"):  # the same numbers on every device
            self.first = nn.Linear(16, 16)
            self.again = nn.Linear(16, 16, bias=False)
            self.last = nn.Linear(16, 1)
        self.unused = nn.Parameter(torch.ones(9))
        self.frozen = nn.Parameter(torch.ones(16), requires_grad=False)
        self.to(DEVICE, dtype)

    def forward(self, x: Tensor) -> Any:
        x = self.again(torch.tanh(self.first(x))) + self.frozen
        return self.last(torch.tanh(self.again(x))).float().square().mean()


def batch(model: Net, seed: int) -> Tensor:
    return values(5, 16, dtype=model.frozen.dtype, seed=seed)


def state_of(model: Net, optimizer: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {name: param.detach() for name, param in model.named_parameters()}
    for name, param in model.named_parameters():
        found |= {f"{key} of {name}": x for key, x in optimizer.state.get(param, {}).items()}
    return found


def train(model: Net, optimizer: Any, steps: int = 4) -> None:
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    for seed in range(steps):
        optimizer.zero_grad()
        model(batch(model, seed)).backward()
        optimizer.step()
        scheduler.step()


def trained(
    make: Callable[[nn.Module], Any], dtype: torch.dtype, **options: Any
) -> list[dict[str, Tensor]]:
    """By ordinary steps, and by those in the backward."""
    found = []
    for in_backward in (False, True):
        model = Net(dtype)
        optimizer = make(model)
        if in_backward:
            with fusedopt.step_in_backward(model, optimizer, **options):
                train(model, optimizer)
            assert all(param.grad is None for param in model.parameters())
        else:
            train(model, optimizer)
        found.append(state_of(model, optimizer))
    return found


@each_bucket
@pytest.mark.parametrize("options", **by_id(SETTINGS))
def test_same_bits(options: dict[str, Any], bucket_bytes: int) -> None:
    def make(model: nn.Module) -> Any:
        return fusedopt.AdamW(model.parameters(), lr=0.01, **options)

    assert same_bits(*trained(make, torch.float32, bucket_bytes=bucket_bytes))


@each_bucket
@pytest.mark.parametrize("opened", [0, 1, 2], ids=["at once", "after 1 step", "after 2 steps"])
@pytest.mark.parametrize("trains_from", [2, 3, 4])
def test_same_bits_after_steps_that_train_nothing(
    trains_from: int, opened: int, bucket_bytes: int
) -> None:
    """As a warm-up from 0 begins. Between two of them, or before training, weights are loaded."""
    found = []
    for in_backward in (False, True):
        model = Net()
        optimizer = fusedopt.AdamW(model.parameters(), lr=0.0, ema_decay=0.9)
        stepping = None
        for step in range(5):
            if step == opened and in_backward:
                stepping = fusedopt.step_in_backward(model, optimizer, bucket_bytes=bucket_bytes)
            if step == trains_from:
                optimizer.param_groups[0]["lr"] = 0.01
            if step == 2:
                with torch.no_grad():
                    model.first.weight.mul_(2.0)
                    model.last.bias.add_(3.0)
            train(model, optimizer, steps=1)
        if stepping is not None:
            stepping.close()
        found.append(state_of(model, optimizer))
    assert same_bits(*found)
    average = found[0]["ema_param of last.bias"]
    assert abs(float(average) - 3.0) < 1.0  # that of the weights that were loaded


@each_bucket
@pytest.mark.parametrize("options", **by_id(MASTERS))
def test_same_bits_of_masters(options: dict[str, Any], bucket_bytes: int) -> None:
    def make(model: nn.Module) -> Any:
        return fusedopt.AdamW(model.named_parameters(), lr=0.01, **options)

    assert same_bits(*trained(make, BFLOAT16, bucket_bytes=bucket_bytes))


@pytest.mark.parametrize("name", ALL_NAMES)
def test_every_optimizer(name: str) -> None:
    def make(model: nn.Module) -> Any:
        return getattr(fusedopt, name)(model.parameters(), lr=0.01)

    assert same_bits(*trained(make, torch.float32, bucket_bytes=600))


def test_groups_with_their_own_options() -> None:
    """One of them has no param of the model; options change on the way."""

    def make(model: nn.Module) -> Any:
        params = list(model.parameters())
        other = nn.Parameter(torch.ones(3, device=DEVICE))
        groups = [
            {"params": params[:2], "lr": 0.1},
            {"params": [other]},
            {"params": params[2:], "weight_decay": 0.3, "ema_decay": 0.9},
        ]
        optimizer = fusedopt.AdamW(groups)

        def change(optimizer: Any, *_: Any) -> None:
            optimizer.param_groups[2]["ema_decay"] = None
            optimizer.param_groups[0]["amsgrad"] = True

        optimizer.register_step_post_hook(change)
        return optimizer

    assert same_bits(*trained(make, torch.float32, bucket_bytes=600))


def test_grads_are_freed_as_buckets_fill() -> None:
    model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(8))).to(DEVICE)
    optimizer = fusedopt.SGD(model.parameters(), lr=0.1)
    size = 32 * 32 * 4
    most = []

    def look(_: Tensor) -> None:
        grads = [param.grad for param in model.parameters() if param.grad is not None]
        most.append(sum(grad.numel() * 4 for grad in grads))

    with fusedopt.step_in_backward(model, optimizer, bucket_bytes=2 * size):
        for param in model.parameters():
            param.register_post_accumulate_grad_hook(look)  # after ours
        model(values(4, 32)).square().mean().backward()
    assert len(most) == 8
    assert max(most) == size  # of one, while its bucket waits for the second
    assert all(param.grad is None for param in model.parameters())


def test_accumulation() -> None:
    """As of grads that backwards have added up."""
    found = []
    for in_backward in (False, True):
        model = Net()
        optimizer = fusedopt.AdamW(model.parameters(), lr=0.01)
        stepping = fusedopt.step_in_backward(model, optimizer, bucket_bytes=600)
        if not in_backward:
            stepping.close()
        for step in range(3):
            with stepping.accumulate():
                for micro in range(2):
                    model(batch(model, 10 * step + micro)).backward()
            if in_backward and step == 0:
                assert not optimizer.state
            model(batch(model, 10 * step + 2)).backward()
            optimizer.step()
            if not in_backward:
                optimizer.zero_grad()
        found.append(state_of(model, optimizer))
    assert same_bits(*found)


def test_only_accumulated_grads_are_for_step() -> None:
    found = []
    for in_backward in (False, True):
        model = Net()
        optimizer = fusedopt.AdamW(model.parameters(), lr=0.01)
        stepping = fusedopt.step_in_backward(model, optimizer)
        if not in_backward:
            stepping.close()
        with stepping.accumulate():
            model(batch(model, 1)).backward()
        optimizer.step()
        found.append(state_of(model, optimizer))
    assert same_bits(*found)


def test_closure_and_hooks() -> None:
    """Hooks are those of ``optimizer.step()``: once, whatever the number of buckets."""
    model = Net()
    optimizer = fusedopt.AdamW(model.parameters(), lr=0.01)
    called: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))

    def closure() -> float:
        loss = model(batch(model, 1))
        loss.backward()
        return float(loss.detach())

    with fusedopt.step_in_backward(model, optimizer, bucket_bytes=1):
        assert optimizer.step(closure) > 0
    assert called == ["before", "after"]
    assert {float(state["step"]) for state in optimizer.state.values()} == {1.0}


def clipped_by_hand(model: Net, limit: float, steps: int) -> tuple[Any, list[float]]:
    optimizer = fusedopt.AdamW(model.parameters(), lr=0.05)
    norms: list[float] = []
    for seed in range(steps):
        optimizer.zero_grad()
        model(batch(model, seed)).backward()
        grads = [param.grad for param in model.parameters() if param.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(grads)))
        if seed > 0:
            for grad in grads:
                grad.mul_(min(1.0, limit / (norms[-2] + 1e-6)))
        optimizer.step()
    return optimizer, norms


@each_bucket
def test_clip_by_the_previous_norm(bucket_bytes: int) -> None:
    limit = 0.3
    expected, model = Net(), Net()
    _, norms = clipped_by_hand(expected, limit, 4)
    assert min(norms) < limit < max(norms[:-1])
    optimizer = fusedopt.AdamW(model.parameters(), lr=0.05, max_grad_norm=limit)
    with fusedopt.step_in_backward(
        model, optimizer, bucket_bytes=bucket_bytes, clip_by_previous_norm=True
    ) as stepping:
        assert stepping.grad_norm is None
        for seed in range(4):
            model(batch(model, seed)).backward()
            optimizer.step()
            assert float(stepping.grad_norm) == pytest.approx(norms[seed], rel=1e-3)
            assert optimizer.grad_norm is None
    for mine, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_grads_that_are_not_finite_are_skipped_where_they_are() -> None:
    """And their norm is no limit to the next step."""
    model = Net()
    optimizer = fusedopt.SGD(model.parameters(), lr=0.05, max_grad_norm=0.3)
    with fusedopt.step_in_backward(
        model, optimizer, bucket_bytes=1, clip_by_previous_norm=True
    ) as stepping:
        model(batch(model, 0)).backward()
        optimizer.step()
        before = {name: param.detach().clone() for name, param in model.named_parameters()}
        handle = model.first.weight.register_hook(lambda grad: grad * torch.inf)
        model(batch(model, 1)).backward()
        optimizer.step()
        handle.remove()
        assert torch.equal(model.first.weight, before["first.weight"])
        assert not torch.equal(model.last.weight, before["last.weight"])
        assert 0 < float(stepping.grad_norm) < torch.inf
        model(batch(model, 2)).backward()
        optimizer.step()
        assert not torch.equal(model.first.weight, before["first.weight"])
        assert all(bool(param.isfinite().all()) for param in model.parameters())


@each_bucket
def test_no_grad_of_the_first_step_is_finite(bucket_bytes: int) -> None:
    """All is skipped, and the next step is the first one that is made."""
    model = Net()
    optimizer = fusedopt.SGD(model.parameters(), lr=0.05, max_grad_norm=0.3)
    with fusedopt.step_in_backward(
        model, optimizer, bucket_bytes=bucket_bytes, clip_by_previous_norm=True
    ) as stepping:
        before = [param.detach().clone() for param in model.parameters()]
        (model(batch(model, 0)) * torch.nan).backward()
        optimizer.step()
        assert all(map(torch.equal, model.parameters(), before))
        model(batch(model, 1)).backward()
        optimizer.step()
        assert not all(map(torch.equal, model.parameters(), before))
        assert 0 < float(stepping.grad_norm) < torch.inf


@pytest.mark.parametrize("kind", [float, Tensor.clone, Tensor.float], ids=["number", "64", "32"])
def test_a_run_that_resumes_clips_by_the_norm_of_its_checkpoint(kind: Any) -> None:
    def build() -> tuple[Net, Any]:
        model = Net()
        return model, fusedopt.AdamW(model.parameters(), lr=0.05, max_grad_norm=0.01)

    def steps(model: Net, optimizer: Any, *seeds: int) -> list[Tensor]:
        for seed in seeds:
            model(batch(model, seed)).backward()
            optimizer.step()
        return list(model.parameters())

    first, second = build(), build()
    clips = {"bucket_bytes": 600, "clip_by_previous_norm": True}
    with fusedopt.step_in_backward(*first, **clips) as stepping:
        steps(*first, 0, 1)
        second[0].load_state_dict(first[0].state_dict())
        second[1].load_state_dict(copy.deepcopy(first[1].state_dict()))
        assert stepping.grad_norm is not None
        norm = kind(stepping.grad_norm)
        expected = steps(*first, 2, 3)
    with fusedopt.step_in_backward(*second, previous_norm=norm, **clips) as stepping:
        assert float(stepping.grad_norm) == norm
        found = steps(*second, 2, 3)
    rtol = 1e-6 if kind is Tensor.float else 0.0
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol)


def test_setting_an_optimizer_up_keeps_the_previous_norm() -> None:
    """torch.distributed.checkpoint does that with grads of zeros and a learning rate of 0."""
    dcp = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    model = Net()
    optimizer = fusedopt.AdamW(model.parameters(), lr=0.05, max_grad_norm=0.01)
    options = {"clip_by_previous_norm": True, "previous_norm": 3.0}
    with fusedopt.step_in_backward(model, optimizer, **options) as stepping:
        dcp.get_optimizer_state_dict(model, optimizer)
        assert len(optimizer.state) == 6  # all but the frozen one
        assert stepping.grad_norm == 3.0
        optimizer.param_groups[0]["lr"] = 0.0  # of a schedule that warms up
        model(batch(model, 0)).backward()
        optimizer.step()
        assert stepping.grad_norm not in (0.0, 3.0)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"previous_norm": 1.0}, ValueError, "without clip_by_previous_norm"),
        ({"previous_norm": -1.0, "clip_by_previous_norm": True}, ValueError, "must not be neg"),
        ({"previous_norm": "1", "clip_by_previous_norm": True}, TypeError, "^previous_norm must"),
    ],
)
def test_no_previous_norm(given: Any, error: Any, words: str) -> None:
    model = Net()
    with pytest.raises(error, match=words):
        fusedopt.step_in_backward(model, fusedopt.SGD(model.parameters()), **given)


def test_checkpoints_and_closing() -> None:
    """State dicts are ordinary ones; after close() steps are, too."""
    model = Net()
    optimizer = fusedopt.AdamW(model.parameters(), lr=0.01)
    plain, other = Net(), fusedopt.AdamW(Net().parameters(), lr=0.01)
    other = fusedopt.AdamW(plain.parameters(), lr=0.01)
    stepping = fusedopt.step_in_backward(model, optimizer, bucket_bytes=600)
    with stepping:
        train(model, optimizer, 2)
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(saved)
        train(model, optimizer, 1)
    train(plain, other, 2)
    other.load_state_dict(copy.deepcopy(other.state_dict()))
    train(plain, other, 1)
    stepping.close()  # once more: nothing happens
    for each, its in ((model, optimizer), (plain, other)):
        each.zero_grad()
        each(batch(each, 9)).backward()
        assert all(param.grad is not None for param in each.first.parameters())
        its.step()
    assert same_bits(state_of(model, optimizer), state_of(plain, other))
    assert not optimizer._step_supports_amp_scaling


def test_closing_in_between_leaves_grads_to_step() -> None:
    found = []
    for closes in (False, True):
        model = Net()
        optimizer = fusedopt.AdamW(model.parameters(), lr=0.01)
        stepping = fusedopt.step_in_backward(model, optimizer, bucket_bytes=2000)
        model(batch(model, 0)).backward()
        if closes:
            stepping.close()
        optimizer.step()
        stepping.close()
        found.append(state_of(model, optimizer))
    assert same_bits(*found)


def test_nothing_is_kept_alive() -> None:
    model = Net()
    optimizer = fusedopt.AdamW(model.parameters(), lr=0.01)
    stepping = fusedopt.step_in_backward(model, optimizer)
    train(model, optimizer, 1)
    kept = [weakref.ref(each) for each in (optimizer, stepping, model.first.weight)]
    del model, optimizer, stepping
    gc.collect()
    assert [each() for each in kept] == [None] * 3


def test_a_second_backward_is_refused() -> None:
    """A grad that comes after its param was stepped would make a step of its own."""
    model = Net()
    optimizer = fusedopt.AdamW(model.parameters(), lr=0.01)
    with fusedopt.step_in_backward(model, optimizer, bucket_bytes=1):
        model(batch(model, 0)).backward()
        before = bits(model.last.weight).clone()
        with pytest.raises(RuntimeError, match=r"optimizer\.step\(\) after each backward"):
            model(batch(model, 1)).backward()
        assert torch.equal(bits(model.last.weight), before)


def test_segments_that_share_a_module() -> None:
    """Checkpointing that is reentrant has a backward for each, the other kind has one for all."""
    module = nn.Linear(8, 8, device=DEVICE)
    x = values(4, 8).requires_grad_()

    def backward(is_reentrant: bool) -> None:
        once = checkpoint(module, x, use_reentrant=is_reentrant)
        checkpoint(module, once, use_reentrant=is_reentrant).square().mean().backward()

    optimizer = fusedopt.AdamW(module.parameters(), lr=0.01)
    with fusedopt.step_in_backward(module, optimizer):
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            backward(is_reentrant=True)
        optimizer.zero_grad()
        before = bits(module.weight).clone()
        backward(is_reentrant=False)
        optimizer.step()
        assert not torch.equal(bits(module.weight), before)


@each_bucket
def test_after_a_backward_that_has_failed(bucket_bytes: int) -> None:
    """zero_grad() gives up what it has left; the parts that were stepped before stay so."""

    def fail(_: Tensor) -> None:
        raise torch.OutOfMemoryError

    model = Net()
    optimizer = fusedopt.AdamW(model.parameters(), lr=0.01)
    with fusedopt.step_in_backward(model, optimizer, bucket_bytes=bucket_bytes):
        train(model, optimizer, 2)
        hidden = torch.tanh(model.first(batch(model, 0)))
        hidden.register_hook(fail)
        with pytest.raises(torch.OutOfMemoryError):
            model.last(hidden).square().mean().backward()
        optimizer.zero_grad()
        assert all(param.grad is None for param in model.parameters())
        counts = [float(optimizer.state[p]["step"]) for p in model.first.parameters()]
        train(model, optimizer, 2)
        assert [float(optimizer.state[p]["step"]) for p in model.first.parameters()] == [
            count + 2 for count in counts
        ]


@pytest.mark.parametrize("library", [torch.amp, fusedopt], ids=["torch", "fusedopt"])
def test_scalers_are_refused(library: Any) -> None:
    model = Net()
    optimizer = fusedopt.AdamW(model.parameters(), lr=0.01)
    scaler = library.GradScaler(DEVICE)
    with fusedopt.step_in_backward(model, optimizer):
        scaler.scale(model(batch(model, 0))).backward()
        with pytest.raises(RuntimeError, match="GradScaler cannot be used where the backward"):
            scaler.step(optimizer)


def test_errors_of_a_step_come_out_of_the_backward() -> None:
    model = Net()
    optimizer = fusedopt.AdamW(model.parameters(), lr=0.01)
    with fusedopt.step_in_backward(model, optimizer, bucket_bytes=1):
        optimizer.param_groups[0]["lr"] = float("nan")
        before = model.last.weight.detach().clone()
        with pytest.raises(ValueError, match="Invalid learning rate"):
            model(batch(model, 0)).backward()
        assert torch.equal(model.last.weight, before)


@pytest.mark.parametrize("wrong", [0.0, -1.0, "1.0", float("nan"), [1.0]], ids=str)
def test_a_bad_limit_is_refused_as_in_a_step(wrong: Any) -> None:
    model = Net()
    optimizer = fusedopt.SGD(model.parameters(), lr=0.01, max_grad_norm=1.0)
    with fusedopt.step_in_backward(model, optimizer, bucket_bytes=1, clip_by_previous_norm=True):
        model(batch(model, 0)).backward()
        optimizer.step()
        optimizer.param_groups[0]["max_grad_norm"] = wrong
        before = [param.detach().clone() for param in model.parameters()]
        with pytest.raises((ValueError, TypeError), match=r"max_grad_norm.*param group 0"):
            model(batch(model, 0)).backward()
        assert all(map(torch.equal, model.parameters(), before))


def clipping(model: nn.Module, **options: Any) -> Any:
    return fusedopt.step_in_backward(
        model, fusedopt.AdamW(model.parameters(), max_grad_norm=1.0), **options
    )


def with_two_limits(model: nn.Module) -> Any:
    first, *others = model.parameters()
    groups = [{"params": [first], "max_grad_norm": 2.0}, {"params": others}]
    optimizer = fusedopt.AdamW(groups, max_grad_norm=1.0)
    return fusedopt.step_in_backward(model, optimizer, clip_by_previous_norm=True)


def twice(model: nn.Module) -> Any:
    optimizer = fusedopt.AdamW(model.parameters())
    with fusedopt.step_in_backward(model, optimizer):
        fusedopt.step_in_backward(model, optimizer)


def given_a_norm(model: Any) -> Any:
    optimizer = fusedopt.AdamW(model.parameters())
    with fusedopt.step_in_backward(model, optimizer):
        optimizer.step(grad_norm=1.0)


REFUSED: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "torch's optimizer": (
        lambda model: fusedopt.step_in_backward(model, torch.optim.SGD(model.parameters())),  # type: ignore[arg-type]
        TypeError,
        "for optimizers of fusedopt, got SGD",
    ),
    "no model": (
        lambda model: fusedopt.step_in_backward(
            list(model.parameters()),  # type: ignore[arg-type]
            fusedopt.SGD(model.parameters()),
        ),
        TypeError,
        "must be a torch.nn.Module, got list",
    ),
    "another model": (
        lambda model: fusedopt.step_in_backward(Net(), fusedopt.SGD(model.parameters())),
        ValueError,
        "no parameter of this model",
    ),
    "empty buckets": (
        lambda model: fusedopt.step_in_backward(
            model, fusedopt.SGD(model.parameters()), bucket_bytes=0
        ),
        ValueError,
        "bucket_bytes must be at least 1, got 0",
    ),
    "no number of bytes": (
        lambda model: fusedopt.step_in_backward(
            model,
            fusedopt.SGD(model.parameters()),
            bucket_bytes=1e9,  # type: ignore[arg-type]
        ),
        TypeError,
        "bucket_bytes must be an int",
    ),
    "clipping": (clipping, ValueError, "max_grad_norm needs all grads before"),
    "two limits": (with_two_limits, ValueError, "needs the same max_grad_norm in all"),
    "twice": (twice, RuntimeError, "steps in the backward already"),
    "a norm": (given_a_norm, ValueError, "grad_norm= comes too late"),
}


@pytest.mark.parametrize(("make", "error", "words"), **by_id(REFUSED))
def test_refused(make: Callable[[Any], Any], error: type[Exception], words: str) -> None:
    model = Net()
    with pytest.raises(error, match=words):
        make(model)
    assert not any(param._post_accumulate_grad_hooks for param in model.parameters())


@pytest.mark.cpu_only
@pytest.mark.parametrize("clips", [False, True], ids=["", "clips"])
def test_nothing_is_stepped_twice_after_an_interrupt(clips: bool) -> None:
    options = {"max_grad_norm": 1.0} if clips else {}
    number, came, seen = 1, True, 0
    while came:
        model = Net()
        optimizer = fusedopt.AdamW(model.parameters(), **options)
        with fusedopt.step_in_backward(
            model, optimizer, bucket_bytes=600, clip_by_previous_norm=clips
        ):
            for seed in range(2):
                model(batch(model, seed)).backward()
                optimizer.step()
            before = {p: state["step"].item() for p, state in optimizer.state.items()}
            loss = model(batch(model, 2))
            came = interrupted_at(number, loss.backward)
            optimizer.step()
        steps = [state["step"].item() - before[p] for p, state in optimizer.state.items()]
        assert set(steps) <= {0, 1}, number
        seen += len(set(steps)) == 2
        number += 1
    assert set(steps) == {1}
    assert seen > 10


def test_params_that_have_left_the_optimizer_keep_their_grads() -> None:
    model = Net()
    optimizer = fusedopt.AdamW(model.parameters())
    with fusedopt.step_in_backward(model, optimizer, bucket_bytes=1):
        model(batch(model, 0)).backward()
        optimizer.step()
        left = list(model.first.parameters())
        (group,) = optimizer.param_groups
        group["params"] = [p for p in group["params"] if all(p is not q for q in left)]
        model(batch(model, 1)).backward()
        assert all(p.grad is not None for p in left)
        assert all(p.grad is None for p in group["params"])
        optimizer.step()
        assert all(p.grad is not None for p in left)
        group["params"] = []
        optimizer.zero_grad()
        model(batch(model, 2)).backward()
        assert all(p.grad is not None for p in model.again.parameters())


def test_previous_norm_whatever_the_default_device() -> None:
    model = Net()
    optimizer = fusedopt.AdamW(model.parameters(), max_grad_norm=1.0)
    options = {"clip_by_previous_norm": True, "previous_norm": 2.0}
    with torch.device("meta"), fusedopt.step_in_backward(model, optimizer, **options) as stepping:
        assert float(stepping.grad_norm) == 2.0
