"""Activations that somebody else made, to train on in place of harvesting them (`data.activations`).

Of these two kinds of folder `open_given` tells which one it is:

    <spool>/<stream>/          a stream of a spool (see `spool`): its blocks are permuted and without excluded tokens
    <folder>/state.json        cached activations of SAELens: a Hugging Face dataset saved to disk, with a column
                               Array2D [context_size, d_in] a hook point and, where it has them, token_ids
    <folder>/<name>/state.json several of them over the same rows, as SAELens caches one hook point at a time

The first is served as it is. Rows of the second are put in a random order by `data.seed`, once an epoch, and cut into
blocks of `data.block_rows`; what becomes of a block is then what becomes of one that the model host makes.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from penstock.errors import DataError
from penstock.identity import content_id
from penstock.sites import parse_array
from penstock.spec import DataSpec, SweepSpec, TrainSpec
from penstock.spool import ABOUT, Spool, SpooledStream, SpoolError
from penstock.storage import Storage
from penstock.tokens import keep_mask, row_generator

ACCEPTED = (
    "a stream of a spool (FOLDER/0123456789ab with about.json), or cached activations of SAELens (a dataset saved to "
    "disk with a column a hook point, or a folder of them)"
)
TOKEN_IDS = "token_ids"

_STREAM = re.compile(r"[0-9a-f]{12}")
_STATE, _INFO = "state.json", "dataset_info.json"
_TYPES = {"float32": np.float32, "float16": np.float16}  # numpy and Arrow, and so SAELens' caches, have no bfloat16
# What a stream's blocks were made with, by their about.json, and the field of the spec that has to say the same.
_MADE_WITH = {
    "dtype": "model.dtype",
    "processing": "model.processing",
    "context_size": "data.context_size",
    "block_tokens": "data.block_tokens",
    "exclude": "data.exclude",
}


def open_given(data: DataSpec) -> "GivenStream | GivenRows":
    """The activations of `data.activations`. Raises `DataError` where the folder holds none."""
    assert data.activations is not None
    named = f"data.activations {data.activations!r}"
    if "://" in data.activations:
        path, query, options = data.activations.partition("?")
        root, _, name = path.rstrip("/").rpartition("/")
        storage = Storage(f"{root}{query}{options}")
        if not _STREAM.fullmatch(name) or not storage.exists(f"{name}/{ABOUT}"):
            raise DataError(f"{named} is no stream of a spool, with about.json; accepted: a URI of one, or a folder on "
                            f"disk: {ACCEPTED}")  # fmt: skip
        return GivenStream(data, Spool(storage).stream(name))
    folder = Path(data.activations).expanduser().resolve()
    if not folder.is_dir():
        raise DataError(f"{named}: there is no such folder; accepted: {ACCEPTED}")
    if _STREAM.fullmatch(folder.name) and (folder / ABOUT).exists():
        return GivenStream(data, Spool(Storage(folder.parent)).stream(folder.name))
    caches = [folder] if (folder / _STATE).exists() else sorted(path.parent for path in folder.glob(f"*/{_STATE}"))
    if caches:
        return GivenRows(data, caches)
    streams = sorted(path.parent.name for path in folder.glob(f"*/{ABOUT}") if _STREAM.fullmatch(path.parent.name))
    if streams:
        raise DataError(f"{named} is a whole spool; accepted: one of its streams, {folder}/STREAM: {_some(streams)}")
    raise DataError(f"{named} holds no activations that can be read; accepted: {ACCEPTED}")


class GivenStream:
    """A stream of a spool. `identity` stands for its blocks; `about` says in a few words what they are."""

    def __init__(self, data: DataSpec, stream: SpooledStream) -> None:
        self._named = f"data.activations {data.activations!r}"
        self._stream = stream
        # The stream's id stands for all that decides its activations at any hook point, and every block names the
        # stream that it is of. Which blocks are there decides nothing of what is in them.
        self.identity = f"stream {stream.id}"
        try:
            made = stream.spool.storage.read_json(f"{stream.id}/{ABOUT}")
            self._made: dict[str, Any] = {key: made[key] for key in ("model", "dataset", *_MADE_WITH)}
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(f"{self._named}: its about.json does not say what was left out and of which model ({error})"
                            "; accepted: the one that `data.spool` has written") from None  # fmt: skip
        files = (file.name.split("/") for file in stream.spool.storage.files(stream.id))
        arrays = sorted({parts[1] for parts in files if len(parts) == 3})
        self._blocks = {array: set(blocks) for array in arrays if (blocks := stream.blocks(array))}

    @property
    def about(self) -> str:
        return f"a spool's stream, of model {self._made['model']} over {self._made['dataset']}"

    @property
    def dataset(self) -> str | None:
        """What the activations were made from, where the folder says so."""
        return self._made["dataset"]

    def check(self, spec: SweepSpec, widths: Mapping[str, int]) -> None:
        """Raise `DataError` where the stream is not what the spec says or needs; `widths`: d of each array."""
        dump = spec.model_dump()
        for key, field in _MADE_WITH.items():
            section, name = field.split(".")
            asked, made = dump[section][name], self._made[key]
            if asked != made:
                raise DataError(f"{field} {_yaml(asked)}: {self._named} was made with {_yaml(made)}; accepted: "
                                f"{field}: {_yaml(made)}")  # fmt: skip
        n_blocks = len(self.kept_per_block(spec.data, spec.train))
        for array, d in widths.items():
            if array not in self._blocks:
                raise DataError(f"hook_points: {self._named} has no {array!r}; accepted: {_some(list(self._blocks))}")
            missing = sorted(set(range(n_blocks)) - self._blocks[array])
            if missing:
                raise DataError(f"train.tokens {spec.train.tokens} takes blocks 0 to {n_blocks - 1}, and {self._named} "
                                f"has no block {missing[0]} of {array}; accepted: a stream that has them all"
                                )  # fmt: skip
            found = self._shape(array, 0)[1]
            if found != d:
                raise DataError(f"{self._named} has activations of width {found} at {array}, and the model of "
                                f"model.name {spec.model.name!r} {d}; accepted: activations of that model"
                                )  # fmt: skip

    def warnings(self, spec: SweepSpec) -> list[str]:
        """What is allowed and may not be meant."""
        if self._made["model"] == spec.model.name:
            return []
        return [f"data.activations: they were made by model {self._made['model']}, and the SAEs are evaluated in model "
                f"{spec.model.name}"]  # fmt: skip

    def kept_per_block(
        self, data: DataSpec, train: TrainSpec, excluded_ids: Sequence[int] = (), vocab_size: int | None = None
    ) -> list[int]:
        """Tokens of each block, as many blocks as the run takes. Raises `DataError` where there are too few."""
        kept: list[int] = []
        steps = 0
        while steps < train.steps:
            array = next((name for name, blocks in self._blocks.items() if len(kept) in blocks), None)
            if array is None:
                raise DataError(f"train.tokens {train.tokens} (with train.batch_tokens {train.batch_tokens}) is more "
                                f"than {self._named} has: its blocks up to the first that is missing hold {sum(kept)} "
                                f"tokens, and a stream is used once, whatever data.epochs allows; accepted: "
                                f"train.tokens of at most {steps * train.batch_tokens}")  # fmt: skip
            kept.append(self._shape(array, len(kept))[0])
            steps += kept[-1] // train.batch_tokens
        return kept

    def harvest(self, block: int, arrays: Sequence[str], dtype: str) -> dict[str, np.ndarray]:
        """The arrays [tokens, d] of a block, read-only. Raises `SpoolError` naming the file that is damaged."""
        return {name: self._stream.read(name, block, dtype) for name in arrays}

    def array_at(self, hook_point: str) -> str:
        """An array of activations at a hook point: its own, or one in which a site's outliers are replaced."""
        return next(name for name in self._blocks if parse_array(name)[0] == hook_point)

    def _shape(self, array: str, block: int) -> tuple[int, int]:
        try:
            return self._stream.shape(array, block)
        except SpoolError as error:
            raise DataError(f"{self._named}: {error}") from None


