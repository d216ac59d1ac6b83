"""Steps in CUDA graphs, and captures that are refused."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from support.device import IS_CUDA, needs_driver, needs_gpu
from support.files import run_python
from support.optimizers import Case, each_case, some_cases, take_step
from support.sides import (
    GPU,
    SIZES,
    WORK_DTYPES,
    Graph,
    Results,
    Side,
    capturable,
    on_both_drivers,
    warmed_up,
)
from support.snapshots import record, snapshot
from support.tensors import BFLOAT16, by_id, draw, params_of, set_grads, some_dtypes, values

pytestmark = needs_driver

each_dtype = some_dtypes(*WORK_DTYPES)


@each_dtype
@each_case
@on_both_drivers
def test_replays(side: Side, case: Case, dtype: torch.dtype) -> Results:
    optimizer = warmed_up(side, case, dtype)
    replay = side.replayable(optimizer.step)
    for seed in range(2, 6):
        set_grads(optimizer, seed, in_place=True)
        replay()
    return record(optimizer)


@some_cases("momentum-damped", "adamw")
@on_both_drivers
def test_eager_steps_between_replays(side: Side, case: Case) -> Results:
    """And a second capture, of other grads."""
    optimizer = warmed_up(side, case)
    replay = side.replayable(optimizer.step)
    for seed in range(2, 8):
        set_grads(optimizer, seed, in_place=True)
        (replay if seed % 2 else optimizer.step)()
    set_grads(optimizer, 8)
    replay = side.replayable(optimizer.step)
    for seed in range(9, 12):
        set_grads(optimizer, seed, in_place=True)
        (replay if seed % 2 else optimizer.step)()
    return record(optimizer)


@needs_gpu
@some_cases("momentum-damped", "adamw")
@on_both_drivers
def test_two_graphs_in_turn(side: Side, case: Case) -> Results:
    """Each has a table of its own, which neither capture, eager step nor new memory disturbs."""
    optimizer = warmed_up(side, case)
    params = params_of(optimizer)
    first = [param.grad for param in params]
    replays = [side.replayable(optimizer.step)]
    set_grads(params, 1)
    second = [param.grad for param in params]
    replays.append(side.replayable(optimizer.step))
    torch.cuda.empty_cache()
    for seed in range(8):
        junk = [torch.full((64 << i,), torch.nan, device=side.device) for i in range(16)]
        for param, grad in zip(params, (first, second)[seed % 2], strict=True):
            param.grad = grad
        set_grads(optimizer, seed, in_place=True)
        (optimizer.step if seed in (3, 6) else replays[seed % 2])()
        del junk
    return record(optimizer)


@some_cases("momentum", "adamw")
@on_both_drivers
def test_several_steps_in_one_graph(side: Side, case: Case) -> Results:
    optimizer = warmed_up(side, case)

    def three_steps() -> None:
        for _ in range(3):
            optimizer.step()

    replay = side.replayable(three_steps)
    for seed in range(2, 4):
        set_grads(optimizer, seed, in_place=True)
        replay()
    return record(optimizer)


@some_cases("momentum-damped", "adam-amsgrad", "adamw")
@on_both_drivers
def test_scaler_in_a_graph(side: Side, case: Case) -> Results:
    """Whether a replay does its step is decided on the device, too."""
    optimizer = warmed_up(side, case)
    found_inf, scale = side.tensor(0.0), side.tensor(1.0)
    optimizer.found_inf, optimizer.grad_scale = found_inf, scale
    replay = side.replayable(optimizer.step)
    for seed in range(2, 7):
        set_grads(optimizer, seed, in_place=True)
        found_inf.fill_(float(seed in (3, 4)))
        scale.fill_(seed / 2)
        replay()
    return record(optimizer)


@needs_gpu
@pytest.mark.filterwarnings("ignore:.*AccumulateGrad")  # torch has views on streams
@some_cases("momentum", "adam", "adamw")
def test_whole_iteration_in_a_graph(case: Case) -> None:
    """Forward, backward and step; eager steps on the GPU give the same bits."""

    def train(captured: bool) -> Tensor:
        param = torch.nn.Parameter(values(700).cuda())
        optimizer = case.ours([param], capturable=True)
        inputs = values(700, seed=1).cuda()

        def iteration() -> None:
            optimizer.zero_grad()
            (param * inputs).square().sum().backward()
            optimizer.step()

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            iteration()
        torch.cuda.current_stream().wait_stream(stream)
        optimizer.zero_grad()
        step = GPU.replayable(iteration) if captured else iteration
        for seed in range(4):
            inputs.copy_(values(700, seed=seed))
            step()
        return param.detach()

    assert torch.equal(train(True), train(False))


@some_cases("sgd", "sgd-l2")
@on_both_drivers
def test_capture_without_a_step_before(side: Side, case: Case) -> Results:
    """Without state there is nothing that an eager step would have to make."""
    optimizer = capturable(side, case)
    set_grads(optimizer, 0)
    replay = side.replayable(optimizer.step)
    for seed in range(3):
        set_grads(optimizer, seed, in_place=True)
        replay()
    return record(optimizer)


@needs_gpu
@some_cases("momentum", "adamw")
@on_both_drivers
def test_another_optimizer_dies_during_a_capture(side: Side, case: Case) -> Results:
    """The garbage collector may come at any time; waiting then would spoil the graph."""
    optimizer = warmed_up(side, case)
    others = [warmed_up(side, case)]

    def step() -> None:
        optimizer.step()
        others.clear()
        gc.collect()

    replay = side.replayable(step)
    for seed in range(2, 4):
        set_grads(optimizer, seed, in_place=True)
        replay()
    return record(optimizer)


# Argument: the momentum. With it, one eager step that leaves the counting to the host.
CAPTURED_FIRST = """
import sys, torch, fusedopt
param = torch.zeros(700, device="cuda")
param.grad = torch.ones_like(param)
momentum = float(sys.argv[1])
optimizer = fusedopt.SGD([param], lr=0.5, momentum=momentum)
if momentum:
    optimizer.step()
