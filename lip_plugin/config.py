"""LipschitzConfig: every option of a retrofit, in one frozen object.

Open this file to see which options there are, what each one does and costs, and which combinations
are refused. A config checks itself when it is made. It can be written as JSON and read back.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lip_plugin.config_values import (
    AUTO,
    CHOICES,
    FLOOR_MIN,
    LEGACY,
    PRESETS,
    check_positive,
    check_residual,
    check_scales,
)
from lip_plugin.errors import ConfigError


@dataclass(frozen=True)
class LipschitzConfig:
    """What `retrofit` does to a model: the caps, the recipe around them, and how training starts.

    A cap is the largest RMS->RMS norm that a block may have. The RMS->RMS norm of W is
    sigma_max(W) * sqrt(d_in / d_out). A block is a part of a weight that is capped on its own, such
    as one attention head. The certificate is a proven bound on Lip(embeddings -> logits). "From
    weights" means that it measures the weights as they are. "From caps" means that it uses the caps
    alone, so that it holds for a whole training run.

    Options that are "auto" get a value that fits the model when it is retrofitted: its family, its
    depth and the other options (`lip_plugin.surgery.automatic`). The values are saved with the
    model, and `config_of(model)` shows them. `LipschitzConfig()` is the preset "accurate", and
    `LipschitzConfig.preset("paper")` is the recipe of arXiv 2507.13338.

    Seven options belong to the recipe that removes norms. If norms are kept or calibrated,
    `position_bias`, `activation` and `logit_scale` are refused, and `residual`, `attention_scale`,
    `value_scale` and `gate_max` have no effect. The figures below are single measurements on small
    models; docs/LOG.md has their commands, dates and settings.

    Args:
        method: The map that brings every block back within its cap after each optimizer step.
            `"auto"` is `"stiefel"` if norms are removed: every block stays orthogonal at its cap,
            which predicted 1 to 2 points more than `"soft_cap"`, at a bound of 1.0 instead of 0.6
            at the network's own scale. It is `"soft_cap"` otherwise, which costs a few matrix
            products and keeps the singular values that are below the cap. Choose that for a base
            that adapters will train on under the same caps, because orthogonal blocks leave them no
            room. The others are
            `"hard_cap"`, `"spectral_normalize"`, `"spectral_hammer"`, `"spectral_weight_decay"`
            and `"weight_decay"`. See `lip_plugin.linalg.projections`.

        w_max: The cap of every linear map that has no override. The default is 1. (Embedding tables
            and patch embeddings follow `embedding_max` instead.) Raise it if the model does not
            learn. The bound grows like a power of w_max, because every cap between embeddings and
            logits enters it: with three layers, 1.2 gave 1.4 points of accuracy for five times the
            bound. `plan_caps(model, bound)` finds the largest w_max for a given bound.

        overrides: Caps of single layers, `{name: cap}`. The default is none. A name is the full
            name of a module, or the end of one that starts after a dot: `"mlp.c_fc"` means that
            layer in every block, as in peft's `target_modules`. The longest name that fits a layer
            wins. A name that fits no layer is an error. For an embedding table the cap is one on
            the RMS norm of each row. Use it for a head that needs a larger cap, or give it
            `own_caps(model)`, which leaves all weights of a trained model as they are.

        granularity: How q, k and v are cut into blocks. The default `"head"` caps every head on its
            own, and then the whole matrix is within the same cap too. `"matrix"` caps each of q, k
            and v as a whole. This leaves training more room, but one head may then be sqrt(number
            of heads) times as large in sigma_max, which makes the bound from caps larger.
            `"matrix"` is refused for fused maps whose rows are stored head by head (gpt_neox).

        norms: What becomes of the model's norms (LayerNorm, RMSNorm). `"remove"` replaces them by
            constants and the residual sums by convex combinations; this also takes QK-norms out.
            Choose it for a model that is trained from scratch. `"calibrated"` keeps each norm but
            divides by the root mean square or by a floor, whichever is larger, so that no norm is
            steeper than its gain over its floor. Choose it for a pretrained model: with the floors
            of `calibrate` it keeps what it knows. The gains are then not trained. `"keep"` only
            caps the weights; its certificate is honest but usually astronomically large, because a
            norm is steep near zero. The default None means `"remove"`, but refuses a model whose
            weights were loaded from somewhere, because a pretrained model is a function of its
            norms.

        norm_floors: The floor under the divisor of every norm, as `{full name of the norm: floor}`.
            Needed for norms="calibrated" and refused otherwise; the default is empty. Take what
            `calibrate(model, batches)` gives, or larger values. Each is 0, which leaves that norm
            as it is, or a number from 1e-12 to 1e12. A higher floor makes the bound smaller and
            changes more tokens: those that lie below their floor come out shorter.
            `RetrofitSchedule` raises floors during training.

        residual: The step size a of the residual, x <- (1-a) x + a f(x). It is a number between 0
            and 1, or a pair of them, for attention and for MLPs. `"auto"` is min(0.75, 2.4 / L) and
            min(0.9, 3 / L) for L layers, or one number min(0.75, 4.2 / L) for families that run
            both in parallel. None is the paper's 1/(2L), or 1/(L+1) in parallel. If a branch has a
            constant of at most 1, a large step costs nothing in the bound. The price is numerical
            range: the model carries x divided by the product of all 1-a, so use float32 or bfloat16
            with large steps, not float16. Steps that are too large for the depth are refused.

        attention_scale: Attention logits are attention_scale * q.k / d_head. The value 0 leaves
            attention by position alone; the weights of q and k are then not trained. That is what
            `"auto"` means wherever position biases have a place, and 1 elsewhere. A larger value
            makes attention sharper, and what its scores add to the bound grows in proportion. A
            tuple is repeated over the layers: with (0, 16) every second layer looks things up by
            content, and the others move them by position. Preset "content" has that. Anything that
            must be looked up by content needs a value above 0.

        position_bias: Adds a bias to every attention logit that depends only on the head and on the
            offset between the two tokens. `"learned"` starts as ALiBi (arXiv 2108.12409), or with
            one peak for each head where the start is open (see `init`), and is trained; `"alibi"`
            stays fixed. None adds nothing. `"auto"` is "learned" where it has a place. A bias that
            does not depend on the input costs nothing in the bound, and the learned one gave 15
            points over fixed ALiBi. A table of learned positions is then fixed at zero. It needs a
            model of tokens (not of images) that attends by torch's scaled_dot_product_attention.

        value_scale: A factor on the output of every attention branch. `"auto"` makes a head whose
            maps are within 1 a map that is 1-Lipschitz at any attention_scale s: 1 / (sqrt(1 + s^2)
            + s), or 1 / (1 + 2 s) if keys are turned by their position. So a sharp head is a quiet
            one. The paper's is 1/3. A larger value multiplies what attention adds to the bound. A
            tuple is repeated over the layers.

        embedding_max: The bound on the token norm of what enters the first block. (A patch bias,
            and what a model with kept norms does before that block, can add to it.) The default is
            1. The embedding tables (tokens, learned positions, token types; in an image model
            patches and positions) share it equally: each of n tables gets the cap embedding_max / n
            on its rows. A larger value makes given changes of embeddings smaller in comparison, but
            attention and gated MLPs steeper, because their constants grow with this radius.

        pixel_max: The bound on the absolute value of every entry of an image as the model receives
            it, that is after normalization. It matters for image models only. The default is 1. Set
            it to the largest value that your preprocessing can give. The certificate takes it for
            granted and says so; it does not look at your images. A larger value costs a smaller cap
            on the patch embedding.

        gate_max: Limits both factors of a gated MLP (llama and its kin) to c tanh(z / c), entry by
            entry, with c = gate_max, if the MLP keeps its product (`activation=None`, which is then
            what "auto" means). Such an MLP multiplies entries with each other, which costs a
            certificate from caps a factor of sqrt(d) for each MLP, and with gate_max twice gate_max
            instead. Adapters on these layers are refused, because what they add would come after
            the limit.

        activation: `"abs"`, which is what "auto" means, puts the absolute value in the place of the
            MLP's own activation. Its slopes are 1 and -1, so it keeps the norm of what passes and
            of its gradient, where a gelu halves both; it gave 6 points over gelu. In a gated MLP it
            takes the place of the product: the absolute value sqrt(g^2 + u^2) of each pair, scaled
            to slope 1. That is no steeper at any width, where a product costs sqrt(d). None keeps
            the model's own activation, divided by its largest slope.

        logit_scale: A factor on what enters the head, and so on the logits and on their bound. It
            is an inverse temperature, which the weights cannot learn because they are capped.
            Predictions and certified radii do not depend on it, but training does: a small value
            gives wide margins, a large one accuracy. The default None is 40 if norms are removed
            and the family has a norm behind its last block; elsewhere it is 1, and other values are
            refused. The preset "robust" has 5.

        biases: `"drop"`, which is what "auto" means if norms are removed, fixes the biases of all
            linear maps at zero. `"keep"` trains them. They have no cap: the certificate measures
            them, and one from caps holds only while they are what they were.

        untie_head: If the head is tied to the token embedding, give the head its own copy of the
            weight. The default is True and costs the memory of one more table. The two have
            different constraints (a matrix and a table of rows), so False refuses a tied model.

        init: Where training starts. `"orthogonal"` makes every block orthogonal at norm min(1,
            cap); this overwrites the weights. The output maps of attention and MLP are then zero,
            as in the paper, or orthogonal as well if `residual` is "auto" and the method is
            "stiefel". `"keep"` leaves all weights as they are. The default `"auto"` is orthogonal
            if norms are removed from a model that was never loaded from anywhere, and keep
            otherwise.

    Raises:
        ConfigError: A value is outside its range, or two options contradict each other. The message
            names the option.
    """

    method: str = AUTO
    w_max: float = 1.0
    overrides: Mapping[str, float] = field(default_factory=dict)
    granularity: str = "head"
    norms: str | None = None
    norm_floors: Mapping[str, float] = field(default_factory=dict)
    residual: float | tuple[float, float] | str | None = AUTO
    attention_scale: float | tuple[float, ...] | str = AUTO
    value_scale: float | tuple[float, ...] | str = AUTO
    embedding_max: float = 1.0
    pixel_max: float = 1.0
    gate_max: float | None = None
    position_bias: str | None = AUTO
    activation: str | None = AUTO
    logit_scale: float | None = None
    biases: str = AUTO
    untie_head: bool = True
    init: str = "auto"

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(
                    f"LipschitzConfig({name}={value!r}): choose one of "
                    f"{', '.join(map(repr, choices))}."
                )
        for name in ("w_max", "embedding_max", "pixel_max"):
            check_positive(name, getattr(self, name))
        for name in ("value_scale", "attention_scale"):
            if isinstance(getattr(self, name), (list, tuple)):
                object.__setattr__(self, name, tuple(getattr(self, name)))
            if getattr(self, name) != AUTO:
                check_scales(name, getattr(self, name), zero=name == "attention_scale")
        if self.some_by_position_alone and self.position_bias is None:
            raise ConfigError(
                f"LipschitzConfig(attention_scale={self.attention_scale}): attention would be "
                "uniform. Give it a position_bias, 'learned' or 'alibi'."
            )
        chosen = [
            n for n in ("position_bias", "activation") if getattr(self, n) not in (None, AUTO)
        ]
        if self.logit_scale is not None:
            check_positive("logit_scale", self.logit_scale)
        if self.norms in ("keep", "calibrated") and (chosen or self.logit_scale not in (None, 1)):
            raise ConfigError(
                f"LipschitzConfig({(chosen or ['logit_scale'])[0]}=..., norms={self.norms!r}): "
                "parts of the recipe that removes norms; a model that keeps or calibrates them "
                "keeps its own attention, activations and logits."
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
            check_positive(f"overrides[{layer!r}]", cap)
        object.__setattr__(self, "overrides", dict(self.overrides))
        if self.gate_max is not None:
            check_positive("gate_max", self.gate_max)
        if isinstance(self.residual, (list, tuple)):
            object.__setattr__(self, "residual", tuple(self.residual))
        if self.residual not in (None, AUTO):
            check_residual(self.residual)

    @property
    def some_by_position_alone(self) -> bool:
        """Whether some layer's attention does not look at content."""
        scales = self.attention_scale
        return scales != AUTO and 0 in (scales if isinstance(scales, tuple) else (scales,))

    @property
    def recipe(self) -> bool:
        """Whether the norms are removed, which None means as well."""
        return self.norms not in ("keep", "calibrated")

    # Refuses floors that are no numbers, out of range, or not asked for.
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
                    f"LipschitzConfig(norm_floors[{slot!r}]={floor!r}): 0, or a number from 1e-12 "
                    "to 1e12, please."
                )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> LipschitzConfig:
        """A named choice of options that were measured together, with `changes` on top.

        Args:
            name: A key of PRESETS. `"accurate"` is `LipschitzConfig()`: attention by position
                alone, absolute values as activation, steps of the residual that follow the depth.
                `"robust"` is the same with a smaller logit_scale, for wide margins: many
                predictions are proven at perturbations of 1 %. At 3 and 10 %, a logit_scale of 3.3
                and 2 proves more. With `MarginLoss(model, 0.5)` take logit_scale=20: as many
                predictions are proven, and more of them are right. `"content"` is "accurate" with
                attention by content in every second layer, at the same bound. `"paper"` is the
                recipe of arXiv 2507.13338 to the letter. Its logits are as small as its caps make
                them. What was measured with which depth and family is in docs/depth.md.
            changes: Fields of LipschitzConfig that replace those of the preset.

        Raises:
            ConfigError: The name is unknown, a change is no field, or a value is out of range.
        """
        if not isinstance(name, str) or name not in PRESETS:
            raise ConfigError(
                f"LipschitzConfig.preset({name!r}): choose one of {', '.join(map(repr, PRESETS))}."
            )
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(changes) - known)
        if unknown:
            raise ConfigError(
                f"LipschitzConfig has no field {', '.join(unknown)}; it has "
                f"{', '.join(sorted(known))}."
            )
        return cls(**{**PRESETS[name], **changes})

    def to_dict(self) -> dict[str, Any]:
        """The config as a dictionary of JSON types, which `from_dict` reads back."""
        values = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    def to_json(self) -> str:
        """The config as JSON text, which `from_json` reads back to an equal config."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LipschitzConfig:
        """The config that `to_dict` wrote.

        Raises:
            ConfigError: `values` is no mapping, or a value is out of range, or a key is unknown: no
                setting is lost in silence.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(
                f"not a LipschitzConfig: expected a mapping, got {type(values).__name__}"
            )
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(
                f"LipschitzConfig has no field {', '.join(unknown)}; it has "
                f"{', '.join(sorted(known))}. Was this written by a newer lip_plugin?"
            )
        return cls(**dict(values))

    @classmethod
    def from_saved(cls, values: Mapping[str, Any]) -> LipschitzConfig:
        """The config of a saved model, which an earlier version may have written.

        An option that did not exist then has the value that leaves the model as it was.

        Raises:
            ConfigError: as `from_dict`.
        """
        if not isinstance(values, Mapping) or not values:
            return cls.from_dict(values)
        return cls.from_dict({**LEGACY, "logit_scale": 1.0, **values})

    @classmethod
    def from_json(cls, text: str) -> LipschitzConfig:
        """The config that `to_json` wrote.

        Raises:
            ConfigError: The text is not a JSON object, or `from_dict` refuses what it holds.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"not a LipschitzConfig: {error}") from error
        return cls.from_dict(values)
