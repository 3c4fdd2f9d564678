"""TODO lip_plugin/certificate/drift."""
