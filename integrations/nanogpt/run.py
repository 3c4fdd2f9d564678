"""Runs an untouched nanoGPT checkout under constraint: its train.py, its sample.py, its options.

    RUN="python -m lip_plugin.integrations.nanogpt --nanogpt-dir DIR"
    $RUN config/train_shakespeare_char.py --lip_w_max=2
    $RUN sample.py --out_dir=out-shakespeare-char

No file of the checkout is changed. The class `model.GPT` is patched in memory, so that every model
it builds is retrofitted and trained by LipschitzMuon.

Beside each ckpt.pt the runner writes `lipschitz.json` and `certificate.json`. The first holds the
options, and is read again by init_from=resume and sample.py.

A fork of nanoGPT with its own start script calls `patch(GPT, LipschitzConfig(...))` instead, right
after it imports GPT; see patch.py.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import logging
import os
import runpy
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lip_plugin.certificate.certify import certify
from lip_plugin.config_values import LEGACY
from lip_plugin.errors import CertificateError, ConfigError, LipschitzError, UnsupportedModelError
from lip_plugin.files import write_whole
from lip_plugin.integrations.nanogpt.checkout import (
    CERTIFICATE,
    CHECKPOINT,
    SCRIPTS,
    SETTINGS,
    inside,
)
from lip_plugin.integrations.nanogpt.patch import OPTION_PREFIX, Options, install
from lip_plugin.surgery.state import config_of

# Not __name__, which is "__main__" under python -m.
logger = logging.getLogger("lip_plugin.integrations.nanogpt.run")


class _Run:
    """One run of a script: its options, its model, and the files beside its checkpoints."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.given = dict(given)
        self.options = Options.from_dict(given)
        self.model: nn.Module | None = None

    def built(self, model: nn.Module) -> None:
        self.model = model
        # What None and "auto" stand for is written out, so that a later version that chooses
        # otherwise resumes the run as it is.
        self.options = replace(self.options, config=config_of(model))
        logger.info("constrained: %s", json.dumps(self.options.to_dict()))

    @contextmanager
    def beside_checkpoints(self) -> Iterator[None]:
        """Let torch.save and torch.load of a ckpt.pt also write and read the files beside it."""
        save, load = torch.save, torch.load

        def save_too(obj: Any, f: Any, *args: Any, **kwargs: Any) -> None:
            if not _is_checkpoint(f) or self.model is None:
                return save(obj, f, *args, **kwargs)
            folder = Path(f).parent
            # A certificate must never lie beside weights that it was not computed from.
            (folder / CERTIFICATE).unlink(missing_ok=True)
            write_whole(
                folder / SETTINGS,
                json.dumps(self.options.to_dict(), indent=2, sort_keys=True) + "\n",
            )
            save(obj, f, *args, **kwargs)
            self._certify(self.model, folder)

        def load_too(f: Any, *args: Any, **kwargs: Any) -> Any:
            if _is_checkpoint(f) and Path(f).exists():
                self._adopt(Path(f))
            return load(f, *args, **kwargs)

        torch.save, torch.load = save_too, load_too
        try:
            yield
        finally:
            torch.save, torch.load = save, load

    def _certify(self, model: nn.Module, folder: Path) -> None:
        try:
            weights, caps = certify(model, source="weights"), certify(model, source="caps")
        except CertificateError as error:  # a missing certificate must not end a long training
            logger.error("no certificate for this checkpoint: %s", error)
            return
        write_whole(folder / CERTIFICATE, weights.to_json() + "\n")
        logger.info(
            "certificate from weights 10^%.2f, from caps 10^%.2f, radius %.4g",
            weights.log10_lipschitz,
            caps.log10_lipschitz,
            weights.radius,
        )

    def _adopt(self, checkpoint: Path) -> None:
        """Take the options that the checkpoint was made with, and refuse others."""
        path = checkpoint.with_name(SETTINGS)
        if not path.exists():
            raise ConfigError(
                f"{checkpoint} has no {SETTINGS} beside it, so it is a plain nanoGPT checkpoint, "
                "trained with norms. Use another out_dir and init_from=scratch, or run nanoGPT's "
                "own scripts on it."
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            # An option that did not exist when the run began has the value of that time.
            stored = Options.from_dict({**LEGACY, "logit_scale": 1.0, **values})
        except (ValueError, TypeError, AttributeError) as error:
            cure = f"Restore the one that was written with {CHECKPOINT}."
            raise ConfigError(f"{path} cannot be read: {error}. {cure}") from error
        values = stored.to_dict()
        given = Options.from_dict(self.given).to_dict()
        wrong = [k for k in self.given if values[k] != given[k]]
        if wrong:
            told = ", ".join(
                f"{OPTION_PREFIX}{k}={self.given[k]} (it has {values[k]})" for k in wrong
            )
            raise ConfigError(
                f"{checkpoint} was made with other options than {told}. Leave them out: they are "
                f"read from {SETTINGS}. To change the rates of a resumed run, change nanoGPT's "
                "learning_rate: all of them move in proportion to it."
            )
        self.options = stored


def _is_checkpoint(f: Any) -> bool:
    return isinstance(f, (str, os.PathLike)) and Path(f).name == CHECKPOINT


def run(
    directory: str | Path, arguments: Sequence[str] = (), options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Run the checkout's train.py, or the script of SCRIPTS that `arguments` starts with.

    Args:
        directory: the checkout. It is the script's working directory, as nanoGPT expects.
        arguments: the arguments of the script.
        options: our options, by the names that `Options.to_dict` has.

    Returns:
        The script's global variables at its end.

    Raises:
        ConfigError: `directory` is no checkout, or an option is unknown, out of range, or differs
            from that of the checkpoint.
        UnsupportedModelError: `model.GPT` is not nanoGPT's, or the script never built one.
    """
    folder, arguments = Path(directory).resolve(), list(arguments)
    script = arguments.pop(0) if arguments and arguments[0] in SCRIPTS else SCRIPTS[0]
    missing = [name for name in ("model.py", script) if not (folder / name).is_file()]
    if missing:
        raise ConfigError(
            f"{folder} has no {' and no '.join(missing)}: --nanogpt-dir takes the folder of a "
            "nanoGPT checkout (git clone https://github.com/karpathy/nanoGPT)."
        )
    state = _Run(options or {})
    with inside(folder, [script, *arguments]):
        gpt_class = getattr(importlib.import_module("model"), "GPT", None)
        if gpt_class is None:
            raise UnsupportedModelError(
                f"{folder / 'model.py'} has no class GPT: that is not nanoGPT."
            )
        undo = install(gpt_class, lambda: state.options, state.built)
        try:
            with state.beside_checkpoints():
                result = runpy.run_path(str(folder / script), run_name="__main__")
        finally:
            undo()
    if state.model is None:
        raise UnsupportedModelError(f"{script} built no model.GPT: nothing was constrained.")
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lip_plugin.integrations.nanogpt",
        usage="%(prog)s --nanogpt-dir DIR [--lip_KEY=VALUE ...] [train.py|sample.py] "
        "[its arguments ...]",
        description="Run an untouched nanoGPT checkout with norm-constrained weights, "
        "LipschitzMuon, and a certificate beside every checkpoint. Paths are relative to DIR, as "
        f"in nanoGPT. {SETTINGS} beside {CHECKPOINT} keeps the {OPTION_PREFIX}* options, so "
        "init_from=resume and sample.py need none of them.",
        epilog="Meanings: LipschitzConfig's documentation, and for the rates Options in this "
        "module.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--nanogpt-dir", required=True, metavar="DIR", help="folder of the checkout"
    )
    for name, default in Options().to_dict().items():
        parser.add_argument(
            OPTION_PREFIX + name,
            dest=name,
            metavar="VALUE",
            default=argparse.SUPPRESS,
            help=f"default {default}",
        )
    return parser


def _value(text: str) -> Any:
    """Read a python literal, as nanoGPT does for its options. Any other text is a string."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def main(argv: Sequence[str] | None = None) -> int:
    """The command line.

    Returns:
        The exit status. Options that are not understood end the process with status 2.
    """
    parser = _parser()
    known, theirs = parser.parse_known_args(argv)
    unknown = [a for a in theirs if a.startswith(OPTION_PREFIX)]
    if unknown:
        valid = " ".join(OPTION_PREFIX + name for name in Options().to_dict())
        parser.error(f"unknown option {' '.join(unknown)}; there are {valid}")
    given = {k: _value(v) for k, v in vars(known).items() if k != "nanogpt_dir"}
    logging.basicConfig(format="%(message)s")
    first = os.environ.get("RANK", "0") == "0"  # under torchrun, one process speaks for all
    logging.getLogger("lip_plugin").setLevel(logging.INFO if first else logging.WARNING)
    try:
        run(known.nanogpt_dir, theirs, given)
    except LipschitzError as error:
        logger.debug("raised here", exc_info=True)
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0
