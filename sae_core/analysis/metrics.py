"""Scalars of the logits that a model's behaviour is judged by: a token's logit, a difference of two, a log-probability.

    logit(token)                 logits[position, token]
    logit_difference(a, b)       logits[position, a] - logits[position, b]
    log_prob(token)              log_softmax(logits[position])[token]

What attribution takes as `metric` is one of these, or any function of the logits [rows, positions, vocabulary] that
returns a scalar. Where there are several rows, these add up their rows' values. They are the cheaper ones: logits are
made at their one position a row alone, and each changed row is judged without the others.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sae_core.errors import ConfigError

Token = int | str
Tokens = Token | Sequence[Token]
Metric = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class PositionMetric(ABC):
    """A scalar of each row's logits at one position. `position`: of the row, from its end if negative; one for all rows
    or one a row. Tokens: an id, or text that is one token, with its leading space where it has one; one for all rows or
    one a row."""

    position: int | Sequence[int]

    @abstractmethod
    def tokens(self) -> dict[str, Tokens]:
        """The tokens that this metric is of, by the name of the argument."""

    @abstractmethod
    def of_logits(self, logits: Tensor, **ids: Tensor) -> Tensor:
        """[n, vocabulary] -> [n], given the id [n] of each of `tokens`."""

    def __call__(self, logits: Tensor) -> Tensor:
        """The sum over rows of logits [rows, positions, vocabulary]; tokens as ids."""
        bound = BoundMetric(self, None, *logits.shape[:2], logits.device)
        rows = torch.arange(len(logits), device=logits.device)
        return bound.of_logits(logits[rows, bound.positions], rows).sum()


class BoundMetric:
    """A PositionMetric for given rows: `positions` [rows], and token ids looked up in the model's tokenizer."""

    def __init__(self, metric: PositionMetric, model: nn.Module | None, n_rows: int, context: int, device: Any):
        self.metric = metric
        positions = _one_a_row("position", metric.position, n_rows)
        for position in positions:
            if not (isinstance(position, int) and -context <= position < context):
                raise ConfigError(
                    f"metric: position {position!r}; accepted: {-context} to {context - 1}, in rows of {context} tokens"
                )
        self.positions = torch.tensor([position % context for position in positions], device=device)
        self.ids = {}
        for name, given in metric.tokens().items():
            ids = [token_id(model, token) for token in _one_a_row(name, given, n_rows)]
            self.ids[name] = torch.tensor(ids, device=device)

    def of_logits(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Of logits [n, vocabulary] at the positions of `rows` [n]: [n], in float32 at least."""
        for name, ids in self.ids.items():
            if (largest := int(ids.max())) >= logits.shape[-1]:
                raise ConfigError(f"metric: {name} {largest}; accepted: 0 to {logits.shape[-1] - 1}")
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return self.metric.of_logits(logits, **{name: ids[rows] for name, ids in self.ids.items()})


@dataclass(frozen=True)
class _OfOne(PositionMetric):
    token: Tokens

    def tokens(self) -> dict[str, Tokens]:
        return {"token": self.token}


class _Logit(_OfOne):
    def of_logits(self, logits: Tensor, **ids: Tensor) -> Tensor:
        return _at(logits, ids["token"])


class _LogProb(_OfOne):
    def of_logits(self, logits: Tensor, **ids: Tensor) -> Tensor:
        return _at(logits.log_softmax(-1), ids["token"])


@dataclass(frozen=True)
class _LogitDifference(PositionMetric):
    a: Tokens
    b: Tokens

    def tokens(self) -> dict[str, Tokens]:
        return {"a": self.a, "b": self.b}

    def of_logits(self, logits: Tensor, **ids: Tensor) -> Tensor:
        return _at(logits, ids["a"]) - _at(logits, ids["b"])


def logit(token: Tokens, position: int | Sequence[int] = -1) -> PositionMetric:
    """The logit of `token` at `position`."""
    return _Logit(position, token)


def logit_difference(a: Tokens, b: Tokens, position: int | Sequence[int] = -1) -> PositionMetric:
    """The logit of `a` less that of `b` at `position`."""
    return _LogitDifference(position, a, b)


def log_prob(token: Tokens, position: int | Sequence[int] = -1) -> PositionMetric:
    """The log-probability, in nats, of `token` as what follows `position`."""
    return _LogProb(position, token)


def token_id(model: nn.Module | None, token: Token) -> int:
    """The id of a token given as one, or as text. ConfigError for text that is not one token of the model's."""
    if isinstance(token, int) and not isinstance(token, bool) and token >= 0:
        return token
    tokenizer = getattr(model, "tokenizer", None)
    if not isinstance(token, str) or tokenizer is None:
        accepted = "a token's id, or its text" if tokenizer is not None else "a token's id (there is no tokenizer here)"
        raise ConfigError(f"token {token!r}; accepted: {accepted}")
    ids = tokenizer.encode(token, add_special_tokens=False)
    if len(ids) != 1:
        pieces = ", ".join(repr(tokenizer.decode([one])) for one in ids)
        raise ConfigError(f"token {token!r} is {len(ids)} tokens ({pieces}); accepted: text that is one, or an id")
    return ids[0]


def _one_a_row(name: str, given: Any, n_rows: int) -> list[Any]:
    if isinstance(given, str) or not isinstance(given, Sequence | Tensor):
        return [given] * n_rows
    values = given.tolist() if isinstance(given, Tensor) else list(given)
    if not isinstance(values, list):  # a tensor of one number
        return [values] * n_rows
    if len(values) != n_rows:
        raise ConfigError(f"metric: {len(values)} values of {name} for {n_rows} rows; accepted: one, or one a row")
    return values


def _at(values: Tensor, ids: Tensor) -> Tensor:
    return values.gather(1, ids[:, None])[:, 0]
