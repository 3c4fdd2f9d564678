"""Writing text files so that they are either complete or absent.

A run that is killed while it writes leaves no half-written file behind.
"""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a text file that appears under its name only once all of it is on the disk.

    The text first goes to a temporary file in the same folder, which then takes the name in one
    step. The folder is made if it does not exist.

    Args:
        path: The file.
        text: What it is to hold, written as UTF-8.

    Raises:
        OSError: The file cannot be written. What was there before is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
