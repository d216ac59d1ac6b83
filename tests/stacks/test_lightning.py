"""Lightning: its Trainer in several precisions, checkpoints, Fabric, and the callback for it."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import fusedopt
from support.codes import have_codes
from support.equality import assert_equal
from support.tensors import by_id
from support.twins import LR, assert_near, batch, clipping, mixed_twins, tiny, twins, whole

L = pytest.importorskip("lightning", reason="make stacks installs it")

pytestmark = [pytest.mark.cpu_only, pytest.mark.unsanitized]

BFLOAT16 = torch.bfloat16


def batches() -> Any:
    xs, ys = zip(*(batch(step) for step in range(8)), strict=True)
    return DataLoader(TensorDataset(torch.cat(xs), torch.cat(ys)), batch_size=8)


class Task(L.LightningModule):
    def __init__(self, adamw: Any, dtype: torch.dtype, options: dict[str, Any]) -> None:
        super().__init__()
        self.net, self.adamw, self.options = tiny().to(dtype), adamw, options

    def training_step(self, pair: Any, _: int) -> Any:
        x, y = pair
        prediction = self.net(x.to(self.net.out.weight.dtype))
        return torch.nn.functional.mse_loss(prediction.float(), y)

    def configure_optimizers(self) -> Any:
        optimizer = self.adamw(self.net.parameters(), lr=LR, **self.options)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


class ManualTask(Task):
    """Which clips, steps and schedules itself, after every second batch."""

    automatic_optimization = False

    def training_step(self, pair: Any, index: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(super().training_step(pair, index))
        if index % 2:
            self.clip_gradients(optimizer, 0.3, "norm")
            optimizer.step()
            optimizer.zero_grad()
            self.lr_schedulers().step()


def fit(
    adamw: Any,
    folder: Path,
    task: Any = Task,
    dtype: torch.dtype = torch.float32,
    options: dict[str, Any] | None = None,
    resume: Path | None = None,
    **arguments: Any,
) -> Any:
    """The Trainer, after its training."""
    module = task(adamw, dtype, options or {})
    arguments = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        **arguments,
    }
    trainer = L.Trainer(**arguments)
    trainer.fit(module, batches(), ckpt_path=resume)
    assert isinstance(trainer.optimizers[0], adamw if isinstance(adamw, type) else adamw.func)
    return trainer


def params(trainer: Any) -> list[Any]:
    return whole(trainer.lightning_module.net.parameters())


def float16(init_scale: float = 2.0**20) -> dict[str, Any]:
    """What precision="16-mixed" means on a GPU; on a CPU Lightning takes the plugin only.

    The scale is so large that the first steps overflow.
    """
    from lightning.pytorch.plugins.precision import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]}


FULL: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"gradient_clip_val": 0.3},
    "clipped by value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "accumulated": {"accumulate_grad_batches": 3},
    "float64": {"precision": "64-true", "gradient_clip_val": 0.3},
}


@pytest.mark.parametrize("arguments", **by_id(FULL))
@twins
def test_fit(adamw: Any, arguments: dict[str, Any], tmp_path: Path) -> Any:
    return params(fit(adamw, tmp_path, **arguments))


@twins
def test_manual_optimization(adamw: Any, tmp_path: Path) -> Any:
    return params(fit(adamw, tmp_path, ManualTask))


@twins
def test_clipping_is_left_to_the_optimizer(adamw: Any, tmp_path: Path) -> Any:
    limit = None if adamw is fusedopt.AdamW else 0.3
    return params(fit(adamw, tmp_path, options=clipping(adamw, 0.3), gradient_clip_val=limit))


@pytest.mark.parametrize("limit", [None, 0.3], ids=["plain", "clipped"])
@mixed_twins
def test_fit_in_bf16(adamw: Any, limit: float | None, tmp_path: Path) -> Any:
    return params(fit(adamw, tmp_path, precision="bf16-mixed", gradient_clip_val=limit))


@pytest.mark.parametrize("limit", [None, 0.3], ids=["plain", "clipped"])
@mixed_twins
def test_fit_in_float16(adamw: Any, limit: float | None, tmp_path: Path) -> Any:
    trainer = fit(adamw, tmp_path, gradient_clip_val=limit, **float16())
    scale = trainer.precision_plugin.scaler.get_scale()
    assert scale < 2.0**20
    return [*params(trainer), scale]


@pytest.mark.parametrize("adamw", [fusedopt.AdamW, torch.optim.AdamW])
def test_fused_in_float16_is_not_clipped(adamw: Any, tmp_path: Path) -> None:
    """One made with fused=True unscales in its step, after Lightning would have to clip."""
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        fit(partial(adamw, fused=True), tmp_path, gradient_clip_val=0.3, **float16())


SETTINGS: dict[str, Any] = {
    "plain": (torch.float32, {}, {}),
    "clipped": (torch.float32, {"gradient_clip_val": 0.3}, {}),
    "everything": (
        BFLOAT16,
        {},
        {"master_weights": "split", "ema_decay": 0.9, "state_dtype": BFLOAT16, "max_grad_norm": 1},
    ),
    "masters": (BFLOAT16, {}, {"master_weights": "float32"}),
    "8 bits": (BFLOAT16, {}, {"master_weights": "split8", "state_dtype": "q8"}),
    "stochastic rounding": (BFLOAT16, {}, {"stochastic_rounding": True}),
}


def each_epoch(folder: Path) -> dict[str, Any]:
    from lightning.pytorch.callbacks import ModelCheckpoint

    keep = ModelCheckpoint(folder, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
    return {"enable_checkpointing": True, "callbacks": [keep]}


@pytest.mark.parametrize("setting", **by_id(SETTINGS))
@pytest.mark.usefixtures("codes_of_small_tensors")
def test_resumes(setting: Any, tmp_path: Path) -> None:
    """With the bits of a run that was not stopped."""
    dtype, arguments, options = setting
    run = partial(fit, fusedopt.AdamW, tmp_path, Task, dtype, options, **arguments)
    straight = run(**each_epoch(tmp_path))
    resumed = run(resume=tmp_path / "epoch=0.ckpt")
    assert resumed.global_step == straight.global_step == 16
    assert_equal(params(resumed), params(straight))
    states = [trainer.optimizers[0].state_dict()["state"] for trainer in (resumed, straight)]
    assert states[0]
    assert have_codes(states[0]) == (options.get("state_dtype") == "q8")
    assert_equal(*states)


def test_resumes_in_float16(tmp_path: Path) -> None:
    """With the scale that the first epoch has found."""
    straight = fit(fusedopt.AdamW, tmp_path, **float16(), **each_epoch(tmp_path))
    resumed = fit(fusedopt.AdamW, tmp_path, resume=tmp_path / "epoch=0.ckpt", **float16())
    assert_equal(params(resumed), params(straight))


def test_resumes_from_torch(tmp_path: Path) -> None:
    torchs = fit(torch.optim.AdamW, tmp_path, **each_epoch(tmp_path))
    resumed = fit(fusedopt.AdamW, tmp_path, resume=tmp_path / "epoch=0.ckpt")
    assert_near(params(resumed), params(torchs))


def fabric_of(precision: str) -> Any:
    from lightning.fabric.plugins.precision import MixedPrecision

    if precision == "32-true":
        return L.Fabric(accelerator="cpu")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20) if precision == "16-mixed" else None
    return L.Fabric(accelerator="cpu", plugins=[MixedPrecision(precision, "cpu", scaler=scaler)])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@mixed_twins
def test_fabric(adamw: Any, precision: str, tmp_path: Path) -> Any:
    """Clipped by Fabric, and saved and loaded on the way."""
    fabric = fabric_of(precision)

    def make() -> tuple[Any, Any]:
        model = tiny()
        return fabric.setup(model, adamw(model.parameters(), lr=LR))

    model, optimizer = make()
    for step, (x, y) in enumerate(fabric.setup_dataloaders(batches())):
        fabric.backward(torch.nn.functional.mse_loss(model(x), y))
        fabric.clip_gradients(model, optimizer, max_norm=0.3, error_if_nonfinite=False)
        optimizer.step()
        optimizer.zero_grad()
        if step == 4:
            fabric.save(tmp_path / "saved", {"model": model, "optimizer": optimizer})
            model, optimizer = make()
            fabric.load(tmp_path / "saved", {"model": model, "optimizer": optimizer})
    return whole(model.parameters())


AVERAGING: Any = {"ema_decay": 0.5}


def averages(trainer: Any) -> list[Any]:
    (optimizer,) = trainer.optimizers
    return [
        optimizer.state[param]["ema_param"].clone()
        for param in trainer.lightning_module.parameters()
    ]


class Watched(Task):
    """Keeps the params that every evaluation has seen, beside the averages of that time."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.seen: list[tuple[Any, Any]] = []

    def validation_step(self, *_: Any) -> None:
        has_averages = self.trainer.optimizers and self.trainer.optimizers[0].state
        now = averages(self.trainer) if has_averages else None
        self.seen.append((whole(self.net.parameters()), now))

    test_step = validation_step

    def predict_step(self, *_: Any) -> int:
        self.validation_step()
        return 0  # Lightning warns of None


