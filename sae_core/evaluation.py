"""What an SAE does to the language model and to the activations, by SAELens' formulas, many SAEs at once.

    ce_recovered = (CE_ablated - CE_sae) / (CE_ablated - CE_clean)      ablated: all activations at the hook point 0
    kl_recovered = (KL_ablated - KL_sae) / KL_ablated                   KL(clean || other)
    explained_variance = 1 - E||x - x_hat||^2 / (E||x||^2 - ||E x||^2)
    mse = E||x - x_hat||^2 (summed over d_in)      relative_reconstruction_bias = E||x_hat||^2 / E<x, x_hat>
    cosine, l2_ratio, l0 (entries not 0), l1: means over tokens

Excluded tokens count in nothing. Their activations pass unchanged through the SAE's run and are zero in the ablated
one, as SAELens does. Cross-entropy counts at kept positions that have a next token, KL at all kept positions.

A transcoder reads one hook point and is judged at the other one, that it writes: there its output is put into the
model, there activations are ablated, and x in the formulas is what the model itself has there. SAELens' evaluations
know no such thing: they compare a transcoder's output with its input, put it in the input's place, and (its hooked
models, too) leave its skip connection out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from sae_core.errors import ConfigError
from sae_core.functional import cosine, l2_ratio, squared_error
from sae_core.hooked import Rerun


@dataclass
class EvaluationSums:
    """Sums over tokens, in float64, from which all metrics come; those of disjoint tokens add up by `merge`."""

    n_tokens: int
    n_predictions: int
    ce_clean: float
    ce_ablated: float
    ce_sae: float
    kl_ablated: float
    kl_sae: float
    l0: float
    l1: float
    squared_error: float
    square_x: float
    square_x_hat: float
    x_dot_x_hat: float
    cosine: float
    l2_ratio: float
    sum_x: Tensor  # [d_out] float64, CPU; x is what is to be reconstructed
    fired: Tensor  # [d_sae] int64, CPU: on how many tokens each latent was not 0

    def merge(self, other: "EvaluationSums") -> "EvaluationSums":
        """Add `other`'s sums to these; returns self."""
        if self.sum_x.shape != other.sum_x.shape or self.fired.shape != other.fired.shape:
            raise ConfigError("only sums of the same SAE can be merged: their d_out or d_sae differ")
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))
        return self

    def metrics(self, dead: Tensor | None = None) -> dict[str, float]:
        """All metrics. `dead` [d_sae] bool says which latents are dead where a larger count than this one knows;
        by default those that fired on none of the n_tokens."""
        if self.n_tokens == 0 or self.n_predictions == 0:
            raise ConfigError(f"{self.n_tokens} tokens were kept: an evaluation needs one that has a next token")
        n = self.n_tokens
        ce_clean, ce_ablated, ce_sae = (
            total / self.n_predictions for total in (self.ce_clean, self.ce_ablated, self.ce_sae)
        )
        variance = self.square_x / n - float((self.sum_x / n).square().sum())
        dead = self.fired == 0 if dead is None else dead
        return {
            "l0": self.l0 / n,
            "l1": self.l1 / n,
            "ce_recovered": _ratio(ce_ablated - ce_sae, ce_ablated - ce_clean),
            "ce_clean": ce_clean,
            "ce_ablated": ce_ablated,
            "ce_sae": ce_sae,
            "kl_recovered": _ratio(self.kl_ablated - self.kl_sae, self.kl_ablated),
            "kl_sae": self.kl_sae / n,
            "kl_ablated": self.kl_ablated / n,
            "explained_variance": 1 - _ratio(self.squared_error / n, variance),
            "mse": self.squared_error / n,
            "cosine": self.cosine / n,
            "l2_ratio": self.l2_ratio / n,
            "relative_reconstruction_bias": _ratio(self.square_x_hat, self.x_dot_x_hat),
            "dead_fraction": float(dead.double().mean()),
            "n_tokens": n,
        }


