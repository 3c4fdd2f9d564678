"""What the benchmarks share: options, a text and a small model to train on it, times, and results.

A benchmark reads its options with `parser`, prints a headline with `headline`, shows its rows in a
`Table`, and ends with the one JSON line of `finish`, which also says on which machine it ran.
Importing this file makes the checkout importable, for the models of tests/support.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
import transformers
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

from lip_plugin import LipschitzConfig, attach_projection
from lip_plugin.config_values import LEGACY
from lip_plugin.tables import line

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20
sys.path.insert(0, str(ROOT))


# Options


# Help of the options that several benchmarks have.
_HELP = {
    "attack_steps": "of the attack",
    "layers": "of the model",
    "length": "tokens in a sequence",
    "lr": "RMS->RMS norm per step",
    "repeats": "rounds that count",
    "restarts": "starts of the attack",
    "steps": "optimizer steps",
    "threads": "of torch",
    "vocabulary": "tokens of the model",
    "w_max": "cap on every block, RMS->RMS norm",
    "width": "of the model",
}


def parser(
    doc: str | None, *, text: bool = False, device: bool = False, **values: Any
) -> argparse.ArgumentParser:
    """A parser with --smoke, and with a docstring as its help.

    Args:
        text: add --text, see `read_text`.
        device: add --device, by default the GPU where there is one.
        values: options that take one value each: the default, or (default, help).
    """
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--smoke", action="store_true", help="a few steps of everything")
    if text:
        made.add_argument("--text", help="a text file; the Python language reference without")
    if device:
        made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name, value in values.items():
        default, about = value if isinstance(value, tuple) else (value, _HELP.get(name))
        flag = f"--{name.replace('_', '-')}"
        made.add_argument(flag, type=type(default), default=default, help=about)
    return made


def parsed(made: argparse.ArgumentParser, **smoke: Any) -> argparse.Namespace:
    """The options of the command line; with --smoke those that are named here take these values."""
    options = made.parse_args()
    for name, value in smoke.items() if options.smoke else ():
        setattr(options, name, value)
    return options


# A text, and a model over its characters


@dataclass(frozen=True)
class Characters:
    """A text as numbers, of characters or byte pairs: nine tenths to train on, and the rest."""

    train: Tensor
    held_out: Tensor
    vocabulary: list[str]


def read_text(path: str | None) -> str:
    """The text of a file, or the Python language reference, which comes with Python."""
    return Path(path).read_text() if path else "\n".join(topics.topics.values())


def encode(text: str, vocabulary: Sequence[str]) -> Tensor:
    """The characters of a text as indices of a vocabulary; unknown ones are left out."""
    index = {c: i for i, c in enumerate(vocabulary)}
    return torch.tensor([index[c] for c in text if c in index])


def characters(path: str | None, vocabulary: list[str] | None = None) -> Characters:
    """Read and encode a text (see `read_text`), with its own vocabulary unless one is given."""
    text = read_text(path)
    known = vocabulary or sorted(set(text))
    cut = int(0.9 * len(text))
    return Characters(encode(text[:cut], known), encode(text[cut:], known), known)


def byte_pairs(path: str | None, size: int) -> Characters:
    """Read a text (see `read_text`) as byte pairs that are learned from its first nine tenths.

    Args:
        path: of the text.
        size: of the vocabulary, at least 256.
    """
    text = read_text(path)
    cut = int(0.9 * len(text))
    parts = text[:cut], text[cut:]
    made = ByteLevelBPETokenizer()
    made.train_from_iterator(parts[:1], vocab_size=size, show_progress=False)
    train, held_out = (torch.tensor(made.encode(part).ids) for part in parts)
    return Characters(train, held_out, sorted(made.get_vocab(), key=made.get_vocab().__getitem__))


def windows(ids: Tensor, length: int, count: int, generator: Any = None) -> Tensor:
    """Sequences that begin anywhere in a text, [count, length]."""
    at = torch.randint(len(ids) - length, (count,), generator=generator)
    return torch.stack([ids[i : i + length] for i in at.tolist()])


def character_gpt2(
    vocabulary: int, width: int, layers: int, length: int, heads: int = 4, **more: Any
) -> GPT2LMHeadModel:
    """A fresh GPT-2 without dropout and without special tokens."""
    sizes = {"n_embd": width, "n_layer": layers, "n_head": heads, "n_positions": length}
    nothing: dict[str, Any] = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    nothing |= dict.fromkeys(("bos_token_id", "eos_token_id"))
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, **sizes, **nothing, **more))


# By family: class of the config, class of the model, and fields of the config besides sizes.
_FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {"query_pre_attn_scalar": 32}),
}


def character_model(family: str, vocabulary: int, width: int, layers: int, length: int) -> Any:
    """A fresh small model of a family, with 4 heads and MLPs of about the same size in each."""
    if family == "gpt2":
        return character_gpt2(vocabulary, width, layers, length)
    config, cls, more = _FAMILIES[family]
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": width // 4,
        "intermediate_size": 8 * width // 3 // 16 * 16,
        "max_position_embeddings": length,
    }
    nothing = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    made = getattr(transformers, config)(**sizes, **nothing, **more)
    return getattr(transformers, cls)(made)


def recipe(**changes: Any) -> LipschitzConfig:
    """The recipe of arXiv 2507.13338 with changes, so that a benchmark stays what it measured."""
    return LipschitzConfig(**{**LEGACY, **changes})


def own_loss(model: Any, batch: Tensor) -> Tensor:
    """The loss by which a model of transformers predicts each token from those before it."""
    return model(batch, labels=batch).loss


def fit(
    model: Any,
    optimizer: torch.optim.Optimizer,
    steps: int,
    draw: Callable[[], Tensor],
    *,
    loss: Callable[[Any, Tensor], Tensor] = own_loss,
    clip: float | None = None,
    title: str | None = None,
) -> Any:
    """Train at a rate that falls to zero in a straight line; returns the model, to be judged.

    Args:
        draw: makes the batch of a step.
        loss: of the model on a batch.
        clip: largest norm of all gradients together; None leaves them as they are.
        title: of a progress bar; None shows none.
    """
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / steps)
    for _ in tqdm(range(steps), desc=title, disable=title is None):
        batch = draw()
        optimizer.zero_grad()
        loss(model, batch).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        schedule.step()
    return model.eval()


def fit_warmed(
    model: Any,
    batches: Iterable[Mapping[str, Tensor]],
    steps: int,
    lr: float,
    *,
    held: bool,
    each: Callable[[int, Any], None] | None = None,
) -> None:
    """Train with AdamW: 20 steps of warm-up, then a rate that falls to zero in a straight line.

    Args:
        batches: arguments of the model for each of the `steps` steps, labels among them.
        held: keep the model's caps after every step.
        each: called before every step with its number and the optimizer.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    if held:
        attach_projection(optimizer, model, "spectral_normalize")
    model.train()
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 20) * (1.0 - step / steps)
        if each is not None:
            each(step, optimizer)
        model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


