"""peft's own modules around a model, and which of them compute what the model inside computes.

    PeftModel and its kin       run the tuner inside, unless an adapter is a soft prompt
    LoraModel, OFTModel, ...    run the model, whose layers they have wrapped one by one

layers.py says which weight a wrapped layer multiplies with. The tuners listed here are those whose
layers have a rule there. Modules are recognized by the names of their classes; peft is never
imported.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lip_plugin.errors import UnsupportedModelError
from lip_plugin.model.wrappers import Wrapper, is_class, register_wrapper

_TUNERS = {
    "peft.tuners.lora.model.LoraModel",
    "peft.tuners.oft.model.OFTModel",
    "peft.tuners.hra.model.HRAModel",
    "peft.tuners.mixed.model.MixedModel",
}
_BASE_TUNER = "peft.tuners.tuners_utils.BaseTuner"


def _is_peft_model(module: nn.Module) -> bool:
    cls = type(module)
    return cls.__module__ in ("peft.peft_model", "peft.mixed_model") and cls.__name__.startswith(
        "Peft"
    )


def _inside_peft_model(module: nn.Module) -> nn.Module:
    model: Any = module
    kinds = {
        name: config for name, config in model.peft_config.items() if config.is_prompt_learning
    }
    if kinds:
        name, config = next(iter(kinds.items()))
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        raise UnsupportedModelError(
            f"Adapter {name!r} is a soft prompt ({kind}): the model then reads learned keys, "
            "values or embeddings besides its tokens, of any size, and no rule bounds those. Use "
            "LoRA, DoRA, OFT or HRA, or certify the base: model.get_base_model()."
        )
    return model.base_model


def _is_tuner(module: nn.Module) -> bool:
    return is_class(module, _BASE_TUNER)


def _inside_tuner(module: nn.Module) -> nn.Module:
    cls, tuner = type(module), module
    if f"{cls.__module__}.{cls.__qualname__}" not in _TUNERS:
        raise UnsupportedModelError(
            f"{cls.__name__} has no rule here: what its layers compute is not W0 + s B A, nor W0 "
            "times an orthogonal matrix. Use LoRA, DoRA, OFT or HRA, or merge it first: model = "
            "model.merge_and_unload()."
        )
    held: Any = tuner
    return held.model


register_wrapper(Wrapper("peft model", _is_peft_model, _inside_peft_model))
register_wrapper(Wrapper("peft tuner", _is_tuner, _inside_tuner))
