"""TODO lip_plugin/distributed."""
