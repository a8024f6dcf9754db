"""What an SAE does to the language model and to the activations, by SAELens' formulas, many SAEs at once.

    ce_recovered = (CE_ablated - CE_sae) / (CE_ablated - CE_clean)      ablated: all activations at the hook point 0
    ce_increase = CE_sae - CE_clean, in nats
    kl_recovered = (KL_ablated - KL_sae) / KL_ablated                   KL(clean || other)
    explained_variance = 1 - E||x - x_hat||^2 / E||x - E x||^2
    mse = E||x - x_hat||^2 (summed over d_in)      relative_reconstruction_bias = E||x_hat||^2 / E<x, x_hat>
    cosine, l2_ratio, l0 (entries not 0), l1: means over tokens

Sums are kept a row of tokens, so that figures of any choice of rows can be had from them, a bootstrap's too.

Excluded tokens count in nothing. Their activations pass unchanged through the SAE's run and are ablated like all others
in the ablated one, as SAELens does. Cross-entropy counts at kept positions that have a next token, KL at all kept
positions. Ablated activations may be another vector than zeros, usually their mean; SAELens knows zeros only.

A transcoder reads one hook point and is judged at the other one, that it writes: there its output is put into the
model, there activations are ablated, and x in the formulas is what the model itself has there. SAELens' evaluations
know no such thing: they compare a transcoder's output with its input, put it in the input's place, and (its hooked
models, too) leave its skip connection out.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from sae_core.errors import ConfigError
from sae_core.functional import cosine, l2_ratio, squared_error
from sae_core.hooked import Rerun

Figures = Mapping[str, Any]  # a number or an array of one shape for each name

_STORED = (
    "n_tokens", "n_predictions", "ce_clean", "ce_ablated", "ce_sae", "kl_ablated", "kl_sae", "l0", "l1",
    "squared_error", "square_x", "square_x_hat", "x_dot_x_hat", "cosine", "l2_ratio",
)  # fmt: skip
ROW_SUMS = (*_STORED[:10], "square_centred", *_STORED[10:])
"""What is summed over the kept tokens of a row. `n_predictions`: those with a next token, over which CE is summed.
`square_centred`: of ||x - m||^2, where m is the mean over the tokens of all rows."""


@dataclass
class EvaluationSums:
    """Sums over the kept tokens of each row, from which all metrics come; those of other rows are added by `merge`.

    Arrays are numpy's, on the CPU; scalars' sums are float64 [rows], in the order in which the rows were given.
    """

    n_tokens: np.ndarray
    n_predictions: np.ndarray
    ce_clean: np.ndarray
    ce_ablated: np.ndarray
    ce_sae: np.ndarray
    kl_ablated: np.ndarray
    kl_sae: np.ndarray
    l0: np.ndarray
    l1: np.ndarray
    squared_error: np.ndarray
    square_x: np.ndarray
    square_x_hat: np.ndarray
    x_dot_x_hat: np.ndarray
    cosine: np.ndarray
    l2_ratio: np.ndarray
    sum_x: np.ndarray  # [rows, d_out] float64; x is what is to be reconstructed. One object for all SAEs of a call
    fired: np.ndarray  # [d_sae] int64: on how many tokens of all rows each latent was not 0

    def merge(self, *others: "EvaluationSums") -> "EvaluationSums":
        """Append the rows of `others` to these, in the order given; returns self."""
        for other in others:
            if self.sum_x.shape[1:] != other.sum_x.shape[1:] or self.fired.shape != other.fired.shape:
                raise ConfigError("only sums of the same SAE can be merged: their d_out or d_sae differ")
        for name in (*_STORED, "sum_x"):
            setattr(self, name, np.concatenate([getattr(one, name) for one in (self, *others)]))
        self.fired = sum((other.fired for other in others), start=self.fired)
        return self

    def rows(self) -> dict[str, np.ndarray]:
        """Each of ROW_SUMS, [rows]."""
        mean = self.sum_x.sum(0) / max(self.n_tokens.sum(), 1)
        centred = self.square_x - 2 * (self.sum_x @ mean) + self.n_tokens * (mean @ mean)
        stored = {name: getattr(self, name) for name in _STORED}
        return {name: centred if name == "square_centred" else stored[name] for name in ROW_SUMS}

    @property
    def feature_density(self) -> np.ndarray:
        """Share of the kept tokens on which each latent was not 0, [d_sae]."""
        return self.fired / self.n_tokens.sum()

    def metrics(self, dead: Tensor | np.ndarray | None = None) -> dict[str, float]:
        """All metrics. `dead` [d_sae] bool says which latents are dead where a larger count than this one knows;
        by default those that fired on none of the tokens."""
        totals = {name: float(sums.sum()) for name, sums in self.rows().items()}
        if totals["n_tokens"] == 0 or totals["n_predictions"] == 0:
            kept = int(totals["n_tokens"])
            raise ConfigError(f"{kept} tokens were kept: an evaluation needs one that has a next token")
        dead = np.asarray(self.fired == 0 if dead is None else dead)
        found = {name: float(value) for name, value in metrics_of(totals).items()}
        return found | {"dead_fraction": float(dead.mean()), "n_tokens": int(totals["n_tokens"])}


def metrics_of(sums: Figures) -> dict[str, Any]:
    """Every metric but dead_fraction from totals of ROW_SUMS over rows: numbers, or arrays of one shape (a bootstrap's
    replicates, say), for numbers or arrays. What would be divided by 0 is NaN."""
    n, predictions = sums["n_tokens"], sums["n_predictions"]
    ce_clean, ce_ablated, ce_sae = (_ratio(sums[name], predictions) for name in ("ce_clean", "ce_ablated", "ce_sae"))
    return {
        "l0": _ratio(sums["l0"], n),
        "l1": _ratio(sums["l1"], n),
        "ce_recovered": _ratio(ce_ablated - ce_sae, ce_ablated - ce_clean),
        "ce_increase": ce_sae - ce_clean,
        "ce_clean": ce_clean,
        "ce_ablated": ce_ablated,
        "ce_sae": ce_sae,
        "kl_recovered": _ratio(sums["kl_ablated"] - sums["kl_sae"], sums["kl_ablated"]),
        "kl_sae": _ratio(sums["kl_sae"], n),
        "kl_ablated": _ratio(sums["kl_ablated"], n),
        "explained_variance": 1 - _ratio(sums["squared_error"], sums["square_centred"]),
        "mse": _ratio(sums["squared_error"], n),
        "cosine": _ratio(sums["cosine"], n),
        "l2_ratio": _ratio(sums["l2_ratio"], n),
        "relative_reconstruction_bias": _ratio(sums["square_x_hat"], sums["x_dot_x_hat"]),
        "n_tokens": n,
    }


def _ratio(a: Any, b: Any) -> Any:
    return np.divide(a, b, out=np.full(np.broadcast(a, b).shape, np.nan), where=np.not_equal(b, 0))[()]


@torch.no_grad()
def evaluate_rows(
    model: nn.Module,
    saes: Mapping[str, nn.Module],
    hook_point: str,
    tokens: Tensor,
    kept: Tensor,
    *,
    rows_per_forward: int,
    writes: str | None = None,
    ablation: Tensor | None = None,
) -> dict[str, EvaluationSums]:
    """Evaluate SAEs of one hook point on the same rows of tokens: anything with `reconstruct` (x -> latents and
    reconstruction), or else with `encode` and `decode`, that takes each token for itself.

    model: TransformerLens' TransformerBridge or HookedTransformer. tokens, kept: [rows, context], integer and bool.
    writes: the hook point that transcoders reconstruct from `hook_point`, at or behind it in the model.
    ablation: the vector [d_out] that stands for every activation in the ablated run, for example the mean; zeros if
    None.
    The clean and the ablated pass run once for all SAEs, and the passes with an SAE start at the layer that is written
    where the model allows it. Raises ConfigError if the model has no such hook point, or a reconstruction or `ablation`
    is of another width than what is to be reconstructed.
    """
    if tokens.shape != kept.shape or tokens.ndim != 2:
        raise ConfigError(
            f"tokens have shape {list(tokens.shape)} and kept {list(kept.shape)}; accepted: both [rows, context]"
        )
    rerun = Rerun(model, writes or hook_point, reads=hook_point)
    device = next(model.parameters()).device
    tokens, kept = tokens.to(device), kept.to(device, torch.bool)
    passes = [
        _evaluate_forward(rerun, saes, rows, keep, ablation)
        for rows, keep in zip(tokens.split(rows_per_forward), kept.split(rows_per_forward), strict=True)
    ]
    shared = {name: np.concatenate([common[name] for common, _ in passes]) for name in passes[0][0]}
    results = {}
    for name in saes:
        own = [of_saes[name] for _, of_saes in passes]
        sums = {key: np.concatenate([one[key] for one in own]) for key in own[0] if key != "fired"}
        results[name] = EvaluationSums(**shared, **sums, fired=np.sum([one["fired"] for one in own], axis=0))
    return results


def _evaluate_forward(
    rerun: Rerun, saes: Mapping[str, nn.Module], rows: Tensor, keep: Tensor, ablation: Tensor | None
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, np.ndarray]]]:
    """Sums over some rows by field of EvaluationSums: (those that SAEs have in common, those of each SAE)."""
    final, activations = rerun.clean(rows)
    behaviour = _Behaviour(rerun.logits, final, rows, keep)
    del final
    ce_ablated, kl_ablated = behaviour.compare(rerun.replaced(_ablated(activations, ablation, rerun.hook_point)))
    x, target = (_wide(given[keep]) for given in (rerun.inputs, activations))
    target_64 = target.double()
    of_tokens = {"ce_clean": behaviour.ce_clean, "ce_ablated": ce_ablated, "kl_ablated": kl_ablated}
    of_tokens |= {"n_predictions": behaviour.has_next, "square_x": target_64.square().sum(1)}
    common = _row_sums({"n_tokens": torch.ones_like(ce_ablated), **of_tokens}, keep)
    sum_x = torch.zeros(len(rows), target.shape[1], dtype=torch.float64, device=target.device)
    common["sum_x"] = sum_x.index_add_(0, keep.nonzero()[:, 0], target_64).cpu().numpy()
    of_saes = {}
    for name, sae in saes.items():
        x_hat, l0, l1, fired = _reconstruct(sae, x)
        if x_hat.shape != target.shape:
            raise ConfigError(
                f"SAE {name!r} reconstructs {x_hat.shape[-1]} dimensions, and {rerun.hook_point!r} has "
                f"{target.shape[-1]}"
            )
        replaced = activations.clone()
        replaced[keep] = x_hat.to(activations.dtype)
        ce_sae, kl_sae = behaviour.compare(rerun.replaced(replaced))
        x_hat_64 = x_hat.double()
        of_tokens = {
            "ce_sae": ce_sae,
            "kl_sae": kl_sae,
            "l0": l0,
            "l1": l1,
            "squared_error": squared_error(target_64, x_hat_64),
            "square_x_hat": x_hat_64.square().sum(1),
            "x_dot_x_hat": (target_64 * x_hat_64).sum(1),
            "cosine": cosine(target_64, x_hat_64),
            "l2_ratio": l2_ratio(target_64, x_hat_64),
        }
        of_saes[name] = _row_sums(of_tokens, keep) | {"fired": fired.cpu().numpy()}
    return common, of_saes


def _ablated(activations: Tensor, ablation: Tensor | None, hook_point: str) -> Tensor:
    if ablation is None:
        return torch.zeros_like(activations)
    d_out = activations.shape[-1]
    if ablation.shape != (d_out,):
        raise ConfigError(f"ablation has shape {list(ablation.shape)}; accepted: [{d_out}], as {hook_point!r} has it")
    return ablation.to(activations).expand_as(activations).contiguous()


def _row_sums(of_tokens: Mapping[str, Tensor], keep: Tensor) -> dict[str, np.ndarray]:
    """Sums in float64, [rows] each, of what each of the kept tokens has, [kept tokens] each."""
    placed = torch.zeros(len(of_tokens), *keep.shape, dtype=torch.float64, device=keep.device)
    placed[:, keep] = torch.stack([values.double() for values in of_tokens.values()])
    return dict(zip(of_tokens, placed.sum(2).cpu().numpy(), strict=True))


def _wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _reconstruct(sae: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of x [tokens, d_in]: the reconstruction, L0 and L1 of each token, and on how many tokens each latent was not 0.
    All on the device of `x`, computed where the SAE lies."""
    own = next(iter([*sae.parameters(), *sae.buffers()]), x)
    parts, fired = [], 0
    for given in x.to(own.device).split(_tokens_at_once(own.device, getattr(sae, "d_sae", x.shape[1]))):
        if hasattr(sae, "reconstruct"):
            f, x_hat = sae.reconstruct(given)
        else:
            f = sae.encode(given)
            x_hat = sae.decode(f)
        active = f.bool().float()  # a comparison with 0 takes a CPU eight times as long
        fired = fired + active.sum(0).long()
        parts.append((x_hat.to(x.dtype), active.sum(1), f.abs().sum(1, dtype=torch.float32)))
    x_hat, l0, l1 = (torch.cat(one).to(x.device) for one in zip(*parts, strict=True))
    return x_hat, l0, l1, fired


