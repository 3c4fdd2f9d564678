"""TODO lip_plugin/certificate/robustness."""
