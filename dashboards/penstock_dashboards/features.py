"""An SAE's feature browser: one HTML file to search, sort and read thousands of latents in.

It reads a folder that `sae_core.analysis.feature_files` describes. The page holds an index of all latents, which its
list and its search need at once, and the examples in chunks, which it unpacks when a latent of theirs is shown. Both
are blocks of arrays (`_packed`), gzipped, that the page's script (`templates/unpack.js`) reads back.
"""

import base64
import gzip
import json
import math
import re
import struct
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from penstock_dashboards.page import Parts, page_text, write_whole
from sae_core.analysis.feature_files import EXAMPLES, Features, read_features

PAGE_BYTES = 25_000_000  # a larger page is slow to open and to hand on
_PARTS = Parts("features.html", ("base.css", "features.css"), ("elements.js", "unpack.js", "features.js"))
_CHUNK = 64  # latents that are unpacked together
_BEFORE, _AFTER = 4, 2  # tokens around a peak that the search and the list see
_SEARCHED = 400_000  # examples that a page's index holds of all latents together
_SEARCHED_SERVED = 1_500_000  # the same where the page is served from this machine
_TRIED = ((1.0, 1.0), (1.0, 0.5), (0.75, 0.5), (0.5, 0.5), (0.5, 0.25), (0.35, 0.25), (0.25, 0.25), (0.25, 0.0),
          (0.15, 0.0), (0.1, 0.0), (0.05, 0.0))  # fmt: skip
_NEAR = ("near_tokens", "near_lengths", "near_peaks", "near_counts")
_NEURONPEDIA = re.compile(r"[\w.-]+/[\w.-]+")

Array = NDArray[Any]
Columns = Mapping[str, Array]


@dataclass(frozen=True)
class Kept:
    """How many examples of a latent a page holds: the first `top` of its top group and `each` of every quantile."""

    top: int
    each: int


class ExamplesFile:
    """examples.parquet, read where it is asked for, so that an SAE of any size can be served. Threads may share it."""

    def __init__(self, path: Path):
        self._file = pq.ParquetFile(path, memory_map=True)
        column = self._file.schema_arrow.names.index("latent")
        groups = [self._file.metadata.row_group(number) for number in range(self._file.metadata.num_row_groups)]
        found = [group.column(column).statistics for group in groups if group.num_rows]
        self._ranges = [(one.min, one.max) for one in found]
        self._lock = threading.Lock()
        self._held: tuple[int, pa.Table] | None = None

    def of(self, first: int, last: int) -> pa.Table:
        """The examples of the latents `first` to `last`, both included, in the file's order."""
        parts = [self._file.schema_arrow.empty_table()]
        for number, (low, high) in enumerate(self._ranges):
            if high >= first and low <= last:
                table = self._row_group(number)
                begin, end = np.searchsorted(table["latent"].to_numpy(), [first, last + 1])
                parts.append(table.slice(begin, end - begin))
        return pa.concat_tables(parts)

    def _row_group(self, number: int) -> pa.Table:
        with self._lock:
            if self._held is None or self._held[0] != number:
                self._held = (number, self._file.read_row_group(number))
            return self._held[1]


def write_page(features_folder: str | Path, file: str | Path, *, limit: int = PAGE_BYTES) -> Path:
    """Write the browser of a features folder as one HTML file, whole or not at all, and return its path.

    Where the page would have more than `limit` bytes it holds fewer examples of each latent, and says so.

    Raises `CheckpointError` for a folder that holds no features of format 1, `SweepError` when the file cannot be
    written.
    """
    pages = _Pages(read_features(features_folder), _SEARCHED)
    return write_whole(Path(file), pages.whole(limit))


class ServedFeatures:
    """What a server of the browser answers with: `page`, the HTML, and `examples(latent)`, gzipped."""

    def __init__(self, features_folder: str | Path):
        self._pages = _Pages(read_features(features_folder), _SEARCHED_SERVED)
        self.page: bytes = self._pages.served().encode("utf-8")

    def examples(self, latent: int) -> bytes | None:
        """What the page unpacks to show a latent; None where the SAE has no such latent."""
        row = int(np.searchsorted(self._pages.ids, latent))
        if row >= len(self._pages.ids) or self._pages.ids[row] != latent:
            return None
        return self._pages.chunk(row, row + 1, self._pages.all)


