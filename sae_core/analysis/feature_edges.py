"""Edges between the features of two SAEs: what a feature of an earlier hook point does to one of a later hook point.

    effect of (p, i) on (q, j) = f_j at q in the model as it is - f_j at q with feature i at p set to 0

in units of feature j's activation. `method="ablation"` measures it, `"gradient"` estimates it to first order, f_i times
d f_j / d f_i: the gradient passes through the later SAE's encoder and the real model in between, in which the earlier
SAE and its error together are the identity (Marks et al., arXiv 2403.19647, section 3.1, whose edges are stopped at the
nodes of hook points in between; here those are a part of the model). The errors of the earlier SAE are upstream nodes
of their own.

A gradient does not see that a downstream feature is switched off, and is far off where an upstream feature fires at
every position, a direction of the position itself, say. On the demo model (17 pairs of SAEs of 1024 latents after
blocks.1 and blocks.4, all architectures, the 10 most active downstream features; `jobs/benchmarks/attribution.py`) it
found 0.58 of the 50 largest true effects in eight prompts of 15 to 33 tokens and 0.62 in four of 48, and 0.83 and 0.74
with such upstream latents left out of both (the lowest pair: 0.46, 0.46, 0.66 and 0.46). `"ablation"` takes one
pass an upstream node, whatever the number of targets.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from sae_core.analysis.attribution import Attribution, tokens_at_once
from sae_core.analysis.nodes import ERROR, Nodes, Place, Positions, nodes_of, places_of
from sae_core.analysis.passes import Passes, Tokens, apart_from_inference_mode, rows_of
from sae_core.errors import ConfigError
from sae_core.sae import SAE

if TYPE_CHECKING:
    import pandas

METHODS = ("gradient", "ablation")


@dataclass(frozen=True)
class Edges:
    """Effects of upstream nodes on downstream features, in one row of tokens: effect [downstream, upstream] float64.

    up_position, up_latent, up_activation [upstream]: features, then the errors (latent ERROR, activation its norm).
    down_position, down_latent, down_activation [downstream]. texts: of the tokens, where the model has a tokenizer.
    """

    method: str
    upstream: str
    downstream: str
    up_position: np.ndarray
    up_latent: np.ndarray
    up_activation: np.ndarray
    down_position: np.ndarray
    down_latent: np.ndarray
    down_activation: np.ndarray
    effect: np.ndarray
    texts: list[str] | None

    def table(self, top: int | None = 50) -> "pandas.DataFrame":
        """The `top` edges with the largest absolute effect (None: all): up_position, up_token, kind ("feature" or
        "error"), up_latent, up_activation, down_position, down_token, down_latent, down_activation, effect."""
        import pandas

        order = np.argsort(-np.abs(self.effect), axis=None, kind="stable")[:top]
        down, up = np.unravel_index(order, self.effect.shape)
        columns: dict[str, Any] = {"up_position": self.up_position[up]}
        if self.texts is not None:
            columns["up_token"] = [self.texts[position] for position in self.up_position[up]]
        columns["kind"] = np.where(self.up_latent[up] == ERROR, "error", "feature")
        columns |= {"up_latent": self.up_latent[up], "up_activation": self.up_activation[up]}
        columns["down_position"] = self.down_position[down]
        if self.texts is not None:
            columns["down_token"] = [self.texts[position] for position in self.down_position[down]]
        columns |= {"down_latent": self.down_latent[down], "down_activation": self.down_activation[down]}
        return pandas.DataFrame({**columns, "effect": self.effect[down, up]})


def edges(
    model: nn.Module,
    upstream: SAE,
    downstream: SAE,
    tokens: Tokens,
    *,
    targets: Attribution | Sequence[tuple[int, int]] | None = None,
    top: int = 20,
    method: Literal["gradient", "ablation"] = "gradient",
    positions: Positions = None,
    at_once: int | None = None,
) -> Edges:
    """Effects of all nodes of `upstream` on some features of `downstream`, which reads a later hook point.

    tokens: ids [context] (or [1, context]), or a text.
    targets: the downstream features, as (position, latent), active ones; or an attribution with effects of that SAE,
    whose `top` strongest features are taken; by default the `top` most active ones.
    method: "gradient" makes a forward and backward pass a target, "ablation" a forward pass an upstream node, `at_once`
    of them together, over the layers from `upstream` on. positions: of upstream nodes, as in `attribute`.

    Raises ConfigError if what `downstream` reads does not lie behind `upstream` in the model, or for a target that is
    not active.
    """
    if method not in METHODS:
        raise ConfigError(f"method {method!r}; accepted: {', '.join(METHODS)}")
    with torch.inference_mode(False):
        for module in (model, upstream, downstream):
            apart_from_inference_mode(module)
        (up,), (down,) = places_of(upstream), places_of(downstream)
        ids = rows_of(model, tokens, upstream.cfg.metadata)
        if len(ids) != 1:
            raise ConfigError(f"tokens: {len(ids)} rows; accepted: one, for edges")
        passes = Passes(model, up.writes, ids, reads=up.reads)
        reader = _Reader(passes, down)
        nodes = nodes_of(up, passes.read, passes.activations, positions)
        with torch.enable_grad():  # so that a hook point which nothing upstream reaches is seen
            clean = reader.latents(passes.activations.clone().requires_grad_())[0].detach()
        position, latent = _targets(targets, clean, down, top)
        at_once = at_once or max(1, tokens_at_once(ids.device, gradients=method == "gradient") // ids.shape[1])
        measure = _by_gradient if method == "gradient" else _by_ablation
        effect = measure(passes, reader, nodes, clean, position, latent, at_once)
        tokenizer = getattr(model, "tokenizer", None)
        texts = None if tokenizer is None else [tokenizer.decode([token]) for token in ids[0].tolist()]
        upstream_nodes = (nodes.position, nodes.latent, nodes.activation.float())
        arrays = [one.cpu().numpy() for one in (*upstream_nodes, position, latent, clean[position, latent].float())]
        return Edges(method, up.name, down.name, *arrays, effect.cpu().numpy(), texts)


class _Reader:
    """Latents of the downstream SAE in passes with other activations upstream."""

    def __init__(self, passes: Passes, down: Place):
        self.passes, self.down = passes, down

    def latents(self, activations: Tensor) -> Tensor:
        """[n, context, d] upstream -> [n, context, d_sae]; with gradients unless they are switched off."""
        seen: list[Tensor] = []
        watch: tuple[str, Callable] = (self.down.reads, lambda activation, hook: seen.append(activation))
        rows = torch.zeros(len(activations), dtype=torch.int64, device=activations.device)
        try:
            self.passes.final(activations, rows, watch)
        except KeyError as error:  # HookedTransformer; the bridge calls no hook
            if error.args != (self.down.reads,):
                raise
            seen = []
        if not seen or (torch.is_grad_enabled() and not seen[0].requires_grad):
            raise ConfigError(
                f"downstream reads {self.down.reads!r}, which in this model is not behind "
                f"{self.passes.rerun.hook_point!r}, where upstream writes; accepted: a later hook point"
            )
        sae = self.down.sae
        read = self.down.of_head(seen[0].reshape(*activations.shape[:2], -1), sae.d_in)
        return sae.encode(read.to(sae.W_enc.device))


def _targets(
    targets: Attribution | Sequence[tuple[int, int]] | None, clean: Tensor, down: Place, top: int
) -> tuple[Tensor, Tensor]:
    if isinstance(targets, Attribution):
        effects = targets[down.name]
        features = effects.chosen(~effects.is_error)
        strongest = features.chosen(features.order()[:top])
        targets = list(zip(strongest.position.tolist(), strongest.latent.tolist(), strict=True))
    if targets is None:
        first = clean.clone()
        first[: down.default_first()] = 0
        strongest = first.flatten().topk(min(top, int((first > 0).sum())))
        return strongest.indices // clean.shape[1], strongest.indices % clean.shape[1]
    for target in targets:
        match target:
            case (int() as position, int() as latent) if (
                -len(clean) <= position < len(clean) and 0 <= latent < clean.shape[1] and clean[position, latent] != 0
            ):
                pass
            case _:
                raise ConfigError(f"targets: {target!r} is no active feature of {down.name!r}; accepted: (position, "
                                  "latent) of active ones")  # fmt: skip
    if not targets:
        raise ConfigError("targets: none are given; accepted: one or more")
    position, latent = torch.tensor(targets, device=clean.device).unbind(1)
    return position % len(clean), latent


def _by_gradient(
    passes: Passes, reader: _Reader, nodes: Nodes, clean: Tensor, position: Tensor, latent: Tensor, at_once: int
) -> Tensor:
    effects = []
    for q, j in zip(position.split(at_once), latent.split(at_once), strict=True):
        with torch.enable_grad():
            x = passes.activations.repeat(len(q), 1, 1).requires_grad_()
            chosen = reader.latents(x)[torch.arange(len(q), device=q.device), q, j]
            (gradient,) = torch.autograd.grad(chosen.sum(), x)  # of each in its own copy of the row
        own = nodes.place.of_head(gradient, nodes.place.sae.d_out)
        effects += [nodes.dots(one[None]) for one in own]
    return torch.stack(effects)


@torch.no_grad()
def _by_ablation(
    passes: Passes, reader: _Reader, nodes: Nodes, clean: Tensor, position: Tensor, latent: Tensor, at_once: int
) -> Tensor:
    effects = []
    for chosen in torch.arange(len(nodes), device=nodes.row.device).split(at_once):
        x = passes.activations.repeat(len(chosen), 1, 1)
        own = nodes.place.of_head(x, nodes.place.sae.d_out)
        own[torch.arange(len(chosen), device=x.device), nodes.position[chosen].to(x.device)] -= nodes.vectors(
            chosen
        ).to(x)
        changed = reader.latents(x)[:, position, latent]
        effects.append((clean[position, latent].double() - changed.double()).T)
    return torch.cat(effects, 1)
