"""The errors that a user can cause. Everything else is a fault of the program and keeps its traceback."""


class UserError(Exception):
    """Something the user gave is wrong: the message names the field, the value and what is accepted."""


class ConfigError(UserError):
    """A setting is unknown, missing or impossible."""


class CheckpointError(UserError):
    """A checkpoint folder is incomplete, damaged, or of a kind that cannot be read."""


def one_line(error: Exception) -> str:
    """What an error of another library says, short enough to stand in a message of ours."""
    return " ".join(str(error).split())[:300] or type(error).__name__
