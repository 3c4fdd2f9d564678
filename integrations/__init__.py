"""Where lip_plugin meets other people's libraries. Import it as `lip_plugin.integrations`.

`register_all` runs when lip_plugin is imported. It registers what the core has to know about
other libraries: families of models, wrappers of layers, and the loader of saved models. It imports
none of those libraries.
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
    from lip_plugin.integrations.huggingface.after_import import register_saving

    register_saving()
