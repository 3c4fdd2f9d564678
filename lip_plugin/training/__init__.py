"""TODO lip_plugin/training."""