class Failing(Watched):
    def validation_step(self, *_: Any) -> None:
        if not self.trainer.sanity_checking:
            raise ArithmeticError

    test_step = validation_step


def callback(**options: Any) -> Any:
    from fusedopt.integrations.lightning import FusedOptimizerCallback

    return FusedOptimizerCallback(**options)


def evaluated(folder: Path, task: Any = Watched, **arguments: Any) -> Any:
    """A Trainer after two epochs with the callback, a validation at the end of each."""
    arguments = {"callbacks": [callback()], "max_epochs": 2, **arguments}
    module = task(fusedopt.AdamW, torch.float32, AVERAGING)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **{"enable_checkpointing": False, **arguments},
    )
    trainer.fit(module, batches(), batches())
    return trainer


def test_callback_evaluates_the_averages(tmp_path: Path) -> None:
    trainer = evaluated(tmp_path)
    module, weights = trainer.lightning_module, params(trainer)
    for run in (trainer.validate, trainer.test, trainer.predict):
        run(module, batches())
        assert_equal(params(trainer), weights)
    of_sanity_check, seen = module.seen[:2], module.seen[2:]  # before there are averages
    assert len(seen) == 5 * 8
    assert_equal(of_sanity_check, [(whole(tiny().parameters()), None)] * 2)
    for found, now in seen:
        assert_equal(found, now)
    assert not torch.equal(seen[0][1][0], seen[-1][1][0])
    assert not torch.equal(weights[0], seen[-1][1][0])


