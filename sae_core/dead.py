"""What is done about dead latents: those that have fired on none of the last `dead_after_tokens` tokens."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from sae_core.functional import aux_k_scale
from sae_core.kernels import TopK, encode
from sae_core.sae import Gradients, StepContext, TrainableSAE

ENCODER_SHARE = 0.2  # of the living latents' mean encoder norm, that a resampled latent starts with


def accumulate_aux_k(
    sae: TrainableSAE, x_centred: Tensor, error: Tensor, gradients: Gradients, context: StepContext
) -> Tensor:
    """Add the gradients of AuxK, and return its loss: the k_aux dead latents that rank highest reconstruct what the
    living ones leave of the target, `-error` [tokens, d_out], which is a constant here.

    Source: Gao et al., arXiv 2406.04093, appendix A.2; ranked by pre_i * ||W_dec_i|| as the living ones are.
    """
    dead = context.dead.nonzero().squeeze(1)
    loss, d_bias = _aux_k(sae, dead, sae.b_enc[dead], context.coefficient, x_centred, error, gradients, context)
    _add_rows(gradients, "b_enc", dead, d_bias)
    if sae.cfg.apply_b_dec_to_input:
        gradients.add("b_dec", -(d_bias @ sae.W_enc.T[dead]))
    return loss


def accumulate_revival(
    sae: TrainableSAE,
    biases: Mapping[str, Tensor],
    aux_coefficient: float,
    pre_act_coefficient: float,
    x_centred: Tensor,
    error: Tensor,
    gradients: Gradients,
    context: StepContext,
) -> Tensor:
    """Add the gradients of two losses that revive latents whose biases an L1 penalty has closed, and return their sum.
    With u = x_centred W_enc (its b_dec is a constant here), nothing but dead latents' weights gets a gradient.

    - AuxK (see `accumulate_aux_k`) with u in place of the pre-activation, weight `aux_coefficient`: rows of W_enc and
      W_dec turn to what the living latents leave, whether or not they fire. With its bias no dead latent would take
      part.
    - `pre_act_coefficient` * mean over tokens of the sum over dead i of ReLU(-(growth_i u_i + bias_i)) ||W_dec_i||, for
      each of `biases` (name to growth [d_sae]), with everything but the bias constant: closed biases rise until the
      latent fires.

    The second is the loss on dead latents of Anthropic, "Circuits Updates - January 2025", for biases only: there it
    also turns rows of W_enc, to the mean of the tokens, which costs explained variance at equal L0 (see standard.py).
    Its coefficient is small, so that Adam's second moments, which remember how a latent was when it lived, let the
    biases rise slowly, and AuxK has the time to find a direction.
    """
    dead = context.dead.nonzero().squeeze(1)
    loss = error.new_zeros(())
    if aux_coefficient > 0:
        free = sae.W_enc.new_zeros(len(dead))
        loss = loss + _aux_k(sae, dead, free, aux_coefficient, x_centred, error, gradients, context)[0]
    if pre_act_coefficient > 0:
        weight = sae.W_dec[dead].norm(dim=1) * (pre_act_coefficient / context.batch_tokens)
        u = x_centred @ sae.W_enc[:, dead]
        for name, growth in biases.items():
            gap = torch.addcmul(getattr(sae, name)[dead], u, growth[dead]).neg_().relu_()
            _add_rows(gradients, name, dead, -weight * (gap > 0).sum(0))
            loss = loss + (gap.sum(0) * weight).sum()
    return loss


def _aux_k(
    sae: TrainableSAE,
    dead: Tensor,
    bias: Tensor,
    coefficient: float,
    x_centred: Tensor,
    error: Tensor,
    gradients: Gradients,
    context: StepContext,
) -> tuple[Tensor, Tensor]:
    """AuxK of the latents `dead` [n], with encoder biases `bias` [n]: its loss and the gradient of `bias`; those of
    W_dec and W_enc are added."""
    k_aux, weight = aux_k_scale(len(dead), sae.d_in, coefficient)
    W_dec, W_enc_rows = sae.W_dec[dead], sae.W_enc.T[dead]
    norms = W_dec.norm(dim=1).clamp_min_(1e-12)
    scaled = (W_enc_rows * norms[:, None]).T
    active, ranks = encode(x_centred, scaled, bias * norms, TopK(k_aux, len(dead)), context.encoder_dtype)
    z = active.scale(ranks, 1 / norms)
    aux_error = active.decode(z, W_dec).add_(error)

    d_out = aux_error * (2 * weight / context.batch_tokens)
    d_pre = active.row_dots(d_out, W_dec)
    _add_rows(gradients, "W_dec", dead, active.latent_sums(z, d_out))
    _add_rows(gradients, "W_enc", dead, active.latent_sums(d_pre, x_centred))
    return aux_error.square().sum() * (weight / context.batch_tokens), active.per_latent(d_pre)


def accumulate_pre_act(
    sae: TrainableSAE,
    x_centred: Tensor,
    threshold: Tensor,
    coefficient: float,
    gradients: Gradients,
    context: StepContext,
) -> Tensor:
    """Add the gradients of the loss that lifts dead latents towards their thresholds [d_sae], and return it: the mean
    over tokens of coefficient * sum over dead i of ReLU(threshold_i - pre_i) * ||W_dec_i||, norms as constants.

    Source: Anthropic, "Circuits Updates - January 2025"; on dead latents alone, as SAELens has it.
    """
    dead = context.dead.nonzero().squeeze(1)
    W_enc_rows, weight = sae.W_enc.T[dead], sae.W_dec[dead].norm(dim=1) * (coefficient / context.batch_tokens)
    pre = torch.addmm(sae.b_enc[dead], x_centred, W_enc_rows.T)
    gap = torch.relu(threshold[dead] - pre)
    d_pre = -(gap > 0).to(gap.dtype) * weight
    d_bias = d_pre.sum(0)
    _add_rows(gradients, "W_enc", dead, d_pre.T @ x_centred)
    _add_rows(gradients, "b_enc", dead, d_bias)
    _add_rows(gradients, "threshold", dead, -d_bias * (sae.threshold[dead] > 0))
    if sae.cfg.apply_b_dec_to_input:
        gradients.add("b_dec", -(d_bias @ W_enc_rows))
    return (gap.sum(0) * weight).sum()


# ---- resampling: Bricken et al., "Towards Monosemanticity" (2023), section "Neuron resampling" ----------------------


def draw_inputs(squared_errors: Tensor, n: int, key: Sequence[int]) -> Tensor:
    """Indices of up to n tokens, drawn with probability proportional to the square of `squared_errors` [tokens] from a
    generator that `key` alone decides.

    Without replacement, other than in the source: two latents with the same rows would stay the same for ever. So there
    are fewer than n where fewer tokens have an error. The draw is a race of exponential clocks (Efraimidis and
    Spirakis, 2006), so that a rounding of the errors does not change it.
    """
    rates = squared_errors.double().cpu().square().numpy()
    running = np.flatnonzero(rates > 0)
    arrivals = np.random.default_rng(list(key)).exponential(size=len(rates))[running] / rates[running]
    return torch.from_numpy(running[np.argsort(arrivals, kind="stable")[:n]]).to(squared_errors.device)


def resampled_rows(sae: TrainableSAE, dead: Tensor, x: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Rows [n, .] of W_enc and W_dec with which dead latents start anew, given as many drawn tokens, normalised: x
    [n, d_in] and the target [n, d_out].

    Both point where the token lies from b_dec, the source's "input". The decoder's row has the length it has at the
    start of a run, the encoder's 0.2 of the mean among the living; a transcoder's decoder points at its target.
    """
    alive = sae.W_enc.norm(dim=0)[~dead]
    mean_norm = alive.mean() if len(alive) else sae.decoder_norm_at_start
    from_b_dec = target - (sae.b_dec + x @ sae.W_skip.T if sae.cfg.skip else sae.b_dec)
    return {
        "W_enc": normalize(sae.centre(x), dim=1) * (ENCODER_SHARE * mean_norm),
        "W_dec": normalize(from_b_dec, dim=1) * sae.decoder_norm_at_start,
    }


def _add_rows(gradients: Gradients, name: str, rows: Tensor, values: Tensor) -> None:
    """Add to some rows of a gradient that has been added before."""
    if name in gradients.wanted:
        gradients[name].index_add_(0, rows, values)
