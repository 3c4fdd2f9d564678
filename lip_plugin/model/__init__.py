"""TODO lip_plugin/model."""