def test_callback_leaves_weights_of_a_file(tmp_path: Path) -> None:
    """No averages of the latest step belong to them, then and later."""
    trainer = evaluated(tmp_path, **each_epoch_beside_the_callback(tmp_path))
    module = trainer.lightning_module
    saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=False)["state_dict"]
    module.seen.clear()
    trainer.test(module, batches(), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    trainer.test(module, batches(), verbose=False)
    assert len(module.seen) == 16
    for found, _ in module.seen:
        assert_equal(found, list(saved.values()))


def each_epoch_beside_the_callback(folder: Path, **options: Any) -> dict[str, Any]:
    found = each_epoch(folder)
    return {**found, "callbacks": [callback(**options), *found["callbacks"]]}


def test_callback_after_an_evaluation_that_raises(tmp_path: Path) -> None:
    trainers: list[Any] = []

    class Kept(Failing):
        def on_fit_start(self) -> None:
            trainers.append(self.trainer)

    with pytest.raises(ArithmeticError):
        evaluated(tmp_path, Kept)
    (trainer,) = trainers
    (optimizer,) = trainer.optimizers
    assert_equal(params(trainer), optimizer.fp32_params())  # refused within a swap
    assert not torch.equal(params(trainer)[0], averages(trainer)[0])


def test_callback_saves_the_averages(tmp_path: Path) -> None:
    """As the model of a checkpoint, from which training goes on with the same bits."""
    keep = each_epoch_beside_the_callback(tmp_path, averages_in_checkpoints=True)
    straight = evaluated(tmp_path, **keep)
    saved = torch.load(tmp_path / "epoch=1.ckpt", weights_only=False)
    assert_equal(list(saved["state_dict"].values()), averages(straight))
    resumed = fit(
        fusedopt.AdamW,
        tmp_path,
        options=AVERAGING,
        resume=tmp_path / "epoch=0.ckpt",
        callbacks=keep["callbacks"][:1],
    )
    assert_equal(params(resumed), params(straight))
    assert_equal(averages(resumed), averages(straight))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_callback_logs_the_norm(accumulate: int, tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    norms: list[float] = []

    class Noted(Task):
        def configure_optimizers(self) -> Any:
            optimizer = fusedopt.AdamW(self.net.parameters(), lr=LR, max_grad_norm=0.3)
            optimizer.register_step_post_hook(lambda *_: norms.append(float(optimizer.grad_norm)))
            return optimizer

    fit(
        fusedopt.AdamW,
        tmp_path,
        Noted,
        callbacks=[callback(grad_norm="norm")],
        logger=CSVLogger(tmp_path, name="", version=""),
        log_every_n_steps=1,
        accumulate_grad_batches=accumulate,
    )
    header, *rows = (tmp_path / "metrics.csv").read_text().splitlines()
    column = header.split(",").index("norm")
    logged = [float(row.split(",")[column]) for row in rows]
    assert len(norms) == {1: 16, 3: 6}[accumulate]
    assert logged == pytest.approx(norms, rel=1e-6)


@pytest.mark.parametrize("adamw", [fusedopt.AdamW, torch.optim.AdamW])
def test_callback_without_options(adamw: Any, tmp_path: Path) -> None:
    arguments: Any = {"gradient_clip_val": 0.3}
    plain = fit(adamw, tmp_path, **arguments)
    assert_equal(params(fit(adamw, tmp_path, callbacks=[callback()], **arguments)), params(plain))


def test_callback_refuses(tmp_path: Path, mesh: Any) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint
    from torch.distributed.fsdp import fully_shard

    clipped: Any = {"options": {"max_grad_norm": 1.0}, "callbacks": [callback()]}
    with pytest.raises(ValueError, match=r"gradient_clip_val=0.3 and by the optimizer's max_grad"):
        fit(fusedopt.AdamW, tmp_path, gradient_clip_val=0.3, **clipped)
    fit(fusedopt.AdamW, tmp_path, gradient_clip_val=0.0, **clipped)  # which does not clip

    saving = callback(averages_in_checkpoints=True)
    with pytest.raises(ValueError, match="with save_weights_only"):
        fit(
            fusedopt.AdamW,
            tmp_path,
            options=AVERAGING,
            callbacks=[saving, ModelCheckpoint(tmp_path, save_weights_only=True)],
            enable_checkpointing=True,
        )

    class Sharded(Task):
        def configure_optimizers(self) -> Any:
            fully_shard(self.net, mesh=mesh)
            return super().configure_optimizers()

    with pytest.raises(ValueError, match="its parameters are sharded"):
        fit(fusedopt.AdamW, tmp_path, Sharded, callbacks=[saving])

    optimizer = fusedopt.AdamW(tiny().parameters(), ema_decay=0.9)
    of_deepspeed = SimpleNamespace(global_step=0, optimizers=[SimpleNamespace(optimizer=optimizer)])
    with pytest.raises(ValueError, match="partitions of its own"):
        callback().on_fit_start(of_deepspeed, None)


def test_callback_in_pytorch_lightning(tmp_path: Path) -> None:
    """The same code under another name, whose Trainer takes the callback as it is."""
    other = pytest.importorskip("pytorch_lightning", reason="Lightning brings it along")
    seen: list[Any] = []

    class Module(other.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = tiny()

        training_step = Task.training_step

        def validation_step(self, *_: Any) -> None:
            seen.append((whole(self.net.parameters()), averages(self.trainer)))

        def configure_optimizers(self) -> Any:
            return fusedopt.AdamW(self.parameters(), lr=LR, max_grad_norm=0.3, **AVERAGING)

    trainer = other.Trainer(
        accelerator="cpu",
        max_epochs=1,
        num_sanity_val_steps=0,
        callbacks=[callback()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(Module(), batches(), batches())
    assert len(seen) == 8
    assert_equal(*map(list, zip(*seen, strict=True)))
    assert trainer.callback_metrics["grad_norm"] > 0
