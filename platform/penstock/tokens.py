"""The token store: a corpus tokenised once, cut into rows, kept as Arrow files under an address made of its content.

Layout, below `tokens/` of the storage:

    <id>/store.json              the three parts, and what decides which tokens are kept
    parts/<part>/part.json       a split's rows: how many, in which files
    parts/<part>/rows-00000.arrow   columns tokens (fixed_size_list<int32>[context_size]), document, kept (int32)

A part is addressed by what it was made from (corpus, tokenizer, context, seed, how much of it), so asking for more
report tokens leaves the train part as it is. Its manifest is written last: without one it is made again.
"""

import json
import math
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from penstock.corpus import Corpus, Piece, open_corpus, sampled_pieces, split_of_document
from penstock.errors import DataError, ModelError
from penstock.models import describe_model, location, may_download
from penstock.spec import DataSpec, ModelSpec, TrainSpec
from penstock.splits import SPLITS, Split
from penstock.storage import MANIFEST, Storage

_RULES = 1  # raised when splits, pieces or rows are made by other rules
_FILE_BYTES = 1 << 25
_SHARD_SIZE = 1 << 18  # characters or ids of one task
_WAVE_SIZE = 1 << 26  # and of one split in one round of tasks
_PART = "part.json"
_HELD_CHARACTERS_A_TOKEN = 6
_COUNTED_SIZE = 1 << 26  # characters or ids of a corpus that is small enough to be counted in advance

ParallelMap = Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[Any]]


