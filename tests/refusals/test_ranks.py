"""Ranks that step together with different settings: an error on all of them before a first step."""

import copy
import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

dist = pytest.importorskip("torch.distributed")
if not dist.is_available():
    pytest.skip("torch was built without torch.distributed", allow_module_level=True)

from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.tensor import DTensor, Replicate, Shard  # noqa: E402

import fusedopt  # noqa: E402
from fusedopt._ranks import _name  # noqa: E402
from support.processes import on_ranks  # noqa: E402
from support.sharded import local  # noqa: E402
from support.tensors import BFLOAT16, FLOAT32  # noqa: E402

pytestmark = [pytest.mark.cpu_only, pytest.mark.unsanitized]

SHAPES = ((4, 3), (6, 5), (7,), (2, 2))
Groups = list[dict[str, Any]]


@functools.cache
def mesh_of(*sizes: int) -> Any:
    return init_device_mesh("cpu", sizes, mesh_dim_names=("outer", "inner")[: len(sizes)])


def sharded(
    rows: int, *others: int, mesh: Any = None, dtype: torch.dtype = FLOAT32, shard: Any = None
) -> Parameter:
    """With a grad. Made by this rank alone: what ranks make in other orders would never meet."""
    mesh = mesh_of(dist.get_world_size()) if mesh is None else mesh
    placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0) if shard is None else shard]

    def part() -> Any:
        whole = torch.ones(rows, *others, dtype=dtype)
        size, at = mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)
        dim = placements[-1].dim
        parts = whole.chunk(size, dim)
        own = parts[at] if at < len(parts) else whole.narrow(dim, 0, 0)
        shape, stride = whole.shape, whole.stride()
        return DTensor.from_local(
            own.clone(), mesh, placements, run_check=False, shape=shape, stride=stride
        )

    param = Parameter(part())
    param.grad = part()
    return param


def params_of(optimizer: Any) -> list[Any]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def held(optimizer: Any) -> list[Any]:
    """All that a step could change, by the memory of this rank."""
    params = params_of(optimizer)
    entries = [t for param in params for t in optimizer.state.get(param, {}).values()]
    tensors = [*params, *(param.grad for param in params), *entries]
    values = [(local(t.detach()).tolist(), local(t.detach())._version) for t in tensors]
    options = [{k: repr(v) for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    return [values, options, len(optimizer.state)]


def said_on_all_ranks(step: Callable[[], Any]) -> str:
    """What the step is refused with, which is the same everywhere."""
    with pytest.raises(ValueError, match="ranks that step together differ") as raised:
        step()
    texts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(texts, str(raised.value))
    assert set(texts) == {texts[0]}
    return str(raised.value)


def refusal(optimizer: Any) -> str:
    before = held(optimizer)
    text = said_on_all_ranks(optimizer.step)
    assert held(optimizer) == before
    assert text.endswith("nothing was changed")
    return text


@contextmanager
def counted() -> Iterator[list[Any]]:
    """The groups of the collectives that are made inside."""
    calls: list[Any] = []
    names = ("all_reduce", "all_gather_object", "broadcast_object_list")
    originals = {name: getattr(dist, name) for name in names}

    def counting(original: Any) -> Any:
        def counts(*args: Any, **kwargs: Any) -> Any:
            calls.append(kwargs["group"])
            return original(*args, **kwargs)

        return counts

    for name, original in originals.items():
        setattr(dist, name, counting(original))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def assert_silent(step: Callable[[], Any]) -> None:
    with counted() as calls:
        step()
    assert not calls


NORM = r"the norm of the grads \(for max_grad_norm or fusedopt.GradScaler\) is"
# Options of the other ranks, of the last one, and how the error goes on.
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "lr": ({"lr": 0.1}, {"lr": 0.2}, "lr of param group 0 is 0.1 on rank 0 and 0.2 on rank 1"),
    "lr as a tensor": (
        {"lr": torch.tensor(0.5)},
        {"lr": torch.tensor(0.25)},
        "lr of param group 0 is 0.5 on rank 0 and 0.25 on rank 1",
    ),
    "betas": (
        {},
        {"betas": (0.9, 0.95)},
        r"betas of param group 0 is \(0.9, 0.999\) on rank 0 and \(0.9, 0.95\) on rank 1",
    ),
    "weight_decay": ({}, {"weight_decay": 0.5}, "weight_decay of param group 0 is 0.01 on rank 0"),
    "amsgrad": ({}, {"amsgrad": True}, "amsgrad of param group 0 is False on rank 0 and True on"),
    "max_grad_norm": (
        {"max_grad_norm": 1.0},
        {"max_grad_norm": 0.5},
        "max_grad_norm of param group 0 is 1.0 on rank 0 and 0.5 on rank 1",
    ),
    "no clipping": (
        {"max_grad_norm": 1.0},
        {},
        "max_grad_norm of param group 0 is 1.0 on rank 0 and None on rank 1; "
        f"{NORM} taken on rank 0 and not asked for on rank 1",
    ),
    "clipping on one": (
        {},
        {"max_grad_norm": 1.0},
        "max_grad_norm of param group 0 is None on rank 0 and 1.0 on rank 1; "
        f"{NORM} not asked for on rank 0 and taken on rank 1",
    ),
    "error_if_nonfinite": (
        {"max_grad_norm": 1.0, "error_if_nonfinite": True},
        {"max_grad_norm": 1.0},
        "error_if_nonfinite of param group 0 is True on rank 0 and False on rank 1",
    ),
    "state_dtype": (
        {"state_dtype": BFLOAT16},
        {},
        "state_dtype of param group 0 is 'bfloat16' on rank 0 and None on rank 1",
    ),
    "master_weights": (
        {"master_weights": "float32"},
        {},
        "master_weights of param group 0 is 'float32' on rank 0 and None on rank 1",
    ),
    "rounding_seed": ({}, {"rounding_seed": 7}, "rounding_seed of param group 0 is 0.0 on rank 0"),
    "ema_decay": ({"ema_decay": 0.9}, {"ema_decay": 0.8}, "ema_decay of param group 0 is 0.9 on"),
    "what is no option": (
        {"lr": 0.1},
        {"lr": torch.ones(2)},
        "lr of param group 0 is 0.1 on rank 0 and a Tensor on cpu on rank 1",
    ),
}


@on_ranks(2)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str) -> None:
    common, other, text = OPTIONS[name]
    params = [sharded(*shape) for shape in SHAPES]
    optimizer = fusedopt.AdamW(params)  # which would refuse some
    optimizer.param_groups[0].update(other if dist.get_rank() == 1 else common)
    said = refusal(optimizer)
    assert re.search(f"differ: {text}", said), said


