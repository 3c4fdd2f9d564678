"""What `lip-plugin certify`, `falsify` and `report` do.

Each command takes the words that lip_plugin/cli/main.py has read, and returns its exit code, its
result as JSON types, and its text.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import nn

from lip_plugin.certificate.attack.falsify import Falsification, falsify
from lip_plugin.certificate.certify import certify
from lip_plugin.certificate.result import Certificate, check_same
from lip_plugin.cli.charts import require_matplotlib
from lip_plugin.cli.main import FALSIFIED, OK, RESTARTS, body_of
from lip_plugin.cli.report import Report, bound_text, render
from lip_plugin.cli.saved import (
    CERTIFICATE,
    beside,
    folder_of,
    history,
    load,
    model_of_run,
)
from lip_plugin.errors import (
    CertificateError,
    ConfigError,
    NotRetrofittedError,
    UnsupportedModelError,
)
from lip_plugin.files import write_whole
from lip_plugin.progress import steps
from lip_plugin.surgery.block_norms import block_norms

_STREAM_FROM = 1 << 30  # certify reads weights of this many bytes or more layer by layer


def certify_command(args: argparse.Namespace) -> tuple[int, dict[str, Any], str]:
    folder, stated = folder_of(args.path), beside(args.path, Certificate)
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
    result = {"certificate": body_of(fresh), "compared": compared, "seconds": round(seconds, 3)}
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


def falsify_command(args: argparse.Namespace) -> tuple[int, dict[str, Any], str]:
    if args.claim is not None and not args.claim >= 0:
        raise ConfigError(f"--claim {args.claim}: must be a number of at least 0.")
    stated = beside(args.path, Certificate) if args.claim is None else None
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
        falsify(model, RESTARTS, args.steps, tokens=args.tokens, seed=seed)
        for seed in _bar(args, range(args.rounds), "attack")
    ]
    return max(rounds, key=lambda found: found.lower_bound)


def _effort(args: argparse.Namespace) -> str:
    return f"{args.rounds * RESTARTS} starts, {args.steps} steps, {args.tokens} tokens"


def report_command(args: argparse.Namespace) -> tuple[int, dict[str, Any], str]:
    require_matplotlib()  # before the attack, which may take minutes
    run = args.path
    args.path = model_of_run(run)
    model, stated = load(args.path, args.nanogpt_dir), beside(args.path, Certificate)
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


COMMANDS = {"certify": certify_command, "falsify": falsify_command, "report": report_command}
