"""Where LipschitzCallback stands among the callbacks of a Trainer.

The Trainer calls its reporters (wandb, mlflow, TensorBoard) before a user's callbacks, and its
progress bar after them. Our keys have to be in an entry of the log before the first reporter reads
it.
"""

from __future__ import annotations

import sys
from typing import Any

from transformers import DefaultFlowCallback, ProgressCallback
from transformers.trainer_callback import CallbackHandler

# What the progress bar shows of our keys.
SHOWN = ("lip/certificate", "lip/log10_certificate")


def handler_above() -> CallbackHandler | None:
    """The handler that called the present callback, or None if somebody else did.

    The Trainer gives its callbacks neither itself nor their list, so it is looked up on the stack.
    """
    frame = sys._getframe(1)
    for _ in range(6):
        found = frame.f_locals.get("self")
        if isinstance(found, CallbackHandler):
            return found
        if frame.f_back is None:
            break
        frame = frame.f_back
    return None


def put_first(handler: Any, kind: type) -> None:
    """Put callbacks of this kind before every reporter, and shorten what the progress bar shows.

    Trainer's own callback stays in front, because it decides if a step logs, evaluates and saves.
    """
    order = (DefaultFlowCallback, kind)
    callbacks = handler.callbacks
    callbacks.sort(
        key=lambda c: next((i for i, of in enumerate(order) if isinstance(c, of)), len(order))
    )
    for i, callback in enumerate(callbacks):
        if type(callback) is ProgressCallback:
            callbacks[i] = ShortProgress(callback.max_str_len)


class ShortProgress(ProgressCallback):
    """The Trainer's progress bar, which shows the bound in place of all our keys."""

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        shown = {k: v for k, v in (logs or {}).items() if not k.startswith("lip/")}
        key = next((k for k in SHOWN if k in (logs or {})), None)
        if logs is not None and key is not None:
            shown[key] = logs[key]
        super().on_log(args, state, control, logs=shown, **kwargs)
