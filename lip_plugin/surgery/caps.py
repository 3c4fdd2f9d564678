"""The cap of every matrix and of every table of rows, by name."""

from __future__ import annotations

from lip_plugin.config import LipschitzConfig
from lip_plugin.model.parts import Parts
from lip_plugin.surgery.untrained import UNUSED_SHARE


def caps_by_name(names: Parts, config: LipschitzConfig) -> dict[str, float]:
    """The cap of every matrix (RMS->RMS) and of every table of rows (RMS), by full name."""
    tables = names.tables()
    # what enters the first block: one row of each table; of images, a patch (or `first`) and a position
    shared = [role for role, _ in tables if role != "position" or config.position_bias is None]
    share = config.embedding_max / (2 if names.architecture.patches else len(shared))
    unused = config.embedding_max * UNUSED_SHARE
    if len(shared) < len(tables):
        share *= 1.0 - UNUSED_SHARE
    caps = {}
    for role, name in names.linears():
        caps[name] = cap_of(
            name, config, default=share / config.pixel_max if role == "patch" else None
        )
    for role, name in tables:
        caps[name] = cap_of(name, config, default=share if role in shared else unused)
    return caps


def cap_of(name: str, config: LipschitzConfig, default: float | None = None) -> float:
    """Cap of the layer with this full name: the longest override that names it, or the default."""
    hits = [key for key in config.overrides if name == key or name.endswith("." + key)]
    if hits:
        return float(config.overrides[max(hits, key=len)])
    return float(config.w_max if default is None else default)
