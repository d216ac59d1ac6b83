"""Hugging Face: the Trainer, and LoRA adapters of PEFT in it."""

from pathlib import Path
from typing import Any

import pytest
import torch

import fusedopt
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
    from transformers import Trainer, TrainingArguments

    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "learning_rate": LR,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **arguments,
    }
    trainer = Trainer(
        model=model or llama(),
        args=TrainingArguments(**arguments),
        train_dataset=Sequences(),
        optimizer_cls_and_kwargs=(adamw, {"lr": LR, "weight_decay": 0.1, **(options or {})}),
    )
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer


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
    "stochastic rounding": (BFLOAT16, {}, {"stochastic_rounding": True}),
}


@pytest.mark.parametrize("setting", **by_id(SETTINGS))
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
    assert_equal(*states)


def test_trainer_resumes_from_torch(tmp_path: Path) -> None:
    torchs = fit(torch.optim.AdamW, tmp_path, save_strategy="steps", save_steps=3)
    resumed = fit(fusedopt.AdamW, tmp_path, resume=tmp_path / "checkpoint-3")
    assert_near(whole(resumed.model.parameters()), whole(torchs.model.parameters()))
