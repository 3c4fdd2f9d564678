"""Settings from the command line, as names of files to execute and as --key=value."""

from __future__ import annotations

from ast import literal_eval
from pathlib import Path
from typing import Any


def overridden(settings: dict[str, Any], arguments: list[str]) -> dict[str, Any]:
    """The settings after all arguments, in order; an unknown key is an error."""
    settings = dict(settings)
    for argument in arguments:
        if not argument.startswith("--"):
            exec(Path(argument).read_text(encoding="utf-8"), settings)
            settings.pop("__builtins__")
            continue
        key, _, text = argument[2:].partition("=")
        if key not in settings:
            raise ValueError(f"no setting {key}")
        settings[key] = text if isinstance(settings[key], str) else literal_eval(text)
    return settings
