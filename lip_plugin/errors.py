"""The errors that lip_plugin raises. Everything that a user can mend derives from `LipschitzError`.

Each message says what was found, where it was found, and what to do about it. An error is raised
before anything is changed: the model, the optimizer or the file that caused it is as it was.
"""

from __future__ import annotations


class LipschitzError(Exception):
    """The base of every error that a user of lip_plugin can mend."""


class ConfigError(LipschitzError, ValueError):
    """A `LipschitzConfig`, or an argument of a function, has a value outside its valid range."""


class UnsupportedModelError(LipschitzError, TypeError):
    """The model or one of its modules is not described here, or no rule is proven for it."""


class TiedWeightsError(LipschitzError, ValueError):
    """One Parameter plays two roles, and the constraints of the two roles conflict."""


class NonFiniteError(LipschitzError, ArithmeticError):
    """A weight, a gradient or a bound is nan or inf where a finite number is needed."""


class NotRetrofittedError(LipschitzError, RuntimeError):
    """The call needs a model that `retrofit` was applied to. This one has no constrained layer."""


class CheckpointError(LipschitzError, ValueError):
    """A saved model is truncated, incomplete, or contradicts its own config."""


class CertificateError(LipschitzError, RuntimeError):
    """A certificate cannot be given, read or trusted.

    No number is returned in its place.
    """


class TrainerError(LipschitzError, RuntimeError):
    """The training stack is configured in a way in which the constraint would not survive."""


class DistributedError(LipschitzError, RuntimeError):
    """The processes of a run disagree, or one of them failed.

    It is raised on all processes, so that none of them waits for ever for the others.
    """
