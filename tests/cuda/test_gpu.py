"""What only a real GPU can tell of the CUDA driver: streams, devices, its memory, sizes."""

import copy
import gc

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from support.device import needs_gpu
from support.equality import bits
from support.optimizers import Case, some_cases, take_step, train
from support.sides import CPU, GPU, SIZES, Results, Side, assert_same_bits, on_both_drivers
from support.snapshots import record, results
from support.tensors import draw, each_dtype, params_of, set_grads, values

pytestmark = needs_gpu
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def train_on_devices(devices: list[str], case: Case, kind: str) -> Results:
    """Parameters take turns in where they lie; the first step has no scaler in any case."""
    sizes = [33, 1, 700, 0, 5, 3000]
    params = draw(sizes, CPU.device)
    params = [param.to(devices[i % len(devices)]) for i, param in enumerate(params)]
    options = {"capturable": True} if kind == "capturable" and len(set(devices)) > 1 else {}
    optimizer = case.ours([{"params": params[:3]}, {"params": params[3:], "lr": 0.5}], **options)
    scaled = torch.device(devices[-1])
    for step in range(5):
        set_grads(params, step)
        if step > 0 and kind == "scaler":
            optimizer.found_inf = torch.tensor(float(step == 2), device=scaled)
            optimizer.grad_scale = torch.tensor(3.0, device=scaled)
        optimizer.step()
    return record(optimizer)


each_kind = pytest.mark.parametrize("kind", ["plain", "capturable", "scaler"])


@each_kind
@pytest.mark.parametrize("devices", [["cpu", "cuda"], ["cuda", "cpu"]], ids=lambda d: "-".join(d))
@some_cases("sgd-l2", "momentum-damped", "adam-amsgrad", "adamw")
def test_cpu_and_gpu_in_one_optimizer(case: Case, devices: list[str], kind: str) -> None:
    ours = train_on_devices(devices, case, kind)
    assert_same_bits(ours, train_on_devices(["cpu"], case, kind))


@needs_two_gpus
@each_kind
@pytest.mark.parametrize("devices", [["cuda:0", "cuda:1"], ["cuda:1", "cpu", "cuda:0"]], ids=str)
@some_cases("momentum-damped", "adamw")
def test_several_gpus_in_one_optimizer(case: Case, devices: list[str], kind: str) -> None:
    ours = train_on_devices(devices, case, kind)
    assert_same_bits(ours, train_on_devices(["cpu"], case, kind))


@needs_two_gpus
@some_cases("momentum", "adamw")
def test_gpu_that_is_not_the_current_one(case: Case) -> None:
    with torch.cuda.device(0):
        ours = train_on_devices(["cuda:1"], case, "plain")
        assert torch.cuda.current_device() == 0
    assert_same_bits(ours, train_on_devices(["cpu"], case, "plain"))


@some_cases("momentum", "adamw")
@on_both_drivers
def test_step_waits_its_turn_in_a_side_stream(side: Side, case: Case) -> Results:
    """The grads are written half a second after step() was called, in the same stream."""
    params = draw(SIZES, side.device)
    optimizer = case.ours(params)
    take_step(optimizer, 0)
    kept = [param.grad for param in params]
    set_grads(params, 1)
    grads = [param.grad for param in params]
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        if side.is_gpu:
            torch.cuda._sleep(500_000_000)
        for param, old, new in zip(params, kept, grads, strict=True):
            param.grad = old.copy_(new)
        optimizer.step()
        return record(optimizer)  # waits for this stream only