class _Pages:
    """A features folder as blocks of arrays. Tokens are named by their place among the folder's tokens, most frequent
    first, so that the numbers are small."""

    def __init__(self, features: Features, searched: int):
        self.about = features.about
        self.examples = ExamplesFile(features.folder / EXAMPLES)
        self.columns = {name: features.latents[name].combine_chunks() for name in features.latents.column_names}
        self.ids = self.columns["latent"].to_numpy()
        settings = self.about["settings"]
        self.all = Kept(int(settings["top"]), int(settings["per_quantile"]))
        tokens = features.vocabulary["token"].to_numpy()
        self.texts: list[str] = features.vocabulary["text"].to_pylist()
        self.place = np.zeros(int(tokens.max(initial=-1)) + 1, np.uint32)
        self.near, counts = self._near(max(1, min(self.all.top, searched // max(len(self.ids), 1))), len(self.place))
        order = np.argsort(-counts[tokens], kind="stable")
        self.texts = [self.texts[index] for index in order]
        self.place[tokens[order]] = np.arange(len(tokens))
        self.near["near_tokens"] = self.place[self.near["near_tokens"]]

    def whole(self, limit: int) -> str:
        """The page with all that it shows: the most examples with which it has at most `limit` bytes."""
        index = self._index()
        room = limit - len(self._html({}, index, []))
        choices = [kept for kept in self._choices() if self._estimate(kept) <= room] or [self._choices()[-1]]
        for kept in choices:
            chunks = self._chunks(kept)
            if sum(map(_embedded_bytes, chunks)) <= room:
                break
        fewer = {} if kept == self.all else {"kept": {"top": kept.top, "each": kept.each}}
        return self._html({"chunk": _CHUNK, **fewer}, index, chunks)

    def served(self) -> str:
        return self._html({"chunk": 1, "served": True}, self._index(level=1), [], connect=" connect-src 'self';")

    def chunk(self, first: int, last: int, kept: Kept) -> bytes:
        """What the panel of the latents in rows `first` to `last` (excluded) shows."""
        rows = slice(first, last)
        arrays: dict[str, Array] = {}
        for name, bits in (("top_logits", 11), ("bottom_logits", 11), ("neighbour_cosines", 11)):
            arrays[name] = _few_bits(_flat(self.columns[name][rows])[0], bits)
        neighbours, counts = _flat(self.columns["neighbours"][rows])
        arrays["neighbours"], arrays["neighbour_counts"] = _ints(neighbours), _ints(counts)
        arrays["histogram"] = _ints(_flat(self.columns["histogram"][rows])[0])
        if last > first:
            self._add_examples(arrays, rows, kept)
        return _packed(arrays)

    def _add_examples(self, arrays: dict[str, Array], rows: slice, kept: Kept) -> None:
        ids = self.ids[rows]
        table = self.examples.of(int(ids[0]), int(ids[-1]))
        group = _groups(table)
        rank = table["rank"].to_numpy()
        table = table.filter(pa.array(np.where(group == 0, rank < kept.top, rank < kept.each)))
        group, row = _groups(table), np.searchsorted(ids, table["latent"].to_numpy())
        tokens, lengths = _flat(table["tokens"])
        values, _ = _flat(table["activations"])
        most = self.columns["max_activation"].to_numpy(zero_copy_only=False)[rows][row]
        arrays |= {
            "example_counts": _ints(np.bincount(row, minlength=len(ids))),
            "group": _ints(group),
            "peak": _ints(table["peak"].to_numpy()),
            "activation": _few_bits(table["activation"].to_numpy(), 13),
            "row": _ints(table["row"].to_numpy()),
            "position": _ints(table["position"].to_numpy()),
            "lengths": _ints(lengths),
            "tokens": _ints(self.place[tokens]),
            "activations": _levels(values, np.repeat(most, lengths)),
        }

    def _choices(self) -> list[Kept]:
        found = [Kept(math.ceil(top * self.all.top), int(each * self.all.each)) for top, each in _TRIED]
        return list(dict.fromkeys(found))

    def _chunks(self, kept: Kept) -> list[bytes]:
        return [self.chunk(first, min(first + _CHUNK, len(self.ids)), kept) for first in self._firsts()]

    def _firsts(self) -> range:
        return range(0, len(self.ids), _CHUNK)

    def _estimate(self, kept: Kept) -> float:
        """Bytes that the chunks take up, from at most eight of them."""
        firsts = self._firsts()[:: max(1, len(self._firsts()) // 8)]
        sizes = [_embedded_bytes(self.chunk(first, min(first + _CHUNK, len(self.ids)), kept)) for first in firsts]
        return float(np.mean(sizes)) * len(self._firsts()) if sizes else 0.0

    def _near(self, each: int, tokens: int) -> tuple[dict[str, Array], Array]:
        """The tokens around the peaks of `each` top examples a latent, and how often each token is in all examples."""
        counts = np.zeros(tokens, np.int64)
        parts: dict[str, list[Array]] = {name: [np.zeros(0, np.int64)] for name in _NEAR}
        for first in self._firsts():
            ids = self.ids[first : first + _CHUNK]
            table = self.examples.of(int(ids[0]), int(ids[-1]))
            counts += np.bincount(_flat(table["tokens"])[0], minlength=tokens)
            table = table.filter(pc.and_(pc.equal(table["group"], "top"), pc.less(table["rank"], each)))
            flat, lengths = _flat(table["tokens"])
            peak = table["peak"].to_numpy()
            begin = np.maximum(peak - _BEFORE, 0)
            taken = np.minimum(peak + _AFTER + 1, lengths) - begin
            starts = np.cumsum(lengths) - lengths + begin
            index = np.repeat(starts - (np.cumsum(taken) - taken), taken) + np.arange(taken.sum())
            row = np.searchsorted(ids, table["latent"].to_numpy())
            found = (flat[index], taken, peak - begin, np.bincount(row, minlength=len(ids)))
            for name, values in zip(_NEAR, found, strict=True):
                parts[name].append(values)
        return {name: np.concatenate(values) for name, values in parts.items()}, counts

    def _index(self, level: int = 6) -> bytes:
        arrays: dict[str, Array] = {
            "latent": _ints(self.ids),
            "fired": self._numbers("fired"),
            "firing_rate": self._numbers("firing_rate"),
            "max_activation": self._numbers("max_activation"),
            "mean_activation": self._numbers("mean_activation"),
        }
        for name in ("top_tokens", "bottom_tokens"):
            tokens, counts = _flat(self.columns[name])
            arrays[name], arrays[f"{name}_counts"] = _ints(self.place[tokens]), _ints(counts)
        arrays |= {name: _ints(values) for name, values in self.near.items()}
        return _packed(arrays, level, texts=self.texts)

    def _numbers(self, name: str) -> Array:
        values = self.columns[name].fill_null(0).to_numpy(zero_copy_only=False)
        is_small = values.dtype.kind == "i" and values.max(initial=0) < 2**32
        return _ints(values) if is_small else np.nan_to_num(values.astype(np.float32))

    def _html(self, more: Mapping[str, Any], index: bytes, chunks: list[bytes], connect: str = "") -> str:
        sae, data = self.about["sae"], self.about["data"]
        title = _clean(_title(sae))
        metadata = sae.get("metadata") or {}
        neuronpedia = str(metadata.get("neuronpedia_id") or "")
        described = {
            "title": title,
            "sae": {name: _clean(sae.get(name)) for name in ("id", "sweep", "folder", "architecture", "d_sae", "d_in")},
            "metadata": _clean({name: metadata.get(name) for name in ("model_name", "hook_name", "hook_name_out")}),
            "data": _clean(data),
            "figures": _clean(self.about["figures"] or {}),
            "settings": self.about["settings"],
            "bins": self.about["bins"],
            "neuronpedia": neuronpedia if _NEURONPEDIA.fullmatch(neuronpedia) else None,
            "version": _clean(self.about.get("penstock_version")),
            **more,
        }
        blocks = [("index", index), *((f"chunk-{number}", chunk) for number, chunk in enumerate(chunks))]
        embedded = "".join(
            f'<script type="application/octet-stream" id="{name}">{base64.b64encode(block).decode()}</script>\n'
            for name, block in blocks
        )
        in_short = [f"{len(self.ids):,} latents of an SAE at {title}, over {int(data.get('tokens') or 0):,} tokens."]
        return page_text(title, in_short, described, _PARTS, blocks=embedded, connect=connect)


# ---- blocks of arrays -----------------------------------------------------------------------------------------------


def _packed(arrays: Columns, level: int = 6, **more: Any) -> bytes:
    """Gzipped: the header's length in bytes (uint32), the header (JSON: `arrays`, a list of [name, kind, count], and
    `more`), then each array in little-endian bytes, all first bytes of its numbers before all second ones: the upper
    bytes of small numbers are alike, and so are those of numbers of one size."""
    header = {"arrays": [[name, values.dtype.str[1:], values.size] for name, values in arrays.items()], **more}
    text = json.dumps(header, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    parts = [struct.pack("<I", len(text)), text]
    for values in arrays.values():
        little = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
        parts.append(little.view(np.uint8).reshape(-1, values.dtype.itemsize).T.tobytes())
    return gzip.compress(b"".join(parts), level, mtime=0)


def _embedded_bytes(block: bytes) -> int:
    return (len(block) + 2) // 3 * 4 + 80


def _ints(values: Array) -> Array:
    """Whole numbers, none negative, in as few bytes as they need."""
    most = int(values.max(initial=0))
    return values.astype(np.uint8 if most < 2**8 else np.uint16 if most < 2**16 else np.uint32)


def _few_bits(values: Array, bits: int) -> Array:
    """float32 rounded to `bits` bits of the mantissa (a relative error of at most 2^-(bits + 1)); it packs better."""
    whole = np.nan_to_num(np.asarray(values, np.float32)).view(np.uint32)
    cut = np.uint32(23 - bits)
    return ((whole + (np.uint32(1) << (cut - 1))) >> cut << cut).view(np.float32)


def _levels(values: Array, most: Array) -> Array:
    """Activations in 255ths of their latent's largest; what is above 0 stays above 0."""
    share = np.divide(values, most, out=np.zeros(len(values)), where=most > 0)
    return np.where(values > 0, np.clip(np.rint(255 * share), 1, 255), 0).astype(np.uint8)


def _flat(column: pa.Array | pa.ChunkedArray) -> tuple[Array, Array]:
    """A list column's numbers, one after the other, and each list's length."""
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    return pc.list_flatten(column).to_numpy(zero_copy_only=False), lengths.astype(np.int64)


def _groups(table: pa.Table) -> Array:
    """0 for the top group, n for the n-th quantile."""
    names = table["group"].combine_chunks().dictionary_encode()
    numbers = [0 if name == "top" else int(name[1:]) for name in names.dictionary.to_pylist()]
    return np.asarray(numbers, np.int64)[names.indices.to_numpy(zero_copy_only=False)] if numbers else np.zeros(0, int)


# ---- what is said of the SAE ----------------------------------------------------------------------------------------


def _title(sae: Mapping[str, Any]) -> str:
    metadata = sae.get("metadata") or {}
    hook_point = metadata.get("hook_name") or sae.get("id") or sae.get("folder") or "SAE"
    out = metadata.get("hook_name_out")
    return f"{hook_point} → {out}" if out and out != hook_point else str(hook_point)


def _clean(value: Any) -> Any:
    """The same with what can be written: lone surrogates, which JSON can hold, as question marks; null for nan."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, Mapping):
        return {str(_clean(str(key))): _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