def as_made(groups: Groups) -> Groups:
    return groups


def swapped(groups: Groups) -> Groups:
    return [{"params": groups[0]["params"][::-1]}, groups[1]]


def in_one_group(groups: Groups) -> Groups:
    return [{"params": groups[0]["params"] + groups[1]["params"]}]


def other_groups(groups: Groups) -> Groups:
    return groups[::-1]


def one_less(groups: Groups) -> Groups:
    return [{"params": groups[0]["params"][:1]}, groups[1]]


def other_shape(groups: Groups) -> Groups:
    return [{"params": [groups[0]["params"][0], sharded(6, 6)]}, groups[1]]


def other_dtype(groups: Groups) -> Groups:
    return [{"params": [groups[0]["params"][0], sharded(6, 5, dtype=BFLOAT16)]}, groups[1]]


def other_placement(groups: Groups) -> Groups:
    return [{"params": [groups[0]["params"][0], sharded(6, 5, shard=Shard(1))]}, groups[1]]


PARAMS: dict[str, tuple[Callable[[Groups], Groups], str]] = {
    "order": (
        swapped,
        r"the parameter at group 0, index 0 is torch.float32 of shape \(4, 3\), placed "
        r"\(Shard\(dim=0\),\) on rank 0 and torch.float32 of shape \(6, 5\)",
    ),
    "number of groups": (
        in_one_group,
        "the number of param groups with params on the mesh is 2 on rank 0 and 1 on rank 1",
    ),
    "order of groups": (other_groups, r"the parameter at group 0, index 0 is .* shape \(7,\)"),
    "number": (
        one_less,
        "the number of params of group 0 on the mesh is 2 on rank 0 and 1 on rank 1; "
        "the parameter at group 0, index 1 is .* on rank 0 and not there on rank 1",
    ),
    "shape": (other_shape, r"the parameter at group 0, index 1 is .* shape \(6, 6\)"),
    "dtype": (other_dtype, "the parameter at group 0, index 1 is .* torch.bfloat16 of shape"),
    "placement": (other_placement, r"the parameter at group 0, index 1 is .*\(Shard\(dim=1\),\)"),
}


