"""Sharded params: FSDP2's fully_shard, tensor parallel, and FSDP1."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

dist = pytest.importorskip("torch.distributed")
if not dist.is_available():
    pytest.skip("torch was built without torch.distributed", allow_module_level=True)

import fusedopt  # noqa: E402
from support.equality import assert_equal  # noqa: E402
from support.processes import on_ranks  # noqa: E402
from support.sharded_twins import FSDP2, UNEVEN, each_width, mesh_of, shard  # noqa: E402
from support.tensors import by_id, values  # noqa: E402
from support.twins import (  # noqa: E402
    LR,
    Block,
    clipping,
    loss_of,
    mixed_twins,
    step_clipped,
    tiny,
    twins,
    whole,
)

pytestmark = [pytest.mark.cpu_only, pytest.mark.unsanitized]

BFLOAT16 = torch.bfloat16


def split(model: Any, mesh: Any, sequence: bool = False) -> Any:
    """Tensor parallel. With sequence parallel norms, whose grads are partial sums."""
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    up = ColwiseParallel(input_layouts=Shard(0)) if sequence else ColwiseParallel()
    plan = {}
    for index, block in enumerate(model.blocks):
        plan |= {f"blocks.{index}.up": up, f"blocks.{index}.down": RowwiseParallel()}
        if sequence:
            plan[f"blocks.{index}.norm"] = SequenceParallel(sequence_dim=0)
            block.norm.register_forward_pre_hook(
                lambda _, inputs: DTensor.from_local(inputs[0], mesh, [Replicate()])
            )
    return parallelize_module(model, mesh, plan)


def train(model: Any, optimizer: Any, steps: range, rank: int | None = None) -> list[Any]:
    """The params. Ranks train with batches of their own, but for a rank that is given."""
    for step in steps:
        loss_of(model, step, dist.get_rank() if rank is None else rank).backward()
        optimizer.step()
        optimizer.zero_grad()
    return whole(model.parameters())


def train_clipped(adamw: Any, model: Any, clip: Any, rank: int | None = None) -> list[Any]:
    """Clipped by the option or by `clip`; the params, and the norm of every step."""
    optimizer = adamw(model.parameters(), lr=LR, **clipping(adamw, 0.3))
    norms = []
    for step in range(4):
        loss_of(model, step, dist.get_rank() if rank is None else rank).backward()
        norms.append(step_clipped(optimizer, clip).float())
        optimizer.zero_grad()
    assert max(norms) > 0.3
    return [*whole(model.parameters()), *norms]


def clip_by_torch(model: Any) -> Any:
    return lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)


def clip_by_hand(model: Any) -> Any:
    """torch's own refuses plain tensors beside DTensors."""

    def clip() -> Any:
        grads = [param.grad for param in model.parameters()]
        norm = torch.stack([grad.norm() for grad in whole(grads)]).norm()
        factor = min(1.0, 0.3 / (float(norm) + 1e-6))
        for grad in grads:
            (grad.to_local() if hasattr(grad, "to_local") else grad).mul_(factor)
        return norm

    return clip


@on_ranks(2)
@each_width
@pytest.mark.parametrize("way", FSDP2)
@twins
def test_fsdp2(adamw: Any, way: str, width: int) -> Any:
    model = FSDP2[way](tiny(width))
    on_last = [param.to_local().numel() for param in model.parameters()]
    assert dist.get_rank() == 0 or 0 in on_last
    return train(model, adamw(model.parameters(), lr=LR), range(4))


@on_ranks(2)
@each_width
@pytest.mark.parametrize("way", FSDP2)
@twins
def test_fsdp2_clips(adamw: Any, way: str, width: int) -> Any:
    model = FSDP2[way](tiny(width))
    return train_clipped(adamw, model, clip_by_torch(model))


@on_ranks(2)
@pytest.mark.parametrize("clips", [False, True])
@mixed_twins
def test_fsdp2_mixed_precision(adamw: Any, clips: bool) -> Any:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=BFLOAT16, reduce_dtype=torch.float32)
    model = shard(tiny(), mp_policy=policy)
    if clips:
        return train_clipped(adamw, model, clip_by_torch(model))
    return train(model, adamw(model.parameters(), lr=LR), range(4))