class GivenRows:
    """Cached activations of SAELens: one dataset with a column a hook point, or several over the same rows.

    `identity` stands for the rows in their stored order; `about` says in a few words what they are.
    """

    def __init__(self, data: DataSpec, caches: Sequence[Path]) -> None:
        self._named = f"data.activations {data.activations!r}"
        self._data = data
        self._caches = [_Cache(self._named, folder) for folder in caches]
        self._columns = {name: column for cache in self._caches for name, column in cache.columns.items()}
        self.n_rows = len(self._caches[0])
        # Rows are not read: whoever saves a dataset gives it a fingerprint of its own, and files that are cut off or
        # joined anew have another size.
        self.identity = f"rows {content_id([cache.identity for cache in self._caches])}"
        for cache in self._caches if len(self._caches) > 1 else []:
            if len(cache) != self.n_rows or cache.tokens is None:
                has = f"{len(cache)} rows" if len(cache) != self.n_rows else "no token_ids to tell it by"
                raise DataError(f"{self._named}: row i has to be the same text in all of its datasets, and "
                                f"{cache.folder} has {has}, {self._caches[0].folder} {self.n_rows} rows; accepted: "
                                "datasets of the same rows, each with token_ids")  # fmt: skip
        if not self.n_rows:
            raise DataError(f"{self._named} has no rows; accepted: {ACCEPTED}")
        self._orders: dict[int, np.ndarray] = {}

    @property
    def about(self) -> str:
        types = ", ".join(sorted({column.dtype for column in self._columns.values()}))
        return f"cached activations of SAELens, {self.n_rows:,} rows in {types}"

    @property
    def dataset(self) -> str | None:
        """What the activations were made from, where the folder says so: here it does not."""
        return None

    def check(self, spec: SweepSpec, widths: Mapping[str, int]) -> None:
        """Raise `DataError` where the columns are not what the spec says or needs; `widths`: d of each array."""
        for array, d in widths.items():
            hook_point, _ = parse_array(array)
            if hook_point not in self._columns:
                raise DataError(f"hook_points: {self._named} has no column {hook_point!r} of activations; accepted: "
                                f"{_some(sorted(self._columns))}")  # fmt: skip
            column = self._columns[hook_point]
            if column.d != d:
                raise DataError(f"{self._named} has activations of width {column.d} at {hook_point}, and the model of "
                                f"model.name {spec.model.name!r} {d}; accepted: activations of that model"
                                )  # fmt: skip
            if column.context_size != spec.data.context_size:
                raise DataError(f"data.context_size {spec.data.context_size}: {self._named} has rows of "
                                f"{column.context_size} tokens; accepted: data.context_size: {column.context_size}"
                                )  # fmt: skip
            if spec.model.dtype not in (column.dtype, "float32"):
                raise DataError(f"model.dtype {spec.model.dtype}: {self._named} has {column.dtype} at {hook_point}, "
                                f"which would be rounded; accepted: model.dtype: {column.dtype}"
                                f"{'' if column.dtype == 'float32' else ' or float32'}")  # fmt: skip
        # Left out of the evaluation and trained on, unseen, the records of the SAEs would not be true.
        if self._caches[0].tokens is None and spec.data.exclude.special_tokens:
            raise DataError(f"data.exclude.special_tokens true: {self._named} has no token_ids, which would tell where "
                            "they are; accepted: data.exclude: {special_tokens: false}, or a folder with token_ids"
                            )  # fmt: skip

    def warnings(self, spec: SweepSpec) -> list[str]:
        """What is allowed and may not be meant."""
        return [f"data.activations: nothing in the folder says which model they come from, nor which documents: it is "
                f"taken to be {spec.model.name}, and the report split may hold documents that are trained on"
                ]  # fmt: skip

    def kept_per_block(
        self, data: DataSpec, train: TrainSpec, excluded_ids: Sequence[int] = (), vocab_size: int | None = None
    ) -> list[int]:
        """Kept tokens of each block, as many blocks as the run takes. Raises `DataError` where there are too few, and
        for token ids that the model does not have."""
        there = self.n_rows * data.epochs // data.block_rows
        kept: list[int] = []
        steps = 0
        while steps < train.steps:
            if len(kept) == there:
                raise self._too_few(train, kept, steps)
            tokens = self.tokens(len(kept))
            if vocab_size is not None and tokens.max() >= vocab_size:
                raise DataError(f"{self._named} has the token id {tokens.max()}, and the model of model.name has ids "
                                f"up to {vocab_size - 1}; accepted: activations of that model")  # fmt: skip
            kept.append(int(keep_mask(tokens, excluded_ids, data.exclude.first_positions).sum()))
            steps += kept[-1] // train.batch_tokens
        return kept

    def tokens(self, block: int) -> np.ndarray:
        """int32 [block_rows, context_size]: the token ids of a block; -1, which none is, where the folder has none.

        Raises `DataError` where datasets of several hook points differ in them.
        """
        rows = self._rows(block)
        first, *others = (cache.tokens for cache in self._caches)
        if first is None:
            return np.full((len(rows), next(iter(self._columns.values())).context_size), -1, dtype=np.int32)
        tokens = first.take(rows)
        for cache, other in zip(self._caches[1:], others, strict=True):
            if not np.array_equal(tokens, other.take(rows)):
                raise DataError(f"{self._named}: row i has to be the same text in all of its datasets, and "
                                f"{self._caches[0].folder} and {cache.folder} differ in their token_ids; accepted: "
                                "datasets of the same rows in the same order")  # fmt: skip
        return tokens

    def activations(
        self, block: int, kept: np.ndarray, places: np.ndarray, hook_points: Sequence[str], dtype: type[np.generic]
    ) -> dict[str, np.ndarray]:
        """Kept token i of a block at place `places[i]` of an array [kept tokens, d] for each hook point.

        kept: bool [block_rows, context_size].
        """
        rows, firsts = self._rows(block), np.concatenate([[0], np.cumsum(kept.sum(1))])
        made = {}
        for name in hook_points:
            column = self._columns[name]
            made[name] = np.empty((len(places), column.d), dtype=dtype)
            for index, row in enumerate(rows):
                made[name][places[firsts[index] : firsts[index + 1]]] = column.values[row][kept[index]]
        return made

    def _rows(self, block: int) -> np.ndarray:
        """int64 [block_rows]: the stored rows of a block."""
        size = self._data.block_rows
        places = np.arange(block * size, (block + 1) * size)
        epochs = places // self.n_rows
        return np.concatenate([
            self._order(int(epoch))[places[epochs == epoch] % self.n_rows] for epoch in np.unique(epochs)
        ])  # fmt: skip

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            if len(self._orders) > 1:  # a block lies in one epoch, or where one meets the next
                self._orders.clear()
            self._orders[epoch] = row_generator(self._data.seed, epoch, 1).permutation(self.n_rows)
        return self._orders[epoch]

    def _too_few(self, train: TrainSpec, kept: Sequence[int], steps: int) -> DataError:
        data, accepted = self._data, []
        if steps:
            epochs = -(-data.epochs * train.steps // steps)
            accepted = [f"train.tokens of at most {steps * train.batch_tokens}", f"data.epochs: about {epochs}"]
        return DataError(
            f"train.tokens {train.tokens} (with data.block_tokens {data.block_tokens}, train.batch_tokens "
            f"{train.batch_tokens}, data.epochs {data.epochs}) is more than {self._named} has: its {self.n_rows} rows "
            f"give {len(kept)} whole blocks of {data.block_rows} rows, with {sum(kept)} tokens that are not excluded; "
            f"accepted: {', '.join([*accepted, 'a folder of more rows, or smaller blocks and batches'])}"
        )


class _Cache:
    """A dataset that `datasets` saved to disk: its columns of activations, and the token ids where it has them."""

    def __init__(self, named: str, folder: Path) -> None:
        self.folder = folder
        try:
            state = json.loads((folder / _STATE).read_text())
            features = json.loads((folder / _INFO).read_text())["features"]
            files = [folder / _name_in_folder(file["filename"]) for file in state["_data_files"]]
            self.identity = [features, state["_fingerprint"], [os.path.getsize(file) for file in files]]
            # Stored as Arrow streams; mapped into memory, so that nothing is read but the rows that are asked for.
            tables = [pa.ipc.open_stream(pa.memory_map(str(file))).read_all() for file in files]
            self.columns = {
                name: _Activations(feature, [table.column(name) for table in tables])
                for name, feature in features.items() if feature.get("_type") == "Array2D"
            }  # fmt: skip
            contexts = {column.context_size for column in self.columns.values()}
            if len(contexts) != 1:
                raise ValueError("it needs columns Array2D [context_size, d_in], all of one context_size")
            self.tokens = None
            if TOKEN_IDS in features:
                chunks = [chunk for table in tables for chunk in table.column(TOKEN_IDS).chunks]
                self.tokens = _Rows([_flat(chunk, 1).reshape(len(chunk), *contexts) for chunk in chunks])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
            raise DataError(f"{named}: {folder} cannot be read as cached activations: "
                            f"{' '.join(str(error).split())[:300]}; accepted: {ACCEPTED}") from None  # fmt: skip

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())).values)


