"""What lip_plugin knows of other libraries is registered when its first room is opened.

`import lip_plugin` itself imports neither torch nor transformers, so that `lip-plugin --help` and a
type checker need not wait for them. The rooms from `model` upward call `open_house` in their
`__init__`, before any of their files runs. So families, wrappers and loaders are known whichever
file is imported first.
"""

from __future__ import annotations

from importlib import import_module

_opened: list[bool] = []


def open_house() -> None:
    """Register families, wrappers and the loader of saved models. Does nothing the second time.

    The module is imported by its name, because no room may import from the rooms above it.
    """
    if _opened:
        return
    _opened.append(True)  # before the imports, which open further rooms
    try:
        import_module("lip_plugin.integrations").register_all()
    except BaseException:
        _opened.clear()  # else a second try would find no family, and not say why
        raise
