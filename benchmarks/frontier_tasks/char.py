"""Task char: the character transformer of arXiv 2507.13338 on a text.

It is a GPT-2 of 3 blocks, 4 heads, width 256 and length 256. Without a constraint it is the plain
GPT-2, with its norms and biases. Bounds are from the token norm of the embeddings to the token norm
of the logits. eps is the RMS norm by which the embedding of every token may move, all at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from common import character_model, characters, recipe, windows
from torch import Tensor, nn
from transformers import PreTrainedModel

from frontier_tasks.runs import Run, Steps
from lip_plugin import (
    LipschitzConfig,
    attacked_accuracy,
    certified_accuracy,
    certify,
    retrofit,
)
from lip_plugin.surgery.state import find_retrofit

EPS = (0.001, 0.003, 0.01, 0.03, 0.1)
_SCORED = 220  # sequences in each half of the validation text that are scored at most
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Split:
    """Ids of a text.

    Attributes:
        train: the first nine tenths of it.
        choose: sequences [n, length] of the second half of the rest, to choose learning rates by.
        held_out: sequences [n, length] of the first half of the rest, for the results.
        vocabulary: how many characters there are.
    """

    train: Tensor
    choose: Tensor
    held_out: Tensor
    vocabulary: int


def data(options: Any, seed: int) -> Split:
    """The same cut for every seed: text has an order."""
    return _data(options.text, options.length)


@cache
def _data(path: str | None, length: int) -> Split:
    text = characters(path)
    rest = text.held_out.to(DEVICE)
    blocks = rest[: len(rest) // length * length].view(-1, length)
    held_out, choose = blocks.chunk(2)
    train, size = text.train.to(DEVICE), len(text.vocabulary)
    return Split(train, choose[:_SCORED], held_out[:_SCORED], size)


def train(
    run: Run, lr: float, seed: int, split: Split, options: Any, steps: int
) -> Iterator[PreTrainedModel]:
    """Yields the model after every step (the same object)."""
    torch.manual_seed(seed)
    model = character_model(run.family, split.vocabulary, options.width, 3, options.length)
    model = model.to(DEVICE)
    if run.config is not None:
        changes = dict(run.config)
        preset = changes.pop("preset", None)
        retrofit(model, LipschitzConfig.preset(preset, **changes) if preset else recipe(**changes))
    stepping = Steps(run, model, lr, steps)
    model.train()
    for _ in range(steps):
        batch = windows(split.train, options.length, options.batch)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=getattr(options, "autocast", False)):
            logits = model(batch).logits
        stepping.take(_training_loss(logits.float(), batch, run))
        yield model


def _training_loss(logits: Tensor, ids: Tensor, run: Run) -> Tensor:
    """Cross-entropy at the run's temperature, after its margin is taken from the right logits."""
    if "margin" in run.loss:
        right = nn.functional.one_hot(ids[:, 1:], logits.shape[-1])
        logits = torch.cat([logits[:, :-1] - run.loss["margin"] * right, logits[:, -1:]], 1)
    return _loss(logits / run.temperature, ids, run.loss.get("label_smoothing", 0.0))


def _loss(logits: Tensor, ids: Tensor, label_smoothing: float = 0.0) -> Tensor:
    predicted, following = logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    return nn.functional.cross_entropy(predicted, following, label_smoothing=label_smoothing)


@torch.no_grad()
def score(model: PreTrainedModel, blocks: Tensor, temperature: float = 1.0) -> dict[str, float]:
    """Accuracy and loss, by default at the network's own scale."""
    model.eval()
    loss = accuracy = 0.0
    for batch in blocks.split(20):
        logits = model(batch).logits / temperature
        share = len(batch) / len(blocks)
        loss += float(_loss(logits, batch)) * share
        accuracy += float((logits[:, :-1].argmax(-1) == batch[:, 1:]).double().mean()) * share
    return {"accuracy": accuracy, "loss": loss}


def choose(model: PreTrainedModel, split: Split, temperature: float) -> dict[str, float]:
    """Scores at the training temperature on the text that learning rates are chosen by."""
    return score(model, split.choose, temperature)


def evaluate(model: PreTrainedModel, split: Split, options: Any) -> dict[str, Any]:
    """Scores, proven bounds, certified and attacked accuracy on the first held-out sequences."""
    found: dict[str, Any] = score(model, split.held_out)
    sources = ("weights", "caps") if find_retrofit(model) else ("weights",)
    certificates = {source: certify(model, source) for source in sources}
    found["bound"] = {
        s: c.lipschitz if c.lipschitz < float("inf") else "inf" for s, c in certificates.items()
    }
    found["log10_bound"] = {s: round(c.log10_lipschitz, 4) for s, c in certificates.items()}
    batches = list(split.held_out[: options.examples].split(4))
    proven = certified_accuracy(model, batches, EPS, refine=options.refine)
    restarts, steps = options.attack
    attacked = attacked_accuracy(model, batches, EPS, restarts=restarts, steps=steps)
    # the same predictions, in the same order; the clean share is of these sequences only
    assert not bool((proven.right & ~attacked.right).any()), "an attack broke what was proven"
    found |= {"eps": EPS, "certified": list(proven.accuracy), "attacked": list(attacked.accuracy)}
    return found | {"examples": proven.right.shape[1], "clean": round(proven.clean, 5)}
