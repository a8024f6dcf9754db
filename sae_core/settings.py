"""Settings of one SAE and of its training, and how a wrong one is reported."""

import difflib
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from sae_core.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)


class SAESettings(BaseModel):
    """What every architecture has. An architecture's own settings derive from this in its file.

    resample_every_steps: after every so many steps of the first half of a run (later they would have no time to learn),
    dead latents start anew, at tokens that are reconstructed badly; see dead.py. None: never.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    architecture: str
    d_sae: int = Field(gt=0)
    seed: int = Field(default=0, ge=0)
    lr: float | None = Field(default=None, gt=0)
    frozen_decoder: bool = False
    resample_every_steps: int | None = Field(default=None, gt=0)
    normalize_activations: Literal[
        "none", "expected_average_only_in", "constant_norm_rescale", "layer_norm", "covariance_whitening"
    ] = "expected_average_only_in"

    @field_validator("*", mode="before")
    @classmethod
    def refuse_truth_values(cls, value: object, info: ValidationInfo) -> object:
        """`k: true` is no number, though Python takes it for 1."""
        if isinstance(value, bool) and cls.model_fields[info.field_name or ""].annotation is not bool:
            raise ValueError(f"{info.field_name} is {value}: a truth value, where none is accepted")
        return value

    @model_validator(mode="after")
    def check_resampling(self) -> "SAESettings":
        if self.frozen_decoder and self.resample_every_steps is not None:
            raise ValueError(
                f"resample_every_steps is {self.resample_every_steps}, and frozen_decoder is true: resampling changes "
                "the decoder; accepted: one of the two"
            )
        return self

    def coefficient_at(self, step: int) -> float:
        """The coefficient of the sparsity or auxiliary loss at `step` (0-based), warm-up applied."""
        raise TypeError(f"settings of architecture {self.architecture!r} have no training loss")

    def settled_after(self, steps: int) -> int:
        """The step of a run of `steps` after which the coefficient's warm-up is over: from there on an SAE can be
        compared with others."""
        warm_ups = [getattr(self, name) for name in type(self).model_fields if name.endswith("_warm_up_steps")]
        return min(max(warm_ups, default=0), steps)

    def named_coefficient(self, coefficient: float) -> dict[str, float]:
        """The coefficient under the name by which metrics show it; nothing where it never changes."""
        return {}

    def config_fields(self) -> dict[str, Any]:
        """What the saved configuration says of this architecture beside the sizes (see SAEConfig)."""
        return {}


class TrainingSettings(BaseModel):
    """How long and how fast: everything that SAEs of one sweep share.

    `lr` rises linearly over `lr_warm_up_steps` and falls to 0 over the last `lr_decay_steps` (None: the last fifth of
    the run) as `lr_decay` says: along a line, along half a cosine, or, if constant, not at all. A latent is dead that
    has not fired for `dead_after_tokens` tokens. The encoder's product is made in `encoder_dtype`; weights, gradients
    and everything else are float32.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    steps: int = Field(gt=0)
    batch_tokens: int = Field(gt=0)
    lr: float = Field(default=4e-4, gt=0)
    lr_warm_up_steps: int = Field(default=0, ge=0)
    lr_decay: Literal["linear", "cosine", "constant"] = "linear"
    lr_decay_steps: int | None = Field(default=None, ge=0)
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    adam_betas: tuple[float, float] = (0.9, 0.999)
    dead_after_tokens: int = Field(gt=0)
    encoder_dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    @model_validator(mode="after")
    def check_betas_and_schedule(self) -> "TrainingSettings":
        if not all(0 <= beta < 1 for beta in self.adam_betas):
            raise ValueError(f"adam_betas is {self.adam_betas}; both must be at least 0 and below 1")
        if self.lr_decay == "constant" and self.lr_decay_steps:
            raise ValueError(
                f"lr_decay_steps is {self.lr_decay_steps}, but lr_decay is 'constant', without a decay; accepted: 0, "
                "or lr_decay linear or cosine"
            )
        if self.lr_warm_up_steps + self.decay_steps > self.steps:
            raise ValueError(
                f"lr_warm_up_steps ({self.lr_warm_up_steps}) and lr_decay_steps ({self.decay_steps}) together "
                f"exceed steps ({self.steps})"
            )
        return self

    @property
    def decay_steps(self) -> int:
        if self.lr_decay == "constant":
            return 0
        return self.steps // 5 if self.lr_decay_steps is None else self.lr_decay_steps


def read_settings(model: type[Model], mapping: Mapping[str, Any], **context: object) -> Model:
    """Validate `mapping` as `model`; ConfigError names field, value and what is accepted, one line a mistake.

    `context` (for example file="spec.yaml", line=12) is put before the message.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{prefix(context)}expected a mapping of settings, got {mapping!r}")
    try:
        return model.model_validate(dict(mapping))
    except ValidationError as error:
        lines = [_describe(model, item) for item in error.errors()]
        raise ConfigError(prefix(context) + "; ".join(lines)) from None


def nearest(name: object, known: list[str]) -> str:
    """' (did you mean ...?)', or nothing if no known name is close."""
    close = difflib.get_close_matches(str(name), known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def prefix(context: Mapping[str, object]) -> str:
    """'file spec.yaml, line 12: ' of {"file": "spec.yaml", "line": 12}; '' of nothing."""
    return "".join(f"{name} {value}, " for name, value in context.items())[:-2] + ": " if context else ""


def _describe(model: type[BaseModel], item: Mapping[str, Any]) -> str:
    field = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        known = sorted(model.model_fields)
        return f"unknown key {field!r}{nearest(field, known)}; known keys: {', '.join(known)}"
    if item["type"] == "missing":
        return f"{field} is missing: {_accepted(model, field)}"
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])
    reason = item["msg"][0].lower() + item["msg"][1:]
    return f"{field} is {item['input']!r}: {reason}; accepted: {_accepted(model, field)}"


def _accepted(model: type[BaseModel], field: str) -> str:
    info = model.model_fields.get(field.split(".")[0])
    if info is None:
        return "see the documentation"
    kind = info.annotation.__name__ if isinstance(info.annotation, type) else str(info.annotation)
    limits = [
        f"{sign} {getattr(rule, name)}" for rule in info.metadata for name, sign in _LIMITS if hasattr(rule, name)
    ]
    return " ".join([kind, " and ".join(limits)]).strip()


_LIMITS = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