def groups_of(arrange: Callable[[Groups], Groups], mesh: Any = None) -> Groups:
    params = [sharded(*shape, mesh=mesh) for shape in SHAPES]
    return arrange([{"params": params[:2]}, {"params": params[2:]}])


@on_ranks(2)
@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("name", PARAMS)
def test_params(name: str, clips: bool) -> None:
    arrange, text = PARAMS[name]
    groups = groups_of(arrange if dist.get_rank() == 1 else as_made)
    said = refusal(fusedopt.AdamW(groups, max_grad_norm=1.0 if clips else None))
    assert re.search(text, said), said


@on_ranks(2)
def test_names() -> None:
    """Params that have been given names, and are of one shape."""
    order = (0, 1) if dist.get_rank() == 0 else (1, 0)
    named = [("v", sharded(4, 3)), ("w", sharded(4, 3))]
    text = refusal(fusedopt.SGD([named[at] for at in order]))
    assert "the parameter at group 0, index 0 is 'v', torch.float32" in text
    assert "on rank 0 and 'w', torch.float32" in text


@on_ranks(2)
def test_another_optimizer() -> None:
    params = [sharded(*shape) for shape in SHAPES]
    text = refusal((fusedopt.SGD if dist.get_rank() else fusedopt.Adam)(params))
    assert "optimizer of param group 0 is Adam on rank 0 and SGD on rank 1" in text


@on_ranks(2)
def test_a_norm_that_one_rank_is_given() -> None:
    optimizer = fusedopt.SGD([sharded(4, 3)], lr=0.5, max_grad_norm=1.0)
    given = {"grad_norm": 2.0} if dist.get_rank() else {}
    text = said_on_all_ranks(lambda: optimizer.step(**given))
    assert "is taken on rank 0 and given to step() on rank 1" in text


@on_ranks(2)
def test_a_scaler_on_one_rank() -> None:
    optimizer = fusedopt.SGD([sharded(4, 3)], lr=0.5)
    scaler = fusedopt.GradScaler("cpu", enabled=dist.get_rank() == 1)
    scaler.scale(torch.zeros(()))
    text = said_on_all_ranks(lambda: scaler.step(optimizer))
    assert "is not asked for on rank 0 and taken on rank 1" in text


@on_ranks(2)
def test_ranks_that_are_mended_step() -> None:
    optimizer = fusedopt.SGD([sharded(4, 3)], lr=0.5 if dist.get_rank() else 0.25)
    refusal(optimizer)
    optimizer.param_groups[0]["lr"] = 0.25
    optimizer.step()
    assert set(local(params_of(optimizer)[0].detach()).flatten().tolist()) == {0.75}


@on_ranks(2)
@pytest.mark.parametrize("clips", [False, True])
def test_alike_ranks_compare_once(clips: bool) -> None:
    """In whatever else differs: arguments without effect, what the user keeps in the groups."""
    alike = {"foreach": dist.get_rank() == 1, "of the user": dist.get_rank()}
    params = [sharded(*shape) for shape in SHAPES]
    options = {"max_grad_norm": 8.0} if clips else {}
    optimizer = fusedopt.SGD([{"params": params, **alike}], lr=0.5, **options)
    of_the_norm = len(options)
    with counted() as calls:
        optimizer.step()
    assert len(calls) == 2 + of_the_norm
    for then in (
        lambda: None,
        lambda: optimizer.load_state_dict(optimizer.state_dict()),
        lambda: optimizer.add_param_group({"params": [sharded(3, 3)]}),
    ):
        then()
        with counted() as calls:
            optimizer.step()
        assert len(calls) == of_the_norm


@on_ranks(2)
def test_a_copy_is_another_optimizer() -> None:
    optimizer = fusedopt.SGD([sharded(4, 3)], lr=0.5)
    optimizer.step()
    other = copy.deepcopy(optimizer)
    for param in params_of(other):
        param.grad = sharded(4, 3).grad
    with counted() as calls:
        other.step()
    assert len(calls) == 2
    assert_silent(other.step)


