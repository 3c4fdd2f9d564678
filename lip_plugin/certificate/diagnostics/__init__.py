"""TODO lip_plugin/certificate/diagnostics."""
