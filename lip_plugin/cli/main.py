"""The command line: lip-plugin certify | falsify | report.

Results go to stdout, everything else goes to stderr. This file reads the words and runs one
command. It imports no torch: help, wrong words and a certificate without weights are answered at
once. The commands themselves are in lip_plugin/cli/commands.py.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from lip_plugin.cli.saved import beside, folder_of, has_weights
from lip_plugin.errors import (
    ConfigError,
    LipschitzError,
    NotRetrofittedError,
    UnsupportedModelError,
)
from lip_plugin.stated import Stated

_ABOUT = "Prove, attack and report the Lipschitz bound of a saved model. Results go to stdout."
OK, USAGE, BAD_INPUT, UNSUPPORTED, FALSIFIED = range(5)
EXIT_CODES = """exit codes:
  0  proven, or the claim holds against the attack
  1  wrong usage
  2  bad input: truncated or edited files, nan, a config or certificate of other weights
  3  not supported: a model or layer without a proven rule, or without the caps that were asked for
  4  falsified: an attack exceeded the claimed bound"""
RESTARTS = 5  # one round of an attack has one start of each kind that falsify knows


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(USAGE, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after `lip-plugin`; None takes them from the command line.

    Returns:
        The exit code, one of `EXIT_CODES`.

    Raises:
        SystemExit: the words do not fit (code 1), or help was asked for (code 0).
    """
    args = _parser().parse_args(argv)
    try:
        code, result, text = _run(args)
    except (LipschitzError, ImportError, OSError) as error:
        if args.debug:
            raise
        code = _code_of(error)
        result, text = {"error": {"kind": type(error).__name__, "message": str(error)}}, ""
        sys.stderr.write(f"error: {error}\n")
    result = {"command": args.command, "exit_code": code, **result}
    sys.stdout.write(
        (json.dumps(_plain(result)) if args.json else text) + "\n" if args.json or text else ""
    )
    return code


def _run(args: argparse.Namespace) -> tuple[int, dict[str, Any], str]:
    """What a command gives: its exit code, its result as JSON types, and its text."""
    if args.command == "certify" and args.path.suffix == ".json":
        # A certificate without weights beside it needs no torch.
        stated = beside(args.path, Stated)
        if not has_weights(folder_of(args.path)):
            assert stated is not None
            text = f"{stated}\nintact, and no weights beside it: nothing was compared"
            return OK, {"certificate": body_of(stated), "compared": False}, text
    from lip_plugin.cli.commands import COMMANDS

    return COMMANDS[args.command](args)


def body_of(certificate: Stated) -> dict[str, Any]:
    """The fields of a certificate as JSON types."""
    return json.loads(certificate.to_json())["certificate"]


def _code_of(error: BaseException) -> int:
    if isinstance(error, ConfigError):
        return USAGE
    return (
        UNSUPPORTED
        if isinstance(error, (UnsupportedModelError, NotRetrofittedError, ImportError))
        else BAD_INPUT
    )


def _plain(value: Any) -> Any:
    """The same value with infinities and nan as strings, because JSON has none of them."""
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _parser() -> _Parser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser("lip-plugin", description=_ABOUT, epilog=EXIT_CODES, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, path: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=text, description=text, epilog=EXIT_CODES, formatter_class=raw
        )
        sub.set_defaults(command=name)
        sub.add_argument(
            "path", type=Path, metavar=path.partition(":")[0], help=path.partition(": ")[2]
        )
        sub.add_argument(
            "--nanogpt-dir", type=Path, metavar="DIR", help="checkout whose model.py made a ckpt.pt"
        )
        sub.add_argument(
            "--json", action="store_true", help="one JSON object on stdout, and nothing else"
        )
        sub.add_argument("--debug", action="store_true", help="show where an error was raised")
        return sub

    model = (
        "PATH: folder of save_pretrained or of a Trainer checkpoint, nanoGPT's ckpt.pt, "
        "or a certificate.json"
    )
    sub = command(
        "certify",
        model,
        "prove a Lipschitz bound, and check the certificate beside the weights",
    )
    sub.add_argument(
        "--source",
        choices=("weights", "caps"),
        default="weights",
        help="what the bound is computed from",
    )
    sub.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="layer by layer; default: above 1 GiB",
    )
    sub.add_argument(
        "--renew",
        action="store_true",
        help="write a new certificate.json, whatever the old one says",
    )
    sub = command("falsify", model, "attack a claimed bound from below")
    sub.add_argument(
        "--claim",
        type=float,
        help="the bound; default: certificate.json's, or the one that is proven now",
    )
    _attack_options(sub)
    run = "RUN: output folder of a run, or any folder with a model"
    sub = command("report", run, "write one HTML page about a run")
    sub.add_argument("--out", type=Path, help="the page; default: report.html in the folder")
    _attack_options(sub)
    return parser


def _attack_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--rounds", type=_count, default=2, help=f"rounds of {RESTARTS} starts each (default 2)"
    )
    sub.add_argument(
        "--steps", type=_count, default=60, help="ascent steps of each start (default 60)"
    )
    sub.add_argument(
        "--tokens", type=_count, default=17, help="length of the sequences (default 17)"
    )


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)
