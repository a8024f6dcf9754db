"""Which features of a model's SAEs, and how much of what they leave unexplained, a scalar of its logits rests on.

A node is a feature at a position, or the error there (see nodes.py). Its effect is

    metric(model as it is) - metric(node set to 0)

so that what supports the metric is positive. `ablate` measures it; `attribute` estimates it, for all nodes at once:

    gradient               f d metric / d f, at the activations as they are: the first order of the effect.
                           Attribution patching (Nanda, 2023; Syed et al., arXiv 2310.10348) to 0; for features and
                           error terms: Marks et al., "Sparse feature circuits", arXiv 2403.19647, section 3.1.
    integrated_gradients   f times the mean of d metric / d f along a line on which nodes of one hook point go from 0 to
                           what they are (Sundararajan et al., arXiv 1703.01365; Marks et al., section 3.1), errors
                           included. Nodes are dealt out among `paths` lines; on each of them all other nodes stay.
                           Effects of a line's nodes add up to metric(as is) - metric(those nodes 0).
    direct                 f times what the decoder's row, through the final norm and the unembedding alone, adds to the
                           metric, to first order in the residual stream: direct logit attribution. Exact for logits
                           with the norm's scale held.

In all of them everything but the node stays: other features of the same SAE keep their activations, whatever its
activation function (a top-k SAE does not choose again), errors stay, and what follows is the model itself, since an SAE
and its error together are the identity. So each hook point is judged by itself: the nodes of one are seen in the nodes
of a later one again, and effects are not to be added up over hook points.

Marks et al. have one line a hook point, `paths=1`: it ends where nothing is left of the activations, far from where an
ablation of one node leads. With as many lines as nodes the estimate is what `ablate` measures; a few are most of the
way. On the demo model, 34 SAEs of 1024 latents (all architectures, L0 3 to 37) after blocks.1 and blocks.4, the
difference of the two largest logits as the metric: the share of the 50 largest true effects at a hook point that were
among the 50 largest estimates there, mean over SAEs and prompts,

                                               8 prompts of 15 to 33 tokens      4 of 48 tokens
    gradient                                            0.82, 0.85                 0.67, 0.83
    integrated_gradients                                0.88, 0.94                 0.87, 0.94
    integrated_gradients, paths=8, steps=1              0.76, 0.87                 0.77, 0.85
    integrated_gradients, paths=1, steps=16             0.72, 0.72                 0.58, 0.64
    direct                                              0.28, 0.35                 0.20, 0.32

and the same to 0.01 with the norm's scale held in both (paths=1: up to 0.05 more). What a gradient misses is above all
a latent that fires at every position (position itself, as it seems): set to 0, it changes where later layers look,
which is nothing of first order. On long prompts `paths=8, steps=1`, one pass for 8 lines together, is the cheap way to
find it (2.3 times a gradient's CPU time after blocks.1); on short ones a gradient is the better of the two. `direct` is
no estimate of the whole effect: it leaves out what later layers do with a node. The figures, their lowest SAE and the
time that each takes are `jobs/benchmarks/attribution.py --sweep`.

`freeze_norm` holds the scale of the final norm at what it is in the model as it is: the effect on the logit's numerator
alone. Otherwise an ablation changes it as well.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from sae_core.analysis.metrics import Metric, PositionMetric, log_prob, logit, logit_difference
from sae_core.analysis.nodes import ERROR, Nodes, Place, Positions, SAEs, nodes_of, places_of
from sae_core.analysis.passes import Passes, Tokens, apart_from_inference_mode, gradients_at, rows_of
from sae_core.errors import ConfigError
from sae_core.hooked import Rerun

if TYPE_CHECKING:
    import pandas

__all__ = [
    "ERROR", "Attribution", "Effects", "ablate", "attribute", "log_prob", "logit", "logit_difference", "recall",
]  # fmt: skip

Method = Literal["gradient", "integrated_gradients", "direct"]
METHODS: tuple[Method, ...] = ("gradient", "integrated_gradients", "direct")
Node = tuple[str, int, int | str] | tuple[str, int, int, int | str]

# What a hook point's activations become part of without a nonlinearity: the residual stream, or what adds to it
_RESIDUAL = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")
_LINEAR_INTO = {"attn.hook_z": "hook_attn_out", "mlp.hook_post": "hook_mlp_out"}
# Tokens in a pass that several ablations share: on a CPU, where more are no faster, and elsewhere
_TOKENS_AT_ONCE, _TOKENS_AT_ONCE_ELSEWHERE = 1 << 11, 1 << 15
_SHARE_WITH_GRADIENTS = 8  # elsewhere: all layers' activations are kept for the backward pass


@dataclass(frozen=True)
class Effects:
    """Of the nodes of one SAE: numpy arrays [nodes], features in the order of row, position and latent, then errors.

    latent: ERROR (-1) for the error term. activation: a feature's activation; an error's norm. effect: float64.
    expected_total: what integrated gradients' effects add up to but for the finite number of steps; None of others.
    """

    hook_point: str
    row: np.ndarray
    position: np.ndarray
    latent: np.ndarray
    activation: np.ndarray
    effect: np.ndarray
    expected_total: float | None = None

    def __len__(self) -> int:
        return len(self.row)

    @property
    def is_error(self) -> np.ndarray:
        return self.latent == ERROR

    @property
    def total(self) -> float:
        """The sum of all effects, errors included."""
        return float(self.effect.sum())

    def chosen(self, index: np.ndarray) -> "Effects":
        """The nodes at `index`, or where it is true."""
        names = ("row", "position", "latent", "activation", "effect")
        return replace(self, **{name: getattr(self, name)[index] for name in names})

    def order(self) -> np.ndarray:
        """Indices from the largest absolute effect on; of equal ones the first comes first."""
        return np.argsort(-np.abs(self.effect), kind="stable")

    def nodes(self) -> list[tuple[int, int, int]]:
        """(row, position, latent) of each."""
        return list(zip(self.row.tolist(), self.position.tolist(), self.latent.tolist(), strict=True))


@dataclass(frozen=True, repr=False)
class Attribution:
    """Effects on a metric, by hook point (or by the name that an SAE was given under): `attribution[name]`.

    value: the metric as it is. tokens [rows, context]; texts: theirs, where the model has a tokenizer.
    method: one of METHODS or "ablation".
    """

    method: str
    freeze_norm: bool
    value: float
    tokens: np.ndarray
    texts: list[list[str]] | None
    effects: dict[str, Effects]

    def __repr__(self) -> str:
        """The ten largest effects, and what all of them come to."""
        count, total = sum(map(len, self.effects.values())), sum(one.total for one in self.effects.values())
        frame = self.table(10)
        shown = frame.drop(columns="row") if len(self.tokens) == 1 else frame
        return (f"{self.method}: {count:,} effects, together {total:.4g}, on a metric of {self.value:.4g}\n"
                f"{shown.to_string(index=False, float_format='{:.3g}'.format)}")  # fmt: skip

    def __getitem__(self, name: str) -> Effects:
        if name not in self.effects:
            raise ConfigError(f"there are no effects of {name!r}; accepted: {', '.join(self.effects)}")
        return self.effects[name]

    def strongest(self, top: int) -> "Attribution":
        """The `top` nodes with the largest absolute effect at each hook point, from the largest on."""
        return replace(self, effects={name: one.chosen(one.order()[:top]) for name, one in self.effects.items()})

    def table(self, top: int | None = 50) -> "pandas.DataFrame":
        """The `top` nodes of all with the largest absolute effect (None: all), one a row: hook_point, row, position,
        token (its text, or its id), kind ("feature" or "error"), latent, activation, effect."""
        import pandas

        frames = [self._frame(name, one) for name, one in self.effects.items()]
        return _by_size(pandas.concat(frames, ignore_index=True), top)

    def by_latent(self, top: int | None = None) -> "pandas.DataFrame":
        """Effects added up over positions and rows, one row a latent (and one for all errors) of each hook point:
        hook_point, kind, latent, effect, positions (how many nodes), max_activation."""
        import pandas

        frame = pandas.concat([self._frame(name, one) for name, one in self.effects.items()], ignore_index=True)
        groups = frame.groupby(["hook_point", "kind", "latent"], sort=False)
        summed = groups.agg(
            effect=("effect", "sum"), positions=("effect", "size"), max_activation=("activation", "max")
        )
        return _by_size(summed.reset_index(), top)

    def _frame(self, name: str, one: Effects) -> "pandas.DataFrame":
        import pandas

        at = list(zip(one.row, one.position, strict=True))
        token = [self.tokens[place] for place in at] if self.texts is None else [self.texts[r][p] for r, p in at]
        kind = np.where(one.is_error, "error", "feature")
        return pandas.DataFrame(
            {"hook_point": name, "row": one.row, "position": one.position, "token": token, "kind": kind,
             "latent": one.latent, "activation": one.activation, "effect": one.effect}
        )  # fmt: skip


def _by_size(frame: "pandas.DataFrame", top: int | None) -> "pandas.DataFrame":
    order = np.argsort(-frame["effect"].abs().to_numpy(), kind="stable")
    return frame.iloc[order[:top]].reset_index(drop=True)


# ---- estimates ------------------------------------------------------------------------------------------------------


def attribute(
    model: nn.Module,
    saes: SAEs,
    tokens: Tokens,
    metric: Metric,
    *,
    method: Method = "gradient",
    freeze_norm: bool | None = None,
    paths: int = 32,
    steps: int = 2,
    positions: Positions = None,
) -> Attribution:
    """Estimate the effect of every active feature, and of the error at every position, on a scalar of the logits.

    model: a TransformerBridge or HookedTransformer. saes: one, several, or {name: sae}, SAEs and transcoders, at
    whatever hook points their metadata name (blocks.N.<hook>).
    tokens: ids [rows, context] or [context], or a text. With several rows the metric is of all of them.
    metric: `logit`, `logit_difference` or `log_prob`, or a function of the logits [rows, positions, vocabulary] that
    returns a scalar tensor.
    method: see the top of this module. `gradient` and `direct` take one forward and one backward pass for all SAEs
    together, `integrated_gradients` `paths` times `steps` of them an SAE, over the layers from its hook point on.
    freeze_norm: hold the final norm's scale; by default only in `direct`.
    positions: where nodes are, alike for all rows; by default everywhere but at the first positions that an SAE's
    training left out.

    Raises ConfigError for a hook point that the model lacks or that does not lead to the logits, for `direct` from one
    that a nonlinearity parts from the residual stream, and for what is given wrongly.
    """
    if method not in METHODS:
        raise ConfigError(f"method {method!r}; accepted: {', '.join(METHODS)}")
    for name, number in (("steps", steps), ("paths", paths)):
        if number < 1:
            raise ConfigError(f"{name} {number}; accepted: 1 or more")
    freeze = method == "direct" if freeze_norm is None else freeze_norm
    with torch.inference_mode(False):
        places, ids = _prepare(model, saes, tokens)
        if method == "integrated_gradients":
            return _integrated(model, places, ids, metric, freeze, steps, paths, positions)
        return _from_one_pass(model, places, ids, metric, method, freeze, positions)


def _prepare(model: nn.Module, saes: SAEs, tokens: Tokens) -> tuple[list[Place], Tensor]:
    places = places_of(saes)
    apart_from_inference_mode(model)
    for place in places:
        apart_from_inference_mode(place.sae)
    return places, rows_of(model, tokens, places[0].sae.cfg.metadata)


def _from_one_pass(
    model: nn.Module, places: list[Place], ids: Tensor, metric: Metric, method: Method, freeze: bool, at: Positions
) -> Attribution:
    """`gradient` or `direct`: from the layer of the lowest hook point on, through all of them."""
    lowest = min(Rerun(model, name).layer for place in places for name in (place.reads, place.writes))
    passes = Passes(model, f"blocks.{lowest}.hook_resid_pre", ids, metric, freeze_norm=freeze)
    adds_at = {place.name: _added_at(model, place.writes, ids) for place in places}
    into = {place.name: _direct_into(place.writes) for place in places} if method == "direct" else {}

    def gradients(value: Tensor, kept: Mapping[str, Tensor]) -> list[Tensor | None]:
        if method == "gradient":
            return list(torch.autograd.grad(value, [kept[adds_at[place.name]] for place in places], allow_unused=True))
        (at_end,) = torch.autograd.grad(value, stream[:1], retain_graph=True)
        found: list[Tensor | None] = []
        for place in places:
            linear = into[place.name]
            if linear is None:
                found.append(at_end)
            else:
                found += torch.autograd.grad(
                    kept[linear], kept[place.writes], at_end, retain_graph=True, allow_unused=True
                )
        return found

    read_at = [name for place in places for name in (place.reads, place.writes)]
    differentiate_at = [*adds_at.values(), *(name for name in into.values() if name is not None)]
    with passes.norm.watched() as stream:
        activations, (value, found) = gradients_at(
            passes, read_at, differentiate_at, lambda value, kept: (value.detach(), gradients(value, kept))
        )
    effects = {}
    for place, gradient in zip(places, found, strict=True):
        if gradient is None:
            raise ConfigError(f"hook point {place.writes!r} does not lead to the logits in this model")
        read, written, gradient = (
            given.reshape(*ids.shape, -1) for given in (activations[place.reads], activations[place.writes], gradient)
        )
        nodes = nodes_of(place, read, written, at)
        effects[place.name] = _effects(nodes, nodes.dots(place.of_head(gradient, place.sae.d_out)))
    return _attribution(model, ids, method, freeze, float(value), effects)


def _integrated(
    model: nn.Module, places: list[Place], ids: Tensor, metric: Metric, freeze: bool, steps: int, paths: int,
    at: Positions,
) -> Attribution:  # fmt: skip
    effects, value = {}, 0.0
    for place in places:
        passes = Passes(model, place.writes, ids, metric, reads=place.reads, freeze_norm=freeze)
        nodes = nodes_of(place, passes.read, passes.activations, at)
        with torch.no_grad():
            value = float(passes.totals(passes.activations[None]))
        dealt = torch.randperm(len(nodes), generator=torch.Generator().manual_seed(0)).to(nodes.row.device)
        effect = torch.zeros(len(nodes), dtype=torch.float64, device=nodes.row.device)
        expected = 0.0
        at_once = max(1, tokens_at_once(ids.device, gradients=True) // ids.numel())
        if not isinstance(metric, PositionMetric):  # which has logits of all positions
            at_once = 1
        for lines in _several([dealt[line::paths] for line in range(min(paths, len(nodes)))], at_once):
            vectors = [nodes.vectors(line) for line in lines]
            whole = torch.stack([nodes.placed(*both) for both in zip(lines, vectors, strict=True)])
            clean = passes.activations.expand(len(lines), *passes.activations.shape)
            mean = torch.zeros_like(clean)
            for step in range(steps):
                left = 1 - (step + 0.5) / steps  # midpoints: the sum's error falls with the square of their number
                with torch.enable_grad():
                    x = _less(place, clean, whole * left).requires_grad_()
                    (gradient,) = torch.autograd.grad(passes.totals(x).sum(), x)
                mean += gradient / steps
            mean = place.of_head(mean, place.sae.d_out)
            for line, vector, slope in zip(lines, vectors, mean.to(nodes.error), strict=True):
                effect[line] = (vector.double() * slope[nodes.row[line], nodes.position[line]].double()).sum(-1)
            with torch.no_grad():
                expected += float((value - passes.totals(_less(place, clean, whole)).double()).sum())
        effects[place.name] = _effects(nodes, effect, expected_total=expected)
    return _attribution(model, ids, "integrated_gradients", freeze, value, effects)


def _several(things: list[Any], at_once: int) -> Iterable[list[Any]]:
    return (things[start : start + at_once] for start in range(0, len(things), at_once))


def tokens_at_once(device: torch.device, gradients: bool = False) -> int:
    """How many tokens share a pass."""
    if device.type == "cpu":
        return _TOKENS_AT_ONCE
    return _TOKENS_AT_ONCE_ELSEWHERE // (_SHARE_WITH_GRADIENTS if gradients else 1)


def _less(place: Place, activations: Tensor, vectors: Tensor) -> Tensor:
    """A copy of `activations` [..., d], less `vectors` [..., d_out] where this SAE's are."""
    changed = activations.clone()
    place.of_head(changed, place.sae.d_out).sub_(vectors.to(changed))
    return changed


