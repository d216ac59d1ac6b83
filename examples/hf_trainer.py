"""transformers' Trainer, full or with LoRA adapters: its steps clip, and averages are evaluated.

Examples:
    python examples/hf_trainer.py
    python examples/hf_trainer.py --lora --output lora-trainer
"""

from __future__ import annotations

import argparse

import torch
import transformers
from torch import Tensor

import fusedopt
from fusedopt.integrations.transformers import TrainerMixin

VOCABULARY, LENGTH = 64, 16


class Trainer(TrainerMixin, transformers.Trainer):
    """Leaves clipping to the optimizer, logs its grad_norm, evaluates and saves its averages."""


class Sequences(torch.utils.data.Dataset):
    """Every second token follows from the one before."""

    def __init__(self, first: int, count: int) -> None:
        self.first, self.count = first, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.first + index)
        tokens = torch.randint(VOCABULARY, (LENGTH,), generator=generator)
        tokens[1::2] = tokens[::2]
        return {"input_ids": tokens, "labels": tokens}


def make_model(lora: bool) -> torch.nn.Module:
    transformers.set_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
    )
    model = transformers.LlamaForCausalLM(config)
    if not lora:
        return model
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lora", action="store_true", help="train adapters of PEFT only")
    parser.add_argument("--output", default="hf-trainer", metavar="FOLDER", help="to save to")
    args = parser.parse_args()
    trainer = Trainer(
        model=make_model(args.lora),
        args=transformers.TrainingArguments(
            args.output,
            per_device_train_batch_size=16,
            max_steps=60,
            lr_scheduler_type="cosine",
            logging_steps=10,
            eval_strategy="steps",
            eval_steps=20,
            save_steps=20,  # checkpoints: weights, and the optimizer's state with the averages
            report_to=[],
        ),
        train_dataset=Sequences(0, 1024),
        eval_dataset=Sequences(1024, 64),
        # The Trainer's own max_grad_norm, 1.0 if nothing is said, is not used beside this one.
        optimizer_cls_and_kwargs=(
            fusedopt.AdamW,
            {"lr": 1e-2, "max_grad_norm": 1.0, "ema_decay": 0.9},
        ),
    )
    trainer.train()
    trainer.save_model()  # the averages


if __name__ == "__main__":
    main()
