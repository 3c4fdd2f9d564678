"""Descriptions of models, and the modules that a retrofit leaves in them. It decides nothing."""

from lip_plugin.opening import open_house

open_house()
