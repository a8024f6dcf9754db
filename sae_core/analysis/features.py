"""Feature dashboards: for each latent of an SAE the places where it fires most, places where it fires at all, how often
and how strongly it fires, and what it writes. Accumulated a few rows at a time, merged exactly, kept as Parquet.

For latent i with activation f_i(t) >= 0 at token t (excluded tokens have f = 0 everywhere):

    fired        number of tokens with f_i(t) > 0           firing_rate = fired / tokens
    histogram    of the f_i(t) > 0, over BINS, the same logarithmic bins for every latent
    top          the strongest peaks, one a row: max_t f_i(t) of the row; of equal ones the earlier (row, position)
    quantiles    a uniform sample of the tokens with f_i(t) > 0, cut by activation into groups of equal size
    logits       W_dec_i as the unembedding sees it, see `latent_logits`      neighbours   by cosine of decoder rows

**Merging is exact.** The sample holds the `size` firing places with the smallest hash of (row, position, latent): every
place has the same chance, places are drawn without replacement (bottom-k sampling: Cohen and Kaplan, PODC 2007), and
which ones are drawn depends neither on the order of rows nor on who saw them. Top examples are the first of a total
order, counts are integers. Sums of activations are in float64, added in the order of the parts' numbers. So any number
of workers, in any order, gives the same bits, provided that each part is computed alike.

**Memory** is bounded by latents, never by tokens: a few hundred bytes for each example kept, `bytes_per_latent` in all.
Where that is too much for all latents at once, they are done in groups (`latents`), one pass over the tokens for each.

A result is a folder, see `feature_files`: `FeatureWriter` writes one, `read_features` reads it.

Shapes: R rows, C tokens of a row (context), F latents of the SAE, L latents of a group, D = d_in or d_out.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from sae_core.analysis.feature_files import (
    EXAMPLE_SCHEMA,
    LATENT_SCHEMA,
    Features,
    FeatureWriter,
    is_features,
    read_features,
)
from sae_core.analysis.final_norm import read_norm
from sae_core.errors import ConfigError
from sae_core.sae import SAE

__all__ = [
    "BINS", "Best", "Examples", "FeaturePass", "FeatureSettings", "FeatureWriter", "Features", "LatentLogits",
    "MergedFeatures", "Part", "Totals", "add_rows", "decoder_neighbours", "example_tables",
    "is_features", "latent_groups", "latent_logits", "latents_table", "place_hash", "read_features", "to_residual",
]  # fmt: skip

BINS = (10 ** (np.arange(-25, 41) / 10)).astype(np.float32)
"""Edges of the histogram's bins, ten a decade from 0.003 to 10,000; the first and last one take what lies beyond."""

_SAMPLED = 2  # places sampled for each example that is shown: steadier quantiles, and a choice of different rows
_NO_HASH = 2**63 - 1
_TINY = float(np.finfo(np.float32).tiny)
_LEAST_PENDING = 1 << 14  # candidates to wait for before the best are picked again
_LATENTS_A_GROUP = 64  # of a row group of examples.parquet: what is read to show one of them
_ROWS_AT_ONCE = 4096  # whose tokens are looked up together
_CPU_ENTRIES, _DEVICE_ENTRIES = 1 << 22, 1 << 27  # of a matrix at a time: what a CPU's cache takes, half a gigabyte


@dataclass(frozen=True)
class FeatureSettings:
    """How much is kept of each latent.

    top: peaks. quantiles, per_quantile: groups of firing places, and examples of each. before, after: tokens of context
    around a peak. logits: tokens at each end. neighbours: other latents. 0 leaves one of them out.
    """

    top: int = 20
    quantiles: int = 5
    per_quantile: int = 4
    before: int = 16
    after: int = 8
    logits: int = 10
    neighbours: int = 8

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ConfigError(f"{name} {value!r}: accepted is a whole number of 0 or more")

    @property
    def window(self) -> int:
        return self.before + 1 + self.after

    @property
    def sample(self) -> int:
        """How many firing places of a latent are sampled."""
        return _SAMPLED * self.quantiles * self.per_quantile

    @property
    def bytes_per_latent(self) -> int:
        """What a latent takes at most: examples, of which there are four times as many while the best are picked and
        parts are merged, histogram and sums, of which there are three."""
        example = 4 * self.window + 4 + 4 + 8 + 8 + 4
        return 4 * (self.top + self.sample) * example + 3 * (8 * (len(BINS) - 1) + 20)


