"""Runs `python -m lip_plugin.integrations.nanogpt --nanogpt-dir DIR train.py ...`; see run.py."""

import sys

from lip_plugin.integrations.nanogpt.run import main

if __name__ == "__main__":
    sys.exit(main())
