"""TODO lip_plugin/certificate/attack."""
