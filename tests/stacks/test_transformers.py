"""Hugging Face: the Trainer, LoRA adapters of PEFT in it, and the mixin for it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import fusedopt
from support.codes import have_codes
from support.equality import assert_equal
from support.tensors import by_id
from support.twins import LR, assert_near, clipping, mixed_twins, twins, whole

pytest.importorskip("transformers", reason="make stacks installs it")
pytest.importorskip("accelerate", reason="make stacks installs it")

pytestmark = [pytest.mark.cpu_only, pytest.mark.unsanitized]

LENGTH, VOCABULARY, STEPS = 12, 64, 6


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here needs a hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


class Sequences(torch.utils.data.Dataset):
    """Every second token follows from the one before."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(VOCABULARY, (LENGTH,), generator=generator)
        tokens[1::2] = (tokens[::2] * 3 + 1) % VOCABULARY
        return {"input_ids": tokens, "labels": tokens}


def llama(dtype: torch.dtype = torch.float32) -> Any:
    """With dropout: a resumed run needs the state of the random numbers, too."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        attention_dropout=0.1,
    )
    return LlamaForCausalLM(config).to(dtype)


def fit(
    adamw: Any,
    folder: Path,
    model: Any = None,
    options: dict[str, Any] | None = None,
    resume: Path | None = None,
    **arguments: Any,
) -> Any:
    """The Trainer, after its training."""
    trainer = make(adamw, folder, model, options, **arguments)
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer


def make(
    adamw: Any,
    folder: Path,
    model: Any = None,
    options: dict[str, Any] | None = None,
    trainer_class: Any = None,
    optimizers: Any = (None, None),
    **arguments: Any,
) -> Any:
    """The Trainer, of an optimizer's class or, without it, of an optimizer."""
    from transformers import Trainer, TrainingArguments

    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "learning_rate": LR,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **arguments,
    }
    return (trainer_class or Trainer)(
        model=model or llama(),
        args=TrainingArguments(**arguments),
        train_dataset=Sequences(),
        eval_dataset=Sequences(),
        optimizers=optimizers,
        optimizer_cls_and_kwargs=adamw and (adamw, {"lr": LR, **(options or {})}),
    )


def logged(trainer: Any, what: str) -> list[float]:
    return [entry[what] for entry in trainer.state.log_history if what in entry]


def losses_and_params(trainer: Any) -> list[Any]:
    losses = torch.tensor(logged(trainer, "loss"))
    assert len(losses) == trainer.args.max_steps
    return [losses, *whole(p for p in trainer.model.parameters() if p.requires_grad)]


ARGUMENTS: dict[str, dict[str, Any]] = {
    "plain": {"max_grad_norm": 0.0},
    "accumulated": {"gradient_accumulation_steps": 3},
    "clipped": {"max_grad_norm": 0.1},
}


@pytest.mark.parametrize("arguments", **by_id(ARGUMENTS))
@twins
def test_trainer(adamw: Any, arguments: dict[str, Any], tmp_path: Path) -> Any:
    trainer = fit(adamw, tmp_path, **arguments)
    assert isinstance(trainer.optimizer.optimizer, adamw)
    return losses_and_params(trainer)


@mixed_twins
def test_trainer_in_bf16(adamw: Any, tmp_path: Path) -> Any:
    return losses_and_params(fit(adamw, tmp_path, bf16=True))


@twins
def test_trainer_leaves_clipping_to_the_optimizer(adamw: Any, tmp_path: Path) -> Any:
    limit = 0.0 if adamw is fusedopt.AdamW else 0.1
    return losses_and_params(
        fit(adamw, tmp_path, options=clipping(adamw, 0.1), max_grad_norm=limit)
    )


@twins
def test_trainer_with_lora(adamw: Any, tmp_path: Path) -> Any:
    peft = pytest.importorskip("peft", reason="make stacks installs it")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    base = llama()
    before = whole(base.parameters())
    trainer = fit(adamw, tmp_path, peft.get_peft_model(base, lora))
    frozen = [p for p in trainer.model.parameters() if not p.requires_grad]
    assert_equal(whole(frozen), before)
    assert all(state for state in trainer.optimizer.state.values())
    return losses_and_params(trainer)


