"""Running a TransformerLens model again with other activations at a hook point.

Works on the duck type that TransformerBridge and HookedTransformer share (`run_with_hooks`, `blocks`), so that this
library does not import TransformerLens.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sae_core.errors import ConfigError

# model -> hook point -> whether the layers below can be left out, and under _UNEMBEDDING whether the unembedding can be
# applied afterwards: found out once a model
_KNOWN: WeakKeyDictionary[nn.Module, dict[str, bool]] = WeakKeyDictionary()
_UNEMBEDDING = "unembed"


class Rerun:
    """One clean pass over rows of tokens, then any number of passes with the activations at a hook point replaced.

    A pass with replaced activations leaves out the layers below: their blocks hand on the clean pass's residual
    stream. Passes end ahead of the unembedding, so that logits are made (`logits`) of only the positions that count, a
    few at a time, and never take more memory than those. Whether a model stands either is tried once, by comparing
    logits; if not, the whole model is run.

    `reads`: another hook point, whose activations the clean pass notes as well (`inputs`): what a transcoder reads. It
    lies at or before `hook_point`, so that replacing activations there does not change it.
    """

    def __init__(self, model: nn.Module, hook_point: str, reads: str | None = None):
        self.model = model
        self.hook_point = hook_point
        self.reads = reads or hook_point
        found = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook_point)
        self.layer = int(found.group(1)) if found else None
        self.kind = found.group(2) if found else hook_point
        blocks = getattr(model, "blocks", None)
        if self.layer is None or blocks is None or self.layer >= len(blocks):
            n_layers = "no" if blocks is None else str(len(blocks))
            raise ConfigError(
                f"hook point {hook_point!r}: the model has {n_layers} layers; accepted: blocks.N.<hook>, for example "
                "blocks.0.hook_resid_post"
            )
        # The residual stream at this layer's input decides what the layers below contribute. A hook at a layer's end
        # is the next one's input: then even this layer need not run.
        self.first_layer = self.layer + 1 if self.kind == "hook_resid_post" else self.layer

    def clean(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What `logits` makes logits of [rows, context, ...], and activations [rows, context, d] (heads, if any, side
        by side)."""
        self.ends_early = self._can_end_early(tokens[:1])
        seen: dict[str, Any] = {}
        names = dict.fromkeys((self.hook_point, self.reads))

        def keep(name: str) -> Callable[[Tensor, Any], None]:
            return lambda activation, hook: seen.update({name: activation.detach()})

        try:
            with self._residual_at_input(seen):
                hooks = [(name, keep(name)) for name in names]
                final = self._run_model(tokens, hooks)
        except KeyError as error:  # HookedTransformer; the bridge says nothing and calls no hook
            if not (error.args and error.args[0] in names):
                raise
            missing = [error.args[0]]
        else:
            missing = [name for name in names if name not in seen]
        if missing:
            raise ConfigError(f"hook point {missing[0]!r}: the model has none of this name")
        self.tokens, self.residual, self.as_tuple = tokens, seen["residual"], seen["as_tuple"]
        self.shape = seen[self.hook_point].shape
        self.inputs = seen[self.reads].reshape(*tokens.shape, -1)
        activations = seen[self.hook_point].reshape(*tokens.shape, -1)
        self.skip = self._skippable(activations)
        return final, activations

    def replaced(self, activations: Tensor, rows: Tensor | None = None, *watches: tuple) -> Tensor:
        """What `logits` makes logits of, for the same tokens with `activations` [rows, context, d] in their place.

        rows [n]: which of the clean pass's rows those of `activations` [n, context, d] stand for, each any number of
        times; all of them, once each, if None. watches: further hooks (name, function), at hook points behind this one.
        Gradients pass, unless they are switched off.
        """
        if rows is None:
            return self._run(activations, self.tokens, self.residual, *watches)
        return self._run(activations, self.tokens[rows], self.residual[rows], *watches)

    def logits(self, final: Tensor) -> Tensor:
        """Logits [n, vocabulary] of any n positions of what a pass has returned."""
        return self.model.unembed(final) if self.ends_early else final

    def _run_model(self, tokens: Tensor, hooks: list[tuple]) -> Tensor:
        if not self.ends_early:
            return self.model.run_with_hooks(tokens, return_type="logits", fwd_hooks=hooks)
        seen = []

        def end(final: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            seen.append(final)
            return final[..., :1]

        with _forward_of([self.model.unembed], end):
            self.model.run_with_hooks(tokens, return_type="logits", fwd_hooks=hooks)
        return seen[0]

    def _run(self, activations: Tensor, tokens: Tensor, residual: Tensor, *watches: tuple) -> Tensor:
        shaped = activations.reshape(len(tokens), *self.shape[1:])
        if not self.skip:
            return self._run_hooked(shaped, tokens, residual, *watches)
        if self.kind == "hook_resid_post" or self.kind == "hook_resid_pre":
            with self._blocks_hand_on(shaped):
                return self._run_model(tokens, list(watches))
        with self._blocks_hand_on(residual):
            return self._run_hooked(shaped, tokens, residual, *watches)

    def _run_hooked(self, shaped: Tensor, tokens: Tensor, residual: Tensor, *watches: tuple) -> Tensor:
        hook_point, value = self.hook_point, shaped
        if self.kind == "hook_resid_mid":
            # On the bridge this hook lies on the way into the second norm alone, off the residual stream: the
            # stream itself is set by what attention adds to it.
            hook_point, value = f"blocks.{self.layer}.hook_attn_out", shaped - residual

        def replace(activation: Tensor, hook: Any) -> Tensor:
            return value.reshape(activation.shape)

        return self._run_model(tokens, [(hook_point, replace), *watches])

    @contextmanager
    def _residual_at_input(self, seen: dict[str, Any]) -> Iterator[None]:
        """Notes the residual stream at the hook point's layer, and the form in which blocks return it."""

        def before(block: nn.Module, args: tuple, kwargs: dict) -> None:
            seen["residual"] = (args[0] if args else kwargs["hidden_states"]).detach()

        def after(block: nn.Module, args: tuple, output: Any) -> None:
            seen["as_tuple"] = None if isinstance(output, Tensor) else isinstance(output, tuple) and len(output) == 1

        block = self.model.blocks[self.layer]
        handles = [block.register_forward_pre_hook(before, with_kwargs=True), block.register_forward_hook(after)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _blocks_hand_on(self, residual: Tensor) -> AbstractContextManager[None]:
        """Within, every block below `first_layer` returns `residual` without computing anything."""
        output = (residual,) if self.as_tuple else residual
        return _forward_of(list(self.model.blocks)[: self.first_layer], lambda *args, **kwargs: output)

    def _can_end_early(self, tokens: Tensor) -> bool:
        """Whether logits are what the unembedding makes of its input: some models cap them afterwards."""
        known = _KNOWN.setdefault(self.model, {})
        if _UNEMBEDDING not in known:
            known[_UNEMBEDDING] = False
            if isinstance(getattr(self.model, "unembed", None), nn.Module):
                outcomes = []
                for self.ends_early in (False, True):
                    outcomes.append(self.logits(self._run_model(tokens, [])))
                # much closer than passes are: a cap changes small logits by little
                known[_UNEMBEDDING] = _alike(*outcomes, {torch.float32: 1e-4}.get(outcomes[0].dtype, 1e-2))
        return known[_UNEMBEDDING]

    def _skippable(self, activations: Tensor) -> bool:
        known = _KNOWN.setdefault(self.model, {})
        if self.hook_point not in known:
            if self.kind == "hook_resid_mid":
                self._check_mid(activations[:1])
            known[self.hook_point] = self._try_skipping(activations[:1])
        return known[self.hook_point]

    def _check_mid(self, activations: Tensor) -> None:
        """Some models normalise what attention adds, or add it elsewhere: setting it then does not set the stream."""
        seen = []
        value = torch.zeros_like(activations)
        watch = (self.hook_point, lambda activation, hook: seen.append(activation.detach()))
        self._run_hooked(value, self.tokens[:1], self.residual[:1], watch)
        if not seen or seen[0].abs().max() > 1e-3 * activations.abs().max():
            raise ConfigError(
                f"hook point {self.hook_point!r} cannot be replaced in this model; accepted are hook_resid_pre, "
                "hook_resid_post, hook_attn_out and hook_mlp_out of a layer"
            )

    def _try_skipping(self, activations: Tensor) -> bool:
        """Whether passes with and without the layers below agree, for the clean activations and for zeros."""
        if self.first_layer == 0 or self.as_tuple is False:
            return False
        tokens, residual = self.tokens[:1], self.residual[:1]
        for given in (activations, torch.zeros_like(activations)):
            outcomes = []
            for self.skip in (False, True):
                outcomes.append(self.logits(self._run(given, tokens, residual)))
            if not _alike(*outcomes, 1e-3 if given.dtype == torch.float32 else 5e-2):
                return False
        return True


@contextmanager
def _forward_of(modules: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Within, modules compute `forward` in place of what they do."""
    for module in modules:
        # straight into the instance: the bridge's modules pass attribute assignments on to the wrapped ones
        vars(module)["forward"] = forward
    try:
        yield
    finally:
        for module in modules:
            del vars(module)["forward"]


def _alike(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return bool((a - b).abs().max() <= tolerance * a.abs().max().clamp_min(1e-6))
