"""The named errors of lip_plugin: everything a user can mend derives from `LipschitzError`.

Each message says what was found, where, and what to do about it. Errors are raised before anything
is changed: a model, an optimizer or a file that met one is as it was.
"""

from __future__ import annotations


class LipschitzError(Exception):
    """Base of every error that a user of lip_plugin can mend."""


class ConfigError(LipschitzError, ValueError):
    """A `LipschitzConfig` (or an argument) has a value outside its valid range."""


class UnsupportedModelError(LipschitzError, TypeError):
    """The model, or one of its modules, has no description or no proven rule here."""


class TiedWeightsError(LipschitzError, ValueError):
    """One Parameter plays two roles whose constraints conflict."""


class NonFiniteError(LipschitzError, ArithmeticError):
    """A weight, gradient or bound is nan or inf where a number is needed."""


class NotRetrofittedError(LipschitzError, RuntimeError):
    """The call needs a model that `retrofit` has been applied to, and this one has no constrained layer."""


class CheckpointError(LipschitzError, ValueError):
    """A saved model is truncated, incomplete, or at odds with its own config."""


class CertificateError(LipschitzError, RuntimeError):
    """A certificate cannot be given, read or trusted: no number is returned in its place."""


class TrainerError(LipschitzError, RuntimeError):
    """The training stack is configured in a way that the constraint cannot survive."""


class DistributedError(LipschitzError, RuntimeError):
    """Processes disagree, or another one failed: raised on all of them, so that none waits for ever."""
