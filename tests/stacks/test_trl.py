"""TRL: its trainer for supervised fine-tuning, which is transformers' with data of its own."""

from pathlib import Path
from typing import Any

import pytest

from support.twins import LR, twins, whole

pytest.importorskip("trl", reason="make stacks installs it")

pytestmark = [pytest.mark.cpu_only, pytest.mark.unsanitized]

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


@twins
def test_sft_trainer(adamw: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed
    from trl import SFTConfig, SFTTrainer

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
        max_grad_norm=0.3,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=LlamaForCausalLM(config),
        args=arguments,
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=tokenizer(),
        optimizer_cls_and_kwargs=(adamw, {"lr": LR}),
    )
    trainer.train()
    assert trainer.state.global_step == 4
    return whole(trainer.model.parameters())
