"""TODO lip_plugin/cli."""
