"""SAELens' store of activations: the batches that a sweep trains on, in this process and without Ray."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from penstock.activations import from_wire
from penstock.batches import batches
from penstock.compat.config import LanguageModelSAERunnerConfig, Resolved, resolve
from penstock.errors import ConfigError, DataError
from penstock.given import GivenRows, open_given
from penstock.home import Home
from penstock.model_host import ModelHost
from penstock.resolved import ResolvedSweep
from penstock.storage import Storage
from penstock.tokens import build_token_store
from sae_core.model_processing import PROCESSING, state_of, steps_that_matter

if TYPE_CHECKING:
    from sae_core import SAE


class ActivationsStore:
    """Batches of activations, and the token rows that they are of.

    `next_batch()` gives float32 [train_batch_size_tokens, d_in] on `device`, as the model has them: neither scaled nor
    with the tokens that are excluded. They are those of a run with the same configuration, in its order, and after the
    last one the first comes again; `for batch in store` goes through them once. They come from the model, or with
    `use_cached_activations` from a folder that SAELens or `penstock harvest` made, or from the spool, where a run of
    the same data has left them there.

    model: the model that the configuration names, loaded already (TransformerBridge or HookedTransformer); None loads
    it. `home` keeps the tokens (else `PENSTOCK_HOME`, else ./penstock-home).

    Raises ConfigError for a model that the configuration does not describe, and what `resolve` raises.
    """

    def __init__(
        self,
        model: Any,
        cfg: LanguageModelSAERunnerConfig,
        *,
        home: str | Path | Home | None = None,
        device: Any = None,
    ) -> None:
        self._begin(model, resolve(cfg), home, device or cfg.given.get("device"))
        self.cfg = cfg
        self.store_batch_size_prompts = int(cfg.store_batch_size_prompts)

    @classmethod
    def from_config(
        cls,
        model: Any,
        cfg: LanguageModelSAERunnerConfig,
        override_dataset: Any = None,
        *,
        home: str | Path | Home | None = None,
        device: Any = None,
    ) -> "ActivationsStore":
        """The store that the run of `cfg` trains on."""
        if override_dataset is not None:
            raise ConfigError(f"override_dataset is a {type(override_dataset).__name__}; accepted: a file of it "
                              "(dataset.to_parquet(FILE)) as dataset_path")  # fmt: skip
        return cls(model, cfg, home=home, device=device)

    @classmethod
    def from_sae(
        cls,
        model: Any,
        sae: "SAE",
        dataset: str | None = None,
        dataset_trust_remote_code: bool = False,
        context_size: int | None = None,
        streaming: bool = True,
        store_batch_size_prompts: int = 8,
        n_batches_in_buffer: int | None = None,
        train_batch_size_tokens: int = 4096,
        total_tokens: int = 1_000_000,
        device: Any = None,
        *,
        home: str | Path | Home | None = None,
    ) -> "ActivationsStore":
        """Activations at the hook point of `sae`, of what its metadata name unless it is given: its dataset, its
        context size, with BOS or without. total_tokens: so many before the first come again."""
        about = sae.cfg.metadata
        dataset = dataset if dataset is not None else about.dataset_path
        if not isinstance(dataset, str):
            raise ConfigError(f"dataset is {dataset!r}; accepted: the name of a dataset, a file or a folder, where the "
                              "SAE's metadata name none (dataset.to_parquet(FILE) makes a file)")  # fmt: skip
        excluded = about.get("exclude") or {}
        if excluded.get("norm_over_median") is not None:
            raise ConfigError("sae was trained without tokens of outlying norm (data.exclude.norm_over_median "
                              f"{excluded['norm_over_median']:g}), which SAELens' configuration cannot say; accepted: "
                              "an SAE trained with all others")  # fmt: skip
        keywords: dict[str, Any] = {
            "model_name": about.model_name,
            "hook_name": about.hook_name,
            "dataset_path": dataset,
            "context_size": context_size or about.context_size,
            "prepend_bos": about.prepend_bos,
            "store_batch_size_prompts": store_batch_size_prompts,
            "train_batch_size_tokens": train_batch_size_tokens,
            "training_tokens": total_tokens,
            "d_in": sae.cfg.d_in,
            "architecture": "topk",  # nothing is trained
            "k": 1,
            "d_sae": sae.cfg.d_sae,
            "exclude_special_tokens": bool(excluded.get("special_tokens", True)),
            "seqpos_slice": (int(excluded.get("first_positions", 1)), None),
        }
        if n_batches_in_buffer is not None:
            keywords["n_batches_in_buffer"] = n_batches_in_buffer
        if (processing := about.get("model_processing")) is not None:
            keywords["model_from_pretrained_kwargs"] = dict.fromkeys(PROCESSING[processing], True)
        elif about.model_from_pretrained_kwargs is not None:
            keywords["model_from_pretrained_kwargs"] = about.model_from_pretrained_kwargs
        return cls(model, LanguageModelSAERunnerConfig(**keywords), home=home, device=device)

    def _begin(self, model: Any, resolved: Resolved, home: str | Path | Home | None, device: Any) -> None:
        resolved.say()
        spec = resolved.spec
        self.hook_name = spec.sites[0].reads
        self.context_size = spec.data.context_size
        self.train_batch_size_tokens = spec.train.batch_tokens
        self.d_in = resolved.model.hook_points[self.hook_name]
        self.device = torch.device(device or "cpu")
        if model is not None:
            _check_model(model, resolved, self.hook_name)
        where = home if isinstance(home, Home) else Home.resolve(home)
        storage = Storage(where.storage_uri(spec.storage))
        store = build_token_store(spec.data, spec.model, spec.train, storage)
        self.sweep = ResolvedSweep(spec, resolved.model, store, storage, where)
        self._loaded = model
        self._spool = self.sweep.spool(1)
        self._next_row = 0
        self._batches: Iterator[Tensor] = iter(self)

    @cached_property
    def _host(self) -> ModelHost:
        return ModelHost(self.sweep.spec.model, device=str(self.device), threads=None, loaded=self._loaded)

    @property
    def model(self) -> Any:
        """The language model."""
        return self._host.model

    # ---- activations ----

    def __len__(self) -> int:
        """The batches of the run."""
        return self.sweep.schedule.steps

    def __iter__(self) -> Iterator[Tensor]:
        """All batches of the run once, from its first."""
        schedule, dtype = self.sweep.schedule, getattr(torch, self.sweep.spec.model.dtype)
        for block in range(schedule.n_blocks):
            activations = from_wire(self._block(block), dtype)
            for _, where in batches(schedule, block, len(activations), 0):
                yield activations[where].to(self.device, torch.float32, copy=True)

    def next_batch(self) -> Tensor:
        """The next batch; after the last of the run its first."""
        batch = next(self._batches, None)
        if batch is None:
            self._batches = iter(self)
            batch = next(self._batches)
        return batch

    __next__ = next_batch

    def get_data_loader(self) -> Iterator[Tensor]:
        """All batches once, as iterating does."""
        return iter(self)

    def _block(self, block: int) -> np.ndarray:
        array = self.sweep.spec.sites[0].array(self.hook_name, self.sweep.spec.data.exclude.norm_over_median)
        if self._spool is not None and self._spool.has(array, block):
            return self._spool.read(array, block, self.sweep.spec.model.dtype)
        return self._host.harvest(self.sweep.store, self.sweep.spec.data, block, [array])[array]

    @torch.no_grad()
    def get_activations(self, batch_tokens: Tensor) -> Tensor:
        """float32 [rows, context, d_in] at the hook point, of token rows [rows, context]; those of all heads side by
        side."""
        tokens = torch.as_tensor(batch_tokens).to(self._host.device)
        _, cache = self.model.run_with_cache(tokens, names_filter=[self.hook_name], prepend_bos=False)
        return cache[self.hook_name].flatten(2).to(self.device, torch.float32)

    # ---- tokens ----

    def get_batch_tokens(self, batch_size: int | None = None) -> Tensor:
        """int64 [batch_size, context_size], store_batch_size_prompts rows unless given: the next token rows of the
        run's, from its first again after the last. Excluded tokens are in them."""
        count = self.store_batch_size_prompts if batch_size is None else batch_size
        rows = np.concatenate([self._row(self._next_row + index) for index in range(count)])
        self._next_row += count
        return torch.from_numpy(rows.astype(np.int64)).to(self.device)

    def reset_input_dataset(self) -> None:
        """Begin again at the first row and the first batch."""
        self._next_row, self._batches = 0, iter(self)

    def _row(self, index: int) -> np.ndarray:
        data, store = self.sweep.spec.data, self.sweep.store
        if data.activations is None:
            index %= store.n_rows("train")
            return store.rows("train", index, index + 1)
        if not isinstance(self._given, GivenRows):
            raise DataError(f"cached_activations_path {data.activations!r}: a spool's stream holds activations and no "
                            "tokens; accepted: next_batch()")  # fmt: skip
        block, place = divmod(index % (self.sweep.schedule.n_blocks * data.block_rows), data.block_rows)
        row = self._given.tokens(block)[place : place + 1]
        if (row < 0).any():
            raise DataError(f"cached_activations_path {data.activations!r} has no token_ids; accepted: next_batch()")
        return row

    @cached_property
    def _given(self) -> Any:
        return open_given(self.sweep.spec.data)


