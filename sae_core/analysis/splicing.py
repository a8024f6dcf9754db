"""SAEs inside a running model: their reconstructions in place of activations, their latents within reach of hooks.

    model = with_saes(model)                       # a TransformerBridge or HookedTransformer, as it is
    logits, cache = model.run_with_cache_with_saes(tokens, saes=[sae], use_error_term=True)
    cache["blocks.4.hook_resid_post.hook_sae_acts_post"]            # [batch, position, d_sae]

The methods, hook names and numbers are those of SAELens' HookedSAETransformer; where it is silent, this is not: a hook
point that the model lacks, an SAE of other weights than the model has, or two SAEs that would write the same
activations are refused.

At a hook point where an SAE is, the model's own hooks come after it: they see, and the cache has, what the model goes
on with. Of an SAE that reads x and writes in place of y (for an SAE the same; of a transcoder two hook points):

    hook_sae_input      x, heads side by side        hook_sae_recons   W_dec and b_dec applied, before denormalising
    hook_sae_acts_pre   pre-activations [..., d_sae] hook_sae_error    y less the reconstruction, of no gradient
    hook_sae_acts_post  latents [..., d_sae]         hook_sae_output   what takes the place of y

each as `f"{hook point written}.{name}"`. What a hook returns (or changes in place) is what is used from there on. The
error is always that of the untouched SAE, so that it hides no intervention. A skip connection is part of
hook_sae_recons (SAELens' hooked models leave it out).
"""

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from math import isnan
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from sae_core.analysis.generation import Progress, generate
from sae_core.errors import CheckpointError, ConfigError
from sae_core.model_processing import state_of, steps_of, steps_that_matter
from sae_core.normalization import scale_tokens
from sae_core.sae import SAE

HOOKS = (
    "hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons", "hook_sae_error", "hook_sae_output",
)  # fmt: skip
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id")
_STREAM = re.compile(r"(blocks\.\d+\.)?(hook_(resid_(pre|mid|post)|attn_out|mlp_out|embed))")
# Hook points that a model passes by until it is told to make what they show, and the setting that tells it.
_SWITCHED = {
    "hook_mlp_in": "use_hook_mlp_in", "hook_attn_in": "use_attn_in", "hook_result": "use_attn_result",
    **dict.fromkeys(("hook_q_input", "hook_k_input", "hook_v_input"), "use_split_qkv_input"),
}  # fmt: skip
_CHECKED: "WeakSet[SAE]" = WeakSet()  # SAEs from elsewhere that have been tried on activations
_TOKENS_TO_CHECK = 1024


def with_saes(model: Any) -> Any:
    """The same model, in place, with the surface of SAELens' HookedSAETransformer (see `SplicedModel`).

    model: TransformerLens' TransformerBridge or HookedTransformer (what derives from them, too). Asked for a second
    time, it changes nothing. Raises ConfigError for anything else.
    """
    if isinstance(model, SplicedModel):
        return model
    if not isinstance(model, nn.Module) or not isinstance(getattr(model, "hook_dict", None), Mapping):
        raise ConfigError(
            f"model is a {type(model).__name__}; accepted: TransformerLens' TransformerBridge or HookedTransformer"
        )
    if "hook_dict" in vars(model):  # a plain attribute of a HookedTransformer
        vars(model)["_own_hook_dict"] = vars(model).pop("hook_dict")
    model.__class__ = _spliced_class(type(model))
    model._splices = {}
    model._generation = None
    return model


@cache
def _spliced_class(base: type) -> type:
    return type(base.__name__, (SplicedModel, base), {"__module__": base.__module__, "__doc__": SplicedModel.__doc__})


def _blank(base: type) -> Any:
    spliced = _spliced_class(base)
    return spliced.__new__(spliced)