@on_ranks(2)
def test_a_wrapper_with_its_dict_is_none() -> None:
    optimizer = fusedopt.SGD([sharded(4, 3)], lr=0.5)
    wrapper = type("Wrapper", (fusedopt.SGD,), {"__init__": lambda _: None})()
    wrapper.__dict__.update(optimizer.__dict__)
    optimizer.step()
    assert_silent(wrapper.step)


@on_ranks(2)
def test_a_step_that_one_rank_skips_is_compared() -> None:
    """As with torch.amp.GradScaler and ``fused=True``: the others would wait for it."""
    optimizer = fusedopt.SGD([sharded(4, 3)], lr=0.5)
    optimizer.found_inf = torch.tensor(float(dist.get_rank()))
    with counted() as calls:
        optimizer.step()
    assert len(calls) == 2
    del optimizer.found_inf
    assert_silent(optimizer.step)


@on_ranks(2)
def test_what_a_hook_sets_counts() -> None:
    optimizer = fusedopt.SGD([sharded(4, 3)], lr=0.5)

    def sets_lr(hooked: Any, *_: Any) -> None:
        hooked.param_groups[0]["lr"] = 0.25 * (1 + dist.get_rank())

    optimizer.register_step_pre_hook(sets_lr)
    text = said_on_all_ranks(optimizer.step)
    assert "lr of param group 0 is 0.25 on rank 0 and 0.5 on rank 1" in text


@on_ranks(2)
def test_nothing_of_a_closure_runs() -> None:
    optimizer = fusedopt.SGD([sharded(4, 3)], lr=0.5 + dist.get_rank())
    calls: list[int] = []
    said_on_all_ranks(lambda: optimizer.step(lambda: calls.append(1)))
    assert not calls


@on_ranks(2)
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("alike", [False, True])
def test_setting_up_hides_no_learning_rate(alike: bool, as_tensor: bool) -> None:
    """torch.distributed.checkpoint makes a step with a learning rate of 0 in place of theirs."""
    from torch.distributed.checkpoint.state_dict import _init_optim_state

    lr = 0.5 if alike else 0.5 + dist.get_rank()
    params = [sharded(*shape) for shape in SHAPES]
    for param in params:
        param.grad = None
    optimizer = fusedopt.AdamW(params, lr=torch.tensor(lr) if as_tensor else lr)
    _init_optim_state(optimizer)
    for param in params:
        param.grad = sharded(*param.shape).grad
    if not alike:
        assert "lr of param group 0 is 0.5 on rank 0 and 1.5 on rank 1" in refusal(optimizer)
        return
    with counted() as calls:
        optimizer.step()
    assert len(calls) == 2
    assert_silent(optimizer.step)


@on_ranks(2)
def test_learning_rates_of_zero_are_compared_twice() -> None:
    """A warm-up may begin with several, and layers may be frozen for good."""
    optimizer = fusedopt.SGD([sharded(4, 3)], lr=0.0)
    optimizer.step()
    optimizer.step()
    assert_silent(optimizer.step)


@on_ranks(4)
@pytest.mark.parametrize("odd", [0, 1, 2, 3])
def test_all_dims_of_a_mesh(odd: int) -> None:
    """Of HSDP: replicas of what is sharded over two."""

    def made(lr: float) -> Any:
        return fusedopt.AdamW(groups_of(as_made, mesh_of(2, 2)), lr=lr, max_grad_norm=1.0)

    text = refusal(made(0.5 if dist.get_rank() == odd else 0.25))
    if odd == 0:
        assert "lr of param group 1 is 0.5 on rank 0 and 0.25 on ranks 1, 2, 3" in text
    else:
        assert f"lr of param group 1 is 0.25 on rank 0 and 0.5 on rank {odd}" in text
    optimizer = made(0.25)
    optimizer.step()
    assert len(optimizer.state) == len(SHAPES)


@on_ranks(4)
@pytest.mark.parametrize("odd", [0, 3])
def test_ranks_that_meet_others_that_differ(odd: int) -> None:
    """Tensor parallel in one dim of a mesh, FSDP in the other: all know of the one that differs."""
    mesh = mesh_of(2, 2)
    groups = [
        {"params": [sharded(4, 3, mesh=mesh["outer"]), sharded(6, 5, mesh=mesh["inner"])]},
        {"params": [sharded(2, 2, mesh=mesh["outer"])], "lr": 0.5 if dist.get_rank() == odd else 1},
    ]
    assert "lr of param group 1 is" in refusal(fusedopt.SGD(groups))


