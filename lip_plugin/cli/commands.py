"""The command line: lip-plugin certify | falsify | report.

Results go to stdout, everything else goes to stderr. `main` runs one command, and the functions
below it do what the three commands promise.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from lip_plugin.certificate.attack.falsify import Falsification, falsify
from lip_plugin.certificate.certify import certify
from lip_plugin.certificate.result import Certificate, check_same
from lip_plugin.cli.charts import require_matplotlib
from lip_plugin.cli.report import Report, bound_text, render
from lip_plugin.cli.saved import (
    CERTIFICATE,
    beside,
    folder_of,
    has_weights,
    history,
    load,
    model_of_run,
)
from lip_plugin.errors import (
    CertificateError,
    ConfigError,
    LipschitzError,
    NotRetrofittedError,
    UnsupportedModelError,
)
from lip_plugin.files import write_whole
from lip_plugin.progress import steps
from lip_plugin.surgery.block_norms import block_norms

OK, USAGE, BAD_INPUT, UNSUPPORTED, FALSIFIED = range(5)
EXIT_CODES = """exit codes:
  0  proven, or the claim holds against the attack
  1  wrong usage
  2  bad input: truncated or edited files, nan, a config or certificate of other weights
  3  not supported: a model or layer without a proven rule, or without the caps that were asked for
  4  falsified: an attack exceeded the claimed bound"""
_STREAM_FROM = 1 << 30  # certify reads weights of this many bytes or more layer by layer
_RESTARTS = 5  # one round of an attack has one start of each kind that falsify knows


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
        code, result, text = args.run(args)
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
    parser = _Parser("lip-plugin", description=__doc__, epilog=EXIT_CODES, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[..., Any], path: str, text: str
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=text, description=text, epilog=EXIT_CODES, formatter_class=raw
        )
        sub.set_defaults(run=run)
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
        _certify,
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
    sub = command("falsify", _falsify, model, "attack a claimed bound from below")
    sub.add_argument(
        "--claim",
        type=float,
        help="the bound; default: certificate.json's, or the one that is proven now",
    )
    _attack_options(sub)
    run = "RUN: output folder of a run, or any folder with a model"
    sub = command("report", _report, run, "write one HTML page about a run")
    sub.add_argument("--out", type=Path, help="the page; default: report.html in the folder")
    _attack_options(sub)
    return parser


def _attack_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--rounds", type=_count, default=2, help=f"rounds of {_RESTARTS} starts each (default 2)"
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


def _certify(args: argparse.Namespace) -> tuple[int, dict[str, Any], str]:
    folder, stated = folder_of(args.path), beside(args.path)
    if args.path.suffix == ".json" and not has_weights(folder):
        assert stated is not None
        text = f"{stated}\nintact, and no weights beside it: nothing was compared"
        return OK, {"certificate": _body(stated), "compared": False}, text
    began = time.perf_counter()
    if args.path.suffix == ".json" and stated is not None:
        args.source = stated.source
    fresh = _prove(args, folder)
    note = f"no {CERTIFICATE} beside the weights"
    if args.renew:
        write_whole(folder / CERTIFICATE, fresh.to_json())
        note = f"written: {folder / CERTIFICATE}"
    elif stated is not None and stated.source == fresh.source:
        _check_stated(stated, fresh, folder)
        note = f"{CERTIFICATE} beside it belongs to these weights, and its bound is reproduced"
    elif stated is not None:
        note = f"{CERTIFICATE} beside it is from {stated.source}: not compared"
    compared = stated is not None and stated.source == fresh.source and not args.renew
    seconds = time.perf_counter() - began
    result = {"certificate": _body(fresh), "compared": compared, "seconds": round(seconds, 3)}
    return OK, result, f"{fresh}\n{fresh.weights}\n{note}"


def _prove(args: argparse.Namespace, folder: Path) -> Certificate:
    """The certificate of what lies in the folder.

    The weights are read layer by layer if that is asked for, and by default if the files are large.
    """
    hugging_face = (folder / "config.json").is_file()
    size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    if args.stream and not hugging_face:
        raise ConfigError(
            "--stream reads folders of save_pretrained; a ckpt.pt is loaded as a whole."
        )
    if hugging_face and (size >= _STREAM_FROM if args.stream is None else args.stream):
        from lip_plugin.integrations.huggingface.loading import certify_streamed

        with _proving():
            return certify_streamed(folder, args.source, progress=lambda g: _bar(args, g, "layers"))
    model = load(args.path, args.nanogpt_dir)
    with _proving():
        return certify(model, args.source)


def _check_stated(stated: Certificate, fresh: Certificate, folder: Path) -> None:
    """Raise CertificateError unless the stated certificate belongs to the weights and is proven.

    Args:
        stated: the certificate that lies beside the weights.
        fresh: the certificate that was just computed from them.
    """
    try:
        check_same(stated, fresh)
    except CertificateError as error:
        cure = f"To replace the certificate: lip-plugin certify {folder} --renew"
        raise CertificateError(f"{folder / CERTIFICATE}: {error} {cure}") from error


def _falsify(args: argparse.Namespace) -> tuple[int, dict[str, Any], str]:
    if args.claim is not None and not args.claim >= 0:
        raise ConfigError(f"--claim {args.claim}: must be a number of at least 0.")
    stated = beside(args.path) if args.claim is None else None
    model = load(args.path, args.nanogpt_dir)
    claim, origin = args.claim, "--claim"
    if stated is not None:
        stated.verify(model)
        claim, origin = stated.lipschitz, CERTIFICATE
    with _proving():
        proven = certify(model)
        found = _attack(args, model)
    if claim is None:
        claim, origin = proven.lipschitz, "proven now"
    if stated is not None and stated.radius < found.radius * (1 - 1e-9):
        raise CertificateError(
            f"{CERTIFICATE} speaks of radius {stated.radius:.4g} only, and tokens reach "
            f"{found.radius:.4g}: it was edited."
        )
    exceeded = found.lower_bound > min(claim, proven.lipschitz)
    result = {
        "lower_bound": found.lower_bound,
        "claim": claim,
        "claim_from": origin,
        "exceeded": exceeded,
        "proven": proven.lipschitz,
        "radius": found.radius,
        "effort": _effort(args),
    }
    verdict = "EXCEEDED: the claim is false" if exceeded else "holds against this attack"
    text = (
        f"attained by an attack   {found.lower_bound:.6g}  ({_effort(args)})\n"
        f"claimed ({origin})   {claim:.6g}  {verdict}\nproven from the weights {bound_text(proven)}"
    )
    return (FALSIFIED if exceeded else OK), result, text


def _attack(args: argparse.Namespace, model: nn.Module) -> Falsification:
    """The best find of several rounds, each of which has its own random numbers."""
    rounds = [
        falsify(model, _RESTARTS, args.steps, tokens=args.tokens, seed=seed)
        for seed in _bar(args, range(args.rounds), "attack")
    ]
    return max(rounds, key=lambda found: found.lower_bound)


def _effort(args: argparse.Namespace) -> str:
    return f"{args.rounds * _RESTARTS} starts, {args.steps} steps, {args.tokens} tokens"


def _report(args: argparse.Namespace) -> tuple[int, dict[str, Any], str]:
    require_matplotlib()  # before the attack, which may take minutes
    run = args.path
    args.path = model_of_run(run)
    model, stated = load(args.path, args.nanogpt_dir), beside(args.path)
    with _proving():
        certificate, attack = certify(model), _attack(args, model)
    if stated is not None and stated.source == "weights":
        _check_stated(stated, certificate, folder_of(args.path))
    try:
        caps: Certificate | str = certify(model, "caps")
        norms = [(b.name, b.worst_over_cap) for b in block_norms(model)]
    except (CertificateError, NotRetrofittedError) as error:
        caps, norms = str(error), []
    versions = {
        "date": time.strftime("%Y-%m-%d"),
        "model": folder_of(args.path).resolve().name,
        **_versions(),
    }
    page = Report(
        run.resolve().name,
        certificate,
        caps,
        norms,
        history(run, args.path),
        attack,
        _effort(args),
        versions,
    )
    out = args.out or (run if run.is_dir() else run.parent) / "report.html"
    write_whole(out, render(page))
    result = {
        "report": str(out),
        "lipschitz": certificate.lipschitz,
        "log10_lipschitz": certificate.log10_lipschitz,
        "lower_bound": attack.lower_bound,
        "weights": certificate.weights,
    }
    text = f"{out}\nproven {bound_text(certificate)}, attained {attack.lower_bound:.4g}"
    return (FALSIFIED if page.falsified else OK), result, text


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in ("lip_plugin", "torch", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _body(certificate: Certificate) -> dict[str, Any]:
    return json.loads(certificate.to_json())["certificate"]


def _bar(args: argparse.Namespace, items: Any, what: str) -> Iterator[Any]:
    return steps(items, what, shown=not args.json)


@contextmanager
def _proving() -> Iterator[None]:
    """Turn a failed proof into UnsupportedModelError.

    The input could be read before this, so that a failure means that the model has no proof and not
    that the files are bad.
    """
    try:
        yield
    except CertificateError as error:
        raise UnsupportedModelError(str(error)) from error