def latent_groups(d_sae: int, settings: FeatureSettings, budget_bytes: int) -> list[range]:
    """All latents, in as few groups of neighbours as keep within a budget; each needs a pass over the tokens."""
    at_once = max(1, min(d_sae, budget_bytes // settings.bytes_per_latent))
    size = math.ceil(d_sae / math.ceil(d_sae / at_once))
    return [range(start, min(start + size, d_sae)) for start in range(0, d_sae, size)]


# ---- the best of many -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Examples:
    """Places where latents fire, n of them: on the CPU, whatever device they were found on.

    latent int32 [n], within its group. rank int64 [n]: the smaller, the better; what of equal ones comes first,
    (row, position) decides. activation float32 [n]. row int64 [n], position int32 [n]. window float32 [n, W]: the
    latent's activation from `before` tokens ahead of the place to `after` behind it, 0 beyond the row.
    """

    latent: np.ndarray
    rank: np.ndarray
    activation: np.ndarray
    row: np.ndarray
    position: np.ndarray
    window: np.ndarray

    def __len__(self) -> int:
        return len(self.latent)

    def take(self, index: Any) -> "Examples":
        return Examples(*(getattr(self, name)[index] for name in _EXAMPLE_FIELDS))

    @staticmethod
    def none(width: int) -> "Examples":
        types = (np.int32, np.int64, np.float32, np.int64, np.int32)
        return Examples(*(np.empty(0, kind) for kind in types), window=np.empty((0, width), np.float32))

    @staticmethod
    def join(parts: Sequence["Examples"]) -> "Examples":
        if len(parts) == 1:
            return parts[0]
        return Examples(*(np.concatenate([getattr(part, name) for part in parts]) for name in _EXAMPLE_FIELDS))


_EXAMPLE_FIELDS = ("latent", "rank", "activation", "row", "position", "window")


class Best:
    """The `size` best examples of each of `n_latents`. `limit` int64 [n_latents]: no worse rank has a chance."""

    def __init__(self, n_latents: int, size: int, width: int):
        self.size = size
        self.limit = np.full(n_latents, _NO_HASH if size else -1, np.int64)
        self._kept = Examples.none(width)
        self._pending: list[Examples] = []

    def add(self, found: Examples) -> None:
        if self.size and len(found):
            self._pending.append(found)
            if sum(map(len, self._pending)) > max(_LEAST_PENDING, len(self._kept) // 2):
                self.examples()

    def examples(self) -> Examples:
        """The best of all that was added: by latent, and of each the best first."""
        if self._pending:
            every = Examples.join([self._kept, *self._pending])
            self._kept, self._pending = every, []  # lets the parts go
            order = np.flatnonzero(every.rank <= self.limit[every.latent])
            keys = (every.position[order], every.row[order], every.rank[order], every.latent[order])
            order = order[np.lexsort(keys)]
            latent = every.latent[order]
            place = np.arange(len(order)) - np.searchsorted(latent, latent)
            self._kept = every.take(order[place < self.size])
            last = latent[place == self.size - 1]
            self.limit[last] = every.rank[order[place == self.size - 1]]
        return self._kept


# ---- accumulating ---------------------------------------------------------------------------------------------------


@dataclass
class Totals:
    """Sums over tokens. Of a group of L latents: fired int64 [L], total float64 [L], greatest float32 [L], histogram
    int64 [L, bins]; of the reconstruction, where asked for: squared error and square of the target, its sum [d_out],
    all float64."""

    n_tokens: int
    fired: np.ndarray
    total: np.ndarray
    greatest: np.ndarray
    histogram: np.ndarray
    squared_error: float = 0.0
    square: float = 0.0
    target: np.ndarray | None = None

    @staticmethod
    def zeros(n_latents: int) -> "Totals":
        fired, histogram = np.zeros(n_latents, np.int64), np.zeros((n_latents, len(BINS) - 1), np.int64)
        return Totals(0, fired, np.zeros(n_latents), np.zeros(n_latents, np.float32), histogram)

    def add(self, other: "Totals") -> None:
        """Add another's to these; the order of float sums is that of the calls."""
        self.n_tokens += other.n_tokens
        self.fired += other.fired
        self.total += other.total
        np.maximum(self.greatest, other.greatest, out=self.greatest)
        self.histogram += other.histogram
        self.squared_error += other.squared_error
        self.square += other.square
        if other.target is not None:
            self.target = other.target.copy() if self.target is None else self.target + other.target

    @property
    def l0(self) -> float:
        """Latents of the group that fire on a token, on average."""
        return float(self.fired.sum() / self.n_tokens) if self.n_tokens else math.nan

    @property
    def explained_variance(self) -> float | None:
        """1 - E||x - x_hat||^2 / E||x - E x||^2; None where it was not asked for."""
        if self.target is None:
            return None
        variance = self.square - float(self.target @ self.target) / self.n_tokens
        return 1 - self.squared_error / variance if variance > 0 else math.nan


@dataclass(frozen=True)
class Part:
    """What some rows have: sums, and of each latent the best examples (of those that had a chance)."""

    totals: Totals
    top: Examples
    sample: Examples


class FeaturePass:
    """Accumulates rows for a group of latents. `limits`: of the merged examples so far (`MergedFeatures.limits`), so
    that what has no chance is not kept; the result is the same without.

    A row may be given once only, in this pass or in one that is merged with it, and whole: peaks are one a row.
    """

    def __init__(
        self, n_latents: int, context_size: int, settings: FeatureSettings, *, first_latent: int = 0,
        limits: tuple[np.ndarray, np.ndarray] | None = None,
    ):  # fmt: skip
        self.settings, self.context_size, self.first_latent = settings, context_size, first_latent
        self.totals = Totals.zeros(n_latents)
        self.top = Best(n_latents, settings.top, settings.window)
        self.sample = Best(n_latents, settings.sample, settings.window)
        if limits is not None:
            np.minimum(self.top.limit, limits[0], out=self.top.limit)
            np.minimum(self.sample.limit, limits[1], out=self.sample.limit)

    @torch.no_grad()
    def add(self, f: Tensor, first_row: int, n_tokens: int) -> None:
        """f [R, C, L]: activations of rows from number `first_row` on, 0 at excluded tokens; `n_tokens` of them are
        counted."""
        n_latents = len(self.totals.fired)
        if f.shape[1:] != (self.context_size, n_latents):
            raise ConfigError(f"activations have shape {list(f.shape)}; accepted: [rows, {self.context_size}, "
                              f"{n_latents}]")  # fmt: skip
        f = f.detach().float().contiguous()
        where = _positive(f)
        values = f.view(-1)[where]
        token, latent = where // n_latents, where % n_latents
        self.totals.n_tokens += n_tokens
        self._add_sums(f, latent, values)
        peaks = f.amax(1).clamp_min_(0)
        if len(peaks) and not bool(peaks.amax() < math.inf):
            raise ConfigError(
                f"activations in rows {first_row} to {first_row + len(f) - 1} are not finite numbers; accepted: "
                "a model in float32 or bfloat16, where they are too large for float16"
            )
        np.maximum(self.totals.greatest, peaks.amax(0).cpu().numpy(), out=self.totals.greatest)
        if self.top.size:
            self._add_peaks(f, peaks, first_row)
        if self.sample.size:
            self._add_sample(f, first_row, token, latent, values)

    def add_errors(self, target: Tensor, x_hat: Tensor) -> None:
        """Of kept tokens alone: what is reconstructed and its reconstruction, [n, d_out] each."""
        wide, error = target.double(), (target - x_hat).double()
        self.totals.squared_error += float(error.square().sum())
        self.totals.square += float(wide.square().sum())
        added = wide.sum(0).cpu().numpy()
        self.totals.target = added if self.totals.target is None else self.totals.target + added

    def part(self) -> Part:
        return Part(self.totals, self.top.examples(), self.sample.examples())

    def _add_sums(self, f: Tensor, latent: Tensor, values: Tensor) -> None:
        n_latents, n_bins = self.totals.histogram.shape
        if f.device.type == "cpu":  # one pair after the other
            total = torch.zeros(n_latents, dtype=torch.float64).index_add_(0, latent, values.double())
        else:  # where pairs would be added in any order
            total = f.clamp_min(0).sum((0, 1), dtype=torch.float64)
        edges = torch.from_numpy(BINS).to(f.device)
        bins = (torch.bucketize(values, edges, right=True) - 1).clamp_(0, n_bins - 1)
        counts = torch.zeros(n_latents * n_bins, dtype=torch.int64, device=f.device)
        counts.index_add_(0, latent * n_bins + bins, torch.ones_like(latent))
        histogram = counts.view(n_latents, n_bins).cpu().numpy()
        self.totals.histogram += histogram
        self.totals.fired += histogram.sum(1)
        self.totals.total += total.cpu().numpy()

    def _add_peaks(self, f: Tensor, peaks: Tensor, first_row: int) -> None:
        worst = _activation_of(torch.from_numpy(self.top.limit).to(f.device))
        places = torch.arange(self.context_size, device=f.device)
        step = max(1, (1 << 20) // self.context_size)  # peaks whose whole rows are looked through at a time
        for found in (peaks >= worst).nonzero().split(step):
            row, latent = found.unbind(1)
            height = peaks[row, latent]
            chosen = self._with_a_chance(self.top, _rank_of(height), latent)
            row, latent, height = row[chosen], latent[chosen], height[chosen]
            # the first of equal ones, which argmax does not promise
            position = torch.where(f[row, :, latent] == height[:, None], places, self.context_size).amin(1)
            self.top.add(self._examples(f, first_row, row, position, latent, height, _rank_of(height)))

    def _add_sample(self, f: Tensor, first_row: int, token: Tensor, latent: Tensor, values: Tensor) -> None:
        place = token + first_row * self.context_size
        hashed = place_hash(place, latent + self.first_latent)
        for some in self._with_a_chance(self.sample, hashed, latent).split(_LEAST_PENDING):
            chosen = some[self._with_a_chance(self.sample, hashed[some], latent[some])]
            row, position = token[chosen] // self.context_size, token[chosen] % self.context_size
            found = self._examples(f, first_row, row, position, latent[chosen], values[chosen], hashed[chosen])
            self.sample.add(found)

    @staticmethod
    def _with_a_chance(best: Best, rank: Tensor, latent: Tensor) -> Tensor:
        """The indices of what may be among the best; fewer and fewer, as more is known."""
        return (rank <= torch.from_numpy(best.limit).to(rank.device)[latent]).nonzero()[:, 0]

    def _examples(
        self, f: Tensor, first_row: int, row: Tensor, position: Tensor, latent: Tensor, height: Tensor, rank: Tensor
    ) -> Examples:
        around = torch.arange(-self.settings.before, self.settings.after + 1, device=f.device) + position[:, None]
        inside = (around >= 0) & (around < self.context_size)
        window = f[row[:, None], around.clamp(0, self.context_size - 1), latent[:, None]] * inside
        columns = (latent.int(), rank, height, row + first_row, position.int(), window)
        return Examples(*(column.cpu().numpy() for column in columns))


def place_hash(place: Tensor, latent: Tensor) -> Tensor:
    """int64 [n], not negative: 63 well-mixed bits of places (row * C + position) and latents, int64 [n] each (two
    rounds of SplitMix64's mixing, Steele et al., OOPSLA 2014)."""
    return _mixed(_mixed(place) + latent) & _NO_HASH


def _mixed(z: Tensor) -> Tensor:
    z = z + -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed number, as the next two; overflow wraps around
    z = (z ^ _shifted(z, 30)) * -0x40A7B892E31B1A47
    z = (z ^ _shifted(z, 27)) * -0x6B2FB644ECCEEE15
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """z >> bits of unsigned numbers."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _positive(f: Tensor) -> Tensor:
    """Flat positions of the entries above 0, ascending."""
    if f.device.type != "cpu":
        return (f.view(-1) > 0).nonzero()[:, 0]
    flat = torch.from_numpy(np.flatnonzero(f.view(-1).bool().numpy()))  # in a fraction of a comparison's time
    negative = f.view(-1)[flat] < 0
    return flat[~negative] if bool(negative.any()) else flat


def _rank_of(activation: Tensor) -> Tensor:
    """int64, the smaller the larger a positive float32: by its bits, which are ordered as the numbers are."""
    return 0x7F800000 - activation.view(torch.int32).long()


def _activation_of(rank: Tensor) -> Tensor:
    """The activation of a rank; for one that everything positive reaches, the least positive number."""
    return (0x7F800000 - rank).clamp(1, 0x7F800000).int().view(torch.float32)


class MergedFeatures:
    """Parts of a pass put together. They may come in any order: float sums wait for their turn."""

    def __init__(self, n_latents: int, settings: FeatureSettings):
        self.settings = settings
        self.totals = Totals.zeros(n_latents)
        self._top = Best(n_latents, settings.top, settings.window)
        self._sample = Best(n_latents, settings.sample, settings.window)
        self._next = 0
        self._waiting: dict[int, Totals] = {}

    @property
    def limits(self) -> tuple[np.ndarray, np.ndarray]:
        """Ranks beyond which no further top example, and no further sampled place, of each latent has a chance."""
        return self._top.limit.copy(), self._sample.limit.copy()

    def add(self, number: int, part: Part) -> None:
        """Take in part `number` (0, 1, 2, ...), once."""
        self._top.add(part.top)
        self._sample.add(part.sample)
        self._waiting[number] = part.totals
        while self._next in self._waiting:
            self.totals.add(self._waiting.pop(self._next))
            self._next += 1

    @property
    def top(self) -> Examples:
        return self._top.examples()

    @property
    def sample(self) -> Examples:
        return self._sample.examples()


def _entries(device: torch.device) -> int:
    return _CPU_ENTRIES if device.type == "cpu" else _DEVICE_ENTRIES


# ---- running an SAE -------------------------------------------------------------------------------------------------


@torch.no_grad()
def add_rows(
    passes: Sequence[tuple[FeaturePass, range]], sae: SAE, x: Tensor, kept: Tensor, first_row: int,
    target: Tensor | None = None,
) -> None:  # fmt: skip
    """Put rows through an SAE, as many tokens at a time as its width allows.

    passes: each with the latents that it is of. x: activations [R, C, d_in], on any device. kept: [R, C] bool, the
    tokens that count. target: [R, C, d_out], what is to be reconstructed, where errors are asked for (in the first of
    `passes`); x itself for an SAE.
    """
    device = sae.W_dec.device
    context = x.shape[1]
    entries = _entries(device)
    rows_at_once = max(1, entries // (context * sae.d_sae))
    tokens_at_once = max(1, entries // sae.d_sae) if rows_at_once == 1 else rows_at_once * context
    for start in range(0, len(x), rows_at_once):
        rows = slice(start, start + rows_at_once)
        keep = kept[rows].to(device)
        given, wanted = x[rows].flatten(0, 1), None if target is None else target[rows].flatten(0, 1)
        columns: list[list[Tensor]] = [[] for _ in passes]
        for first in range(0, len(given), tokens_at_once):
            piece = slice(first, first + tokens_at_once)
            there, counts = given[piece].to(device), keep.view(-1)[piece]
            if wanted is None:
                f = sae.encode(there)
            else:
                f, x_hat = sae.reconstruct(there)
                passes[0][0].add_errors(wanted[piece].to(x_hat)[counts], x_hat[counts])
            f[~counts] = 0
            for column, (_, latents) in zip(columns, passes, strict=True):
                column.append(f[:, latents.start : latents.stop])
        for column, (one, latents) in zip(columns, passes, strict=True):
            f = column[0] if len(column) == 1 else torch.cat(column)
            one.add(f.view(*keep.shape, len(latents)), first_row + start, int(keep.sum()))


# ---- what latents write ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LatentLogits:
    """Of n latents, [n, settings.logits] each, the farthest first: int32 tokens and float32 logits."""

    top_tokens: np.ndarray
    top_logits: np.ndarray
    bottom_tokens: np.ndarray
    bottom_logits: np.ndarray


@torch.no_grad()
def latent_logits(model: nn.Module, hook_point: str, rows: Tensor, n: int) -> LatentLogits | None:
    """The tokens whose logits decoder rows [L, d_out] raise most and lower most, when they are added at `hook_point`.

    It is the direct path: the row, as it reaches the residual stream, through the final norm and the unembedding, with
    no layer in between. Of the final norm the gain is applied and, if it is a LayerNorm, the mean over d_model taken
    out; its scale, which differs from token to token, is left at 1. The mean over the vocabulary is taken out, as no
    probability depends on it. `attn.hook_z` goes through W_O of its layer and `mlp.hook_post` through W_out; where
    what is written does not reach the residual stream by a linear path (a norm's or an MLP's input), None is returned.

    model: TransformerBridge or HookedTransformer.
    """
    direction = to_residual(model, hook_point, rows)
    if direction is None or not n:
        return None
    unembedding = model.unembed.W_U.detach().float()
    norm, gain, is_centred = getattr(model, "ln_final", None), torch.ones_like(direction[0]), False
    if norm is not None:
        parameter = next(model.parameters())
        gain, _, is_centred = read_norm(norm, parameter.new_empty(direction.shape[1]))
    n = min(n, unembedding.shape[1])
    at_once = max(1, _entries(unembedding.device) // unembedding.shape[1])
    found: list[list[np.ndarray]] = [[], [], [], []]
    for part in direction.split(at_once):
        part = part - part.mean(1, keepdim=True) if is_centred else part
        logits = (part * gain) @ unembedding
        logits = logits - logits.mean(1, keepdim=True)
        for sign, place in ((1, 0), (-1, 2)):
            values, tokens = (sign * logits).topk(n, dim=1)
            found[place].append(tokens.int().cpu().numpy())
            found[place + 1].append((sign * values).cpu().numpy())
    return LatentLogits(*(np.concatenate(parts) if parts else np.empty((0, n)) for parts in found))


def to_residual(model: nn.Module, hook_point: str, rows: Tensor) -> Tensor | None:
    """float32 [L, d_model]: what rows [L, d_out] written at a hook point add to the residual stream; None where there
    is no linear path."""
    _, _, kind = hook_point.rpartition("blocks.")
    layer, _, name = kind.partition(".")
    rows = rows.detach().float().to(next(model.parameters()).device)
    if name in ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out"):
        return rows
    if name in ("attn.hook_z", "mlp.hook_post") and layer.isdecimal():
        block = model.blocks[int(layer)]
        weights = block.attn.W_O if name == "attn.hook_z" else getattr(block.mlp, "W_out", None)
        if isinstance(weights, Tensor) and weights.numel() == rows.shape[1] * model.cfg.d_model:
            return rows @ weights.detach().float().reshape(rows.shape[1], model.cfg.d_model)
    return None


@torch.no_grad()
def decoder_neighbours(W_dec: Tensor, n: int, latents: range | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(int32 latents, float32 cosines), [L, n] each: those whose decoder rows point the most nearly the same way, the
    nearest first. A row of zeros has a cosine of 0 with all. W_dec [F, d_out]; `latents`: of these alone."""
    latents = range(len(W_dec)) if latents is None else latents
    n = min(n, len(W_dec) - 1)
    W = W_dec.detach().float()
    W = W / W.norm(dim=1, keepdim=True).clamp_min(_TINY)
    at_once = max(1, _entries(W.device) // len(W))
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for start in range(latents.start, latents.stop, at_once):
        rows = torch.arange(start, min(start + at_once, latents.stop), device=W.device)
        cosines = W[rows] @ W.T
        cosines[torch.arange(len(rows), device=W.device), rows] = -2  # not its own neighbour
        values, others = cosines.topk(n, dim=1)
        found.append((others.int().cpu().numpy(), values.clamp(-1, 1).cpu().numpy()))
    nearest, cosine = zip(*found, strict=True) if found else ((np.empty((0, n)),), (np.empty((0, n)),))
    return np.concatenate(nearest).astype(np.int32), np.concatenate(cosine).astype(np.float32)


# ---- tables ---------------------------------------------------------------------------------------------------------

TokensOf = Callable[[np.ndarray], np.ndarray]
"""The tokens of rows: ascending int64 [n] -> int [n, C]."""


def latents_table(
    merged: MergedFeatures, latents: range, logits: LatentLogits | None, neighbours: tuple[np.ndarray, np.ndarray]
) -> pa.Table:
    """The rows of latents.parquet for a group of latents; logits and neighbours are those of the group."""
    totals = merged.totals
    with np.errstate(invalid="ignore"):
        mean = totals.total / totals.fired
    empty = [pa.array([[]] * len(latents), LATENT_SCHEMA.field(name).type) for name in
             ("top_tokens", "top_logits", "bottom_tokens", "bottom_logits")]  # fmt: skip
    columns = [
        pa.array(np.arange(latents.start, latents.stop, dtype=np.int32)),
        pa.array(totals.fired),
        pa.array(totals.fired / max(totals.n_tokens, 1)),
        pa.array(totals.greatest),
        pa.array(mean.astype(np.float32), mask=totals.fired == 0),
        _lists(totals.histogram),
        *(empty if logits is None else [_lists(getattr(logits, name)) for name in
                                        ("top_tokens", "top_logits", "bottom_tokens", "bottom_logits")]),
        *(_lists(column) for column in neighbours),
    ]  # fmt: skip
    return pa.table(columns, schema=LATENT_SCHEMA)


def _lists(matrix: np.ndarray) -> pa.Array:
    """[n, m] as n lists of m."""
    offsets = np.arange(0, matrix.size + 1, matrix.shape[1]) if matrix.shape[1] else np.zeros(len(matrix) + 1)
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(np.ascontiguousarray(matrix).ravel()))


def example_tables(merged: MergedFeatures, latents: range, tokens_of: TokensOf) -> Iterator[pa.Table]:
    """The rows of examples.parquet for a group of latents, a few latents at a time."""
    top, sample = merged.top, merged.sample
    for start in range(0, len(latents), _LATENTS_A_GROUP):
        ends = start, start + _LATENTS_A_GROUP
        shown_top, shown_sample = (
            one.take(slice(*np.searchsorted(one.latent, ends))) for one in (top, sample)
        )  # fmt: skip
        places = np.arange(len(shown_top)) - np.searchsorted(shown_top.latent, shown_top.latent)
        group = np.zeros(len(shown_top), np.int32)  # 0 for top, then the quantiles
        quantile, rank, chosen = _quantile_groups(shown_sample, merged.settings)
        every = Examples.join([shown_top, shown_sample.take(chosen)])
        group, rank = np.concatenate([group, quantile]), np.concatenate([places, rank])
        names = np.array(["top", *(f"q{index + 1}" for index in range(merged.settings.quantiles))])
        order = np.lexsort((rank, names[group], every.latent))
        every, group, rank = every.take(order), group[order], rank[order]
        yield _examples_table(every, names[group], rank, latents.start, merged.settings, tokens_of)


def _quantile_groups(sample: Examples, settings: FeatureSettings) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(group from 1 on, rank within it, index into the sample) of the examples that are shown.

    The sample of a latent is cut by activation into groups of equal size (to one). Of each group the places that were
    drawn first are shown, those of rows that are not shown yet before others; within a group the strongest first.
    """
    groups, ranks, chosen = [], [], []
    starts = np.flatnonzero(np.diff(sample.latent, prepend=-1))
    for start, stop in zip(starts, np.append(starts[1:], len(sample))[: len(starts)], strict=True):
        size = stop - start
        by_strength = start + np.lexsort((np.arange(size), sample.activation[start:stop]))
        group_of = np.empty(size, np.int64)
        group_of[by_strength - start] = np.arange(size) * settings.quantiles // size
        shown_rows: set[int] = set()
        picked: list[list[int]] = [[] for _ in range(settings.quantiles)]
        for again in (False, True):
            for place in range(start, stop):  # as they were drawn
                group, row = picked[group_of[place - start]], int(sample.row[place])
                if len(group) < settings.per_quantile and place not in group and (again or row not in shown_rows):
                    group.append(place)
                    shown_rows.add(row)
        for index, places in enumerate(picked):
            places.sort(key=lambda place: (-sample.activation[place], sample.row[place], sample.position[place]))
            groups += [index + 1] * len(places)
            ranks += range(len(places))
            chosen += places
    return np.array(groups, np.int64), np.array(ranks, np.int64), np.array(chosen, np.int64)


def _examples_table(
    every: Examples, names: np.ndarray, rank: np.ndarray, first: int, settings: FeatureSettings, tokens_of: TokensOf
) -> pa.Table:
    tokens = np.zeros((len(every), settings.window), np.int32)
    context = 0
    rows, row_of = np.unique(every.row, return_inverse=True)
    around = every.position[:, None].astype(np.int64) + np.arange(-settings.before, settings.after + 1)
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        found = tokens_of(rows[start : start + _ROWS_AT_ONCE])
        context = found.shape[1]
        here = (row_of >= start) & (row_of < start + _ROWS_AT_ONCE)
        tokens[here] = found[(row_of[here] - start)[:, None], around[here].clip(0, context - 1)]
    inside = (around >= 0) & (around < context)
    offsets = pa.array(np.concatenate([[0], np.cumsum(inside.sum(1))]).astype(np.int32))
    columns = [
        pa.array((every.latent + first).astype(np.int32)),
        pa.array(names.tolist(), pa.string()),
        pa.array(rank.astype(np.int32)),
        pa.array(every.activation),
        pa.array(every.row),
        pa.array(every.position),
        pa.array(np.minimum(every.position, settings.before).astype(np.int32)),
        pa.ListArray.from_arrays(offsets, pa.array(tokens[inside])),
        pa.ListArray.from_arrays(offsets, pa.array(every.window[inside])),
    ]
    return pa.table(columns, schema=EXAMPLE_SCHEMA)
