"""What a run needs around its steps: limits, schedules, calibration, losses, checkpoints."""
