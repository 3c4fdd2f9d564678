"""The names that a saved model carries in its config.json.

They are read in processes without this plugin. There transformers warns of an unknown quantization
method, by its name. Then, unless the norms were kept, it raises a KeyError that shows the name of
the activation. So both names say what to do.

Models that were saved by earlier versions have short names, which still load. Settings and
certificates always record activations under the short names. So a certificate still fits a model
that was loaded and saved again.
"""

from __future__ import annotations

from typing import Any

METHOD = (
    "lip_plugin (put `import lip_plugin` before the line that loads this model, and leave "
    "config.json as it is)"
)
METHODS = (METHOD, "lip_plugin")  # the name that is saved now, and the one that was saved before
# These stand in front of an activation's name. SCALED says that it is divided by its largest slope.
# CALIBRATED says that it is left as it is, in a model whose norms are not what its class says.
SCALED = "import lip_plugin before loading this model. scaled:"
CALIBRATED = "import lip_plugin before loading this model. calibrated:"
# From the names that are saved now to the short ones, which were saved before and which settings
# record.
_SHORT = {SCALED: "lip_plugin:", CALIBRATED: "lip_plugin.calibrated:"}
SCALED_NAMES = (SCALED, _SHORT[SCALED])
CALIBRATED_NAMES = (CALIBRATED, _SHORT[CALIBRATED])


def plain_name(name: str) -> str:
    """The library's own name of an activation, without what was put in front of it."""
    for prefix in (*SCALED_NAMES, *CALIBRATED_NAMES):
        name = name.removeprefix(prefix)
    return name


def recorded(value: Any) -> Any:
    """A field of a model's config as settings record it.

    Activations get their short names. Everything else stays as it is.
    """
    if isinstance(value, str):
        for prefix, short in _SHORT.items():
            if value.startswith(prefix):
                return short + value.removeprefix(prefix)
    return value
