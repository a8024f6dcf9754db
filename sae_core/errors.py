"""The errors that a user can cause. Everything else is a fault of the program and keeps its traceback."""

import os


class UserError(Exception):
    """Something the user gave is wrong: the message names the field, the value and what is accepted."""


class ConfigError(UserError):
    """A setting is unknown, missing or impossible."""


class CheckpointError(UserError):
    """A checkpoint folder is incomplete, damaged, or of a kind that cannot be read."""


def one_line(error: BaseException) -> str:
    """What an error of another library says, short enough to stand in a message of ours."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def reason_of(error: BaseException) -> str:
    """Why a file could not be read or written: the system's word, or what the library that tried it says."""
    number = getattr(error, "errno", None)
    return os.strerror(number) if number else one_line(error)
