"""TODO lip_plugin/certificate/graph."""