def _added_at(model: nn.Module, hook_point: str, ids: Tensor) -> str:
    """Where to change activations at `hook_point`: for hook_resid_mid, which on the bridge lies off the residual
    stream, where attention adds to it (in models that allow it, which Rerun finds out)."""
    if not hook_point.endswith(".hook_resid_mid"):
        return hook_point
    with torch.no_grad():
        Rerun(model, hook_point).clean(ids[:1])
    return hook_point.replace("hook_resid_mid", "hook_attn_out")


def _direct_into(hook_point: str) -> str | None:
    """What the activations at a hook point are mapped into by a matrix alone; None for the residual stream."""
    prefix, kind = ".".join(hook_point.split(".")[:2]), ".".join(hook_point.split(".")[2:])
    if kind in _RESIDUAL:
        return None
    if kind not in _LINEAR_INTO:
        accepted = ", ".join([*_RESIDUAL, *_LINEAR_INTO])
        raise ConfigError(f"method 'direct': {hook_point!r} is parted from the residual stream by a nonlinearity; "
                          f"accepted: {accepted}; or another method")  # fmt: skip
    return f"{prefix}.{_LINEAR_INTO[kind]}"


def _effects(nodes: Nodes, effect: Tensor, index: Tensor | None = None, expected_total: float | None = None) -> Effects:
    arrays = [
        (tensor if index is None else tensor[index]).cpu().numpy()
        for tensor in (nodes.row, nodes.position, nodes.latent, nodes.activation.float())
    ]
    return Effects(nodes.place.name, *arrays, effect.double().cpu().numpy(), expected_total)


