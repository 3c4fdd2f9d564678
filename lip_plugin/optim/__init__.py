"""Optimizers that keep the caps: LipschitzMuon, and a projection behind any other optimizer.

The other files hold what both need: parameter groups, and the checks before each step.
"""

from lip_plugin.opening import open_house

open_house()