def _check_model(model: Any, resolved: Resolved, hook_point: str) -> None:
    """Whether a loaded model is the one that the spec describes, as far as that can be seen."""
    spec, described = resolved.spec.model, resolved.model
    if getattr(model, "acts_to_saes", None):
        raise ConfigError(f"model has SAEs spliced in at {', '.join(model.acts_to_saes)}; accepted: after "
                          "model.reset_saes()")  # fmt: skip
    found = model.cfg.n_layers, model.cfg.d_model
    if found != (described.n_layers, described.d_model):
        raise ConfigError(f"model has {found[0]} layers and d_model {found[1]}, and model_name {spec.name!r} "
                          f"{described.n_layers} and {described.d_model}; accepted: that model")  # fmt: skip
    asked = PROCESSING[spec.processing]
    for step in steps_that_matter(hook_point):
        state = state_of(model, step)
        if state is not None and state != (step in asked):
            raise ConfigError(
                f"model was loaded {'with' if state else 'without'} {step}, and the configuration is of one "
                f"{'with' if step in asked else 'without'} it: its activations at {hook_point} are others; accepted: "
                f"from_pretrained_no_processing(NAME{f', {step}=True' if step in asked else ''}), or "
                f"model_from_pretrained_kwargs={{{step!r}: {state}}}"
            )
