"""The sparse autoencoder as a module: what every architecture shares.

Names and layout: `W_enc [d_in, d_sae]`, `W_dec [d_sae, d_out]`, `b_dec [d_out]`, the biases that the encoder has,
and `W_skip [d_out, d_in]` where there is a skip connection. The same modules train (on normalised activations, see
training.py) and serve (on activations as the model has them).

A transcoder reads one hook point and reconstructs another: d_out may differ from d_in, and b_dec is not subtracted from
the input. Transcoders: Dunefsky et al., arXiv 2406.11944; skip transcoders: Paulo et al., arXiv 2501.18823.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from torch import Tensor, nn

from sae_core.errors import ConfigError
from sae_core.kernels import Active, decode
from sae_core.normalization import PER_TOKEN, TokenScaling, Whitening, scale_tokens
from sae_core.settings import SAESettings, nearest

# What may be absent from the metadata, and is None then; what else is asked for has to be there.
_OPTIONAL = {
    *("hook_name_out", "hook_head_index", "model_class_name", "model_from_pretrained_kwargs", "dataset_path"),
    *("neuronpedia_id", "exclude_special_tokens", "seqpos_slice", "sae_lens_version", "sae_lens_training_version"),
}
# Entries of the metadata that scripts of SAELens' several ages ask the configuration for, by the names that they use.
_OF_METADATA = {
    "hook_point": "hook_name", "hook_point_head_index": "hook_head_index",
    **{name: name for name in ("model_name", "hook_name", "context_size", "prepend_bos", *sorted(_OPTIONAL))},
}  # fmt: skip
# What SAELens' objects have beside, and what there is instead.
_SPLICED = "its hooks are the model's: sae_core.analysis.with_saes(model).run_with_cache_with_saes(tokens, saes=[sae])"
_INSTEAD = {
    **dict.fromkeys(("run_with_cache", "run_with_hooks", "add_hook", "reset_hooks", "hook_dict"), _SPLICED),
    **{f"hook_sae_{part}": _SPLICED for part in ("input", "acts_pre", "acts_post", "recons", "error", "output")},
    "activation_fn": "encode(x) applies it",
    **dict.fromkeys(("turn_on_forward_pass_hook_z_reshaping", "turn_off_forward_pass_hook_z_reshaping"),
                    "encode and reconstruct take [..., n_heads, d_head] and [..., d_in] as they come"),
}  # fmt: skip


class Metadata(dict[str, Any]):
    """Entries by name, `metadata["hook_name"]`, which can be read as attributes, too: `metadata.hook_name`. One that is
    not there raises AttributeError, unless it is one of those that SAELens knows as optional: then it is None."""

    def __getattr__(self, name: str) -> Any:
        if name in self or name in _OPTIONAL:
            return self.get(name)
        raise AttributeError(f"the SAE's metadata has no {name!r}{nearest(name, list(self))}; it has: "
                             f"{', '.join(self) or 'nothing'}")  # fmt: skip


class SAEConfig(BaseModel):
    """What identifies a saved SAE. `metadata` is free: model, hook point, settings it was trained with. What SAELens'
    scripts ask of the configuration and the metadata knows is answered from there: `cfg.hook_name`, `cfg.hook_point`,
    `cfg.hook_layer`, `cfg.model_name`, `cfg.context_size`, `cfg.prepend_bos`, ...

    d_out: width of what is reconstructed; None for an SAE, which reconstructs what it reads.
    normalize_activations: what is done to each token's activations before and undone after, see normalization.py.
    reshape_activations: "hook_z" if the activations come as [..., n_heads, d_head].
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: str
    d_in: int = Field(gt=0)
    d_sae: int = Field(gt=0)
    d_out: int | None = None
    skip: bool = False
    dtype: str = "float32"
    apply_b_dec_to_input: bool = True
    normalize_activations: Literal["none", "constant_norm_rescale", "layer_norm"] = "none"
    reshape_activations: Literal["none", "hook_z"] = "none"
    k: int | float | None = None
    rescale_acts_by_decoder_norm: bool = False
    metadata: Annotated[dict[str, Any], AfterValidator(Metadata)] = Field(default_factory=Metadata)

    @property
    def is_transcoder(self) -> bool:
        return self.d_out is not None

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> "SAEConfig":
        known = {"metadata": Metadata(update["metadata"])} if update and "metadata" in update else {}
        return super().model_copy(update={**(update or {}), **known}, deep=deep)

    def to_dict(self) -> dict[str, Any]:
        """The fields, metadata among them, as a plain dictionary."""
        return self.model_dump()

    if not TYPE_CHECKING:  # or every misspelt name would pass for one of these

        def __getattr__(self, name: str) -> Any:
            if name == "device":
                raise AttributeError("a configuration is on no device; the SAE's is sae.device")
            if name in _OF_METADATA:
                return getattr(self.metadata, _OF_METADATA[name])
            if name in ("hook_layer", "hook_point_layer"):
                found = re.match(r"blocks\.(\d+)\.", str(self.metadata.hook_name))
                return int(found[1]) if found else None
            return super().__getattr__(name)


