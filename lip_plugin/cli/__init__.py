"""The command line, on top of everything; nobody imports it."""