def _ratio(a: float, b: float) -> float:
    return a / b if b != 0 else float("nan")


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
) -> dict[str, EvaluationSums]:
    """Evaluate SAEs of one hook point on the same rows of tokens: anything with `reconstruct` (x -> latents and
    reconstruction), or else with `encode` and `decode`.

    model: TransformerLens' TransformerBridge or HookedTransformer. tokens, kept: [rows, context], integer and bool.
    writes: the hook point that transcoders reconstruct from `hook_point`, at or behind it in the model.
    The clean and the ablated pass run once for all SAEs, and the passes with an SAE start at the layer that is written
    where the model allows it. Raises ConfigError if the model has no such hook point, or a reconstruction is of
    another width than what is to be reconstructed.
    """
    if tokens.shape != kept.shape or tokens.ndim != 2:
        raise ConfigError(
            f"tokens have shape {list(tokens.shape)} and kept {list(kept.shape)}; accepted: both [rows, context]"
        )
    rerun = Rerun(model, writes or hook_point, reads=hook_point)
    device = next(model.parameters()).device
    tokens, kept = tokens.to(device), kept.to(device, torch.bool)
    results: dict[str, EvaluationSums] = {}
    for rows, keep in zip(tokens.split(rows_per_forward), kept.split(rows_per_forward), strict=True):
        for name, sums in _evaluate_forward(rerun, saes, rows, keep).items():
            results[name] = results[name].merge(sums) if name in results else sums
    return results


def _evaluate_forward(
    rerun: Rerun, saes: Mapping[str, nn.Module], rows: Tensor, keep: Tensor
) -> dict[str, EvaluationSums]:
    logits, activations = rerun.clean(rows)
    behaviour = _Behaviour(logits, rows, keep)
    del logits
    ce_ablated, kl_ablated = behaviour.compare(rerun.replaced(torch.zeros_like(activations)))
    x, target = (_wide(given[keep]) for given in (rerun.inputs, activations))
    target_64 = target.double()
    results = {}
    for name, sae in saes.items():
        f, x_hat = _reconstruct(sae, x)
        if x_hat.shape != target.shape:
            raise ConfigError(
                f"SAE {name!r} reconstructs {x_hat.shape[-1]} dimensions, and {rerun.hook_point!r} has "
                f"{target.shape[-1]}"
            )
        replaced = activations.clone()
        replaced[keep] = x_hat.to(activations.dtype)
        ce_sae, kl_sae = behaviour.compare(rerun.replaced(replaced))
        x_hat_64 = x_hat.double()
        sums = torch.stack(
            [
                *(behaviour.ce_clean, ce_ablated, ce_sae, kl_ablated, kl_sae),
                (f != 0).sum().double(),
                f.abs().sum(dtype=torch.float64),
                squared_error(target_64, x_hat_64).sum(),
                target_64.square().sum(),
                x_hat_64.square().sum(),
                (target_64 * x_hat_64).sum(),
                cosine(target_64, x_hat_64).sum(),
                l2_ratio(target_64, x_hat_64).sum(),
            ]
        ).tolist()
        results[name] = EvaluationSums(
            len(x), behaviour.n_predictions, *sums, sum_x=target_64.sum(0).cpu(), fired=(f != 0).sum(0).cpu()
        )
    return results


def _wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _reconstruct(sae: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Latents and reconstruction, on the device of `x`, computed where the SAE lies."""
    own = next(iter([*sae.parameters(), *sae.buffers()]), x)
    given = x.to(own.device)
    if hasattr(sae, "reconstruct"):
        f, x_hat = sae.reconstruct(given)
    else:
        f = sae.encode(given)
        x_hat = sae.decode(f)
    return f.to(x.device), x_hat.to(x.device, x.dtype)


class _Behaviour:
    """The clean model's predictions, to compare others with. Sums over kept positions, in float64."""

    def __init__(self, logits: Tensor, rows: Tensor, keep: Tensor):
        self.keep = keep
        self.has_next = keep.clone()
        self.has_next[:, -1] = False
        self.n_predictions = int(self.has_next.sum())
        self.targets = rows.roll(-1, dims=1).long()[..., None]
        log_p = log_softmax(logits.float(), dim=-1)
        self.p = log_p.exp()
        self.negative_entropy = _dot(self.p, log_p)
        self.ce_clean = self._cross_entropy(log_p)

    def _cross_entropy(self, log_q: Tensor) -> Tensor:
        return -log_q.gather(-1, self.targets)[..., 0][self.has_next].sum(dtype=torch.float64)

    def compare(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(sum of CE, sum of KL(clean || other)); the clean part of the KL is not computed again."""
        log_q = log_softmax(logits.float(), dim=-1)
        kl = (self.negative_entropy - _dot(self.p, log_q))[self.keep]
        return self._cross_entropy(log_q), kl.sum(dtype=torch.float64)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum over the last axis of a * b, without the product in memory."""
    return torch.einsum("rcv,rcv->rc", a, b)
