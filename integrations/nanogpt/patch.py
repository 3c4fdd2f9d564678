"""`patch(GPT)`: change nanoGPT's GPT class in memory, so that it builds constrained models.

A patched class also makes LipschitzMuon in its configure_optimizers. No file of nanoGPT is changed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lip_plugin.config import LipschitzConfig
from lip_plugin.errors import ConfigError
from lip_plugin.optim.enforce import project_
from lip_plugin.optim.muon import LipschitzMuon
from lip_plugin.surgery.retrofit import retrofit

SENTINEL = "lipschitz_retrofit"  # state_dict key of a model that kept its norms; see _retrofit
OPTION_PREFIX = "--lip_"


@dataclass(frozen=True)
class Options:
    """Every choice of a run: the constraint, and the rates for which nanoGPT has no names.

    Args:
        config: see LipschitzConfig.
        lr: rate of the matrices at nanoGPT's full learning_rate, in RMS->RMS norm per step.
        embedding_lr: rate of embedding rows, in RMS norm per step; None takes `lr`.
        adamw_lr: rate of biases and kept norms; None takes nanoGPT's learning_rate.
        momentum: momentum of matrices and rows.

    Raises:
        ConfigError: a value is outside its range.
    """

    config: LipschitzConfig = field(default_factory=LipschitzConfig)
    lr: float = 0.05
    embedding_lr: float | None = None
    adamw_lr: float | None = None
    momentum: float = 0.95

    def __post_init__(self) -> None:
        for name in ("lr", "embedding_lr", "adamw_lr"):
            rate = getattr(self, name)
            if rate is None and name != "lr":
                continue
            if (
                isinstance(rate, bool)
                or not isinstance(rate, (int, float))
                or not 0 < rate < math.inf
            ):
                raise ConfigError(f"{name}={rate!r}: a rate must be a finite number above 0.")
        if not isinstance(self.momentum, (int, float)) or not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum={self.momentum!r}: must lie in [0, 1).")
        if not isinstance(self.config.untie_head, bool):
            raise ConfigError(f"untie_head={self.config.untie_head!r}: must be True or False.")

    def to_dict(self) -> dict[str, Any]:
        """One flat dictionary of JSON types. Its keys are the names of the runner's options."""
        return {**self.config.to_dict(), **{name: getattr(self, name) for name in _RATES}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Options:
        """The inverse of `to_dict`.

        Absent keys take their defaults. Unknown ones raise ConfigError.
        """
        rates = {k: v for k, v in values.items() if k in _RATES}
        config = {k: v for k, v in values.items() if k not in _RATES}
        return cls(LipschitzConfig.from_dict({**cls().config.to_dict(), **config}), **rates)


_RATES = tuple(f.name for f in dataclasses.fields(Options) if f.name != "config")


def patch(
    gpt_class: type[nn.Module], config: LipschitzConfig | None = None, **rates: float
) -> Callable[[], None]:
    """Make every model that nanoGPT's GPT class builds a constrained one, trained by LipschitzMuon.

    Args:
        gpt_class: the class. It is changed in memory only.
        config: see LipschitzConfig; None takes its defaults.
        rates: `lr`, `embedding_lr`, `adamw_lr` and `momentum`; see Options.

    Returns:
        A function that gives the class its own methods back.

    Raises:
        ConfigError: the class is patched already, or a rate is outside its range.
    """
    options = Options(config or Options().config, **rates)
    return install(gpt_class, lambda: options, lambda model: None)


def install(
    gpt_class: Any, current: Callable[[], Options], built: Callable[[nn.Module], None]
) -> Callable[[], None]:
    """Patch the class, with options that are looked up when a model is built.

    Args:
        gpt_class: the class.
        current: gives the options; it is called at each construction.
        built: called with each model that was built.

    Returns:
        A function that gives the class its own methods back.
    """
    if getattr(gpt_class.__init__, "lip_patched", False):
        raise ConfigError(
            f"{gpt_class.__name__} is patched already. Call what patch() returned first."
        )
    names = ("__init__", "configure_optimizers", "from_pretrained")
    originals = {name: gpt_class.__dict__[name] for name in names if name in gpt_class.__dict__}
    loading_pretrained = False

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        originals["__init__"](self, *args, **kwargs)
        if not loading_pretrained:
            _retrofit(self, current().config)
            built(self)

    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal loading_pretrained
        config = current().config
        if config.norms is None:
            raise ConfigError(
                "init_from=gpt2* loads pretrained weights, and a trained model is a function of "
                "its norms: removing them destroys what it learned. Say which you want: "
                f"{OPTION_PREFIX}norms=keep caps the weights only, {OPTION_PREFIX}norms=remove "
                "removes the norms all the same."
            )
        loading_pretrained = True
        try:
            model = originals["from_pretrained"].__func__(cls, *args, **kwargs)
        finally:
            loading_pretrained = False
        _retrofit(
            model,
            dataclasses.replace(config, init="keep" if config.init == "auto" else config.init),
        )
        project_(model, "hard_cap")  # the projection that moves the weights least
        built(model)
        return model

    def configure_optimizers(
        self: Any, weight_decay: float, learning_rate: float, betas: Any, device_type: str
    ) -> LipschitzMuon:
        # weight_decay is not used. The caps bound the weights, and nanoGPT does not decay biases.
        return make_optimizer(self, current(), learning_rate, betas)

    __init__.lip_patched = True  # type: ignore[attr-defined]
    gpt_class.__init__ = __init__
    gpt_class.configure_optimizers = configure_optimizers
    if "from_pretrained" in originals:
        gpt_class.from_pretrained = classmethod(from_pretrained)

    def undo() -> None:
        for name, method in originals.items():
            setattr(gpt_class, name, method)

    return undo


def _retrofit(model: nn.Module, config: LipschitzConfig) -> None:
    retrofit(model, config)
    if not config.recipe:
        # A plain nanoGPT refuses a checkpoint without norms, because their keys are missing. One
        # with norms it would load, the untied head into the embedding, and compute something else.
        # This additional key makes it refuse that too.
        model.register_buffer(SENTINEL, torch.ones(()))


def make_optimizer(
    model: nn.Module, options: Options, learning_rate: float, betas: Sequence[float]
) -> LipschitzMuon:
    """Build LipschitzMuon so that nanoGPT's learning_rate moves all rates.

    Every group gets nanoGPT's learning_rate as its `lr`, and our rate over it as its `lr_ratio`.
    nanoGPT's loop writes one number into the `lr` of all groups, and every rate then changes in
    proportion.

    Args:
        model: a retrofitted model.
        options: the rates.
        learning_rate: that of nanoGPT.
        betas: those of nanoGPT, for the AdamW inside.

    Raises:
        ConfigError: learning_rate is not above 0, so there is no ratio to it.
    """
    if not 0 < learning_rate < math.inf:
        raise ConfigError(
            f"learning_rate={learning_rate!r}: must be above 0, as all rates are relative to it."
        )
    optimizer = LipschitzMuon(
        model,
        options.lr,
        embedding_lr=options.embedding_lr,
        adamw_lr=options.adamw_lr or learning_rate,
        momentum=options.momentum,
        betas=(betas[0], betas[1]),
    )
    for group in optimizer.param_groups:
        group["lr_ratio"] *= group["lr"] / learning_rate
        group["lr"] = learning_rate
    return optimizer