@some_cases("momentum", "adamw")
@on_both_drivers
def test_another_stream_in_every_step(side: Side, case: Case) -> Results:
    streams = [torch.cuda.default_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
    params = draw(SIZES, side.device)
    optimizer = case.ours(params)
    for step in range(7):
        torch.cuda.synchronize()
        with torch.cuda.stream(streams[step % 3]):
            set_grads(params, step)
            if side.is_gpu:
                torch.cuda._sleep(10_000_000)
            optimizer.step()
    torch.cuda.synchronize()
    return record(optimizer)


@pytest.mark.parametrize("capturable", [False, True], ids=["plain", "capturable"])
@some_cases("momentum", "adamw")
@on_both_drivers
def test_host_runs_ahead(side: Side, case: Case, capturable: bool) -> Results:
    """New grads and rates for every step, all steps asked for before the first is done."""
    params = draw(SIZES, side.device)
    # More groups than scalars fit in a kernel's arguments: those are sent, too.
    params += draw([3] * 100, side.device)
    groups = [{"params": [param], "lr": 0.001 * (1 + i)} for i, param in enumerate(params)]
    optimizer = case.ours(groups, capturable=capturable and side.is_gpu)
    grads = []
    for seed in range(30):
        set_grads(params, seed)
        grads.append([param.grad for param in params])
    if side.is_gpu:
        torch.cuda._sleep(500_000_000)
    for step_grads in grads:
        for param, grad in zip(params, step_grads, strict=True):
            param.grad = grad
        for group in optimizer.param_groups:
            group["lr"] *= 1.01
        optimizer.step()
    return record(optimizer)


@pytest.mark.parametrize("capturable", [False, True], ids=["plain", "capturable"])
@some_cases("sgd", "momentum", "adamw")
def test_memory_does_not_grow(case: Case, capturable: bool) -> None:
    params = draw(SIZES, GPU.device)
    optimizer = case.ours(params, capturable=capturable)
    set_grads(params, 0)
    gc.collect()  # what other tests left is not to be freed in between
    grads = [(param.grad, param.grad.clone()) for param in params]
    for step in range(120):
        for param, pair in zip(params, grads, strict=True):
            param.grad = pair[step % 2]
        optimizer.step()
        if step == 20:
            before = torch.cuda.memory_allocated()
    assert torch.cuda.memory_allocated() <= before


@some_cases("sgd", "momentum", "adamw")
def test_memory_is_given_back(case: Case) -> None:
    def run() -> None:
        params = draw([5000] * 50, GPU.device)
        optimizer = case.ours(params, capturable=True)
        take_step(optimizer, 0)

    run()
    gc.collect()
    before = torch.cuda.memory_allocated()
    run()
    gc.collect()
    assert torch.cuda.memory_allocated() <= before


@some_cases("momentum", "adamw")
@on_both_drivers
def test_copies_and_checkpoints_on_the_gpu(side: Side, case: Case) -> Results:
    """A copy has a driver of its own; a checkpoint goes over the CPU and comes back."""
    params = [Parameter(param) for param in draw(SIZES, side.device)]
    optimizer = case.ours(params, capturable=side.is_gpu)
    for seed in range(6):
        take_step(optimizer, seed)
        if seed == 2:
            optimizer = copy.deepcopy(optimizer)
        if seed == 4:
            saved = copy.deepcopy(optimizer.state_dict())
            for entries in saved["state"].values():
                entries.update({name: entry.cpu() for name, entry in entries.items()})
            params = params_of(optimizer)
            optimizer = case.ours(params, capturable=side.is_gpu)
            optimizer.load_state_dict(saved)
    return record(optimizer)


def train_periodic(case: Case, shape: tuple[int, int], how: str, dtype: torch.dtype) -> None:
    """Every row of a param of more than 2^31 elements holds the same, so each must stay the same
    as in a small param on the CPU, which is one of the rows."""
    rows, width = shape
    row, grad_row = (values(width, dtype=dtype, seed=seed) for seed in (1, 2))
    # Allocated at once: neither random numbers nor copies of them fit beside it.
    param = row.expand(rows, width).contiguous()
    if how == "dense":
        param.grad = grad_row.expand(rows, width).contiguous()
    elif how == "transposed grad":
        param.grad = torch.empty(width, rows, dtype=dtype, device=GPU.device).t()
        param.grad.copy_(grad_row.expand(rows, width))
    else:
        param.grad = grad_row.expand(rows, width)
    small = row.cpu()
    small.grad = grad_row.cpu()
    optimizers = [case.ours([param]), case.ours([small])]
    for optimizer in optimizers:
        optimizer.step()
        optimizer.step()
    expected = results(optimizers[1], small)
    for name, found in results(optimizers[0], param).items():
        assert_rows_equal(found, expected[name].cuda())


def assert_rows_equal(found: Tensor, row: Tensor) -> None:
    """By the bits, some rows at a time."""
    as_integers = {2: torch.int16, 4: torch.int32}[row.element_size()]
    for part in found.split(4096):
        assert torch.equal(part.view(as_integers), row.view(as_integers).expand_as(part))


LARGE = (2**31 // 65519 + 3, 65519)  # 2^31 lies within a row


@pytest.mark.parametrize("how", ["dense", "transposed grad", "expanded grad"])
@some_cases("sgd-l2", "momentum")
def test_more_than_31_bits_of_elements(case: Case, how: str) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < 20 * 2**30:
        pytest.skip(f"needs 20 GiB of free GPU memory, {free >> 30} are there")
    train_periodic(case, LARGE, how, torch.bfloat16)
    torch.cuda.empty_cache()


@each_dtype
@some_cases("adamw-amsgrad")
def test_same_bits_in_every_run(case: Case, dtype: torch.dtype) -> None:
    def run() -> Results:
        params = draw([100_003, 17], GPU.device, dtype)
        optimizer = case.ours(params)
        train(optimizer, 3)
        return record(optimizer)

    first, second = run(), run()
    assert all(torch.equal(bits(first[name]), bits(second[name])) for name in first)