optimizer.param_groups[0]["capturable"] = True
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    optimizer.step()
graph.replay()
graph.replay()
print(*param.unique().tolist())
"""


@needs_gpu
@pytest.mark.parametrize(("momentum", "expected"), [(0.0, "-1.0"), (0.5, "-2.125")])
def test_code_comes_to_the_gpu_during_a_capture(momentum: float, expected: str) -> None:
    """CUDA loads kernels when they are first asked for, so this takes a new process."""
    assert run_python("-c", CAPTURED_FIRST, momentum).strip() == expected


def one_is_new(optimizer: Any, device: Any = GPU.device) -> None:
    params = draw([3], device)
    optimizer.add_param_group({"params": params})
    set_grads(params, 0)


NO_STATE = "state of some parameters is not there"
REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "not capturable": (
        lambda optimizer: optimizer.param_groups[1].update(capturable=False),
        "capturable is False in param group 1.*capturable=True",
    ),
    "no state": (lambda optimizer: optimizer.state.pop(params_of(optimizer)[-1]), NO_STATE),
    "new param": (one_is_new, NO_STATE),
}
if IS_CUDA:
    REFUSED["on the CPU"] = (lambda optimizer: one_is_new(optimizer, "cpu"), "are on the CPU")


@pytest.mark.parametrize(("damage", "pattern"), **by_id(REFUSED))
@some_cases("momentum", "adamw")
def test_refused_capture(case: Case, damage: Callable[[Any], None], pattern: str) -> None:
    groups = [{"params": draw(SIZES, GPU.device, seed=seed)} for seed in (1, 2)]
    optimizer = case.ours(groups, capturable=True)
    take_step(optimizer, 0)
    damage(optimizer)
    before = snapshot(optimizer)
    with Graph().capture():
        torch.zeros(3, device=GPU.device).add_(1)  # torch warns of empty graphs
        with pytest.raises(RuntimeError, match=pattern):
            optimizer.step()
    assert snapshot(optimizer) == before
    optimizer.step()


def test_capture_after_a_write_to_params_with_masters() -> None:
    """Every replay would take the weight from the param again."""
    params = [Parameter(tensor) for tensor in draw(SIZES, GPU.device, BFLOAT16)]
    optimizer = fusedopt.AdamW(params, master_weights="float32", capturable=True)
    take_step(optimizer, 0)
    with torch.no_grad():
        params[0].add_(1)
    before = snapshot(optimizer)
    with Graph().capture():
        torch.zeros(3, device=GPU.device).add_(1)
        with pytest.raises(RuntimeError, match="written to"):
            optimizer.step()
    assert snapshot(optimizer) == before
    take_step(optimizer, 1)
    with Graph().capture():
        optimizer.step()


@some_cases("momentum", "adamw")
@on_both_drivers
def test_step_after_a_refused_capture(side: Side, case: Case) -> Results:
    optimizer = case.ours(draw(SIZES, side.device))
    for seed in range(4):
        set_grads(optimizer, seed)
        if side.is_gpu and seed != 1:
            with Graph().capture():
                torch.zeros(3, device=side.device).add_(1)
                with pytest.raises(RuntimeError, match="capturable is False in param group 0"):
                    optimizer.step()
            assert len(optimizer.state) == (0 if seed == 0 else len(SIZES))
        optimizer.step()
    return record(optimizer)
