"""Passes over the same rows of tokens with other activations at a hook point, and the metric of each."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sae_core.analysis.final_norm import FinalNorm
from sae_core.analysis.metrics import BoundMetric, Metric, PositionMetric
from sae_core.errors import ConfigError
from sae_core.hooked import Rerun

Tokens = str | Sequence[int] | Sequence[Sequence[int]] | Tensor


def rows_of(model: nn.Module, tokens: Tokens, metadata: Mapping[str, Any]) -> Tensor:
    """Token ids [rows, context], from those, from one row's, or from a text (with a BOS if `metadata`, an SAE's, say
    that it was trained with one; as the model does by default where they say nothing)."""
    if isinstance(tokens, str):
        prepend = metadata.get("prepend_bos")
        tokens = model.to_tokens(tokens, **({} if prepend is None else {"prepend_bos": prepend}))
    try:
        ids = torch.as_tensor(tokens)
    except (TypeError, ValueError):
        raise ConfigError("tokens: rows of different lengths; accepted: ids [rows, context] or a text") from None
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.ndim != 2 or ids.is_floating_point() or ids.numel() == 0:
        raise ConfigError(f"tokens have shape {list(ids.shape)} and type {ids.dtype}; accepted: ids [rows, context]")
    return ids.to(next(model.parameters()).device, torch.int64, copy=True)


class Passes:
    """Passes with the activations at `hook_point` replaced; the layers below are left out where the model allows it.

    `activations` [rows, context, d]: the clean ones; `read`: those at `reads`. With `freeze_norm` the final norm
    divides by its scale of the clean pass in all of them.
    """

    def __init__(
        self,
        model: nn.Module,
        hook_point: str,
        tokens: Tensor,
        metric: Metric | None = None,
        *,
        reads: str | None = None,
        freeze_norm: bool = False,
    ):
        self.norm = FinalNorm(model)
        self.scale: Tensor | None = None
        self.rerun = Rerun(model, hook_point, reads=reads)
        self.rows = torch.arange(len(tokens), device=tokens.device)
        with torch.no_grad():
            _, self.activations = self.rerun.clean(tokens)
            self.read = self.rerun.inputs
            if freeze_norm:
                with self.norm.watched() as seen:
                    self.rerun.replaced(self.activations)
                self.scale = self.norm.scales(seen[0])
        self.metric = metric
        if isinstance(metric, PositionMetric):
            self.metric = BoundMetric(metric, model, *tokens.shape, tokens.device)

    def final(self, activations: Tensor, rows: Tensor, *watches: tuple) -> Tensor:
        """What `Rerun.logits` makes logits of, for `activations` [n, context, d] in place of those of `rows` [n]."""
        with self.norm.frozen(None if self.scale is None else self.scale[rows]):
            return self.rerun.replaced(activations, rows, *watches)

    def totals(self, activations: Tensor, *watches: tuple) -> Tensor:
        """The metric [n] of all rows, once for each of `activations` [n, rows, context, d]."""
        n = len(activations)
        rows = self.rows.repeat(n)
        final = self.final(activations.flatten(0, 1), rows, *watches)
        if isinstance(self.metric, BoundMetric):
            return self._of_positions(final, rows).view(n, -1).sum(1)
        return torch.stack([self._scalar(logits) for logits in self.rerun.logits(final).split(len(self.rows))])

    @torch.no_grad()
    def clean(self) -> Tensor:
        """The metric as it is, with which `changed` is compared: of each row where the metric adds up rows, [rows];
        else of all of them, [1]."""
        final = self.final(self.activations, self.rows)
        if isinstance(self.metric, BoundMetric):
            return self._of_positions(final, self.rows)
        self.clean_logits = self.rerun.logits(final)
        return self._scalar(self.clean_logits)[None]

    @torch.no_grad()
    def changed(self, activations: Tensor, rows: Tensor) -> Tensor:
        """The metric [n], once for each of `activations` [n, context, d] in place of that of its row in `rows` [n]: of
        this row or of all rows, as `clean` says."""
        final = self.final(activations, rows)
        if isinstance(self.metric, BoundMetric):
            return self._of_positions(final, rows)
        values = []
        for row, of_row in zip(rows.tolist(), final.split(1), strict=True):  # one at a time: logits are large
            one = self.rerun.logits(of_row)
            if len(self.rows) > 1:
                one = torch.cat([self.clean_logits[:row], one, self.clean_logits[row + 1 :]])
            values.append(self._scalar(one))
        return torch.stack(values)

    def _of_positions(self, final: Tensor, rows: Tensor) -> Tensor:
        at = final[torch.arange(len(rows), device=rows.device), self.metric.positions[rows]]
        return self.metric.of_logits(self.rerun.logits(at), rows)

    def _scalar(self, logits: Tensor) -> Tensor:
        value = self.metric(logits)
        if not isinstance(value, Tensor) or value.numel() != 1:
            shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ConfigError(
                f"metric returned {shape}; accepted: a function of the logits [rows, positions, vocabulary] that "
                "returns a tensor of one number"
            )
        return value.reshape(())


def gradients_at(
    passes: Passes, read_at: Sequence[str], differentiate_at: Sequence[str], of: Callable[[Tensor, Mapping], Sequence]
) -> tuple[dict[str, Tensor], Any]:
    """One pass that notes activations, as the model has them, by hook point.

    `differentiate_at`: hook points whose activations are part of the graph, so that `of` (the metric, {hook point:
    activations}) can take gradients with respect to them. Returns the activations and what `of` returns.
    """
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Tensor, Any], Tensor | None]:
        def hook(activation: Tensor, hook: Any) -> Tensor | None:
            if name not in differentiate_at:
                kept[name] = activation
                return None
            kept[name] = activation.clone()  # what follows is made of this very tensor
            if not kept[name].requires_grad:
                kept[name].requires_grad_()
            return kept[name]

        return hook

    names = list(dict.fromkeys([*read_at, *differentiate_at]))
    with torch.enable_grad():
        try:
            value = passes.totals(passes.activations[None], *((name, keep(name)) for name in names))
        except KeyError as error:  # HookedTransformer; the bridge calls no hook
            if not (error.args and error.args[0] in names):
                raise
            kept = {name: kept[name] for name in names if name != error.args[0] and name in kept}
            names = [error.args[0]]
        if missing := [name for name in names if name not in kept]:
            raise ConfigError(f"hook point {missing[0]!r}: the model has none of this name")
        return {name: kept[name].detach() for name in read_at}, of(value[0], kept)


def apart_from_inference_mode(module: nn.Module) -> None:
    """Replace weights and buffers that were made under `torch.inference_mode`, through which no gradient passes, by
    copies, in place."""
    copies: dict[int, Tensor] = {}
    for part in module.modules():
        for kind in ("_parameters", "_buffers"):
            tensors: dict[str, Any] = getattr(part, kind)
            for name, tensor in tensors.items():
                if tensor is None or not tensor.is_inference():
                    continue
                if id(tensor) not in copies:
                    copy = tensor.detach().clone()
                    copies[id(tensor)] = nn.Parameter(copy, tensor.requires_grad) if kind == "_parameters" else copy
                tensors[name] = copies[id(tensor)]
