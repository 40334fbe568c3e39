"""Why a process of the service will not start (or go on): one sentence for the operator and an exit code.

The codes are those of sysexits.h, one for each thing that needs a person's hand, so that a restart policy and the one
who reads `docker ps` can tell them apart. None of them gets better by starting again at once.
"""

from enum import IntEnum


class ExitCode(IntEnum):
    MODEL = 66
    """The model folder is missing, corrupt or does not fit."""
    REDIS = 69
    """Redis refuses us: wrong password, user or certificate. (A Redis that is only away is waited for.)"""
    STUCK = 70
    """The worker had questions in hand and made no progress; a fresh start is the cure."""
    TOKEN = 77
    """A chat platform refuses the token, or the intents that the settings need are off."""
    SETTINGS = 78
    """A setting is unknown, missing or wrong."""


class Refusal(Exception):
    """`sentence` says what happened and what to do; `exit_code` is the process's last word."""

    def __init__(self, sentence: str, exit_code: ExitCode) -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.exit_code = exit_code
