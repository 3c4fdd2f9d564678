"""TODO lip_plugin/certificate/comparison."""