class SplicedModel:
    """A TransformerLens model into which SAEs can be spliced. Made by `with_saes`.

    SAEs stay where they lie: activations are brought to their device and type and back. As with TransformerLens' own
    hooks, one thread at a time may run a model.
    """

    _splices: "dict[str, Splice]"  # by hook point written, as the model itself calls it
    _generation: Progress | None

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The class is made for each model's own: it is named by that one, where a model is copied or pickled."""
        _, _, *state = super().__reduce_ex__(protocol)
        return (_blank, (type(self).__bases__[1],), *state)

    # ---- attaching and removing ----

    @property
    def acts_to_saes(self) -> dict[str, SAE]:
        """Attached SAEs by the hook point they read, as their metadata name it; by the one that is written where two
        read the same."""
        found: dict[str, SAE] = {}
        for splice in self._splices.values():
            found[splice.writes if splice.reads in found else splice.reads] = splice.sae
        return found

    def add_sae(
        self,
        sae: SAE,
        use_error_term: bool | None = None,
        exclude_special_tokens: bool | Sequence[int] = False,
    ) -> None:
        """Attach an SAE or transcoder at the hook points that its metadata name (`hook_name`, and `hook_name_out` of a
        transcoder), until `reset_saes`. One that is attached there already is replaced.

        use_error_term: whether what the SAE misses is added again, so that the model runs as without it; None is what
        scripts of SAELens' have set on the SAE itself (`sae.use_error_term = True`), else false.
        exclude_special_tokens: True, or token ids: at these tokens the model keeps its own activations.
        Raises ConfigError for a hook point that the model lacks, a width that differs, a model whose weights were
        processed in another way than the checkpoint asks for, and activations that another SAE writes already.
        """
        self._add(sae, use_error_term, exclude_special_tokens, self.hook_dict)

    def _add(self, sae: SAE, use_error_term: bool | None, exclude: Any, points: Mapping[str, Any]) -> None:
        if use_error_term is None:
            use_error_term = getattr(sae, "use_error_term", False)
        splice = Splice(self, sae, bool(use_error_term), exclude, points)
        other = self._splices.get(splice.place)
        if other is not None and other.origin != splice.origin:
            raise ConfigError(
                f"hook point {splice.writes!r} is written by the SAE that reads {other.reads!r} already; accepted: one "
                f"SAE that writes it (reset_saes({other.reads!r}) takes the other out)"
            )
        self._set_splices({**self._splices, splice.place: splice})

    def reset_saes(self, act_names: str | Sequence[str] | None = None) -> None:
        """Take SAEs out again: those at the named hook points (what they read, or what they write), or all."""
        wanted = list(self._splices.values())
        if act_names is not None:
            names = [act_names] if isinstance(act_names, str) else list(act_names)
            wanted = [splice for name in names for splice in self._named(name)]
        self._set_splices({place: splice for place, splice in self._splices.items() if splice not in wanted})

    def _named(self, name: str) -> "list[Splice]":
        points = self.hook_dict
        actual = hook_point_of(points, name)[0] if name in points else name
        found = [
            splice for splice in self._splices.values() if name in (splice.reads, splice.writes)
            or actual in (splice.origin, splice.place)
        ]  # fmt: skip
        if not found:
            attached = ", ".join(map(repr, self.acts_to_saes)) or "none"
            raise ConfigError(f"act_names: there is no SAE at {name!r}; attached: {attached}")
        return found[:1]

    @contextmanager
    def saes(
        self,
        saes: SAE | Sequence[SAE] = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        exclude_special_tokens: bool | Sequence[int] = False,
    ) -> Iterator[Any]:
        """Within, `saes` are attached; afterwards those are that were before (unless reset_saes_end is false)."""
        before = dict(self._splices)
        points = self.hook_dict if saes else {}  # looked up once: a bridge collects its names anew each time
        try:
            for sae in [saes] if isinstance(saes, nn.Module) else saes:
                self._add(sae, use_error_term, exclude_special_tokens, points)
            yield self
        finally:
            if reset_saes_end:
                self._set_splices(before)

    # ---- running ----

    def run_with_saes(
        self,
        *model_args: Any,
        saes: SAE | Sequence[SAE] = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        exclude_special_tokens: bool | Sequence[int] = False,
        **model_kwargs: Any,
    ) -> Any:
        """The forward pass with `saes` attached."""
        with self.saes(saes, reset_saes_end, use_error_term, exclude_special_tokens):
            return self(*model_args, **model_kwargs)

    def run_with_cache_with_saes(
        self,
        *model_args: Any,
        saes: SAE | Sequence[SAE] = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        exclude_special_tokens: bool | Sequence[int] = False,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """`run_with_cache` with `saes` attached: (what the model returns, cache), the cache with the hooks of each."""
        with self.saes(saes, reset_saes_end, use_error_term, exclude_special_tokens):
            return self.run_with_cache(
                *model_args, return_cache_object=return_cache_object, remove_batch_dim=remove_batch_dim, **kwargs
            )

    def run_with_hooks_with_saes(
        self,
        *model_args: Any,
        saes: SAE | Sequence[SAE] = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        exclude_special_tokens: bool | Sequence[int] = False,
        fwd_hooks: Sequence[tuple[str | Callable[[str], bool], Callable]] = (),
        bwd_hooks: Sequence[tuple[str | Callable[[str], bool], Callable]] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        """`run_with_hooks` with `saes` attached. Raises ConfigError for a name that is no hook point."""
        with self.saes(saes, reset_saes_end, use_error_term, exclude_special_tokens):
            check_hooks(self, fwd_hooks, "fwd_hooks")
            check_hooks(self, bwd_hooks, "bwd_hooks")
            return self.run_with_hooks(
                *model_args, fwd_hooks=list(fwd_hooks), bwd_hooks=list(bwd_hooks), reset_hooks_end=reset_hooks_end,
                clear_contexts=clear_contexts, **model_kwargs,
            )  # fmt: skip

    def generate(
        self, *args: Any, fwd_hooks: Sequence[tuple[str | Callable[[str], bool], Callable]] = (), **kwargs: Any
    ) -> Any:
        """The model's own `generate`, with hooks at every forward pass: see generation.py."""
        check_hooks(self, fwd_hooks, "fwd_hooks")
        return generate(self, super().generate, args, kwargs, fwd_hooks)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._generation is not None and args and isinstance(args[0], Tensor):
            self._generation.begin_pass(args[0].shape[1])
        excluding = [splice for splice in self._splices.values() if splice.excluded is not False]
        tokens = self._tokens_of(args, kwargs) if excluding else None
        try:
            for splice in excluding:
                splice.kept = torch.isin(tokens, self._excluded_ids(splice).to(tokens.device))
            result = super().forward(*args, **kwargs)
        finally:
            for splice in excluding:
                splice.kept = None
        in_part = any(kwargs.get(name) is not None for name in ("start_at_layer", "stop_at_layer"))
        for splice in self._splices.values() if not in_part else ():
            splice.check_reached()
        return result

    def _tokens_of(self, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
        """The tokens of a forward pass, [batch, position]."""
        names = ("input", "input_ids", "tokens")
        given = args[0] if args else next((kwargs[name] for name in names if kwargs.get(name) is not None), None)
        if isinstance(given, str | list):
            settings = {key: kwargs[key] for key in ("prepend_bos", "padding_side") if kwargs.get(key) is not None}
            given = self.to_tokens(given, **settings)
        if not isinstance(given, Tensor) or given.is_floating_point():
            raise ConfigError(
                f"exclude_special_tokens needs to see tokens, and the model was given a {type(given).__name__}"
                f"{' of embeddings' if isinstance(given, Tensor) else ''}; accepted: text, or tokens [batch, position]"
            )
        return given[None] if given.ndim == 1 else given

    def _excluded_ids(self, splice: "Splice") -> Tensor:
        if splice.excluded is not True:
            return torch.tensor(list(splice.excluded), dtype=torch.long)
        if self.tokenizer is None:
            raise ConfigError("exclude_special_tokens is True, and the model has no tokenizer; accepted: token ids")
        ids = (getattr(self.tokenizer, name, None) for name in _SPECIAL)
        return torch.tensor(sorted({token for token in ids if token is not None}), dtype=torch.long)

    # ---- hook points ----

    @property
    def hook_dict(self) -> dict[str, Any]:
        own = vars(self).get("_own_hook_dict")
        if own is not None:
            return own
        # a bridge that looks through itself anew, for its compatibility mode, keeps what it found at the time
        lasting = {name: point for name, point in super().hook_dict.items() if ".hook_sae_" not in name}
        return {**lasting, **self._sae_hooks()}

    @hook_dict.setter
    def hook_dict(self, value: dict[str, Any]) -> None:
        vars(self)["_own_hook_dict"] = value

    def setup(self) -> None:
        """As HookedTransformer has it, which collects its hook points anew; a bridge has none."""
        super().setup()
        self._name_hooks(self._sae_hooks())

    def _name_hooks(self, points: Mapping[str, Any]) -> None:
        """Put hook points among those that a HookedTransformer knows by name; a bridge asks for them each time."""
        if "_own_hook_dict" in vars(self):
            self.hook_dict.update(points)
            self.mod_dict.update(points)

    def _sae_hooks(self) -> dict[str, Any]:
        return {name: point for splice in vars(self)["_splices"].values() for name, point in splice.named_hooks()}

    def get_sae_hook_name(self, sae: SAE, internal: str = "hook_sae_acts_post") -> str:
        """The name of one of an attached SAE's hooks in caches and for hooks."""
        for splice in self._splices.values():
            if splice.sae is sae:
                return f"{splice.writes}.{internal}"
        raise ConfigError(f"the SAE of {sae.cfg.metadata.get('hook_name')!r} is not attached to this model")

    def hook_points(self) -> Any:
        return self.hook_dict.values()

    def clear_contexts(self) -> None:
        super().clear_contexts()
        for point in self._sae_hooks().values():
            point.clear_context()

    def remove_all_hook_fns(
        self, direction: Any = "both", including_permanent: bool = False, level: int | None = None
    ) -> None:
        super().remove_all_hook_fns(direction, including_permanent, level)
        for point in self._sae_hooks().values():
            point.remove_hooks(dir=direction, including_permanent=including_permanent, level=level)

    def _set_splices(self, splices: "dict[str, Splice]") -> None:
        """Put these SAEs, and no others, into the model."""
        for name in self._sae_hooks() if "_own_hook_dict" in vars(self) else ():
            self.hook_dict.pop(name, None)
            self.mod_dict.pop(name, None)
        for splice in self._splices.values():
            splice.take_out()
        # in one order, whatever the order in which they were added: it decides nothing but the order of names
        self._splices = dict(sorted(splices.items()))
        for splice in self._splices.values():
            splice.put_in()
        self._name_hooks(self._sae_hooks())


class Splice:
    """An SAE at its hook points of one model."""

    def __init__(
        self, model: Any, sae: SAE, use_error_term: bool, excluded: bool | Sequence[int], points: Mapping[str, Any]
    ):
        """points: the model's hook_dict."""
        from transformer_lens.hook_points import HookPoint

        if not isinstance(sae, SAE):
            theirs = type(sae).__module__.partition(".")[0] == "sae_lens"
            hint = " (save it with save_model and load that folder with SAE.load)" if theirs else ""
            raise ConfigError(
                f"sae is a {type(sae).__module__}.{type(sae).__name__}; accepted: an SAE of sae_core, as SAE.load and "
                f"SAE.from_pretrained give them{hint}"
            )
        about = sae.cfg.metadata
        if not about.get("hook_name"):
            raise ConfigError("sae.cfg.metadata has no hook_name: where the SAE belongs; accepted: a hook point's name")
        if not isinstance(excluded, bool | Tensor | Sequence) or isinstance(excluded, str):
            raise ConfigError(f"exclude_special_tokens is {excluded!r}; accepted: true, false, or a list of token ids")
        self.sae, self.use_error_term, self.excluded = sae, use_error_term, excluded
        self.reads = str(about["hook_name"])
        self.writes = str(about.get("hook_name_out") or self.reads)
        self.head = about.get("hook_head_index")
        self.origin, self.read_point = hook_point_of(points, self.reads)
        self.place, self.write_point = hook_point_of(points, self.writes)
        self.kept: Tensor | None = None  # [batch, position] bool: tokens of the pass that keep their activations
        self._given: Tensor | None = None
        check_fits(model, sae)
        self._around = _AroundAttention(points, self) if _lies_off_the_stream(self.writes, self.place) else None
        self.points = {name: HookPoint() for name in HOOKS}
        for name, point in self.points.items():
            point.name = f"{self.writes}.{name}"
        self._changed = False
        self._reached = False

    @property
    def is_transcoder(self) -> bool:
        return self.origin != self.place

    @property
    def off_the_stream(self) -> bool:
        """Whether what the hook point itself returns is not what the model goes on with."""
        return self._around is not None

    def named_hooks(self) -> Iterator[tuple[str, Any]]:
        """The SAE's hook points, by the name in its metadata and by the model's own."""
        for name, point in self.points.items():
            yield f"{self.place}.{name}", point
            yield f"{self.writes}.{name}", point

    # ---- in and out of the model ----

    def put_in(self) -> None:
        if self._around is not None:
            self._around.put_in()
        else:
            _tap(self.write_point).writers.append(self)
        if self.is_transcoder:
            _tap(self.read_point).readers.append(self)
        vars(self.write_point).update(self.points)

    def take_out(self) -> None:
        if self._around is not None:
            self._around.take_out()
        else:
            _tap(self.write_point).remove(self)
        if self.is_transcoder:
            _tap(self.read_point).remove(self)
        for name in self.points:
            vars(self.write_point).pop(name, None)
        self._given = None

    def read(self, x: Tensor) -> None:
        self._given = x

    def check_reached(self) -> None:
        """After a whole pass. One of a model's experts may have had no token."""
        if not self._reached and "experts" not in self.place:
            raise ConfigError(
                f"hook point {self.writes!r}: the model has passed it by, and its SAE has changed nothing; accepted: a "
                "hook point that run_with_cache shows"
            )

    # ---- what it computes ----

    def write(self, y: Tensor) -> Tensor:
        """What takes the place of y; a transcoder's input has been noted by `read`."""
        self._reached = True
        x, self._given = (self._given, None) if self.is_transcoder else (y, None)
        if x is None:
            raise ConfigError(
                f"the transcoder of {self.writes!r} has not seen {self.reads!r} in this pass; accepted: a pass that "
                "runs both, the one that is read first"
            )
        sae = self.sae
        given = view_of(sae, x, self.reads)
        target = view_of(sae, y, self.writes, written=True)
        used = given.to(sae.W_enc.device, sae.W_enc.dtype)
        if _of_elsewhere(sae):
            _check_once(sae, used, target if self.is_transcoder else None)
        self._changed = False
        # a clone: a hook that changes it in place must not change what the model has
        flat = self._at("hook_sae_input", used.clone() if self.points["hook_sae_input"].fwd_hooks else used)
        z, scaling = scale_tokens(flat, sae.cfg.normalize_activations)
        pre, gate = sae._pre_activations(z)
        pre = self._at("hook_sae_acts_pre", pre)
        f = self._at("hook_sae_acts_post", sae._activate(pre, gate))
        recons = self._at("hook_sae_recons", sae._decode(f, z))
        y_hat = recons if scaling is None else scaling.undo(recons)
        # in the wider of both types: an error in the SAE's own would lose what the model's holds beyond it
        y_hat = y_hat.to(torch.promote_types(y_hat.dtype, y.dtype))
        own = target.to(y_hat.device, y_hat.dtype)
        kept = None if self.kept is None else self.kept.to(y_hat.device)
        if self.use_error_term:
            with torch.no_grad():
                clean = sae.reconstruct(used)[1] if self._changed else y_hat
                error = own - clean.reshape(own.shape)
                if kept is not None:
                    error = torch.where(_beside(kept, error), torch.zeros_like(error), error)
                error = self.points["hook_sae_error"](_shaped(error, y, self.head))
            y_hat = y_hat + error.reshape(y_hat.shape)
        out = put_back(y_hat.to(y.device, y.dtype), y, self.head)
        if kept is not None:
            out = torch.where(_beside(kept.to(y.device), y), y, out)
        return self.points["hook_sae_output"](out)

    def _at(self, name: str, x: Tensor) -> Tensor:
        """What the hooks at a point make of x. Notes whether they changed it."""
        point = self.points[name]
        if not point.fwd_hooks:
            return point(x)
        version = None if x.is_inference() else x._version
        y = point(x)
        self._changed |= y is not x or version is None or x._version != version
        return y


class _AroundAttention:
    """A splice at hook_resid_mid of a TransformerBridge, whose hook point lies on the way into the second norm alone:
    the stream itself is set by what attention adds to it."""

    def __init__(self, points: Mapping[str, Any], splice: Splice):
        self.splice = splice
        block = splice.writes.removesuffix("hook_resid_mid")
        self.before = hook_point_of(points, f"{block}ln1.hook_in")[1]
        self.added = hook_point_of(points, f"{block}hook_attn_out")[1]
        self._residual: Tensor | None = None
        self._written: Tensor | None = None
        self._checked = False
        self._readers = (_Reader(self.before, self._note), _Reader(splice.write_point, self._check))

    def put_in(self) -> None:
        _tap(self.added).writers.append(self)
        for reader in self._readers:
            _tap(reader.point).readers.append(reader)

    def take_out(self) -> None:
        _tap(self.added).remove(self)
        for reader in self._readers:
            _tap(reader.point).remove(reader)

    def _note(self, x: Tensor) -> None:
        self._residual = x

    def write(self, added: Tensor) -> Tensor:
        residual, self._residual = self._residual, None
        self._written = self.splice.write(residual + added)
        return self._written - residual

    def _check(self, x: Tensor) -> None:
        """Some models normalise what attention adds, or add it elsewhere."""
        written, self._written = self._written, None
        if self._checked:
            return
        scale = x.detach().abs().max().clamp_min(1e-6)
        if written is None or (written - x).detach().abs().max() > (1e-2 if x.dtype != torch.float32 else 1e-3) * scale:
            raise ConfigError(
                f"hook point {self.splice.writes!r} cannot be written in this model; accepted: hook_resid_pre, "
                "hook_resid_post, hook_attn_out or hook_mlp_out of a layer"
            )
        self._checked = True


class _Reader:
    def __init__(self, point: Any, read: Callable[[Tensor], None]):
        self.point, self.read = point, read


class _Tap:
    """What is done to the activations at one hook point, before its own hooks: written anew, then read."""

    def __init__(self, point: Any):
        self.point = point
        self.writers: list[Any] = []
        self.readers: list[Any] = []
        vars(point)["_tap"] = self
        vars(point)["forward"] = self
        # Norms of a bridge make these activations with gradients only for hook points that have hooks.
        self._handle = None
        if str(point.name).endswith(("hook_normalized", "hook_scale")):
            point.add_hook(_look_on, is_permanent=True)
            self._handle = point.fwd_hooks[-1]

    def __call__(self, x: Tensor) -> Tensor:
        # an SAE that writes here comes before what reads the whole stream here
        for writer in sorted(self.writers, key=lambda writer: isinstance(writer, _AroundAttention)):
            x = writer.write(x)
        for reader in self.readers:
            reader.read(x)
        return x

    def remove(self, one: Any) -> None:
        self.writers = [writer for writer in self.writers if writer is not one]
        self.readers = [reader for reader in self.readers if reader is not one]
        if not self.writers and not self.readers:
            for name in ("forward", "_tap"):
                vars(self.point).pop(name, None)
            if self._handle is not None:
                self._handle.hook.remove()
                self.point.fwd_hooks = [handle for handle in self.point.fwd_hooks if handle is not self._handle]


def _tap(point: Any) -> _Tap:
    return vars(point).get("_tap") or _Tap(point)


def _look_on(activation: Tensor, hook: Any) -> None:
    return None


def _lies_off_the_stream(name: str, actual: str) -> bool:
    return name.endswith("hook_resid_mid") and actual != name


# ---- hook points ----------------------------------------------------------------------------------------------------


def hook_point_of(points: Mapping[str, Any], name: str) -> tuple[str, Any]:
    """(the model's own name for a hook point, the hook point), of a model's hook_dict. A TransformerBridge has further
    names for many. Raises ConfigError for a name that the model does not know."""
    if name not in points:
        raise ConfigError(f"hook point {name!r}: the model has none of this name{_nearest(name, points)}")
    return str(points[name].name or name), points[name]


def switch_of(hook_point: str) -> str | None:
    """The setting, as `model.cfg` has it, without which a model passes this hook point by; None for most."""
    return _SWITCHED.get(hook_point.rpartition(".")[2])


def check_hooks(
    model: Any, hooks: Sequence[tuple[str | Callable[[str], bool], Callable]], field: str = "fwd_hooks"
) -> None:
    """Raise ConfigError for a name that is no hook point, or a filter that lets none through: a TransformerBridge would
    go on without the hook."""
    if not isinstance(hooks, list | tuple) or not all(
        isinstance(hook, list | tuple) and len(hook) == 2 and callable(hook[1]) for hook in hooks
    ):
        raise ConfigError(f"{field} is {hooks!r}; accepted: a list of (hook point's name or filter, function)")
    points = model.hook_dict
    for name, _ in hooks:
        if isinstance(name, str) and name not in points:
            raise ConfigError(f"{field}: the model has no hook point {name!r}{_nearest(name, points)}")
        if not isinstance(name, str) and not any(name(point) for point in points):
            raise ConfigError(f"{field}: the filter {name!r} lets no hook point of the model through")


def _nearest(name: str, points: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, points, n=3, cutoff=0.5)
    return f"; the nearest it has: {', '.join(near or list(points)[:3])}"


def check_fits(model: Any, sae: SAE) -> None:
    """Raise ConfigError where an SAE cannot be of this model: by the width of the residual stream and what adds to it,
    by a hook point that the model passes by, or by the way in which the model's weights were processed."""
    about = sae.cfg.metadata
    reads = str(about["hook_name"])
    writes = str(about.get("hook_name_out") or reads)
    for name, width, field in ((reads, sae.d_in, "d_in"), (writes, sae.d_out, "d_out")):
        if _STREAM.fullmatch(name) and width != model.cfg.d_model:
            raise ConfigError(
                f"the SAE of {name!r} has {field} {width}, and the model ({model.cfg.model_name}) has d_model "
                f"{model.cfg.d_model} there; accepted: an SAE of this model (its metadata name "
                f"{about.get('model_name')!r})"
            )
        switch = switch_of(name)
        if switch is not None and not getattr(model.cfg, switch, False):
            raise ConfigError(
                f"hook point {name!r}: the model passes it by, and an SAE there would change nothing; accepted: "
                f"model.set_{switch}(True) first, or another hook point"
            )
    try:
        steps = steps_of(about)
    except CheckpointError as error:
        raise ConfigError(f"the SAE of {reads!r}: {error}") from None
    if steps is None:
        return
    for name in dict.fromkeys((reads, writes)):
        for step in steps_that_matter(name, sae.cfg.normalize_activations):
            state = state_of(model, step)
            if state is not None and state != (step in steps):
                raise ConfigError(_of_other_weights(name, step, steps, state, about))


def _of_other_weights(name: str, step: str, steps: frozenset[str], state: bool, about: Mapping[str, Any]) -> str:
    asked = ", ".join(sorted(steps)) or "no processing"
    arguments = ", ".join([repr(about.get("model_name")), *(f"{one}=True" for one in sorted(steps))])
    return (
        f"the SAE of {name!r} was trained on a model with {asked}, and this model's weights are "
        f"{'' if state else 'not '}as after {step}, which makes the activations there other ones; accepted: the model "
        "as the checkpoint asks for it (penstock.load_model(sae=sae), or "
        f"HookedTransformer.from_pretrained_no_processing({arguments})); if it is the checkpoint that is wrong, set "
        "sae.cfg.metadata['model_processing']"
    )


# ---- shapes ---------------------------------------------------------------------------------------------------------


def view_of(sae: SAE, x: Tensor, hook_point: str, written: bool = False) -> Tensor:
    """The model's activations as an SAE sees them, [..., d_in] (or d_out, where they are `written`): several heads as
    one vector, or one head of them (metadata `hook_head_index`). Raises ConfigError for another width."""
    width, head = (sae.d_out if written else sae.d_in), sae.cfg.metadata.get("hook_head_index")
    seen = x
    if head is not None and x.shape[-1] % width == 0 and x.ndim == 3:  # a bridge has heads side by side
        seen = x.unflatten(-1, (-1, width))
    if head is not None and seen.ndim > 3:
        if not isinstance(head, int) or not 0 <= head < seen.shape[-2]:
            raise ConfigError(
                f"the SAE of {hook_point!r}: metadata.hook_head_index is {head!r}; accepted: 0 to {seen.shape[-2] - 1}"
            )
        seen = seen[..., head, :]
    elif seen.ndim > 3 and seen.shape[-1] != width and seen.shape[-2] * seen.shape[-1] == width:
        seen = seen.flatten(-2)
    if seen.shape[-1] != width:
        field = "d_out" if written else "d_in"
        raise ConfigError(
            f"hook point {hook_point!r}: activations have shape {list(x.shape)}, and its SAE has {field} {width}"
        )
    return seen


def put_back(y: Tensor, x: Tensor, head: int | None) -> Tensor:
    """What an SAE has made of its view of `x`, in the shape of `x`; the other heads, if it saw one, as they are."""
    if head is None:
        return y.reshape(x.shape)
    heads = x.unflatten(-1, (-1, y.shape[-1])) if x.ndim == 3 else x
    out = heads.clone()
    out[..., head, :] = y
    return out.reshape(x.shape)


def _shaped(error: Tensor, y: Tensor, head: int | None) -> Tensor:
    return error.reshape(y.shape) if head is None else error


def _beside(mask: Tensor, x: Tensor) -> Tensor:
    """[batch, position] as it broadcasts with x [batch, position, ...]."""
    return mask.reshape(*mask.shape, *(1,) * (x.ndim - mask.ndim))


# ---- SAEs from elsewhere --------------------------------------------------------------------------------------------


def _of_elsewhere(sae: SAE) -> bool:
    return sae not in _CHECKED and bool(sae.cfg.metadata.get("source"))


@torch.no_grad()
def _check_once(sae: SAE, x: Tensor, target: Tensor | None) -> None:
    """Warn of an SAE that reconstructs nothing of the first activations that it is shown, those of each text's first
    position left out: many SAEs were not trained on it, and it may differ from all others."""
    from sae_core.pretrained import warn_if_absurd

    x, target = (part if part is None or part.ndim < 3 else part[:, 1:] for part in (x, target))
    x = x.reshape(-1, sae.d_in)[:_TOKENS_TO_CHECK]
    target = None if target is None else target.reshape(-1, sae.d_out)[:_TOKENS_TO_CHECK].to(x)
    if not isnan(warn_if_absurd(sae, x, target)):
        _CHECKED.add(sae)
