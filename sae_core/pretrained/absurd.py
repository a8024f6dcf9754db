"""Does a loaded SAE reconstruct what the model really does? One that is used on other activations than it was trained
on, or whose scale was misread, gives features all the same: only its reconstruction shows it."""

import warnings

import torch
from torch import Tensor

from sae_core.errors import ConfigError
from sae_core.functional import explained_variance
from sae_core.sae import SAE

LEAST = 0.1  # explained variance: published SAEs explain 0.5 and more, a wrong scale or hook point gives less than 0
FEWEST_TOKENS = 8  # below which the variance says nothing
OUTLIER = 4.0  # times the median norm: a BOS token or another sink, which many SAEs were not trained on


class AbsurdReconstruction(UserWarning):
    """What an SAE reconstructs of a model's activations has little to do with them."""


@torch.no_grad()
def warn_if_absurd(sae: SAE, x: Tensor, target: Tensor | None = None) -> float:
    """The variance of real activations that `sae` explains: 1 - E||y - y_hat||^2 / (E||y||^2 - ||E y||^2), tokens left
    out whose norm is above 4 times the median. Warns with AbsurdReconstruction where it is below 0.1.

    x: activations [n, d_in] of the SAE's hook point ([n, n_heads, d_head] and further leading dimensions will do);
    target: what is to be reconstructed [n, d_out], for a transcoder. With fewer than 8 tokens, or tokens that are all
    the same, nothing can be said: NaN, and no warning.
    """
    if target is None and sae.cfg.is_transcoder:
        raise ConfigError("target is missing: the activations [n, d_out] that a transcoder reconstructs")
    reads = _rows(x, sae.d_in, "x").to(sae.W_enc.device)
    writes = reads if target is None else _rows(target, sae.d_out, "target").to(sae.W_enc.device)
    if len(reads) != len(writes):
        raise ConfigError(f"x has {len(reads)} tokens and target {len(writes)}; accepted: one row a token in both")
    kept = torch.ones(len(reads), dtype=torch.bool, device=reads.device)
    for part in (reads, writes):
        norms = part.float().norm(dim=1)
        kept &= norms <= OUTLIER * norms.median() if len(norms) else kept
    reads, writes = reads[kept], writes[kept]
    if len(reads) < FEWEST_TOKENS or bool((writes == writes[:1]).all()):
        return float("nan")
    explained = float(explained_variance(writes, sae(reads)))
    if not explained >= LEAST:
        warnings.warn(_what_to_check(sae, explained, len(reads)), AbsurdReconstruction, stacklevel=2)
    return explained


def _rows(x: Tensor, width: int, name: str) -> Tensor:
    if x.ndim > 1 and x.shape[-1] == width:
        return x.reshape(-1, width)
    if x.ndim > 2 and x.shape[-2] * x.shape[-1] == width:
        return x.reshape(-1, width)
    raise ConfigError(f"{name} has shape {list(x.shape)}; accepted: [n, {width}]")


def _what_to_check(sae: SAE, explained: float, n_tokens: int) -> str:
    about = sae.cfg.metadata
    source = about.get("source") or {}
    name = " ".join(str(source[key]) for key in ("release", "sae_id") if source.get(key)) or source.get("repo_id")
    processing = about.get("model_processing") or about.get("model_from_pretrained_kwargs") or "none"
    said = [
        f"hook point {about.get('hook_name')!r}",
        *([f"written to {about['hook_name_out']!r}"] if about.get("hook_name_out") else []),
        f"model {about.get('model_name')!r}",
        f"the model's weights processed by {processing}",
        f"BOS {'first' if about.get('prepend_bos', True) else 'not first'} in each context",
    ]
    return (
        f"{name or 'this SAE'} explains {explained:.3g} of the variance of {n_tokens} tokens' activations (below "
        f"{LEAST}): its features cannot be trusted here. Check that the activations are those that it was trained on, "
        f"by its own word: {', '.join(said)}"
    )
