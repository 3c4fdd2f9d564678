"""The one change that `retrofit` makes to a model, and what belongs to it.

The model is checked first, then it is changed, and then it remembers the config that it was
changed with.
"""

from lip_plugin.opening import open_house

open_house()
