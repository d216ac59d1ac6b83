"""TRL: its trainer for supervised fine-tuning, which is transformers' with data of its own."""

from pathlib import Path
from typing import Any

import pytest
import torch

import fusedopt
from support.twins import LR, twins, whole

pytest.importorskip("trl", reason="make stacks installs it")

pytestmark = [pytest.mark.cpu_only, pytest.mark.unsanitized]

LIMIT = 0.3
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]


def tokenizer() -> Any:
    """Of a few words, as there is none to download."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    numbers = {word: number for number, word in enumerate(["<end>", "<unknown>", *WORDS])}
    tokens = Tokenizer(models.WordLevel(numbers, unk_token="<unknown>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens, eos_token="<end>", pad_token="<end>", unk_token="<unknown>"
    )


@pytest.mark.parametrize("mixin", [False, True], ids=["plain", "with the mixin"])
@twins
def test_sft_trainer(
    adamw: Any, mixin: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """Clipped by the Trainer or, with the mixin, by the optimizer."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed
    from trl import SFTConfig, SFTTrainer

    from fusedopt.integrations.transformers import TrainerMixin

    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 2,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
    )
    texts = [" ".join(WORDS[i % 8 :] + WORDS[: i % 8]) for i in range(16)]
    arguments = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=LR,
        max_grad_norm=LIMIT,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    clips_itself = mixin and adamw is fusedopt.AdamW
    trainer_class = type("Mixed", (TrainerMixin, SFTTrainer), {}) if mixin else SFTTrainer
    if clips_itself:
        arguments.max_grad_norm = LIMIT / 10  # not used
    trainer = trainer_class(
        model=LlamaForCausalLM(config),
        args=arguments,
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=tokenizer(),
        optimizer_cls_and_kwargs=(
            adamw,
            {"lr": LR, **({"max_grad_norm": LIMIT} if clips_itself else {})},
        ),
    )
    trainer.train()
    assert trainer.state.global_step == 4
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "loss" in entry]
    assert max(norms) > LIMIT
    return [*whole(trainer.model.parameters()), torch.tensor(norms)]