# Times and processes


@dataclass(frozen=True)
class Seconds:
    """Time on the clock, and processor time of this process, which a busy machine disturbs less."""

    wall: float
    cpu: float


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device != "cpu":
        torch.accelerator.synchronize()


def timed(call: Callable[[], Any], device: str = "cpu") -> Seconds:
    """Time one call, with all that it starts on the device."""
    synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    synchronize(device)
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def in_turns(
    calls: Mapping[str, Callable[[], Any]],
    repeats: int,
    device: str = "cpu",
    *,
    warm: int = 1,
    before: Callable[[str], None] | None = None,
    title: str | None = None,
) -> dict[str, list[Seconds]]:
    """Time calls one after the other, again and again, so that all meet the same busy machine.

    Args:
        calls: what is timed, by name.
        repeats: rounds that count.
        warm: rounds before them.
        before: called with the name before each call, and not timed.
        title: of a progress bar; None shows none.
    """
    found: dict[str, list[Seconds]] = {name: [] for name in calls}
    for _ in tqdm(range(warm + repeats), desc=title, disable=title is None):
        for name, call in calls.items():
            if before is not None:
                before(name)
            found[name].append(timed(call, device))
    return {name: times[warm:] for name, times in found.items()}


def medians(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median of each name's numbers."""
    return {name: statistics.median(values) for name, values in times.items()}


def wall(times: Mapping[str, Sequence[Seconds]]) -> dict[str, float]:
    """The median time on the clock for each name."""
    return medians({name: [t.wall for t in found] for name, found in times.items()})


def cpu(times: Mapping[str, Sequence[Seconds]]) -> dict[str, float]:
    """The median processor time for each name."""
    return medians({name: [t.cpu for t in found] for name, found in times.items()})


def ratios(values: Mapping[str, float], to: str) -> dict[str, float]:
    """Each value over the one of the name `to`."""
    return {name: value / values[to] for name, value in values.items()}


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function of a module returns when a fresh process calls it."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as pool:
        return pool.submit(function, *arguments).result()


def output_of(command: Sequence[str], **environment: str) -> str:
    """What a command prints; ends this program with the end of its errors if it fails."""
    found = subprocess.run(
        list(command), capture_output=True, text=True, env={**os.environ, **environment}
    )
    if found.returncode:
        raise SystemExit(found.stderr[-3000:])
    return found.stdout


def torchrun(processes: int, script: str | Path, *arguments: str, **environment: str) -> str:
    """What a script prints on several processes of one thread each."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc_per_node", str(processes), str(script), *arguments]
    return output_of(command, OMP_NUM_THREADS="1", **environment)


# Results


class Table:
    """A table that prints each row as soon as there is one.

    Args:
        columns: (title, format) of each column, as in `lip_plugin.tables`.
    """

    def __init__(self, *columns: tuple[str, str]) -> None:
        self.head, self.formats = zip(*columns)
        head = line(self.head, self.head, self.formats)
        print(f"{head}\n{'-' * len(head)}")

    def row(self, *cells: Any) -> None:
        """Print one row."""
        print(line(cells, self.head, self.formats), flush=True)


def machine(device: str = "cpu", *packages: str) -> dict[str, Any]:
    """Where and with what numbers were found: device, cores, threads, versions and the date.

    Args:
        packages: of which versions are given beside those of torch and transformers.
    """
    gpu = device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name()
        if gpu
        else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **{name: metadata.version(name) for name in ("torch", "transformers", *packages)},
        "date": datetime.date.today().isoformat(),
    }


def headline(title: str, found: Mapping[str, Any]) -> None:
    """Print what is measured, and the machine that it is measured on, in one line."""
    where = f"{found['device']}, cores: {found['cores']}, threads: {found['threads']}"
    known = ("device", "cores", "threads", "date")
    versions = [f"{name} {version}" for name, version in found.items() if name not in known]
    print(" | ".join([title, where, *versions, found["date"]]), flush=True)


def finish(name: str, found: Mapping[str, Any], **values: Any) -> str:
    """Print the JSON line of a benchmark, and return it.

    Args:
        found: the machine, see `machine`.
        values: what was measured, and with which options.
    """
    text = json.dumps({"benchmark": name, **values, **found})
    print(text)
    return text
