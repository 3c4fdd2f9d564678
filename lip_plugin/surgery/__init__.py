"""TODO lip_plugin/surgery."""
