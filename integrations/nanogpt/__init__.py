"""nanoGPT under constraint, with its train.py and sample.py untouched."""

from lip_plugin.opening import open_house

open_house()