@on_ranks(4)
def test_orders_of_params_on_several_meshes() -> None:
    """Ranks meet mesh by mesh, and not in the order of their params."""
    meshes = [mesh_of(4), mesh_of(2, 2), mesh_of(2, 2)["inner"], mesh_of(2, 2)["outer"]]
    params = [sharded(4, 3, mesh=mesh) for mesh in meshes]
    at = dist.get_rank()
    text = refusal(fusedopt.SGD([*params[at:], *params[:at]]))
    assert "the parameter at group 0, index" in text
    fusedopt.SGD(params).step()


# Pipeline stages.


def stage(rank: int, *first: Any, **options: Any) -> tuple[list[Tensor], Any]:
    """Plain params, of other shapes and numbers on each."""
    params = [Parameter(torch.ones(2 + rank, 3)) for _ in range(1 + rank)]
    for param in params:
        param.grad = torch.ones_like(param)
    return params, fusedopt.SGD(first[0](params) if first else params, **options)


@on_ranks(2)
@pytest.mark.parametrize("limits", [(1.0, 1.0), (1.0, float("inf")), (float("inf"), 1.0)], ids=str)
def test_stages_are_their_own(limits: tuple[float, float]) -> None:
    """But for the norm: lr, params, groups, and which of these are clipped."""
    rank = dist.get_rank()

    def in_groups(params: list[Any]) -> Any:
        return [{"params": params[:1]}, {"params": params[1:], "max_grad_norm": None}][: 1 + rank]

    params, optimizer = stage(
        rank,
        in_groups,
        lr=0.5 + rank,
        momentum=rank / 2,
        weight_decay=rank,
        max_grad_norm=limits[rank],
        norm_group="world",
    )
    with counted() as calls:
        optimizer.step()
    assert len(calls) == 3
    assert float(optimizer.grad_norm) == pytest.approx((2 * 3 + 2 * 3 * 3) ** 0.5)
    assert params[0].detach().max() < 1
    with counted() as calls:
        optimizer.step()
    assert len(calls) == 1


NORMS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no clipping": ({"max_grad_norm": 1.0}, {}, f"{NORM} taken on rank 0 and not asked for on"),
    "clipping on one": ({}, {"max_grad_norm": 1.0}, f"{NORM} not asked for on rank 0 and taken"),
    "other norms": (
        {"max_grad_norm": 1.0},
        {"max_grad_norm": 0.25},
        "max_grad_norm is 0.25 on one and 1.0 on another",
    ),
    "error_if_nonfinite": (
        {"max_grad_norm": 1.0},
        {"max_grad_norm": 1.0, "error_if_nonfinite": True},
        "error_if_nonfinite of any param group is False on rank 0 and True on rank 1",
    ),
}


@on_ranks(2)
@pytest.mark.parametrize("name", NORMS)
def test_stages_that_differ(name: str) -> None:
    *options, text = NORMS[name]
    rank = dist.get_rank()
    _, optimizer = stage(rank, norm_group=dist.group.WORLD, **options[rank])
    said = refusal(optimizer)
    assert re.search(f"differ: {text}", said), said


@on_ranks(4)
def test_one_stage_whose_ranks_differ() -> None:
    """The other would wait for them in the norm."""
    mesh, rank = mesh_of(2, 2), dist.get_rank()
    params = [sharded(4, 3, mesh=mesh["inner"])]
    across = mesh.get_group("outer")
    lr = 0.5 if rank == 3 else 0.25
    optimizer = fusedopt.SGD(params, lr=lr, max_grad_norm=1.0, norm_group=across)
    assert "lr of param group 0 is 0.25 on rank 2 and 0.5 on rank 3" in refusal(optimizer)


def test_one_process_compares_nothing(mesh: Any) -> None:
    optimizer = fusedopt.SGD([sharded(4, 3, mesh=mesh)], lr=0.5, norm_group="world")
    assert_silent(optimizer.step)


def test_many_ranks_are_counted() -> None:
    assert _name([3]) == "rank 3"
    assert _name(list(range(1, 100))) == "ranks 1, 2, 3, 4, 5, 6, 7, 8 and 91 others"
