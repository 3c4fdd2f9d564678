"""python -m lip_plugin: the command line, see cli.py."""

import sys

from lip_plugin.cli.commands import main

if __name__ == "__main__":
    sys.exit(main())