def _attribution(
    model: nn.Module, ids: Tensor, method: str, freeze: bool, value: float, effects: dict[str, Effects]
) -> Attribution:
    tokens = ids.cpu().numpy()
    tokenizer = getattr(model, "tokenizer", None)
    texts = None if tokenizer is None else [[tokenizer.decode([token]) for token in row] for row in tokens.tolist()]
    return Attribution(method, freeze, value, tokens, texts, effects)


# ---- true effects ---------------------------------------------------------------------------------------------------


def ablate(
    model: nn.Module,
    saes: SAEs,
    tokens: Tokens,
    metric: Metric,
    *,
    nodes: Attribution | Iterable[Node] | None = None,
    freeze_norm: bool = False,
    positions: Positions = None,
    at_once: int | None = None,
) -> Attribution:
    """Measure the effect of nodes: the metric as it is less the metric with a node, and it alone, set to 0.

    nodes: those of an attribution (`attribution.strongest(50)`, say), or (hook point, position, latent) or (hook point,
    row, position, latent), a latent "error" or ERROR for the error term; all nodes at `positions` if None.
    at_once: how many ablations share a forward pass, over the layers from the hook point on.
    The rest as in `attribute`; the result's method is "ablation". Raises ConfigError for a feature that is not active
    where it is named.
    """
    with torch.inference_mode(False):
        places, ids = _prepare(model, saes, tokens)
        wanted = None if nodes is None else _wanted(nodes, places)
        effects, value = {}, 0.0
        for place in places:
            if wanted is not None and not wanted[place.name]:
                continue
            passes = Passes(model, place.writes, ids, metric, reads=place.reads, freeze_norm=freeze_norm)
            found = nodes_of(place, passes.read, passes.activations, positions if wanted is None else slice(None))
            index = None if wanted is None else _indices(found, wanted[place.name])
            clean = passes.clean()
            value = float(clean.sum())
            effects[place.name] = _effects(found, _ablated(passes, found, clean, index, at_once), index)
    return _attribution(model, ids, "ablation", freeze_norm, value, effects)