def map_in_process(fn: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    return map(fn, items)


# ---- the tokenizer --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokenizer:
    """What tokenising needs, small enough to travel: the tokenizer's JSON and the ids that mean something."""

    json: str
    bos_id: int | None
    eos_id: int | None
    special_ids: tuple[int, ...]

    @property
    def fingerprint(self) -> str:
        rest = json.dumps([self.bos_id, self.eos_id, self.special_ids])
        return blake2b((self.json + rest).encode(), digest_size=16).hexdigest()

    def __call__(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts in one int32 array, without special tokens around them, and the length of each."""
        ids = [encoding.ids for encoding in _backend(self.json).encode_batch(texts, add_special_tokens=False)]
        lengths = np.array([len(part) for part in ids], dtype=np.int64)
        flat = np.fromiter((token for part in ids for token in part), dtype=np.int32, count=int(lengths.sum()))
        return flat, lengths


_backends: dict[str, Any] = {}


def _backend(tokenizer_json: str) -> Any:
    """A `tokenizers.Tokenizer`, one a process: a worker needs neither transformers nor torch."""
    if tokenizer_json not in _backends:
        import tokenizers

        backend = tokenizers.Tokenizer.from_str(tokenizer_json)
        backend.no_truncation()
        backend.no_padding()
        _backends.clear()
        _backends[tokenizer_json] = backend
    return _backends[tokenizer_json]


def load_tokenizer(model: ModelSpec) -> Tokenizer:
    """The fast tokenizer of a model. Raises `ModelError` when there is none."""
    from transformers import AutoTokenizer

    place = location(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            place.name, revision=place.revision, local_files_only=not may_download(place), use_fast=True
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ModelError(f"model.name {model.name!r}: its tokenizer cannot be loaded: {' '.join(str(error).split())}"
                         ) from None  # fmt: skip
    if not tokenizer.is_fast:
        raise ModelError(f"model.name {model.name!r}: its tokenizer has no fast version (a tokenizer.json), which is "
                         "what is accepted")  # fmt: skip
    marked = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    special_ids = tuple(sorted(marked | set(tokenizer.all_special_ids)))
    return Tokenizer(tokenizer.backend_tokenizer.to_str(), tokenizer.bos_token_id, tokenizer.eos_token_id, special_ids)


# ---- building -------------------------------------------------------------------------------------------------------


def check_data(data: DataSpec, model: ModelSpec, train: TrainSpec, vocab_size: int) -> None:
    """Refuse, before anything is started, what `build_token_store` would refuse: a dataset or tokenizer that is not
    there, a column that is not, and too few tokens where the corpus is small enough to tell.

    It reads as far into the corpus as it takes to see more than enough; a small corpus that may not be enough is
    tokenised in full. Raises `DataError` and `ModelError`.
    """
    corpus = open_corpus(data)
    tokenizer = load_tokenizer(model)
    _check_special_tokens(data, model, tokenizer)
    if corpus.stream:
        corpus.probe()
        return
    builder = _Builder(data, train, tokenizer, set(SPLITS), vocab_size if data.tokens_column else None, _silent)
    if not builder.sees_plenty(corpus):
        deque(builder.build(corpus, map_in_process), maxlen=0)


def _silent(message: str) -> None:
    pass


def build_token_store(
    data: DataSpec,
    model: ModelSpec,
    train: TrainSpec,
    storage: Storage,
    *,
    parallel_map: ParallelMap = map_in_process,
    progress: Callable[[str], None] = _silent,
) -> "TokenStore":
    """The token store of a run, made where it is not there yet; what is there and whole is not tokenised again.

    `parallel_map(fn, items)` yields `fn(item)` in order. Documents are taken until there are enough train rows for
    `train.steps` batches, and `data.search_tokens` and `data.report_tokens` kept tokens of the other splits.
    Raises `DataError` (no such dataset or column, too few tokens) and `ModelError` (no tokenizer).
    """
    progress(f"reading {data.dataset}")
    corpus = open_corpus(data)
    tokenizer = load_tokenizer(model)
    _check_special_tokens(data, model, tokenizer)
    parts = {split: _part_id(split, corpus, tokenizer, data, train) for split in SPLITS}
    missing = {split for split, part in parts.items() if not _is_whole(storage, part)}
    if missing:
        vocab_size = describe_model(model).vocab_size if data.tokens_column else None
        builder = _Builder(data, train, tokenizer, missing, vocab_size, progress)
        for split, rows in builder.build(corpus, parallel_map):
            _write_part(storage, parts[split], rows)
    description = {
        "parts": parts,
        "context_size": data.context_size,
        "block_rows": data.block_rows,
        "excluded_ids": list(tokenizer.special_ids) if data.exclude.special_tokens else [],
        "first_positions": data.exclude.first_positions,
        "norm_over_median": data.exclude.norm_over_median,
        "seed": data.seed,
    }
    store_id = _address(description)
    if not storage.is_committed(f"tokens/{store_id}"):
        storage.commit_folder(f"tokens/{store_id}", {"store.json": json.dumps(description, indent=1).encode()})
    return TokenStore.open(storage, store_id)


def _check_special_tokens(data: DataSpec, model: ModelSpec, tokenizer: Tokenizer) -> None:
    if data.bos and tokenizer.bos_id is None:
        raise DataError(f"data.bos is true, but the tokenizer of model.name {model.name!r} has no BOS token; accepted: "
                        "data.bos: false")  # fmt: skip
    if tokenizer.bos_id is None and tokenizer.eos_id is None:
        raise DataError(f"the tokenizer of model.name {model.name!r} has neither an EOS nor a BOS token to put between "
                        f"the documents of data.dataset {data.dataset!r}")  # fmt: skip


def _part_id(split: Split, corpus: Corpus, tokenizer: Tokenizer, data: DataSpec, train: TrainSpec) -> str:
    if split == "train":
        amount = [train.steps, train.batch_tokens, data.block_rows]
    else:
        amount = [data.search_tokens if split == "search" else data.report_tokens]
    kept = [data.exclude.special_tokens, data.exclude.first_positions]
    rows = [data.context_size, data.bos, data.seed, kept, amount]
    return _address([_RULES, split, corpus.identity, tokenizer.fingerprint, rows])


def _address(value: Any) -> str:
    return blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=12).hexdigest()


def row_generator(seed: int, *key: int) -> np.random.Generator:
    """A numpy generator for one purpose of one data seed."""
    return np.random.default_rng([seed % 2**64, *key])


@dataclass(frozen=True)
class _Rows:
    tokens: np.ndarray  # int32 [n, context_size]
    document: np.ndarray  # int32 [n]
    kept: np.ndarray  # int32 [n], kept tokens of each row

    def take(self, order: Any) -> "_Rows":
        return _Rows(self.tokens[order], self.document[order], self.kept[order])


class _RowCutter:
    """Joins the documents of a split and cuts them into rows."""

    def __init__(self, data: DataSpec, tokenizer: Tokenizer) -> None:
        self._bos = tokenizer.bos_id if data.bos else None
        self._separator = tokenizer.bos_id if tokenizer.eos_id is None else tokenizer.eos_id
        self._excluded = tokenizer.special_ids if data.exclude.special_tokens else ()
        self._first_positions = data.exclude.first_positions
        self.body = data.context_size - (self._bos is not None)  # tokens of documents in a row
        self._ids: list[np.ndarray] = []
        self._documents: list[np.ndarray] = []
        self._pending = 0
        self._done: list[_Rows] = []

    @property
    def n_rows(self) -> int:
        return sum(len(rows.kept) for rows in self._done) + self._pending // self.body

    def add(self, ids: np.ndarray, document: int) -> None:
        ids = np.append(ids, np.int32(self._separator))
        self._ids.append(ids)
        self._documents.append(np.full(len(ids), document, dtype=np.int32))
        self._pending += len(ids)

    def rows(self) -> _Rows:
        """All whole rows so far, in the order of the documents."""
        n_rows = self._pending // self.body
        if n_rows:
            ids, documents = np.concatenate(self._ids), np.concatenate(self._documents)
            used = n_rows * self.body
            tokens = ids[:used].reshape(n_rows, self.body)
            if self._bos is not None:
                tokens = np.insert(tokens, 0, self._bos, axis=1)
            kept = keep_mask(tokens, self._excluded, self._first_positions).sum(1, dtype=np.int32)
            self._done.append(_Rows(tokens, documents[: used : self.body], kept))
            self._ids, self._documents, self._pending = [ids[used:]], [documents[used:]], self._pending - used
        if len(self._done) > 1:
            columns = ("tokens", "document", "kept")
            self._done = [_Rows(*(np.concatenate([getattr(rows, c) for rows in self._done]) for c in columns))]
        if self._done:
            return self._done[0]
        empty = np.zeros(0, dtype=np.int32)
        return _Rows(np.zeros((0, self.body + (self._bos is not None)), dtype=np.int32), empty, empty)


def keep_mask(rows: np.ndarray, excluded_ids: Sequence[int], first_positions: int) -> np.ndarray:
    """bool [n, context_size]: tokens that count, neither special nor among the first positions of a row."""
    kept = np.ones(rows.shape, dtype=bool)
    if len(excluded_ids):
        kept = np.isin(rows, np.asarray(excluded_ids, dtype=np.int32), invert=True)
    kept[:, :first_positions] = False
    return kept


class _Builder:
    """Takes pieces of documents, in waves, until every missing split has its rows."""

    def __init__(
        self, data: DataSpec, train: TrainSpec, tokenizer: Tokenizer, missing: set[Split], vocab_size: int | None,
        progress: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._data, self._train, self._tokenizer, self._vocab_size = data, train, tokenizer, vocab_size
        self._cutters = {split: _RowCutter(data, tokenizer) for split in SPLITS if split in missing}
        self._wanted = set(missing)  # shrinks as splits fill; the reader of the corpus looks at it too
        self._needed = {split: self._selection(split)[0] for split in self._cutters}
        self._size_taken, self._tokens_taken = 0, 0
        self._progress, self._reported_at = progress, 0.0

    def sees_plenty(self, corpus: Corpus) -> bool:
        """Whether a look into the corpus finds more text than all splits can need, or more than can be counted."""
        size_a_token = 1.1 if self._data.tokens_column else _HELD_CHARACTERS_A_TOKEN
        missing = {split: size_a_token * self._data.context_size * rows for split, rows in self._needed.items()}
        seen = 0
        for content in corpus.read():
            if not isinstance(content, str):
                self._check_ids(content)
            missing[split_of_document(content)] -= len(content)
            seen += len(content)
            if seen > _COUNTED_SIZE or max(missing.values()) <= 0:
                return True
        return False

    def build(self, corpus: Corpus, parallel_map: ParallelMap) -> Iterator[tuple[Split, _Rows]]:
        held = 1 if self._data.tokens_column else _HELD_CHARACTERS_A_TOKEN
        budgets = {split: held * (rows + 8) * self._data.context_size for split, rows in self._needed.items()}
        pieces = sampled_pieces(corpus, self._data, self._wanted, budgets)
        pending: dict[Split, deque[Piece]] = {split: deque() for split in self._cutters}
        while self._wanted:
            self._tokenise(self._next_wave(pieces, pending), parallel_map)
            for split in sorted(self._wanted):
                self._needed[split], order = self._selection(split)
                if order is not None:
                    self._wanted.discard(split)
                    yield split, self._cutters.pop(split).rows().take(order)

    def _selection(self, split: Split) -> tuple[int, np.ndarray | slice | None]:
        """How many rows a split needs, as far as can be told by now, and which of its rows those are, once there.

        The fewest rows that will do, so neither waves nor workers have a say in what is taken.
        """
        rows, data = self._cutters[split].rows(), self._data
        if split != "train":
            wanted = data.search_tokens if split == "search" else data.report_tokens
            totals = np.cumsum(rows.kept, dtype=np.int64)
            if len(totals) and totals[-1] >= wanted:
                n_rows = int(np.searchsorted(totals, wanted)) + 1
                return n_rows, slice(0, n_rows)
            missing = wanted - (int(totals[-1]) if len(totals) else 0)
            return len(totals) + math.ceil(missing / self._most_kept_a_row), None
        most_steps = max(1, data.block_rows * self._most_kept_a_row // self._train.batch_tokens)
        n_blocks = math.ceil(self._train.steps / most_steps)
        while (n_rows := n_blocks * data.block_rows) <= len(rows.kept):
            order = row_generator(data.seed).permutation(n_rows)
            kept = rows.kept[order].reshape(n_blocks, data.block_rows).sum(1, dtype=np.int64)
            steps = kept // self._train.batch_tokens
            if steps.sum() >= self._train.steps:
                return n_rows, order
            if not steps.any():
                raise DataError(f"train.batch_tokens {self._train.batch_tokens} is larger than a block of "
                                f"data.block_tokens {data.block_tokens}, which holds about {int(kept.mean())} tokens "
                                "that are not excluded")  # fmt: skip
            n_blocks += 1
        return n_rows, None

    @property
    def _most_kept_a_row(self) -> int:
        excluded = self._data.exclude
        leading = max(excluded.first_positions, int(self._data.bos and excluded.special_tokens))
        return max(1, self._data.context_size - leading)

    def _next_wave(self, pieces: Iterator[Piece], pending: dict[Split, deque[Piece]]) -> list[Piece]:
        """Pieces for about as many tokens as are still needed. Raises `DataError` when the corpus has no more."""
        size_a_token = 1.0 if self._data.tokens_column else 4.0
        if self._tokens_taken:
            size_a_token = self._size_taken / self._tokens_taken
        wave: list[Piece] = []
        for split in sorted(self._wanted):
            cutter, size = self._cutters[split], 0.0
            target = min(1.02 * size_a_token * cutter.body * (self._needed[split] - cutter.n_rows), _WAVE_SIZE)
            while size < target or not size:
                while not pending[split] and (piece := next(pieces, None)) is not None:
                    if piece.split in self._wanted:
                        pending[piece.split].append(piece)
                if not pending[split]:
                    break
                wave.append(pending[split].popleft())
                size += len(wave[-1].content) + size_a_token
            if not size:
                raise self._too_few(split)
        return wave

    def _tokenise(self, wave: list[Piece], parallel_map: ParallelMap) -> None:
        shards = _shards(wave)
        encode = _join_ids if self._data.tokens_column else self._tokenizer
        results = parallel_map(encode, [[piece.content for piece in shard] for shard in shards])
        for shard, (flat, lengths) in zip(shards, results, strict=True):
            self._check_ids(flat)
            self._size_taken += sum(len(piece.content) for piece in shard)
            self._tokens_taken += len(flat)
            for piece, ids in zip(shard, np.split(flat, np.cumsum(lengths)[:-1]), strict=True):
                self._cutters[piece.split].add(ids, piece.document)
            self._report()

    def _check_ids(self, ids: np.ndarray) -> None:
        if self._vocab_size is not None and len(ids) and not 0 <= ids.min() <= ids.max() < self._vocab_size:
            raise DataError(f"data.tokens_column {self._data.tokens_column!r} holds ids from {ids.min()} to {ids.max()}"
                            f"; the model accepts 0 to {self._vocab_size - 1}")  # fmt: skip

    def _report(self) -> None:
        if time.monotonic() - self._reported_at >= 1:
            self._reported_at = time.monotonic()
            shares = (
                f"{split} {min(1.0, cutter.n_rows / self._needed[split]):.0%}"
                for split, cutter in self._cutters.items()
            )
            self._progress(f"tokenising {self._data.dataset}: {', '.join(shares)}")

    def _too_few(self, split: Split) -> DataError:
        data, train, rows = self._data, self._train, self._cutters[split].rows()
        if split == "train":
            asked = (f"train.tokens {train.tokens} (with data.block_tokens {data.block_tokens} and train.batch_tokens "
                     f"{train.batch_tokens}: {self._needed[split]} rows of {data.context_size})")  # fmt: skip
        else:
            asked = f"data.{split}_tokens {data.search_tokens if split == 'search' else data.report_tokens}"
        return DataError(f"{asked} is more than data.dataset {data.dataset!r} has: its {split} split (by document, "
                         f"train 90%, search 5%, report 5%) gives {len(rows.kept)} rows with {int(rows.kept.sum())} "
                         "tokens that are not excluded")  # fmt: skip


def _shards(pieces: list[Piece]) -> list[list[Piece]]:
    shards: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        if size >= _SHARD_SIZE:
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size += len(piece.content)
    return shards


def _join_ids(parts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate(parts), np.array([len(part) for part in parts], dtype=np.int64)


# ---- parts on the storage -------------------------------------------------------------------------------------------


def _write_part(storage: Storage, part: str, rows: _Rows) -> None:
    """Write a split's rows in files of a bounded size, then `part.json`, then the manifest."""
    n_rows, context_size = rows.tokens.shape
    rows_a_file = max(1, _FILE_BYTES // (4 * context_size))
    sums, sizes = {}, {}
    for index, start in enumerate(range(0, n_rows, rows_a_file)):
        name, data = _file_name(index), _arrow_file(rows.take(slice(start, start + rows_a_file)))
        storage.write(f"{_folder(part)}/{name}", data)
        sums[name], sizes[name] = blake2b(data, digest_size=16).hexdigest(), len(data)
    content = blake2b(np.ascontiguousarray(rows.tokens).data, digest_size=16).hexdigest()
    description = {"n_rows": n_rows, "rows_a_file": rows_a_file, "sizes": sizes, "content": content}
    data = json.dumps(description, indent=1).encode()
    storage.write(f"{_folder(part)}/{_PART}", data)
    storage.write_json(f"{_folder(part)}/{MANIFEST}", {**sums, _PART: blake2b(data, digest_size=16).hexdigest()})


def _arrow_file(rows: _Rows) -> bytes:
    context_size = rows.tokens.shape[1]
    tokens = pa.FixedSizeListArray.from_arrays(pa.array(rows.tokens.reshape(-1)), context_size)
    batch = pa.record_batch([tokens, pa.array(rows.document), pa.array(rows.kept)], ["tokens", "document", "kept"])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def _folder(part: str) -> str:
    return f"tokens/parts/{part}"


def _file_name(index: int) -> str:
    return f"rows-{index:05d}.arrow"


def _is_whole(storage: Storage, part: str) -> bool:
    """Whether a part needs no making. On a disk the files' sizes are looked at too, as somebody may have cut them."""
    if not storage.is_committed(_folder(part)):
        return False
    try:
        sizes = storage.read_json(f"{_folder(part)}/{_PART}")["sizes"]
        return not storage.is_local or all(
            os.path.getsize(storage.path(f"{_folder(part)}/{name}")) == size for name, size in sizes.items()
        )
    except (OSError, ValueError, KeyError):
        return False


# ---- reading --------------------------------------------------------------------------------------------------------


class _Part:
    """The rows of one split. Files are memory-mapped; those of a remote storage are fetched on first use."""

    def __init__(self, storage: Storage, part: str) -> None:
        self._storage, self._part = storage, part
        description = storage.read_json(f"{_folder(part)}/{_PART}")
        self.n_rows: int = description["n_rows"]
        self.content: str = description["content"]
        self._rows_a_file: int = description["rows_a_file"]
        self._batches: dict[int, pa.RecordBatch] = {}

    def column(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of a column: a view where one file holds them."""
        if not 0 <= start <= stop <= self.n_rows:
            raise IndexError(f"rows {start} to {stop} of {self.n_rows}")
        pieces = []
        for index in range(start // self._rows_a_file, max(start, stop - 1) // self._rows_a_file + 1):
            if start == stop:
                break
            first = index * self._rows_a_file
            pieces.append(self._array(index, name)[max(0, start - first) : stop - first])
        if not pieces:
            return self._array(0, name)[:0]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _array(self, index: int, name: str) -> np.ndarray:
        if index not in self._batches:
            self._batches[index] = pa.ipc.open_file(pa.memory_map(self._local_path(_file_name(index)))).get_batch(0)
        column = self._batches[index].column(name)
        if name != "tokens":
            return column.to_numpy()
        return column.flatten().to_numpy().reshape(len(column), -1)

    def _local_path(self, name: str) -> str:
        path = f"{_folder(self._part)}/{name}"
        if self._storage.is_local:
            return self._storage.path(path)
        cached = Path(tempfile.gettempdir(), f"penstock-tokens-{os.getuid()}", self._part, name)
        if not cached.exists():
            Storage(cached.parent).write(name, self._storage.read(path))
        return str(cached)


class TokenStore:
    """A token store that is there. It opens in any process and travels by its address.

    `id` is the address of the whole store. `train_id` identifies the train stream and nothing else: the rows in their
    order (by content), the blocks they form, which of their tokens are kept, and the seed of the blocks' permutations.
    """

    def __init__(self, storage: Storage, store_id: str) -> None:
        self.id = store_id
        self._storage = storage
        try:
            description = storage.read_json(f"tokens/{store_id}/store.json")
        except FileNotFoundError:
            raise DataError(f"there is no token store {store_id!r} in {storage.uri!r}") from None
        self.context_size: int = description["context_size"]
        self.block_rows: int = description["block_rows"]
        self._excluded_ids: list[int] = description["excluded_ids"]
        self._first_positions: int = description["first_positions"]
        self._parts = {split: _Part(storage, part) for split, part in description["parts"].items()}
        stream = {key: value for key, value in description.items() if key != "parts"}
        self.train_id = _address([self._parts["train"].content, stream])

    @staticmethod
    def open(storage: Storage, store_id: str) -> "TokenStore":
        """Open a store by its id. Raises `DataError` when there is none."""
        return TokenStore(storage, store_id)

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenStore, (self._storage, self.id)

    def n_rows(self, split: Split) -> int:
        return self._parts[split].n_rows

    def rows(self, split: Split, start: int, stop: int) -> np.ndarray:
        """int32 [stop - start, context_size], read-only. Raises `IndexError` beyond the split's rows."""
        return self._parts[split].column("tokens", start, stop)

    def documents(self, split: Split, start: int, stop: int) -> np.ndarray:
        """int32 [stop - start]: the position in the corpus of the document that each row begins with."""
        return self._parts[split].column("document", start, stop)

    def kept(self, rows: np.ndarray) -> np.ndarray:
        """bool [n, context_size]: the tokens that count, neither special nor among the first positions."""
        return keep_mask(rows, self._excluded_ids, self._first_positions)

    @cached_property
    def kept_per_block(self) -> np.ndarray:
        """int64 [n_blocks]: kept tokens of each whole block of `block_rows` train rows."""
        n_blocks = self.n_rows("train") // self.block_rows
        kept = self._parts["train"].column("kept", 0, n_blocks * self.block_rows)
        return kept.reshape(n_blocks, self.block_rows).sum(1, dtype=np.int64)