class _Behaviour:
    """The clean model's predictions at kept positions, to compare others with.

    logits: what makes logits [n, vocabulary] of n positions of what a pass returns. final: what the clean pass did,
    [rows, context, ...].
    """

    def __init__(self, logits: Callable[[Tensor], Tensor], final: Tensor, rows: Tensor, keep: Tensor):
        self.logits, self.keep = logits, keep
        has_next = torch.ones_like(keep)
        has_next[:, -1] = False
        self.has_next = has_next[keep]
        self.targets = rows.roll(-1, dims=1).long()[keep]
        self.at_once = _tokens_at_once(final.device, logits(final[:1, 0]).shape[-1])
        self.p: list[Tensor] = []
        negative_entropies, ce = [], []
        for log_p, targets in self._log_softmax(final):
            self.p.append(log_p.exp())
            negative_entropies.append(_dot(self.p[-1], log_p))
            ce.append(_at(log_p, targets))
        self.negative_entropies = negative_entropies
        self.ce_clean = self._cross_entropy(ce)

    def _log_softmax(self, final: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Log-probabilities [n, vocabulary] and next tokens [n], some positions at a time."""
        for part, targets in zip(final[self.keep].split(self.at_once), self.targets.split(self.at_once), strict=True):
            yield log_softmax(self.logits(part).float(), dim=-1), targets

    def _cross_entropy(self, of_targets: list[Tensor]) -> Tensor:
        return torch.where(self.has_next, -torch.cat(of_targets), 0.0)

    def compare(self, final: Tensor) -> tuple[Tensor, Tensor]:
        """CE (0 where there is no next token) and KL(clean || other), [kept positions] each."""
        ce, kl = [], []
        clean = zip(self.p, self.negative_entropies, strict=True)
        for (log_q, targets), (p, negative_entropy) in zip(self._log_softmax(final), clean, strict=True):
            ce.append(_at(log_q, targets))
            kl.append(negative_entropy - _dot(p, log_q))
        return self._cross_entropy(ce), torch.cat(kl)


def _tokens_at_once(device: torch.device, width: int) -> int:
    """Of tokens with `width` numbers each: on a CPU as many as stay in its cache, elsewhere half a gigabyte of them."""
    return max(128, (1 << 20 if device.type == "cpu" else 1 << 27) // width)


def _at(log_p: Tensor, targets: Tensor) -> Tensor:
    return log_p.gather(1, targets[:, None])[:, 0]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)
