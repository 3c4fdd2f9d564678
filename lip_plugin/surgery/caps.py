"""The cap of every linear map and of every table of rows, by the layer's full name.

Open this file to see how `w_max`, `embedding_max` and `overrides` of a config become one number
for each layer.
"""

from __future__ import annotations

from lip_plugin.config import LipschitzConfig
from lip_plugin.model.parts import Parts
from lip_plugin.surgery.untrained import UNUSED_SHARE


def caps_by_name(names: Parts, config: LipschitzConfig) -> dict[str, float]:
    """Compute the cap of every linear map (RMS->RMS norm) and of every table (RMS norm of a row).

    What enters the first block is a sum of one row of each table, so the tables share
    `embedding_max` equally. For images it is one patch (or the row `first`) plus one position.

    Args:
        names: the parts of the model.
        config: the config of the retrofit.

    Returns:
        The caps by full name.
    """
    tables = names.tables()
    # Attention biases replace a table of positions, which is then zero and takes no equal share.
    shared = [role for role, _ in tables if role != "position" or config.position_bias is None]
    share = config.embedding_max / (2 if names.architecture.patches else len(shared))
    unused = config.embedding_max * UNUSED_SHARE
    if len(shared) < len(tables):
        share *= 1.0 - UNUSED_SHARE
    caps = {}
    # A patch map gets pixels up to pixel_max, and its output may be as large as its share.
    for role, name in names.linears():
        caps[name] = cap_of(
            name, config, default=share / config.pixel_max if role == "patch" else None
        )
    for role, name in tables:
        caps[name] = cap_of(name, config, default=share if role in shared else unused)
    return caps


def cap_of(name: str, config: LipschitzConfig, default: float | None = None) -> float:
    """The cap of one layer: the longest override that names it, else `default`, else `w_max`.

    A key of `overrides` names a layer if it is the layer's full name or a dotted suffix of it.
    """
    hits = [key for key in config.overrides if name == key or name.endswith("." + key)]
    if hits:
        return float(config.overrides[max(hits, key=len)])
    return float(config.w_max if default is None else default)
