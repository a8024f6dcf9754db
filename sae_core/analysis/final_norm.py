"""The norm ahead of the unembedding: what it multiplies by, and the scale that it has in the model as it is."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sae_core.errors import ConfigError
from sae_core.hooked import _forward_of

_FAR = 1e3  # so far from 0 that the norm's epsilon does not matter


@torch.no_grad()
def read_norm(norm: nn.Module, like: Tensor) -> tuple[Tensor, Tensor, bool]:
    """(gain [d_model], bias [d_model], whether the mean is taken out) of a LayerNorm or RMS norm, in float32 at least.
    They are read off what it does to vectors of the type, device and width of `like`: libraries spell norms, and keep
    gains (Gemma's is a weight plus 1), in many ways."""
    wide, d_model = torch.promote_types(like.dtype, torch.float32), like.shape[-1]
    v = torch.full((1, 1, d_model), _FAR, dtype=like.dtype, device=like.device)
    v[..., 1::2] = -_FAR  # of mean 0 if the width is even
    if d_model % 2:
        v[..., -1] = 0
    up, down, shifted = (norm(given).to(wide) for given in (v, -v, v + _FAR))
    bias = (up + down) / 2
    root = v.to(wide).square().mean().sqrt()
    gain = torch.where(v == 0, 1.0, (up - bias) * root / torch.where(v == 0, 1.0, v.to(wide)))
    if d_model % 2:  # the last one's gain: from another vector
        e = v.roll(1, dims=-1)
        gain[..., -1] = ((norm(e).to(wide) - bias) * root / e.to(wide))[..., -1]
    return gain[0, 0], bias[0, 0], bool((shifted - up).abs().max() < 1e-2 * up.abs().max())


class FinalNorm:
    """y = gain * (x - mean(x)) / scale + bias (LayerNorm), or without the mean (RMS norm), with `scale` held.

    That gain, bias and mean (see `read_norm`) describe what it did to the activations of a pass is checked. `watched`
    notes the input of the norm in a pass, from which `scales` are had.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.module = getattr(model, "ln_final", None)

    @contextmanager
    def watched(self) -> Iterator[list[Tensor]]:
        """Within, a pass puts the norm's input [rows, context, d_model] into the list."""
        seen: list[Tensor] = []
        if self.module is None:
            raise ConfigError("the model has no ln_final; accepted: a model that ends in a norm and an unembedding")
        handle = self.module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        try:
            yield seen
        finally:
            handle.remove()

    @torch.no_grad()
    def scales(self, x: Tensor) -> Tensor:
        """Scale of the norm at each position of x [rows, context, d_model]: [rows, context, 1], in float32 at least."""
        wide = torch.promote_types(x.dtype, torch.float32)
        self.gain, self.bias, self.centres = read_norm(self.module, x)
        scaled, y = self._centred(x.to(wide)) * self.gain, self.module(x).to(wide)
        out = y - self.bias
        scale = scaled.norm(dim=-1, keepdim=True) / out.norm(dim=-1, keepdim=True).clamp_min(1e-30)
        tolerance = 1e-3 if x.dtype == torch.float32 else 5e-2
        if (scaled / scale - out).abs().max() > tolerance * out.abs().max():
            raise ConfigError(
                f"freeze_norm: the model's ln_final ({type(self.module).__name__}) divides by no scale of its own; "
                "accepted: a LayerNorm or an RMS norm, or freeze_norm=False"
            )
        return scale

    @contextmanager
    def frozen(self, scale: Tensor | None) -> Iterator[None]:
        """Within, passes divide by `scale` [rows, context, 1] whatever the norm's input is; None: as the model does."""
        if scale is None:
            yield
            return

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return (self._centred(x.to(scale.dtype)) / scale * self.gain + self.bias).to(x.dtype)

        with _forward_of([self.module], forward):
            yield

    def _centred(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.centres else x
