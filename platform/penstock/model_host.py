"""Runs the language model: harvests blocks of activations, and evaluates SAEs inside the model."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from penstock.activations import from_wire, wire_dtype
from penstock.errors import DataError, ModelError
from penstock.given import GivenRows, GivenStream, open_given
from penstock.models import load_model
from penstock.sites import Site, parse_array
from penstock.spec import DataSpec, ModelSpec
from penstock.splits import Split
from penstock.tokens import TokenStore, row_generator

if TYPE_CHECKING:
    from sae_core.evaluation import EvaluationSums

log = logging.getLogger(__name__)
Result = TypeVar("Result")


class ModelHost:
    """A language model on one device. `forward_passes` and `tokens` count what harvesting has run through it.

    Args:
        device: `cuda` where there is one and otherwise `cpu`, unless given.
        threads: torch's CPU threads; part of what makes results the same bit for bit. None leaves them as they are.
        loaded: the model that `model` describes, where it is loaded already; it stays on the device where it is.
    """

    def __init__(
        self, model: ModelSpec, *, device: str | None = None, threads: int | None = 1, loaded: Any = None
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        if loaded is not None:
            device = str(next(loaded.parameters()).device)
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load_model(model, self.device) if loaded is None else loaded
        self.dtype: torch.dtype = getattr(torch, model.dtype)
        self._dtype_name = model.dtype
        self.rows_per_forward = model.harvest_rows
        self.forward_passes = 0
        self.tokens = 0
        self._name = model.name
        self._hooks = self.model.hook_dict  # a property that gathers all of them anew
        self._opened: dict[str, GivenStream | GivenRows] = {}
        self._norm_limits: dict[tuple[str, str], float] = {}

    # ---- harvesting ----

    def harvest(
        self, store: TokenStore, data: DataSpec, block: int, arrays: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """The activations of a block of train rows: an array [kept tokens, d] for each name (see `Site.array`).

        Excluded tokens are left out and the rest permuted once by (data.seed, block), the same way for all hook points:
        row i is one token everywhere. Arrays have the model's type (bfloat16 as uint16, see `activations`). On a CPU
        of one type with the same threads they are the same bit for bit, whatever arrays are asked for together.

        With `data.exclude.norm_over_median`, a token whose norm at a hook point is more than that multiple of the
        block's median there gives its place to another token of the block (the first of the permuted order, then the
        second, ...), so that step counts stay as they are. This happens in each array for itself, but in those of a
        transcoder's site together, for the outliers of both its hook points: there row i stays one token in both.

        With `data.activations` the folder's activations take the place of the model's; a spool's stream is handed out
        as it is.

        Raises `ModelError` for a hook point that the model lacks, and when not even one row fits into memory, and
        `DataError` or `SpoolError` for given activations that are damaged or no longer those of the store.
        """
        given = self._given(store, data)
        if isinstance(given, GivenStream):
            return given.harvest(block, arrays, self._dtype_name)
        sources = {name: parse_array(name) for name in arrays}
        needed = dict.fromkeys(name for hook_point, judged in sources.values() for name in (hook_point, *judged))
        found = self._harvest(store, data, block, list(needed))
        limit = data.exclude.norm_over_median
        if limit is None:
            return {name: found[hook_point] for name, (hook_point, _) in sources.items()}
        outliers = {name: norm_outliers(from_wire(array, self.dtype), limit) for name, array in found.items()}
        uses = Counter(hook_point for hook_point, _ in sources.values())
        made = {}
        for name, (hook_point, judged) in sources.items():
            made[name] = found[hook_point].copy() if uses[hook_point] > 1 else found[hook_point]
            replace_rows(from_wire(made[name], self.dtype), torch.stack([outliers[one] for one in judged]).any(0))
        return made

    def sample(
        self, store: TokenStore, data: DataSpec, split: Split, n_tokens: int, arrays: Sequence[str]
    ) -> dict[str, Tensor]:
        """The activations of about the first `n_tokens` kept tokens of a split (whole rows of them, or all there are),
        in their order: [n, d] for each name. Outliers are left out, as in an evaluation."""
        kept_a_row = store.context_size - data.exclude.first_positions
        rows = store.rows(split, 0, min(store.n_rows(split), -(-n_tokens // kept_a_row)))
        found = {}
        for name in arrays:
            hook_point, judged = parse_array(name)
            kept = store.kept(rows)
            for one in judged if data.exclude.norm_over_median is not None else ():
                kept = self._without_outliers(store, data, one, split, rows, kept)
            made = self._activations(rows, kept, np.arange(int(kept.sum())), [hook_point])
            found[name] = from_wire(made[hook_point], self.dtype)
        return found

    def rows_of(
        self, store: TokenStore, data: DataSpec, sites: Sequence[Site], split: Split, start_row: int, stop_row: int
    ) -> tuple[dict[str, Tensor], dict[Site, Tensor]]:
        """The activations of all tokens of rows of a split, [rows, context, d] for each hook point of the sites, and
        which of the tokens count at each site, bool [rows, context]: excluded ones do not, nor do outliers at one of
        its hook points, as in an evaluation. One forward pass makes them all."""
        rows = store.rows(split, start_row, stop_row)
        hook_points = list(dict.fromkeys(name for site in sites for name in site.hook_points))
        made = self._activations(rows, np.ones(rows.shape, dtype=bool), np.arange(rows.size), hook_points)
        found = {name: from_wire(array, self.dtype).view(*rows.shape, -1) for name, array in made.items()}
        kept = torch.from_numpy(store.kept(rows))
        counted = {}
        for site in sites:
            counted[site] = kept
            for name in site.hook_points if data.exclude.norm_over_median is not None else ():
                limit = self._norm_limit(store, data, name, split)
                counted[site] = counted[site] & (found[name].float().norm(dim=2) <= limit)
        return found, counted

    def _harvest(
        self, store: TokenStore, data: DataSpec, block: int, hook_points: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """The activations of a block of train rows, permuted, outliers and all."""
        given = self._given(store, data)
        if isinstance(given, GivenStream):
            arrays = {name: given.array_at(name) for name in hook_points}
            found = given.harvest(block, list(arrays.values()), self._dtype_name)
            return {name: found[array] for name, array in arrays.items()}
        if given is None:
            rows = store.rows("train", block * store.block_rows, (block + 1) * store.block_rows)
        else:
            rows = given.tokens(block)
        kept = store.kept(rows)
        places = row_generator(data.seed, block).permutation(int(kept.sum()))
        if given is None:
            return self._activations(rows, kept, places, hook_points)
        return given.activations(block, kept, places, hook_points, wire_dtype(self.dtype))

    def _given(self, store: TokenStore, data: DataSpec) -> GivenStream | GivenRows | None:
        """The activations that are given, once they are opened; they are still those that the store was made for."""
        if data.activations is None:
            return None
        if store.train_id not in self._opened:
            opened = open_given(data)
            if opened.identity != store.given:
                raise DataError(f"data.activations {data.activations!r} has changed since the sweep was planned, or is "
                                "another folder on this machine; accepted: the same activations on every machine"
                                )  # fmt: skip
            self._opened[store.train_id] = opened
        return self._opened[store.train_id]

    def _activations(
        self, rows: np.ndarray, kept: np.ndarray, places: np.ndarray, hook_points: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """Kept token i of `rows` at place `places[i]` of an array for each hook point, in the order asked for."""
        out: dict[str, np.ndarray] = {}
        firsts = np.concatenate([[0], np.cumsum(kept.sum(1))])
        start = 0
        while start < len(rows):
            n_rows = min(self.rows_per_forward, len(rows))
            stop = min(start + n_rows, len(rows))
            where = torch.from_numpy(places[firsts[start] : firsts[stop]])
            # The last rows are filled up to the same shape: a matrix product of another shape may round another way.
            padded = rows[np.minimum(np.arange(start, start + n_rows), len(rows) - 1)]
            chunk_kept = torch.from_numpy(kept[start:stop]).to(self.device)

            def write(name: str, activations: Tensor) -> None:
                values = activations.flatten(2)[: len(chunk_kept)][chunk_kept].to("cpu")  # noqa: B023
                if name not in out:
                    out[name] = np.empty((len(places), values.shape[1]), dtype=wire_dtype(self.dtype))
                from_wire(out[name], self.dtype)[where] = values.to(self.dtype)  # noqa: B023

            if self._or_halve(lambda: self._forward(padded, hook_points, write)):  # noqa: B023
                start = stop
        return {name: out[name] for name in hook_points}

    def _forward(self, rows: np.ndarray, hook_points: Sequence[str], write: Callable[[str, Tensor], None]) -> bool:
        """Run rows up to the deepest of the hook points and hand over the activations [rows, context, ...] of each."""
        from transformer_lens.model_bridge.exceptions import StopAtLayerException

        missing = [name for name in hook_points if name not in self._hooks]
        if missing:
            raise ModelError(f"hook_points: model.name {self._name!r} has no {missing[0]!r}")
        waiting = set(hook_points)

        def hook(name: str) -> Callable[..., None]:
            def read(activations: Tensor, hook: Any) -> None:
                write(name, activations)
                waiting.discard(name)
                if not waiting:  # the rest of the model is not needed
                    raise StopAtLayerException(activations)

            return read

        tokens = torch.from_numpy(rows.astype(np.int64)).to(self.device)
        try:
            for name in hook_points:
                self._hooks[name].add_hook(hook(name))
            with torch.inference_mode():
                self.model(tokens, return_type=None)
        finally:
            for name in hook_points:
                self._hooks[name].remove_hooks()
        if waiting:
            raise ModelError(f"hook_points: {sorted(waiting)[0]!r} is never reached in model.name {self._name!r}")
        self.forward_passes += 1
        self.tokens += rows.size
        return True

    def _or_halve(self, run: Callable[[], Result]) -> Result | None:
        """`run()`, or None when memory ran out and the rows of a forward pass have been halved for another try."""
        try:
            return run()
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            reason = " ".join(str(error).split())[:200]
        # Outside the handler: the error's traceback keeps the failed pass' tensors alive.
        if self.rows_per_forward == 1:
            raise ModelError(f"model.name {self._name!r}: not even one row fits into the memory of {self.device}; a "
                             f"smaller data.context_size or model.dtype: bfloat16 needs less ({reason})")  # fmt: skip
        self.rows_per_forward //= 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        log.warning("out of memory: going on with %d rows a forward pass (%s)", self.rows_per_forward, reason)
        return None

    # ---- evaluation ----

    def evaluate(
        self, store: TokenStore, data: DataSpec, hook_point: str, saes: Mapping[str, nn.Module], split: Split,
        start_row: int, stop_row: int, *, writes: str | None = None, tokens_of: Sequence[str] | None = None,
        ablation: Tensor | None = None,
    ) -> "dict[str, EvaluationSums]":  # fmt: skip
        """Sums of the metrics of SAEs of one hook point, a row of a split; slices are merged in the order of rows.

        Transcoders read `hook_point` and are compared with, and put at, `writes`. With `data.exclude.norm_over_median`
        a token counts when its norm, at each of `tokens_of` (what is read and written unless given), is at most that
        multiple of the median norm there of train block 0 (in a store to evaluate on alone, of the split's first block
        of rows), so that the tokens do not depend on how a split is cut into slices. `ablation` [d] takes the place of
        every activation in the ablated run; zeros do unless it is given.
        """
        from sae_core.evaluation import evaluate_rows

        rows = store.rows(split, start_row, stop_row)
        kept = store.kept(rows)
        for name in tokens_of or dict.fromkeys((hook_point, writes or hook_point)):
            kept = self._without_outliers(store, data, name, split, rows, kept)
        tokens = torch.from_numpy(rows.astype(np.int64)).to(self.device)
        kept_tokens = torch.from_numpy(kept).to(self.device)
        while True:
            rows_per_forward = self.rows_per_forward
            sums = self._or_halve(
                lambda: evaluate_rows(
                    self.model,
                    saes,
                    hook_point,
                    tokens,
                    kept_tokens,
                    rows_per_forward=rows_per_forward,  # noqa: B023
                    writes=writes,
                    ablation=ablation,
                )
            )
            if sums is not None:
                return sums

    def evaluate_site(
        self, store: TokenStore, data: DataSpec, site: Site, saes: Mapping[str, nn.Module],
        bases: Mapping[str, nn.Module], split: Split, start_row: int, stop_row: int, ablation: Tensor | None = None,
    ) -> "dict[str, EvaluationSums]":  # fmt: skip
        """The sums of the SAEs of a site and of bases of what is written there, on the same tokens."""
        rows, ablated = (split, start_row, stop_row), {"ablation": ablation}
        if not site.is_transcoder:
            return self.evaluate(store, data, site.reads, {**saes, **bases}, *rows, **ablated)
        sums = self.evaluate(store, data, site.reads, saes, *rows, writes=site.writes, **ablated) if saes else {}
        if bases:
            sums |= self.evaluate(store, data, site.writes, bases, *rows, tokens_of=site.hook_points, **ablated)
        return sums

    def mean_written(self, store: TokenStore, data: DataSpec, site: Site, split: Split) -> Tensor:
        """float32 [d]: the mean of what is written at a site, over the tokens that count in a split's first block of
        rows."""
        rows = store.rows(split, 0, min(store.block_rows, store.n_rows(split)))
        kept = store.kept(rows)
        for name in site.hook_points:
            kept = self._without_outliers(store, data, name, split, rows, kept)
        return self._kept_activations(rows, kept, site.writes).double().mean(0).float()

    def _without_outliers(
        self, store: TokenStore, data: DataSpec, hook_point: str, split: Split, rows: np.ndarray, kept: np.ndarray
    ) -> np.ndarray:
        if data.exclude.norm_over_median is None:
            return kept
        limit = self._norm_limit(store, data, hook_point, split)
        kept = kept.copy()
        norms = self._kept_activations(rows, kept, hook_point).float().norm(dim=1)
        kept[kept] = (norms <= limit).numpy()
        return kept

    def _norm_limit(self, store: TokenStore, data: DataSpec, hook_point: str, split: Split) -> float:
        """The largest norm at a hook point that counts, where `data.exclude.norm_over_median` is given."""
        assert data.exclude.norm_over_median is not None
        judged = store.train_id or f"{store.id}/{split}", hook_point
        if judged not in self._norm_limits:
            if store.train_id:
                first = from_wire(self._harvest(store, data, 0, [hook_point])[hook_point], self.dtype)
            else:
                first_rows = store.rows(split, 0, min(store.block_rows, store.n_rows(split)))
                first = self._kept_activations(first_rows, store.kept(first_rows), hook_point)
            norms = first.float().norm(dim=1)
            self._norm_limits[judged] = data.exclude.norm_over_median * norms.median().item()
        return self._norm_limits[judged]

    def _kept_activations(self, rows: np.ndarray, kept: np.ndarray, hook_point: str) -> Tensor:
        """[tokens, d] in the order of the rows, in the model's type."""
        arrays = self._activations(rows, kept, np.arange(int(kept.sum())), [hook_point])
        return from_wire(arrays[hook_point], self.dtype)


def norm_outliers(activations: Tensor, norm_over_median: float) -> Tensor:
    """Which rows [n] of [n, d] have a norm above `norm_over_median` times the median."""
    norms = activations.float().norm(dim=1)
    return norms > norm_over_median * norms.median()


def replace_rows(activations: Tensor, replaced: Tensor) -> None:
    """Overwrite the rows of [n, d] that `replaced` [n] marks by the first that it does not."""
    places = torch.nonzero(replaced).squeeze(1)
    others = torch.nonzero(~replaced).squeeze(1)
    if len(others):
        activations[places] = activations[others[torch.arange(len(places)) % len(others)]]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; torch on a CPU says so in words only."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
