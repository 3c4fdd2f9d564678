"""LipschitzConfig: every choice of a retrofit, frozen, validated, and JSON both ways."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lip_plugin.errors import ConfigError

METHOD_NAMES = (
    "soft_cap",
    "hard_cap",
    "spectral_normalize",
    "spectral_hammer",
    "stiefel",
    "spectral_weight_decay",
    "weight_decay",
)
LOGIT_SCALE = 10.0  # see docs/LOG.md, 2026-11-24: between the best accuracy (40 and more) and the widest margins (3)
_CHOICES: dict[str, tuple[Any, ...]] = {
    "method": METHOD_NAMES,
    "granularity": ("head", "matrix"),
    "norms": (None, "remove", "keep", "calibrated"),
    "biases": ("keep", "drop"),
    "init": ("auto", "orthogonal", "keep"),
    "position_bias": (None, "learned", "alibi"),
    "activation": (None, "abs"),
}
# What a bound is best spent on, as measured in docs/LOG.md (2026-11-24); `LipschitzConfig.preset` gives them.
_POSITION: dict[str, Any] = {
    "position_bias": "learned",
    "attention_scale": 0.0,
    "value_scale": 1.0,
    "residual": (0.75, 0.9),
    "activation": "abs",
    "biases": "drop",
}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"logit_scale": 1.0},
    "robust": {**_POSITION, "logit_scale": 5.0},
    "accurate": {**_POSITION, "logit_scale": 40.0},
}
FLOOR_MIN = 1e-12  # of a norm: gain / floor has to be a float32


@dataclass(frozen=True)
class LipschitzConfig:
    """What a retrofit does; caps are stated in the RMS->RMS norm.

    Args:
        method: projection applied after every optimizer step (`lip_plugin.linalg.projections`).
        w_max: the cap: largest RMS->RMS norm that a block may have.
        overrides: caps of single layers, `{name: cap}`. A name is a module's full name or a dotted
            suffix of it (`"mlp.c_fc"` means that layer in every block), as in peft's
            `target_modules`. A name that matches nothing is an error.
        granularity: `"head"` caps each head of q, k and v on its own, which the certificate
            rewards; `"matrix"` caps each of q, k, v as a whole.
        norms: `"remove"` (the recipe of arXiv 2507.13338: convex residual, no norm, no QK-norm) or
            `"keep"` (caps only; the certificate stays honest and is usually astronomically large), or
            `"calibrated"`: every norm divides by its root mean square or by a floor, whichever is larger, and all else stays
            as it was. For pretrained models: with the floors of `calibrate` what they know survives, and no norm is steeper
            than its gain (not trained then) over its floor. None means remove, but refuses a model whose weights were
            loaded from somewhere, because a pretrained model is a function of its norms.
        norm_floors: for norms="calibrated": the floor under every norm's divisor by the slot's full name, as
            `calibrate(model, batches)` gives them, or higher, up to 1e12; 0 leaves a norm as it is, else 1e-12 and above. See
            RetrofitSchedule, which raises them.
        residual: a in x <- (1-a) x + a f(x), or one of attention and one of MLPs; None is the paper's 1/(2L) for L
            layers, or 1/(L+1) where attention and MLP run in parallel and their mean is f.
        attention_scale: attention logits are attention_scale * q.k / d_head. 0 leaves attention by position alone,
            which needs `position_bias`; the weights of q and k are then not trained.
        position_bias: add to every attention logit a bias that depends on head and offset only: `"learned"`, starting as
            ALiBi, or `"alibi"`, fixed. It costs nothing in the certificate. Needs scaled_dot_product_attention.
        value_scale: factor on the attention branch's output (the paper's 1/3).
        embedding_max: bound on the token norm of what enters the first block; its tables (tokens,
            learned positions, token types; of images patches and positions) share it equally.
        pixel_max: bound on the absolute value of every entry of an image that the model is given
            (so after normalization). The certificate takes it for granted and says so.
        gate_max: c of c tanh(z / c) on every entry of both factors of a gated MLP (llama and its kin); None
            leaves them as they are. Products of entries are what makes such an MLP steep: a bound from caps
            then costs a factor of sqrt(d), with gate_max of 2 gate_max. Not with adapters on these layers.
        activation: `"abs"`: the absolute value in place of the MLP's own activation. Its slopes are 1 and -1, so it
            keeps the norm of what passes and of its gradient, where a gelu halves both. Not for gated MLPs.
        logit_scale: factor on what enters the head, so on the logits, and on their bound: an inverse temperature that caps
            keep the weights from learning. Predictions and certified radii do not depend on it, training does: a small
            one makes for wide margins, a large one for accuracy. None takes LOGIT_SCALE where the family has a norm
            slot behind its last block, and 1 elsewhere.
        biases: `"keep"` (measured, and part of the certificate) or `"drop"` (fixed at zero).
        untie_head: give a head that is tied to the embedding its own copy; the two have
            different constraints, so False refuses such a model.
        init: `"orthogonal"` (output projections zero, as in the paper), `"keep"`, or `"auto"`:
            orthogonal when norms are removed from a model that was never loaded from anywhere.

    Raises:
        ConfigError: a value outside its range; the message names it.
    """

    method: str = "soft_cap"
    w_max: float = 1.0
    overrides: Mapping[str, float] = field(default_factory=dict)
    granularity: str = "head"
    norms: str | None = None
    norm_floors: Mapping[str, float] = field(default_factory=dict)
    residual: float | tuple[float, float] | None = None
    attention_scale: float = 1.0
    value_scale: float = 1.0 / 3.0
    embedding_max: float = 1.0
    pixel_max: float = 1.0
    gate_max: float | None = None
    position_bias: str | None = None
    activation: str | None = None
    logit_scale: float | None = None
    biases: str = "keep"
    untie_head: bool = True
    init: str = "auto"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(
                    f"LipschitzConfig({name}={value!r}): choose one of {', '.join(map(repr, choices))}."
                )
        for name in ("w_max", "value_scale", "embedding_max", "pixel_max"):
            _check_positive(name, getattr(self, name))
        if self.attention_scale != 0 or isinstance(self.attention_scale, bool):
            _check_positive("attention_scale", self.attention_scale)
        elif self.position_bias is None:
            raise ConfigError(
                "LipschitzConfig(attention_scale=0): attention would be uniform. Give it a position_bias, 'learned' or 'alibi'."
            )
        chosen = [n for n in ("position_bias", "activation") if getattr(self, n) is not None]
        if self.logit_scale is not None:
            _check_positive("logit_scale", self.logit_scale)
        if self.norms in ("keep", "calibrated") and (chosen or self.logit_scale not in (None, 1)):
            raise ConfigError(
                f"LipschitzConfig({(chosen or ['logit_scale'])[0]}=..., norms={self.norms!r}): parts of the recipe that removes "
                "norms; a model that keeps or calibrates them keeps its own attention, activations and logits."
            )
        self._check_floors()
        if not isinstance(self.overrides, Mapping):
            raise ConfigError("LipschitzConfig(overrides=...) takes a mapping {layer name: cap}.")
        if not isinstance(self.untie_head, bool):
            raise ConfigError(
                f"LipschitzConfig(untie_head={self.untie_head!r}): must be True or False."
            )
        for layer, cap in self.overrides.items():
            if not isinstance(layer, str) or not layer:
                raise ConfigError(
                    f"LipschitzConfig(overrides=...): {layer!r} is not the name of a layer."
                )
            _check_positive(f"overrides[{layer!r}]", cap)
        object.__setattr__(self, "overrides", dict(self.overrides))
        if self.gate_max is not None:
            _check_positive("gate_max", self.gate_max)
        if isinstance(self.residual, (list, tuple)):
            object.__setattr__(self, "residual", tuple(self.residual))
        if self.residual is not None:
            _check_residual(self.residual)

    @property
    def recipe(self) -> bool:
        """Whether norms are removed, and all that goes with it put in their place (once None is resolved)."""
        return self.norms not in ("keep", "calibrated")

    def _check_floors(self) -> None:
        if not isinstance(self.norm_floors, Mapping):
            raise ConfigError(
                "LipschitzConfig(norm_floors=...) takes a mapping {norm slot: number}."
            )
        if self.norm_floors and self.norms != "calibrated":
            raise ConfigError(
                f"LipschitzConfig(norm_floors=...) needs norms='calibrated', not {self.norms!r}."
            )
        object.__setattr__(self, "norm_floors", dict(self.norm_floors))
        for slot, floor in self.norm_floors.items():
            number = isinstance(floor, (int, float)) and not isinstance(floor, bool)
            if not number or not (floor == 0 or FLOOR_MIN <= floor <= 1.0 / FLOOR_MIN):
                raise ConfigError(
                    f"LipschitzConfig(norm_floors[{slot!r}]={floor!r}): 0, or a number from 1e-12 to 1e12, please."
                )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> LipschitzConfig:
        """A named choice of options, with `changes` on top.

        Args:
            name: `"robust"`: attention by position alone, absolute values, large steps of the residual, wide margins: many
                predictions proven at perturbations of 1 % (at 3 and 10 % a logit_scale of 3.3 and 2 proves more). With
                `MarginLoss(model, 0.5)` take logit_scale=20: as many proven, and more of them right (docs/LOG.md).
                `"accurate"`: the same with a larger logit_scale, the most accuracy. `"paper"`: the recipe of arXiv
                2507.13338 to the letter, its logits as small as its caps make them. Measured on text, 3 blocks deep
                (docs/LOG.md); deeper is untried. Not every family has a place for all of it: give `retrofit`,
                `LipschitzCallback` or `plan_caps` the name alone, and what has no place is left out.
            changes: fields of LipschitzConfig.

        Raises:
            ConfigError: an unknown name, or a change that is out of range.
        """
        if not isinstance(name, str) or name not in PRESETS:
            raise ConfigError(
                f"LipschitzConfig.preset({name!r}): choose one of {', '.join(map(repr, PRESETS))}."
            )
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(changes) - known)
        if unknown:
            raise ConfigError(
                f"LipschitzConfig has no field {', '.join(unknown)}; it has {', '.join(sorted(known))}."
            )
        return cls(**{**PRESETS[name], **changes})

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary of JSON types."""
        values = dataclasses.asdict(self)
        if isinstance(self.residual, tuple):
            values["residual"] = list(self.residual)
        return values

    def to_json(self) -> str:
        """JSON text that `from_json` reads back to an equal config."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LipschitzConfig:
        """Inverse of `to_dict`; unknown keys raise ConfigError, so no setting is lost in silence."""
        if not isinstance(values, Mapping):
            raise ConfigError(
                f"not a LipschitzConfig: expected a mapping, got {type(values).__name__}"
            )
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(
                f"LipschitzConfig has no field {', '.join(unknown)}; it has {', '.join(sorted(known))}. "
                "Was this written by a newer lip_plugin?"
            )
        return cls(**dict(values))

    @classmethod
    def from_json(cls, text: str) -> LipschitzConfig:
        """Inverse of `to_json`; raises ConfigError on text that is not a JSON object."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"not a LipschitzConfig: {error}") from error
        return cls.from_dict(values)


def _check_residual(residual: Any) -> None:
    weights = residual if isinstance(residual, tuple) else (residual,)
    if isinstance(residual, tuple) and len(residual) != 2:
        raise ConfigError(
            f"LipschitzConfig(residual={residual}): one number, or those of (attention, MLP)."
        )
    for a in weights:
        is_number = isinstance(a, (int, float)) and not isinstance(a, bool)
        if not is_number or not 0 < a < 1:
            raise ConfigError(
                f"LipschitzConfig(residual={residual!r}): a in (1-a) x + a f(x) is a number between 0 and 1, "
                "or a pair of them, of (attention, MLP)."
            )


def _check_positive(name: str, value: Any) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value <= sys.float_info.max:
        raise ConfigError(f"LipschitzConfig({name}={value!r}): must be a finite number above 0.")