@on_ranks(2)
@twins
def test_fsdp2_accumulates(adamw: Any) -> Any:
    model = shard(tiny())
    optimizer = adamw(model.parameters(), lr=LR)
    for step in range(6):
        model.set_requires_gradient_sync(step % 2 == 1)
        loss_of(model, step, dist.get_rank()).backward()
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()
    return whole(model.parameters())


SETTINGS: dict[str, Any] = {
    "plain": (torch.float32, {}),
    "averages": (torch.float32, {"ema_decay": 0.9, "max_grad_norm": 0.5}),
    "masters": (BFLOAT16, {"master_weights": "float32"}),
    "split masters": (BFLOAT16, {"master_weights": "split"}),
    "stochastic rounding": (BFLOAT16, {"stochastic_rounding": True}),
}


@on_ranks(2)
@pytest.mark.parametrize("setting", SETTINGS)
def test_fsdp2_resumes(setting: str, tmp_path: Path) -> None:
    """From a distributed checkpoint, with the bits of a run that was not stopped."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    dtype, options = SETTINGS[setting]

    def make() -> tuple[Any, Any]:
        model = shard(tiny(UNEVEN).to(dtype))
        return model, fusedopt.AdamW(model.parameters(), lr=LR, **options)

    def go_on(model: Any, optimizer: Any, steps: range) -> list[Any]:
        cast = torch.nn.Sequential(Cast(dtype), model)
        return train(cast, optimizer, steps)

    model, optimizer = make()
    go_on(model, optimizer, range(3))
    parts = get_state_dict(model, optimizer)
    dcp.save({"model": parts[0], "optimizer": parts[1]}, checkpoint_id=tmp_path)
    resumed = make()
    parts = get_state_dict(*resumed)
    dcp.load({"model": parts[0], "optimizer": parts[1]}, checkpoint_id=tmp_path)
    set_state_dict(*resumed, model_state_dict=parts[0], optim_state_dict=parts[1])
    assert_equal(go_on(*resumed, range(3, 6)), go_on(model, optimizer, range(3, 6)))
    assert_equal(local_states(resumed[1]), local_states(optimizer))


def local_states(optimizer: Any) -> list[Any]:
    """What this rank has of them."""
    return [
        {name: t.to_local() if hasattr(t, "to_local") else t for name, t in state.items()}
        for state in optimizer.state.values()
    ]


FULL: dict[str, dict[str, Any]] = {
    "plain": {},
    "averages": {"ema_decay": 0.9},
    "masters": {"master_weights": "float32"},
    "split masters": {"master_weights": "split"},  # neither gloo nor NCCL sends int16
    "split8 masters": {"master_weights": "split8"},
    "states": {"state_dtype": torch.float32},  # torch gathers no torch.dtype of a group
}


@on_ranks(2)
@pytest.mark.parametrize("options", **by_id(FULL))
def test_fsdp2_resumes_from_a_full_state_dict(options: dict[str, Any]) -> None:
    """Gathered on the CPU of rank 0, and handed out from there."""
    from torch.distributed.checkpoint import state_dict as dcp

    model = shard(tiny(UNEVEN).to(BFLOAT16))
    optimizer = fusedopt.AdamW(model.parameters(), lr=LR, **options)
    train(torch.nn.Sequential(Cast(BFLOAT16), model), optimizer, range(2))
    gather = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    saved = dcp.get_optimizer_state_dict(model, optimizer, options=gather)
    resumed = fusedopt.AdamW(model.parameters(), lr=LR, **options)
    hand_out = dcp.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    dcp.set_optimizer_state_dict(model, resumed, saved, options=hand_out)
    assert_equal(local_states(resumed), local_states(optimizer))


class Cast(torch.nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Any) -> Any:
        return x.to(self.dtype)


@on_ranks(2)
@pytest.mark.parametrize("scaler_type", [torch.amp.GradScaler, fusedopt.GradScaler])
@twins
def test_fsdp2_scaled(adamw: Any, scaler_type: Any) -> Any:
    """A grad that is infinite on one rank only: all skip the step."""
    model = shard(tiny())
    optimizer = adamw(model.parameters(), lr=LR)
    of_ours = adamw is fusedopt.AdamW
    scaler = (scaler_type if of_ours else torch.amp.GradScaler)("cpu", init_scale=2.0**10)
    scales = []
    for step in range(4):
        scaler.scale(loss_of(model, step, dist.get_rank())).backward()
        if step == 1 and dist.get_rank() == 1:
            model.inp.weight.grad.to_local()[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    assert scales == [2.0**10, 2.0**9, 2.0**9, 2.0**9]
    return whole(model.parameters())


@on_ranks(2)
@pytest.mark.parametrize("sequence", [False, True], ids=["plain norms", "sequence parallel"])
@twins
def test_tensor_parallel(adamw: Any, sequence: bool) -> Any:
    model = split(tiny(), mesh_of(2), sequence)
    params = train(model, adamw(model.parameters(), lr=LR), range(4), rank=0)
    loss_of(model, 4).backward()
    grad = model.blocks[0].norm.weight.grad
    assert sequence == (hasattr(grad, "placements") and grad.placements[0].is_partial())
    return params


@on_ranks(2)
@pytest.mark.parametrize("sequence", [False, True], ids=["plain norms", "sequence parallel"])
@twins
def test_tensor_parallel_clips(adamw: Any, sequence: bool) -> Any:
    model = split(tiny(), mesh_of(2), sequence)
    return train_clipped(adamw, model, clip_by_hand(model), rank=0)


@on_ranks(4)
@pytest.mark.parametrize("width", [12, 10], ids=["even", "uneven"])
@twins
def test_fsdp2_of_tensor_parallel_clips(adamw: Any, width: int) -> Any:
    """30 rows make two parts of 15, which make shards of 8 and 7."""
    mesh = mesh_of(2, 2, names=("data", "tensor"))
    model = shard(split(tiny(width), mesh["tensor"]), mesh["data"])
    return train_clipped(adamw, model, clip_by_hand(model), rank=mesh["data"].get_local_rank())


@on_ranks(4)
@pytest.mark.parametrize("hybrid", [False, True], ids=["four shards", "two shards twice"])
@twins
def test_fsdp2_of_four_clips(adamw: Any, hybrid: bool) -> Any:
    """Three rows for four ranks."""
    mesh = mesh_of(2, 2, names=("replicate", "shard")) if hybrid else mesh_of(4)
    model = shard(tiny(3), mesh)
    return train_clipped(adamw, model, clip_by_torch(model))


def wrap(model: Any, strategy: str, **options: Any) -> Any:
    """FSDP1."""
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({Block}),
        sharding_strategy=ShardingStrategy[strategy],
        device_id=torch.device("cpu"),
        **options,
    )


def unwrapped(model: Any) -> list[Any]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    with FullyShardedDataParallel.summon_full_params(model):
        return whole(model.parameters())


def of_fsdp1(test: Any) -> Any:
    strategies = ["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD"]
    test = pytest.mark.parametrize("strategy", strategies)(test)
    return pytest.mark.parametrize("original", [True, False], ids=["params", "flat params"])(test)


@on_ranks(2)
@of_fsdp1
@twins
def test_fsdp1(adamw: Any, strategy: str, original: bool) -> Any:
    """Clipped by FSDP, and saved and loaded on the way."""
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP  # noqa: N817

    model = wrap(tiny(UNEVEN), strategy, use_orig_params=original)
    optimizer = adamw(model.parameters(), lr=LR)
    for step in range(5):
        loss_of(model, step, dist.get_rank()).backward()
        model.clip_grad_norm_(0.3)
        optimizer.step()
        optimizer.zero_grad()
        if step == 2:
            saved = FSDP.optim_state_dict(model, optimizer)
            optimizer = adamw(model.parameters(), lr=LR)
            optimizer.load_state_dict(FSDP.optim_state_dict_to_load(model, optimizer, saved))
    return unwrapped(model)


@on_ranks(2)
@pytest.mark.parametrize("masters", ["float32", "split", "split8"])
def test_fsdp1_saves_masters(masters: str) -> None:
    """Of flat params. Also those of 8 bits, although FSDP1 takes no integers."""
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP  # noqa: N817
    from torch.distributed.fsdp import MixedPrecision

    def made(seed: int) -> Any:
        torch.manual_seed(seed)
        casts = MixedPrecision(BFLOAT16)  # what goes in
        model = tiny(UNEVEN).to(BFLOAT16)
        model = wrap(model, "FULL_SHARD", mixed_precision=casts)
        options = {"master_weights": masters, "state_dtype": "bfloat16"}
        return model, fusedopt.AdamW(model.parameters(), lr=LR, **options)

    def advanced(model: Any, optimizer: Any) -> list[Any]:
        for step in range(3):
            loss_of(model, step, dist.get_rank()).backward()
            optimizer.step()
            optimizer.zero_grad()
        return optimizer.fp32_params()

    model, optimizer = made(0)
    before = advanced(model, optimizer)
    other, its = made(1)
    other.load_state_dict(model.state_dict())
    saved = FSDP.optim_state_dict(model, optimizer)
    its.load_state_dict(FSDP.optim_state_dict_to_load(other, its, saved))
    assert all(map(torch.equal, its.fp32_params(), before))
    assert all(map(torch.equal, advanced(other, its), advanced(model, optimizer)))


@on_ranks(2)
@mixed_twins
def test_fsdp1_mixed_precision(adamw: Any) -> Any:
    from torch.distributed.fsdp import MixedPrecision

    precision = MixedPrecision(torch.bfloat16, torch.float32)
    model = wrap(tiny(), "FULL_SHARD", mixed_precision=precision)
    train(model, optimizer := adamw(model.parameters(), lr=LR), range(4))
    assert optimizer.state
    return unwrapped(model)


@on_ranks(2)
@pytest.mark.parametrize("clips", [False, True])
@mixed_twins
def test_fsdp1_scaled(adamw: Any, clips: bool) -> Any:
    """Of float16 with a scale that overflows at first, maybe on one rank alone."""
    from torch.distributed.fsdp import MixedPrecision
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    precision = MixedPrecision(torch.float16, torch.float16)
    model = wrap(tiny(UNEVEN), "FULL_SHARD", mixed_precision=precision)
    optimizer = adamw(model.parameters(), lr=LR)
    scaler = ShardedGradScaler("cpu", init_scale=2.0**20, growth_interval=4)
    scales = []
    for step in range(8):
        scaler.scale(loss_of(model, step, dist.get_rank())).backward()
        if clips:
            scaler.unscale_(optimizer)
            model.clip_grad_norm_(0.3)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, copy.copy(scales))
    assert everywhere == [scales] * dist.get_world_size()
    assert min(scales) < 2.0**20
    return [*unwrapped(model), *scales]


@on_ranks(2)
@pytest.mark.parametrize(
    ("shape", "dim", "is_coded"),
    [
        ((40, 128), 0, True),
        ((64, 256), 1, True),  # each half of a row is two groups
        ((64, 192), 1, False),  # and one and a half here
        ((8, 16, 64), 1, False),
    ],
)
def test_codes_where_shards_have_whole_groups(
    shape: tuple[int, ...], dim: int, is_coded: bool
) -> None:
    """The shards have the codes and scales of the whole tensor, as has what is saved of them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    found = []
    for placements in (None, [Shard(dim)]):

        def placed(tensor: torch.Tensor, placements: Any = placements) -> torch.Tensor:
            return tensor if placements is None else distribute_tensor(tensor, mesh, placements)

        param = torch.nn.Parameter(placed(values(*shape)))
        # Draws follow the places of elements in the whole tensor only where rows are sharded.
        drawn = None if dim == 0 else False
        optimizer = fusedopt.AdamW([param], lr=0.01, state_dtype="q8", stochastic_rounding=drawn)
        for seed in range(3):
            param.grad = placed(values(*shape, seed=10 + seed))
            optimizer.step()
        entries = {"param": param.detach(), **optimizer.state_dict()["state"][0]}
        found.append({name: whole([entry])[0] for name, entry in entries.items()})
    plain, sharded = found
    assert ("exp_avg_q8" in sharded) == is_coded
    if is_coded:
        assert plain.keys() == sharded.keys()
        for name, entry in plain.items():
            assert torch.equal(entry, sharded[name]), name
