"""Errors that a user can cause, as the command line prints them: one message, no traceback."""

from sae_core.errors import CheckpointError, ConfigError, UserError


class SpecError(ConfigError):
    """The sweep spec has an unknown key, a wrong unit or an impossible value."""


class DataError(UserError):
    """The dataset cannot be read as the spec says, or is too small for the run."""


class ModelError(UserError):
    """The language model cannot be loaded, or lacks a hook point that the spec names."""


class SweepError(UserError):
    """A sweep cannot be found, is already running elsewhere, or cannot be placed on the cluster."""


__all__ = ["CheckpointError", "ConfigError", "DataError", "ModelError", "SpecError", "SweepError", "UserError"]