BFLOAT16 = torch.bfloat16
SETTINGS: dict[str, Any] = {
    "plain": (torch.float32, {}, {}),
    "bf16": (torch.float32, {"bf16": True}, {}),
    "everything": (
        BFLOAT16,
        {},
        {"master_weights": "split", "ema_decay": 0.9, "state_dtype": BFLOAT16, "max_grad_norm": 1},
    ),
    "masters": (BFLOAT16, {}, {"master_weights": "float32"}),
    "8 bits": (BFLOAT16, {}, {"master_weights": "split8", "state_dtype": "q8"}),
    "stochastic rounding": (BFLOAT16, {}, {"stochastic_rounding": True}),
}


@pytest.mark.parametrize("setting", **by_id(SETTINGS))
@pytest.mark.usefixtures("codes_of_small_tensors")
def test_trainer_resumes(setting: Any, tmp_path: Path) -> None:
    """With the bits of a run that was not stopped."""
    dtype, arguments, options = setting

    def run(**more: Any) -> Any:
        return fit(fusedopt.AdamW, tmp_path, llama(dtype), options, **arguments, **more)

    straight = run(save_strategy="steps", save_steps=3)
    resumed = run(resume=tmp_path / "checkpoint-3")
    assert resumed.state.global_step == STEPS
    assert_equal(whole(resumed.model.parameters()), whole(straight.model.parameters()))
    states = [trainer.optimizer.state_dict()["state"] for trainer in (resumed, straight)]
    assert states[0]
    assert have_codes(states[0]) == (options.get("state_dtype") == "q8")
    assert_equal(*states)


def test_trainer_resumes_from_torch(tmp_path: Path) -> None:
    torchs = fit(torch.optim.AdamW, tmp_path, save_strategy="steps", save_steps=3)
    resumed = fit(fusedopt.AdamW, tmp_path, resume=tmp_path / "checkpoint-3")
    assert_near(whole(resumed.model.parameters()), whole(torchs.model.parameters()))


def mixed(*bases: Any) -> Any:
    """A Trainer class with the mixin."""
    from transformers import Trainer

    from fusedopt.integrations.transformers import TrainerMixin

    return type("MyTrainer", (TrainerMixin, *(bases or (Trainer,))), {})


@contextmanager
def no_clipping_by_accelerate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nor measuring, for which the Trainer asks it to clip by infinity."""
    with monkeypatch.context() as patch:
        patch.delattr("accelerate.Accelerator.clip_grad_norm_")
        yield


@pytest.mark.parametrize("accumulate", [1, 3])
@twins
def test_mixin_clips_once(
    adamw: Any, accumulate: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """Whatever the Trainer's own limit is; and logs the norm as the Trainer does."""
    if adamw is fusedopt.AdamW:
        with no_clipping_by_accelerate(monkeypatch):
            trainer = fit(
                adamw,
                tmp_path,
                options=clipping(adamw, 0.1),
                trainer_class=mixed(),
                max_grad_norm=0.01,
                gradient_accumulation_steps=accumulate,
            )
    else:
        trainer = fit(adamw, tmp_path, max_grad_norm=0.1, gradient_accumulation_steps=accumulate)
    norms = logged(trainer, "grad_norm")
    assert len(norms) == STEPS
    assert max(norms) > 0.1
    return [*losses_and_params(trainer), torch.tensor(norms)]


def test_mixin_with_an_optimizer_that_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = clipping(fusedopt.AdamW, 0.1)
    expected = fit(fusedopt.AdamW, tmp_path, options=options, trainer_class=mixed())
    first = make(fusedopt.AdamW, tmp_path, options=options)
    made = (first.create_optimizer(), None)
    trainer = make(None, tmp_path, first.model, trainer_class=mixed(), optimizers=made)
    with no_clipping_by_accelerate(monkeypatch):
        trainer.train()
    assert trainer.optimizer.optimizer is made[0]
    assert_equal(losses_and_params(trainer), losses_and_params(expected))


@pytest.mark.parametrize("adamw", [fusedopt.AdamW, torch.optim.AdamW])
def test_mixin_without_options(adamw: Any, tmp_path: Path) -> None:
    """It does what the Trainer does."""
    arguments: Any = {"max_grad_norm": 0.1, "eval_strategy": "epoch"}
    plain = fit(adamw, tmp_path, **arguments)
    other = fit(adamw, tmp_path, trainer_class=mixed(), **arguments)
    for what in ("grad_norm", "eval_loss"):
        assert logged(plain, what) == logged(other, what) != []
    assert_equal(losses_and_params(other), losses_and_params(plain))


AVERAGING: Any = {"ema_decay": 0.5}


