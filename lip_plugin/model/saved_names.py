"""The names that a saved model carries in config.json: they are read in processes without this plugin.

There transformers warns of an unknown quantization method, by its name, and then (unless the norms were kept)
raises a KeyError, which is the activation's name. So both names say what to do. Models that were saved before
have short names, which still load. Settings and certificates record activations under the short names,
whichever a model was saved with, so a certificate fits a model that was saved again.
"""

from __future__ import annotations

from typing import Any

METHOD = (
    "lip_plugin (put `import lip_plugin` before the line that loads this model, and leave config.json as it "
    "is)"
)
METHODS = (METHOD, "lip_plugin")  # what is saved now, and what was saved before
# In front of an activation's name: SCALED of one that is divided by its largest slope, CALIBRATED of one that
# is left as it is, in a model whose norms are not what its class says.
SCALED = "import lip_plugin before loading this model. scaled:"
CALIBRATED = "import lip_plugin before loading this model. calibrated:"
# what is saved now -> what was saved before, and what settings record
_SHORT = {SCALED: "lip_plugin:", CALIBRATED: "lip_plugin.calibrated:"}
SCALED_NAMES = (SCALED, _SHORT[SCALED])
CALIBRATED_NAMES = (CALIBRATED, _SHORT[CALIBRATED])


def plain_name(name: str) -> str:
    """The library's own name of an activation, whatever was put in front of it."""
    for prefix in (*SCALED_NAMES, *CALIBRATED_NAMES):
        name = name.removeprefix(prefix)
    return name


def recorded(value: Any) -> Any:
    """A field of a model's config as settings record it, with short names for activations."""
    if isinstance(value, str):
        for prefix, short in _SHORT.items():
            if value.startswith(prefix):
                return short + value.removeprefix(prefix)
    return value
