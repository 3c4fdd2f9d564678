"""What a training run needs around its steps.

There are schedules and limits that change in mid-run, calibration, a loss, and checkpoints.
"""

from lip_plugin.opening import open_house

open_house()
