"""peft: adapters that are held within caps and budgets."""

from lip_plugin.opening import open_house

open_house()