class SAE(nn.Module, ABC):
    """Base of all architectures. `encode` takes [..., d_in] to [..., d_sae], `decode` takes that to [..., d_out].

    Weights do not require gradients; `encode` and `decode` are differentiable in their input.
    """

    W_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    encoder_biases: ClassVar[tuple[str, ...]] = ("b_enc",)
    # (cfg, sparsity) for unpacking, of an SAE that from_pretrained or from_hub returned
    loaded: tuple[dict[str, Any], Tensor | None] | None = None

    def __init__(self, cfg: SAEConfig, weights: Mapping[str, Tensor]):
        super().__init__()
        self.cfg = cfg
        for name in self.shapes(cfg):
            self.register_parameter(name, nn.Parameter(weights[name], requires_grad=False))

    @classmethod
    def shapes(cls, cfg: SAEConfig) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight."""
        d_out = cfg.d_out or cfg.d_in
        biases = {name: (cfg.d_sae,) for name in cls.encoder_biases}
        skip = {"W_skip": (d_out, cfg.d_in)} if cfg.skip else {}
        return {"W_enc": (cfg.d_in, cfg.d_sae), "W_dec": (cfg.d_sae, d_out), **biases, "b_dec": (d_out,), **skip}

    @property
    def d_in(self) -> int:
        return self.cfg.d_in

    @property
    def d_out(self) -> int:
        return self.cfg.d_out or self.cfg.d_in

    @property
    def d_sae(self) -> int:
        return self.cfg.d_sae

    @property
    def device(self) -> torch.device:
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        return self.W_dec.dtype

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name in _INSTEAD:
                raise AttributeError(f"an SAE has no {name}: {_INSTEAD[name]}")
            return super().__getattr__(name)

    def extra_repr(self) -> str:
        sizes = {"d_in": self.d_in, "d_sae": self.d_sae, "d_out": self.cfg.d_out, "k": self.cfg.k}
        named = {name: self.cfg.metadata.get(name) for name in ("model_name", "hook_name", "hook_name_out")}
        return ", ".join(f"{name}={value!r}" for name, value in {**sizes, **named}.items() if value is not None)

    # ---- in use ----

    def encode(self, x: Tensor) -> Tensor:
        """[..., d_in] -> [..., d_sae]; hook_z activations may come as [..., n_heads, d_head]."""
        return self._encode(self._enter(x)[0])

    def decode(self, f: Tensor, x: Tensor | None = None) -> Tensor:
        """[..., d_sae] -> [..., d_out]. `x` [..., d_in], what was encoded, is needed where the output depends on more
        than the latents: with a skip connection, or a normalisation of each token; ConfigError without."""
        if x is None and (self.cfg.skip or self.cfg.normalize_activations in PER_TOKEN):
            why = "its skip connection" if self.cfg.skip else f"normalize_activations {self.cfg.normalize_activations}"
            raise ConfigError(f"decode needs the activations that were encoded, for {why}: decode(f, x)")
        if f.shape[-1:] != (self.d_sae,):
            raise ConfigError(f"latents have shape {list(f.shape)}; accepted: [..., d_sae] with d_sae {self.d_sae}")
        x_in, scaling = self._enter(x) if x is not None else (None, None)
        return self._leave(self._decode(f.to(self.W_dec.dtype), x_in), x, scaling)

    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(latents [..., d_sae], reconstruction in the shape of x, or [..., d_out] for a transcoder)."""
        x_in, scaling = self._enter(x)
        f = self._encode(x_in)
        return f, self._leave(self._decode(f, x_in), x, scaling)

    def forward(self, x: Tensor) -> Tensor:
        return self.reconstruct(x)[1]

    def _enter(self, x: Tensor) -> tuple[Tensor, TokenScaling | None]:
        """What the weights see of `x`, and how each token was scaled."""
        heads = self.cfg.reshape_activations == "hook_z"
        if heads and x.ndim > 1 and x.shape[-1] != self.d_in and x.shape[-2] * x.shape[-1] == self.d_in:
            x = x.flatten(-2)
        if x.ndim == 0 or x.shape[-1] != self.d_in:
            also = " or [..., n_heads, d_head]" if heads else ""
            raise ConfigError(
                f"activations have shape {list(x.shape)}; accepted: [..., d_in]{also} with d_in {self.d_in}"
            )
        return scale_tokens(x.to(self.W_enc.dtype), self.cfg.normalize_activations)

    def _leave(self, x_hat: Tensor, x: Tensor | None, scaling: TokenScaling | None) -> Tensor:
        if scaling is not None:
            x_hat = scaling.undo(x_hat)
        if x is not None and not self.cfg.is_transcoder:
            x_hat = x_hat.view(x.shape)
        return x_hat

    def _encode(self, x: Tensor) -> Tensor:
        """Latents of normalised activations."""
        return self._activate(*self._pre_activations(x))

    @abstractmethod
    def _pre_activations(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of normalised activations: what the activation function is given, [..., d_sae]; and, where that does not
        decide alone which latents may be active, those that may, [..., d_sae] bool."""

    @abstractmethod
    def _activate(self, pre: Tensor, gate: Tensor | None) -> Tensor:
        """Latents, given their pre-activations."""

    def _decode(self, f: Tensor, x: Tensor | None) -> Tensor:
        x_hat = decode(f, self.W_dec) + self.b_dec
        return x_hat + x @ self.W_skip.T if self.cfg.skip else x_hat

    def centre(self, x: Tensor) -> Tensor:
        """`x` less b_dec where this SAE subtracts it: what the encoder multiplies."""
        return x - self.b_dec if self.cfg.apply_b_dec_to_input else x

    # ---- prefixes ----

    @property
    def prefix_widths(self) -> tuple[int, ...]:
        """Widths below d_sae at which this SAE, cut off, is an SAE of its own: those of a Matryoshka SAE."""
        return ()

    # ---- folding, folders ----

    @torch.no_grad()
    def unit_rows(self) -> "SAE":
        """The same function with decoder rows of length 1: their lengths go into the encoder, so that a latent's
        activation is the length that it adds. A row of zeros (it decodes to nothing) is left as it is."""
        norms = self.W_dec.norm(dim=1)
        norms = torch.where(norms > 0, norms, torch.ones_like(norms))
        weights = {"W_enc": (self.W_enc * norms).contiguous(), "W_dec": self.W_dec / norms[:, None]}
        return self.replaced(weights | {name: getattr(self, name) * norms for name in self.latent_scaled})

    @torch.no_grad()
    def fold_W_dec_norm(self) -> None:
        """`unit_rows` in place, as SAELens' scripts call it. ConfigError where it would change the function: of top-k
        SAEs that rank latents without the norms."""
        if self.cfg.k is not None and not self.cfg.rescale_acts_by_decoder_norm:
            norms = self.W_dec.norm(dim=1)
            if not torch.allclose(norms, norms.mean().expand_as(norms), rtol=1e-4):
                raise ConfigError("fold_W_dec_norm would change which latents this top-k SAE ranks highest")
        for name, weight in self.unit_rows().named_parameters():
            getattr(self, name).copy_(weight)

    @torch.no_grad()
    def folded(self, scale_in: float, scale_out: float) -> "SAE":
        """The function y -> self(y * scale_in) / scale_out, by weights alone; latents stay what they are."""
        weights = {
            "W_enc": (self.W_enc * scale_in).contiguous(),
            "W_dec": self.W_dec / scale_out,
            "b_dec": self.b_dec / scale_out,
        }
        if self.cfg.skip:
            weights["W_skip"] = self.W_skip * (scale_in / scale_out)
        return self.replaced(weights)

    @torch.no_grad()
    def unwhitened(self, reads: Whitening, writes: Whitening) -> "SAE":
        """The function of raw activations that this one is of whitened ones; latents stay what they are. Refuses a
        ranking by decoder norms, which unwhitening would change: ValueError."""
        if self.cfg.rescale_acts_by_decoder_norm:
            raise ValueError("fold the decoder norms in, and stop ranking by them, before unwhitening")
        W_enc = reads.matrix @ self.W_enc.double()
        weights = {
            "W_enc": W_enc,
            "W_dec": self.W_dec.double() @ writes.inverse,
            "b_dec": self.b_dec.double() @ writes.inverse + writes.mean,
        }
        if not self.cfg.apply_b_dec_to_input:
            weights |= self._shifted(-(reads.mean @ W_enc))
        if self.cfg.skip:
            W_skip = reads.matrix @ self.W_skip.T.double() @ writes.inverse
            weights |= {"W_skip": W_skip.T, "b_dec": weights["b_dec"] - reads.mean @ W_skip}
        return self.replaced({name: tensor.to(self.W_enc).contiguous() for name, tensor in weights.items()})

    def _shifted(self, shift: Tensor) -> dict[str, Tensor]:
        """The encoder biases, in float64, with which `shift` [d_sae] is added to (x - b_dec) W_enc."""
        return {"b_enc": self.b_enc.double() + shift}

    def replaced(self, weights: Mapping[str, Tensor] = {}, **config: Any) -> "SAE":
        """A copy with other weights or fields of the configuration."""
        own = {name: tensor.detach().clone() for name, tensor in self.named_parameters() if name not in weights}
        return type(self)(self.cfg.model_copy(update=config), {**own, **weights})

    @property
    def latent_scaled(self) -> tuple[str, ...]:
        """The weights [d_sae] that grow with a latent's activation."""
        return self.encoder_biases

    @staticmethod
    def load(path: str | Path, device: str | torch.device = "cpu", dtype: str | torch.dtype | None = None) -> "SAE":
        """Load the SAE in a folder, or one file, of any format that pretrained/formats reads, told by its files:
        what `save` or SAELens wrote, Gemma Scope, Llama Scope, dictionary_learning, sparsify, OpenAI's, and others.

        dtype: None is the one that it was saved in, for SAELens' format; float32 for the others. Raises CheckpointError
        with what was seen and what is accepted. No code in a file is run: pickles are read by weights_only alone.
        """
        from sae_core.pretrained.loading import load

        return load(path, device, dtype)

    load_from_disk = load_from_pretrained = load  # SAELens' names for it, of today and before

    @staticmethod
    def from_pretrained(
        release: str,
        sae_id: str,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype | None = None,
        *,
        revision: str | None = None,
        force_download: bool = False,
    ) -> "SAE":
        """Load a published SAE by the names that SAELens' directory has; `sae_core.pretrained.releases()` lists them.

        Returns the SAE. It can be unpacked, too: `sae, cfg, sparsity = SAE.from_pretrained(...)`, cfg a dictionary of
        its fields and metadata, sparsity log10 firing rates [d_sae] or None. Its metadata say what it was trained on
        and, in `source`, where it came from, with the commit.

        dtype: None is float32. revision: branch, tag or commit; None is the main branch. Files come from the Hugging
        Face hub, or, where that cannot be reached, from its cache. Raises UserError for an unknown name, with the
        nearest ones, and for files that neither hub nor cache has; CheckpointError for what cannot be read.
        """
        from sae_core.pretrained.loading import from_pretrained

        return from_pretrained(release, sae_id, device, dtype, revision=revision, force_download=force_download)

    @staticmethod
    def from_pretrained_with_cfg_and_sparsity(
        release: str,
        sae_id: str,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype | None = None,
        **options: Any,
    ) -> "tuple[SAE, dict[str, Any], Tensor | None]":
        """(sae, cfg, sparsity), by SAELens' name; otherwise as `from_pretrained`."""
        sae = SAE.from_pretrained(release, sae_id, device, dtype, **options)
        return sae, sae[1], sae[2]

    @staticmethod
    def from_hub(
        repo_id: str,
        path: str = "",
        *,
        revision: str | None = None,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype | None = None,
    ) -> "SAE":
        """Load the SAE at `path`, a folder or file, of any repository of the Hugging Face hub ("owner/repo") that is in
        a known format (see `load`). Otherwise as `from_pretrained`."""
        from sae_core.pretrained.loading import from_hub

        return from_hub(repo_id, path, revision=revision, device=device, dtype=dtype)

    def _unpacked(self) -> tuple[Any, ...]:
        if self.loaded is None:
            raise TypeError("only an SAE that SAE.from_pretrained or SAE.from_hub returned can be unpacked or indexed")
        return (self, *self.loaded)

    def __iter__(self) -> Iterator[Any]:
        """(sae, cfg, sparsity) of one that `from_pretrained` or `from_hub` returned."""
        return iter(self._unpacked())

    def __getitem__(self, index: int) -> Any:
        return self._unpacked()[index]

    def save(self, folder: str | Path, *, sparsity: Tensor | None = None) -> None:
        """Write SAELens' format: cfg.json (last, so that an interrupted save is seen), sae_weights.safetensors and,
        if given, sparsity.safetensors (log10 firing rates [d_sae])."""
        from sae_core.checkpoint import save_sae

        save_sae(self, folder, sparsity=sparsity)

    save_model = save  # SAELens' name for it


# ---- training -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepContext:
    """What a training step tells an architecture. `batch_tokens` is the whole batch's, also for a micro-batch."""

    batch_tokens: int
    coefficient: float | Tensor  # of the sparsity or auxiliary loss, warm-up applied; a [] tensor if state sets it
    dead: Tensor | None = None  # [d_sae] bool, None if no latent is dead
    encoder_dtype: torch.dtype = torch.float32
    state: Mapping[str, Tensor] = field(default_factory=dict)  # the architecture's own, see `state_at_start`
    progress: float = 0.0  # share of the run's steps that are done
    settings: SAESettings | None = None  # the architecture's own, where its loss has more of them than a coefficient


@dataclass
class StepTerms:
    """Sums over the tokens of a micro-batch, in normalised units; all tensors, so that no step waits for a device."""

    loss: Tensor  # already divided by the batch's tokens
    error: Tensor  # [tokens, d_out]: reconstruction less target
    fired: Tensor  # [d_sae] number of tokens on which each latent fired
    extra: Mapping[str, Tensor] = field(default_factory=dict)  # what the architecture's own state is made from


class Gradients(dict[str, Tensor]):
    """Gradients by weight, summed over micro-batches. `W_enc`'s is kept transposed, [d_sae, d_in], as it is made."""

    def __init__(self, wanted: frozenset[str]):
        super().__init__()
        self.wanted = wanted

    def add(self, name: str, gradient: Tensor) -> None:
        """Add a gradient; the tensor may be kept and changed."""
        if name in self:
            self[name].add_(gradient)
        elif name in self.wanted:
            self[name] = gradient


class TrainableSAE(SAE):
    """An architecture that can be trained: adds its settings, its start, and its loss."""

    settings_type: ClassVar[type[SAESettings]]
    decoder_norm_at_start: ClassVar[float]
    revives_dead: ClassVar[bool] = False  # whether the loss treats dead latents apart
    can_transcode: ClassVar[bool] = False

    @abstractmethod
    def accumulate_gradients(
        self, x: Tensor, target: Tensor, gradients: Gradients, context: StepContext
    ) -> StepTerms:
        """Add the gradient of the loss on x [tokens, d_in] and target [tokens, d_out] (x itself for an SAE), both
        normalised and only read, to `gradients`."""

    @classmethod
    def biases_at_start(cls, settings: SAESettings, spread: float) -> dict[str, float]:
        """Encoder biases that do not start at 0. spread: standard deviation of the normalised input along a random
        direction, as an encoder starts with."""
        return {}

    @classmethod
    def state_at_start(cls, settings: SAESettings) -> dict[str, Tensor]:
        """What the architecture keeps from step to step beside weights: float64 tensors by name. One called
        `coefficient` is the coefficient of the next step, in place of the settings'."""
        return {}

    def whole_batch(self, parts: list[Tensor], context: StepContext) -> Mapping[str, Tensor]:
        """What only all of a batch's micro-batches together (`parts`, normalised) say, added to the context's state.
        Asked for only where there are several."""
        return {}

    def next_state(
        self, state: Mapping[str, Tensor], extra: Mapping[str, Tensor], fired: Tensor, context: StepContext
    ) -> dict[str, Tensor]:
        """The architecture's own state after a step; `extra` and `fired` are summed over the batch."""
        return dict(state)

    def for_use(self, state: Mapping[str, Tensor], tokens: Tensor | None) -> SAE:
        """The SAE as it is used, still in normalised units and with decoder rows of any length: itself, unless it is
        trained in another form. `tokens` [n, d_in], normalised training activations, may calibrate thresholds."""
        return self

    # ---- parts of a step ----

    def error(self, active: Active, f: Tensor, x: Tensor, target: Tensor) -> Tensor:
        """Reconstruction less target, [tokens, d_out]."""
        error = active.decode(f, self.W_dec).add_(self.b_dec)
        if self.cfg.skip:
            error.addmm_(x, self.W_skip.T)
        return error.sub_(target)

    def add_output_gradients(self, gradients: Gradients, d_out: Tensor, x: Tensor) -> None:
        """Of b_dec and W_skip, given the gradient of the reconstruction [tokens, d_out]."""
        gradients.add("b_dec", d_out.sum(0))
        if self.cfg.skip:
            gradients.add("W_skip", d_out.T @ x)

    def add_encoder_gradients(self, gradients: Gradients, active: Active, d_pre: Tensor, x_centred: Tensor) -> Tensor:
        """Of W_enc, and of b_dec where it is subtracted from the input, given d_pre (values); returns the bias's."""
        gradients.add("W_enc", active.latent_sums(d_pre, x_centred))
        d_bias = active.per_latent(d_pre)
        if self.cfg.apply_b_dec_to_input:
            gradients.add("b_dec", -(self.W_enc @ d_bias))
        return d_bias
