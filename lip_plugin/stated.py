"""`Stated`: what a certificate states, as numbers, as JSON, and as a table.

It needs no torch, so that the command line can show a certificate at once. Whether the numbers are
true of a model is asked of its subclass, `Certificate` in lip_plugin/certificate/result.py.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from lip_plugin.errors import CertificateError
from lip_plugin.tables import table

FORMAT = "lip_plugin.certificate/2"
_WITHOUT_FINGERPRINT = "lip_plugin.certificate/1"
_S = TypeVar("_S", bound="Stated")
NORM = "token norm (largest RMS norm of a token) -> token norm"


@dataclass(frozen=True)
class LayerBound:
    """One line of a certificate: the bound of one sub-block, norm slot or head.

    Attributes:
        name: the module's name.
        radius: bound on the token norm of what enters it.
        lipschitz: bound on its own Lipschitz constant on the ball of that radius, from token norm
            to token norm. The residual path around a sub-block is included.
        log10_total: log10 of the bound from the embeddings up to and including this line.
    """

    name: str
    radius: float
    lipschitz: float
    log10_total: float


@dataclass(frozen=True)
class Stated:
    """The fields of a `Certificate`, which explains them, and their form as text."""

    lipschitz: float
    log10_lipschitz: float
    radius: float
    norm: str
    source: str
    layers: tuple[LayerBound, ...]
    logit_difference: float
    d_in: int
    d_out: int
    attention_logit: float
    assumptions: tuple[str, ...]
    model: str
    weights: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False, repr=False)

    def to_json(self) -> str:
        """The certificate as JSON text. Infinities are written as strings.

        The text carries a digest of its content, which `from_json` checks.
        """
        body = _encode(asdict(self))
        return json.dumps(
            {"format": FORMAT, "digest": _digest(body), "certificate": body}, indent=1
        )

    @classmethod
    def from_json(cls: type[_S], text: str) -> _S:
        """The certificate that `to_json` wrote.

        Raises CertificateError for any other text, and for a text that was changed since.
        """
        try:
            outer = json.loads(text)
        except (ValueError, TypeError, RecursionError) as error:
            raise CertificateError(
                f"not a certificate (not JSON: {error}); write a new one with certify(model)."
            ) from error
        if isinstance(outer, Mapping) and outer.get("format") == _WITHOUT_FINGERPRINT:
            raise CertificateError(
                "this certificate is from before certificates carried the fingerprint of their "
                "weights (format 1), so nothing tells which weights it belongs to: write a new one "
                "with certify(model).to_json()."
            )
        if not isinstance(outer, Mapping) or outer.get("format") != FORMAT:
            raise CertificateError(
                f"not a certificate of this version: its format is not {FORMAT!r}."
            )
        body = outer.get("certificate")
        if not isinstance(body, Mapping) or outer.get("digest") != _digest(body):
            raise CertificateError(
                "the certificate was truncated or edited: its digest does not match its content."
            )
        try:
            values = {k: _decode(v) for k, v in body.items()}
            values["layers"] = tuple(
                LayerBound(**{k: _decode(v) for k, v in row.items()}) for row in body["layers"]
            )
            values["assumptions"] = tuple(body["assumptions"])
            return cls(**values)
        except (TypeError, KeyError, AttributeError) as error:
            raise CertificateError(f"the certificate lacks or adds a field: {error}") from error

    def __str__(self) -> str:
        rows = [(x.name, x.radius, x.lipschitz, x.log10_total) for x in self.layers]
        head = ("layer", "radius in", "constant", "log10 total")
        layers = table(head, rows, ("<", "10.4g", "10.4g", "11.3f"), closed=True)
        value = (
            f"{self.lipschitz:.6g}"
            if math.isfinite(self.lipschitz)
            else f"10^{self.log10_lipschitz:.2f}"
        )
        last = (
            f"Lipschitz <= {value} from {self.source}, on token norm <= {self.radius:.4g} "
            f"({self.model})"
        )
        pairs = (
            f"any difference of two logits moves at most {self.logit_difference:.6g} times as far"
        )
        return "\n".join([layers, last, pairs])


def _encode(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if isinstance(value, Mapping):
        return {k: _encode(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode(v) for v in value]
    return value


def _decode(value: Any) -> Any:
    return float(value) if isinstance(value, str) and value in ("inf", "-inf") else value


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
