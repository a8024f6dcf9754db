"""Generating text with hooks.

    model = with_saes(model)
    model.generate(prompt, max_new_tokens=40, fwd_hooks=[("blocks.4.hook_resid_post", add_direction)])

TransformerLens' own `generate` takes no hooks: HookedTransformer and TransformerBridge leave `fwd_hooks` unused, so
that the recipe for steering that circulates changes nothing.

With a key-value cache (`use_past_kv_cache`, the default) a hook sees the whole prompt in the first pass, [batch,
prompt, ...], and from then on the newest position alone, [batch, 1, ...]; without one, all positions in every pass. A
hook that minds where it is finds the position of the first token it is shown as `hook.ctx["start"]`, and the length of
the prompt as `hook.ctx["prompt_length"]`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any


class Progress:
    """Which positions the passes of one generation have shown to hooks."""

    def __init__(self, points: Sequence[Any]):
        self.points = points
        self.prompt_length: int | None = None
        self.seen = 0

    def begin_pass(self, n_tokens: int) -> None:
        """A pass over `n_tokens` begins: all there are so far, or with a cache those after what has been seen."""
        if self.prompt_length is None:
            self.prompt_length = n_tokens
        cached = n_tokens <= self.seen
        start = self.seen if cached else 0
        self.seen = start + n_tokens
        for point in self.points:
            point.ctx.update(start=start, prompt_length=self.prompt_length)

    def forget(self) -> None:
        for point in self.points:
            for name in ("start", "prompt_length"):
                point.ctx.pop(name, None)


def generate(
    model: Any,
    own: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    fwd_hooks: Sequence[tuple[str | Callable[[str], bool], Callable]],
) -> Any:
    """What the model's `own` generate returns for `args` and `kwargs`, with hooks at every forward pass; they are
    removed afterwards, whatever happens."""
    if not fwd_hooks:
        return own(*args, **kwargs)
    points = {
        id(point): point for name, point in model.hook_dict.items()
        if any(name == wanted if isinstance(wanted, str) else wanted(name) for wanted, _ in fwd_hooks)
    }  # fmt: skip
    model._generation = Progress(list(points.values()))
    try:
        with model.hooks(fwd_hooks=list(fwd_hooks)):
            return own(*args, **kwargs)
    finally:
        model._generation.forget()
        model._generation = None
