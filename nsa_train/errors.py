"""What can go wrong for a user: one class per exit code of the command line.

Anything else that reaches the top is a bug of ours: it keeps its traceback and exits with 1.
"""

from __future__ import annotations


class NsaTrainError(Exception):
    """A user's mistake. Printed without traceback as `error: <message>`; the message says what, where, what to do."""

    exit_code = 2


class ConfigError(NsaTrainError):
    """The configuration breaks a rule; the message lists every breach."""


class DataError(NsaTrainError):
    """A corpus, a tokenizer or a prepared store cannot be used."""


class RunFolderError(NsaTrainError):
    """The run folder is in use, or holds another run."""


class CheckpointError(NsaTrainError):
    """No checkpoint of the run can be trusted, or it belongs to another model."""

    exit_code = 17


class OtherRankFailed(NsaTrainError):
    """Another process of the run failed, with its exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class DivergedError(NsaTrainError):
    """The loss or its gradient stayed non-finite, or the loss jumped where that is to stop the run."""

    exit_code = 18


class StorageError(NsaTrainError):
    """The disk is full or not writable."""

    exit_code = 20


class Interrupted(NsaTrainError):
    """A signal asked the run to stop; its checkpoint is written and the same command goes on."""

    exit_code = 75
