"""Where lip_plugin meets other people's libraries. Import it as `lip_plugin.integrations`.

`register_all` runs when the first room of lip_plugin is opened (lip_plugin/opening.py). It
registers what the core has to know about other libraries: families of models and wrappers of
layers. It imports none of those libraries. The loader of saved models is registered by
after_import.py, as soon as `import lip_plugin` runs.
"""

from __future__ import annotations


def register_all() -> None:
    """Register everything that is known of other libraries. It is cheap, and safe to call again."""
    import lip_plugin.integrations.bitsandbytes
    import lip_plugin.integrations.huggingface.families
    import lip_plugin.integrations.known_code
    import lip_plugin.integrations.nanogpt.family
    import lip_plugin.integrations.peft.enforce
    import lip_plugin.integrations.peft.wrappers  # noqa: F401