def averages(trainer: Any) -> list[Any]:
    state = trainer.optimizer.optimizer.state
    return [state[param]["ema_param"].clone() for param in trainer.model.parameters()]


def test_mixin_evaluates_the_averages(tmp_path: Path) -> None:
    trainer = fit(fusedopt.AdamW, tmp_path, options=AVERAGING, trainer_class=mixed())
    weights = whole(trainer.model.parameters())
    found = trainer.evaluate()["eval_loss"], trainer.predict(Sequences()).metrics["test_loss"]
    assert_equal(whole(trainer.model.parameters()), weights)

    plain = make(fusedopt.AdamW, tmp_path, trainer.model)
    of_weights = plain.evaluate()["eval_loss"]
    with torch.no_grad():
        for param, average in zip(trainer.model.parameters(), averages(trainer), strict=True):
            param.copy_(average)
    of_averages = plain.evaluate()["eval_loss"]
    assert found == (of_averages, of_averages)
    assert of_averages != of_weights


def test_mixin_saves_the_averages(tmp_path: Path) -> None:
    """But for checkpoints, from which training goes on with the same bits."""
    from transformers import LlamaForCausalLM

    def run(**more: Any) -> Any:
        return fit(fusedopt.AdamW, tmp_path, options=AVERAGING, trainer_class=mixed(), **more)

    def saved(folder: Path) -> list[Any]:
        return whole(LlamaForCausalLM.from_pretrained(folder).parameters())

    straight = run(save_strategy="steps", save_steps=3)
    straight.save_model(str(tmp_path / "final"))
    assert_equal(saved(tmp_path / "final"), averages(straight))
    weights = whole(straight.model.parameters())
    assert_equal(saved(tmp_path / "checkpoint-6"), weights)
    resumed = run(resume=tmp_path / "checkpoint-3")
    assert_equal(whole(resumed.model.parameters()), weights)
    assert_equal(averages(resumed), averages(straight))


def test_mixin_loads_the_best_averages(tmp_path: Path) -> None:
    """With such a learning rate the first evaluation is the best."""
    arguments: Any = {
        "trainer_class": mixed(),
        "learning_rate": 1.0,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
    }
    trainer = fit(fusedopt.AdamW, tmp_path, options={**AVERAGING, "lr": 1.0}, **arguments)
    assert trainer.state.best_metric < logged(trainer, "eval_loss")[-1]
    assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric
    with pytest.raises(ValueError, match="not saved with save_only_model"):
        fit(fusedopt.AdamW, tmp_path, options=AVERAGING, save_only_model=True, **arguments)


def test_mixin_before_there_are_averages(tmp_path: Path) -> None:
    plain = make(fusedopt.AdamW, tmp_path).evaluate()["eval_loss"]
    trainer = make(fusedopt.AdamW, tmp_path, options=AVERAGING, trainer_class=mixed())
    assert trainer.evaluate()["eval_loss"] == plain
    trainer.args.eval_on_start = True
    trainer.train()
    assert logged(trainer, "eval_loss")[-1] == plain


def test_mixin_after_an_evaluation_that_raises(tmp_path: Path) -> None:
    from transformers import Trainer

    class Failing(Trainer):
        def prediction_step(self, *_: Any, **__: Any) -> Any:
            raise ArithmeticError

    trainer = fit(fusedopt.AdamW, tmp_path, options=AVERAGING, trainer_class=mixed(Failing))
    weights = whole(trainer.model.parameters())
    with pytest.raises(ArithmeticError):
        trainer.evaluate()
    assert_equal(whole(trainer.model.parameters()), weights)
    assert trainer.optimizer.state_dict()["state"]  # refused within a swap


def test_mixin_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Trainer

    from fusedopt.integrations.transformers import TrainerMixin

    with pytest.raises(TypeError, match=r"MyTrainer\(TrainerMixin, transformers.Trainer\)"):
        type("Wrong", (Trainer, TrainerMixin), {})
    for options in ({"max_grad_norm": 1.0}, AVERAGING):
        trainer = make(fusedopt.AdamW, tmp_path, options=options, trainer_class=mixed())
        trainer.is_deepspeed_enabled = True
        with pytest.raises(ValueError, match="gradient_clipping in DeepSpeed's configuration"):
            trainer.create_optimizer()
    monkeypatch.delattr(Trainer, "_get_grad_norm")
    with pytest.raises(RuntimeError, match=r"relies on _get_grad_norm of transformers.Trainer"):
        mixed()
