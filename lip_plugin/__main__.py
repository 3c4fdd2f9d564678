"""The command line, as `python -m lip_plugin`. Its commands are in lip_plugin/cli/commands.py."""

import sys

from lip_plugin.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