@torch.no_grad()
def _ablated(passes: Passes, nodes: Nodes, clean: Tensor, index: Tensor | None, at_once: int | None) -> Tensor:
    place, device = nodes.place, passes.activations.device
    index = torch.arange(len(nodes), device=nodes.row.device) if index is None else index
    effects = []
    for chosen in index.split(at_once or max(1, tokens_at_once(device) // nodes.context)):
        rows, position = nodes.row[chosen].to(device), nodes.position[chosen].to(device)
        changed = passes.activations[rows]
        each = torch.arange(len(rows), device=device)
        own = place.of_head(changed, place.sae.d_out)
        own[each, position] -= nodes.vectors(chosen).to(own)
        before = clean[rows] if len(clean) == len(passes.rows) else clean
        effects.append((before.double() - passes.changed(changed, rows).double()).cpu())
    return torch.cat(effects)


def _wanted(nodes: Attribution | Iterable[Node], places: list[Place]) -> dict[str, list[tuple[int, int, int]]]:
    wanted: dict[str, list[tuple[int, int, int]]] = {place.name: [] for place in places}
    if isinstance(nodes, Attribution):
        given: Iterable[Any] = ((name, *key) for name, one in nodes.effects.items() for key in one.nodes())
    else:
        given = nodes
    for node in given:
        match tuple(node):
            case (str() as name, *row, position, latent) if name in wanted and len(row) < 2:
                at = ERROR if latent == "error" else int(latent)
                wanted[name].append((int(row[0]) if row else 0, int(position), at))
            case _:
                raise ConfigError(f"nodes: {node!r}; accepted: (hook point, position, latent) or (hook point, row, "
                                  f"position, latent), of {', '.join(wanted)}")  # fmt: skip
    if not any(wanted.values()):
        raise ConfigError("nodes: none are given; accepted: one or more, or None for all")
    return wanted


def _indices(nodes: Nodes, wanted: list[tuple[int, int, int]]) -> Tensor:
    there = {key: at for at, key in enumerate(zip(*(one.tolist() for one in (nodes.row, nodes.position, nodes.latent)),
                                                  strict=True))}  # fmt: skip
    wanted = [(row, position % nodes.context if position < 0 else position, latent) for row, position, latent in wanted]
    if absent := [key for key in wanted if key not in there]:
        row, position, latent = absent[0]
        raise ConfigError(f"nodes: latent {latent} of {nodes.place.name!r} is not active at position {position} of row "
                          f"{row}; accepted: nodes that are (ablating another changes nothing)")  # fmt: skip
    return torch.tensor([there[key] for key in wanted], device=nodes.row.device)


def recall(attributed: Attribution, true: Attribution, top: int = 50) -> dict[str, float]:
    """By hook point: of the `top` nodes with the largest absolute true effects there, the share that is among the `top`
    with the largest absolute attributed effects there. Features at their positions and errors count alike, one node
    each. Only nodes that both have are ranked. ConfigError where there are no more than `top`: all would be found.
    """
    found = {}
    for name, one in true.effects.items():
        other = dict(zip(attributed[name].nodes(), attributed[name].effect.tolist(), strict=True))
        both = one.chosen(np.array([key in other for key in one.nodes()], dtype=bool))
        if len(both) <= top:
            raise ConfigError(f"top {top}: {name!r} has {len(both)} nodes; accepted: fewer than that")
        estimated = replace(both, effect=np.array([other[key] for key in both.nodes()]))
        found[name] = len({*both.order()[:top].tolist()} & {*estimated.order()[:top].tolist()}) / top
    return found