class _Activations:
    """A column of activations, [context_size, d] a row."""

    def __init__(self, feature: Mapping[str, Any], columns: Sequence[pa.ChunkedArray]) -> None:
        self.dtype: str = feature["dtype"]
        self.context_size, self.d = feature["shape"]
        if self.dtype not in _TYPES or self.context_size is None:
            raise ValueError(f"a column is {_yaml(dict(feature))}; accepted are dtype {' and '.join(_TYPES)} and rows "
                             "of one length")  # fmt: skip
        chunks = [chunk for column in columns for chunk in column.chunks]
        self.values = _Rows([_flat(chunk, 2).reshape(len(chunk), self.context_size, self.d) for chunk in chunks])


class _Rows:
    """Rows that lie in several arrays, one after the other."""

    def __init__(self, chunks: Sequence[np.ndarray]) -> None:
        self._chunks = [chunk for chunk in chunks if len(chunk)]
        self._ends = np.cumsum([len(chunk) for chunk in self._chunks])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, row: int) -> np.ndarray:
        index = int(np.searchsorted(self._ends, row, side="right"))
        return self._chunks[index][row - self._ends[index]]

    def take(self, rows: np.ndarray) -> np.ndarray:
        return np.stack([self[row] for row in rows]).astype(np.int32, copy=False)


def _name_in_folder(name: str) -> str:
    if name in ("", "..") or Path(name).name != name:
        raise ValueError(f"{_STATE} names {name!r}, which leads out of the folder")
    return name


def _flat(array: pa.Array, depth: int) -> np.ndarray:
    """All values of lists of lists, without a copy."""
    array = getattr(array, "storage", array)  # `datasets`, where it is loaded, has a type of its own for Array2D
    for _ in range(depth):
        if array.null_count:
            raise ValueError("a row has no values")
        array = array.flatten()
    return array.to_numpy(zero_copy_only=True)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "none"


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000).split("\n")[0]
