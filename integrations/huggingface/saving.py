"""save_pretrained and from_pretrained of constrained models: the retrofit re-applies itself.

transformers calls a registered quantizer on the empty skeleton of a model before its weights are
loaded. We register one whose only act is `retrofit`. It removes its mark from the model afterwards,
so the model trains and saves like any other.

If lip_plugin is not imported, transformers merely warns about an unknown quantizer, and would load
a wrong model. Therefore the activation's name in the saved config is one that only lip_plugin
registers. Building the model without it raises KeyError. Both names say what to do (see
lip_plugin/model/saved_names.py).

Importing this module registers the loader.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.activations import ACT2FN
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lip_plugin.certificate.fingerprint import settings_of
from lip_plugin.config import LipschitzConfig
from lip_plugin.errors import ConfigError
from lip_plugin.model.activations import ScaledActivation, activation_kind
from lip_plugin.model.parts import parts
from lip_plugin.model.saved_names import (
    CALIBRATED,
    CALIBRATED_NAMES,
    METHOD,
    METHODS,
    SCALED,
    SCALED_NAMES,
    plain_name,
)
from lip_plugin.surgery.retrofit import retrofit
from lip_plugin.surgery.state import find_retrofit
from lip_plugin.surgery.untrained import freeze_

_SCALABLE = (
    "gelu",
    "gelu_new",
    "gelu_fast",
    "gelu_pytorch_tanh",
    "gelu_accurate",
    "silu",
    "swish",
    "relu",
    "tanh",
)
_ACTIVATION_KEYS = ("activation_function", "hidden_act", "hidden_activation", "activation")


class LipschitzPersistenceConfig(QuantizationConfigMixin):
    """What config.json has under `quantization_config`: the LipschitzConfig, as a dictionary.

    `settings` repeats the model config's own fields as they were at the retrofit. Many of them
    (heads, rotary frequencies) leave no trace in the shapes of the weights, so this is how an
    edited config.json is noticed. Only loading.py notices it; from_pretrained believes what
    config.json says.
    """

    def __init__(self, lipschitz: Any = None, settings: Any = None, **kwargs: Any) -> None:
        self.quant_method: Any = METHOD
        self.lipschitz = LipschitzConfig.from_saved(lipschitz).to_dict()
        self.settings = dict(settings or {})

    def to_dict(self) -> dict[str, Any]:
        return {
            "quant_method": METHOD,
            "lipschitz": dict(self.lipschitz),
            "settings": dict(self.settings),
        }

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


class LipschitzLoader(HfQuantizer):
    """Retrofits the skeleton before the weights come, and leaves no trace of a quantizer behind."""

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        saved: Any = self.quantization_config
        retrofit(model, LipschitzConfig.from_saved(saved.lipschitz), _loading=True)
        return model

    def postprocess_model(self, model: Any, **kwargs: Any) -> Any:
        self.remove_quantization_config(model)
        model.config.quantization_config = self.quantization_config
        found = find_retrofit(model)
        if found is not None:  # loading has made new Parameters, which would all train
            freeze_(model, parts(model, found[1].architecture), found[1].config)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def register() -> None:
    """Register the loader and the activations with transformers. It is safe to call again."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    if METHOD in AUTO_QUANTIZER_MAPPING:
        return
    for method in METHODS:
        register_quantization_config(method)(LipschitzPersistenceConfig)
        register_quantizer(method)(LipschitzLoader)
    for name in _SCALABLE:
        if name in ACT2FN:
            ACT2FN.update({prefix + name: (_scaled, {"name": name}) for prefix in SCALED_NAMES})
            ACT2FN.update({prefix + name: (_plain, {"name": name}) for prefix in CALIBRATED_NAMES})


def _plain(name: str) -> nn.Module:
    return ACT2FN[name]


def _scaled(name: str) -> ScaledActivation:
    act = ACT2FN[name]
    kind = activation_kind(act)
    if kind is None:
        raise ConfigError(f"activation {name!r} of this transformers version has no proven slope.")
    return ScaledActivation(act, kind)


def mark_(model: Any, config: LipschitzConfig) -> None:
    """Write the retrofit into `model.config`, so that it is saved and re-applied at load.

    A head that was untied from the embedding is recorded as untied.
    """
    register()
    model.config.quantization_config = LipschitzPersistenceConfig(config.to_dict())
    head = model.get_output_embeddings()  # None for classifiers
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        model.config.tie_word_embeddings = False
        if hasattr(model, "all_tied_weights_keys"):
            model.all_tied_weights_keys = {}
    if config.norms != "keep":
        _name_activations(model, SCALED if config.recipe else CALIBRATED)
    model.config.quantization_config.settings = settings_of(model)


def _name_activations(model: Any, prefix: str) -> None:
    for key in _ACTIVATION_KEYS:
        name = getattr(model.config, key, None)
        if isinstance(name, str):
            setattr(model.config, key, prefix + plain_name(name))


register()
