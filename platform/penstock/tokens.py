"""The token store: a corpus tokenised once, cut into rows, kept as Arrow files under an address made of its content.

Layout, below `tokens/` of the storage:

    <id>/store.json              the three parts, and what decides which tokens are kept
    parts/<part>/part.json       a split's rows: how many, in which files
    parts/<part>/rows-00000.arrow   columns tokens (fixed_size_list<int32>[context_size]), document, kept (int32); of a
                                    mixture source too

A part is addressed by what it was made from (corpus, tokenizer, context, seed, how much of it), so asking for more
report tokens leaves the train part as it is. Its manifest is written last: without one it is made again.

Of a mixture, n rows of a split are shared out among the sources by weight, to the nearest row (largest remainder). Each
source is cut into rows on its own, and the train rows of all are permuted together. A mixture is known by its sources'
content and their shares: neither their order in the spec nor the scale of the weights matters, and a mixture of one is
that dataset. A source with fewer train rows than its share gives them once more in another order, and again, up to
`data.epochs` times; as the rows do not depend on that limit, no address does.

With `data.activations` there is no train part: the store says in its place which activations are given (see `given`),
and how many tokens each of their blocks has. A store to evaluate on alone has neither.
"""

import itertools
import json
import math
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from penstock.corpus import Corpus, Piece, open_corpora, sampled_pieces, split_of_document
from penstock.errors import DataError, ModelError
from penstock.models import describe_model, location, may_download, wants_to_run_code
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
_COUNTED_ROWS = 1 << 22  # rows of a run whose epochs are counted, and not estimated, where there are too few
_SHARES = 10**9  # weights as whole numbers of about this sum, so that shares are exact

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

    def texts(self, ids: Sequence[int]) -> list[str]:
        """Each token as it is decoded alone; of vocabularies that write a space as ▁, with the space that decoding
        drops at the beginning of a text. An id that is no token is given in angle brackets."""
        backend, found = _backend(self.json), []
        for token_id in ids:
            token, text = backend.id_to_token(token_id), backend.decode([token_id], skip_special_tokens=False)
            if token is None:
                text = f"<{token_id}>"
            elif token.startswith("▁") and not text.startswith(" "):
                text = f" {text}"
            found.append(text)
        return found


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
            place.name, revision=place.revision, local_files_only=not may_download(place), use_fast=True,
            trust_remote_code=model.trust_remote_code,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        if not model.trust_remote_code and "trust_remote_code" in str(error):
            raise ModelError(wants_to_run_code(model)) from None
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
    there, a column that is not, and too few tokens where a source is small enough to tell.

    It reads as far into each source as it takes to see more than enough; a small one that may not be enough is
    tokenised in full. Beside sources that are not, it is held against the fewest rows that the run can need of it.
    Raises `DataError` and `ModelError`.
    """
    corpora = open_corpora(data)
    tokenizer = load_tokenizer(model)
    _check_special_tokens(data, model, tokenizer)
    for corpus in corpora:
        if corpus.stream:
            corpus.probe()
    mixture = _Mixture(data, corpora)
    if data.activations is not None:
        _given_part(data, train, tokenizer, vocab_size)
    builder = _Builder(data, train, tokenizer, mixture, set(_made_splits(data)), vocab_size, _silent)
    small = [
        index for index, corpus in enumerate(mixture.corpora) if not corpus.stream and not builder.sees_plenty(index)
    ]
    if len(small) == len(corpora):
        deque(builder.build(map_in_process), maxlen=0)
    else:
        for index in small:
            builder.count(index)


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
    progress(f"reading {data.label}")
    mixture = _Mixture(data, open_corpora(data))
    tokenizer = load_tokenizer(model)
    _check_special_tokens(data, model, tokenizer)
    parts = _build_parts(_made_splits(data), mixture, tokenizer, data, model, train, storage, parallel_map, progress)
    given = {} if data.activations is None else {"activations": _given_part(data, train, tokenizer)}
    store = _commit_store({**_description(parts, data, tokenizer), **given}, storage)
    for corpus, used in zip(mixture.corpora, store.sources("train"), strict=False):
        if used.epochs > data.epochs:  # made for a run that allows more
            raise _too_few("train", corpus, used, data, train)
    return store


def build_evaluation_store(
    data: DataSpec,
    model: ModelSpec,
    splits: Sequence[Split],
    storage: Storage,
    *,
    parallel_map: ParallelMap = map_in_process,
    progress: Callable[[str], None] = _silent,
) -> "TokenStore":
    """A store of rows to evaluate on and none to train on: `data.search_tokens` and `data.report_tokens` kept tokens of
    those of the two splits that are asked for. What is there and whole is not tokenised again. Raises `DataError` and
    `ModelError` as `build_token_store` does."""
    assert splits and "train" not in splits
    progress(f"reading {data.label}")
    mixture = _Mixture(data, open_corpora(data))
    tokenizer = load_tokenizer(model)
    _check_special_tokens(data, model, tokenizer)
    parts = _build_parts(splits, mixture, tokenizer, data, model, None, storage, parallel_map, progress)
    return _commit_store(_description(parts, data, tokenizer), storage)


def in_context(data: DataSpec, context_size: int | None) -> DataSpec:
    """The same data in rows of another length; in the same ones for None."""
    if context_size in (None, data.context_size):
        return data
    return data.model_copy(
        update={"context_size": context_size, "block_tokens": max(data.block_tokens, context_size), "activations": None}
    )


def _build_parts(
    splits: Sequence[Split], mixture: "_Mixture", tokenizer: Tokenizer, data: DataSpec, model: ModelSpec,
    train: TrainSpec | None, storage: Storage, parallel_map: ParallelMap, progress: Callable[[str], None],
) -> dict[Split, str]:  # fmt: skip
    """The addresses of the parts, all of which are there then."""
    parts = {split: _part_id(split, mixture.identity, tokenizer, data, train) for split in splits}
    missing = {split for split, part in parts.items() if not _is_whole(storage, part)}
    if missing:
        vocab_size = describe_model(model).vocab_size if any(corpus.holds_ids for corpus in mixture.corpora) else None
        builder = _Builder(data, train, tokenizer, mixture, missing, vocab_size, progress)
        for split, rows, used in builder.build(parallel_map):
            _write_part(storage, parts[split], rows, used)
    return parts


def _description(parts: Mapping[Split, str], data: DataSpec, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "parts": parts,
        "context_size": data.context_size,
        "block_rows": data.block_rows,
        "excluded_ids": _excluded_ids(data, tokenizer),
        "first_positions": data.exclude.first_positions,
        "norm_over_median": data.exclude.norm_over_median,
        "seed": data.seed,
    }


def _commit_store(description: Mapping[str, Any], storage: Storage) -> "TokenStore":
    store_id = _address(description)
    if not storage.is_committed(f"tokens/{store_id}"):
        storage.commit_folder(f"tokens/{store_id}", {"store.json": json.dumps(description, indent=1).encode()})
    return TokenStore.open(storage, store_id)


def _made_splits(data: DataSpec) -> tuple[Split, ...]:
    """The splits whose rows are made of the corpus: not those that are trained on where activations are given."""
    return tuple(split for split in SPLITS if split != "train" or data.activations is None)


def _given_part(
    data: DataSpec, train: TrainSpec, tokenizer: Tokenizer, vocab_size: int | None = None
) -> dict[str, Any]:
    """What stands for the train part where activations are given."""
    from penstock.given import open_given

    given = open_given(data)
    kept = given.kept_per_block(data, train, _excluded_ids(data, tokenizer), vocab_size)
    return {"identity": given.identity, "kept_per_block": kept}


def _excluded_ids(data: DataSpec, tokenizer: Tokenizer) -> list[int]:
    return list(tokenizer.special_ids) if data.exclude.special_tokens else []


def _check_special_tokens(data: DataSpec, model: ModelSpec, tokenizer: Tokenizer) -> None:
    if data.bos and tokenizer.bos_id is None:
        raise DataError(f"data.bos is true, but the tokenizer of model.name {model.name!r} has no BOS token; accepted: "
                        "data.bos: false")  # fmt: skip
    if tokenizer.bos_id is None and tokenizer.eos_id is None:
        corpus = f"data.{'mixture' if data.mixture else 'dataset'} {data.label!r}"
        raise DataError(f"the tokenizer of model.name {model.name!r} has neither an EOS nor a BOS token to put between "
                        f"the documents of {corpus}")  # fmt: skip


def _part_id(
    split: Split, corpus: str | list[Any], tokenizer: Tokenizer, data: DataSpec, train: TrainSpec | None
) -> str:
    if split == "train":
        assert train is not None
        amount = [train.steps, train.batch_tokens, data.block_rows]
    else:
        amount = [data.search_tokens if split == "search" else data.report_tokens]
    kept = [data.exclude.special_tokens, data.exclude.first_positions]
    rows = [data.context_size, data.bos, data.seed, kept, amount]
    return _address([_RULES, split, corpus, tokenizer.fingerprint, rows])


def _address(value: Any) -> str:
    return blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=12).hexdigest()


def row_generator(seed: int, *key: int) -> np.random.Generator:
    """A numpy generator for one purpose of one data seed."""
    return np.random.default_rng([seed % 2**64, *key])


class _Mixture:
    """The sources, in an order that their content decides, and how many of any number of rows are whose. Raises
    `DataError` for two with the same documents."""

    def __init__(self, data: DataSpec, corpora: Sequence[Corpus]) -> None:
        total = math.fsum(source.weight for source in data.sources)
        shares = [max(1, round(_SHARES * source.weight / total)) for source in data.sources]
        sources = list(zip(corpora, shares, strict=True))
        if len(sources) > 1:
            sources.sort(key=lambda source: source[0].identity)
        for (first, _), (second, _) in itertools.pairwise(sources):
            if first.identity == second.identity:
                raise DataError(f"{second.source.field()} has the documents of {first.source.field()}; accepted: each "
                                "dataset once, with the weight of both")  # fmt: skip
        self.corpora, self._shares = zip(*sources, strict=True)

    @property
    def identity(self) -> str | list[Any]:
        if len(self.corpora) == 1:
            return self.corpora[0].identity
        return [[corpus.identity, share] for corpus, share in zip(self.corpora, self._shares, strict=True)]

    def quotas(self, n_rows: int) -> list[int]:
        """The rows of each source, `n_rows` in all: by largest remainder, of equal ones the first."""
        total = sum(self._shares)
        quotas = [n_rows * share // total for share in self._shares]
        by_remainder = sorted(range(len(quotas)), key=lambda index: -(n_rows * self._shares[index] % total))
        for index in by_remainder[: n_rows - sum(quotas)]:
            quotas[index] += 1
        return quotas


@dataclass(frozen=True)
class UsedSource:
    """What one source gives to a split: `rows` rows, which are `distinct` ones used once or again, with `kept` tokens
    that are not excluded. `dataset` is its name when the rows were made."""

    dataset: str
    rows: int
    distinct: int
    kept: int

    @property
    def epochs(self) -> float:
        """How often the rows are used: 1.0, or more where there are too few."""
        return self.rows / self.distinct if self.distinct else 1.0


@dataclass(frozen=True)
class _Rows:
    tokens: np.ndarray  # int32 [n, context_size]
    document: np.ndarray  # int32 [n]
    kept: np.ndarray  # int32 [n], kept tokens of each row
    source: np.ndarray | None = None  # int32 [n], of a mixture

    def take(self, order: Any) -> "_Rows":
        source = None if self.source is None else self.source[order]
        return _Rows(self.tokens[order], self.document[order], self.kept[order], source)


def _joined(parts: Sequence[_Rows]) -> _Rows:
    """The rows of all sources, one source after the other."""
    if len(parts) == 1:
        return parts[0]
    source = np.repeat(np.arange(len(parts), dtype=np.int32), [len(rows.kept) for rows in parts])
    columns = ("tokens", "document", "kept")
    return _Rows(*(np.concatenate([getattr(rows, column) for rows in parts]) for column in columns), source)


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


class _Supply:
    """The rows of one source: its documents in the order in which they are used, tokenised as far as rows are needed.

    `wanted` are the splits that are not yet full; the builder, which shares it among the sources, takes from it.
    """

    def __init__(
        self, corpus: Corpus, data: DataSpec, tokenizer: Tokenizer, wanted: set[Split], vocab_size: int | None
    ) -> None:
        self.corpus = corpus
        self.cutters = {split: _RowCutter(data, tokenizer) for split in SPLITS if split in wanted}
        self.exhausted: set[Split] = set()  # splits of which the corpus has no more documents
        self._data, self._tokenizer, self._wanted, self._vocab_size = data, tokenizer, wanted, vocab_size
        self._pieces: Iterator[Piece] = iter(())
        self._pending: dict[Split, deque[Piece]] = {split: deque() for split in self.cutters}
        self._size_taken, self._tokens_taken = 0, 0

    def open(self, needed: Mapping[Split, int]) -> None:
        """Begin at the first document; `needed` rows of each split are about what is held at once."""
        held = 1 if self.corpus.holds_ids else _HELD_CHARACTERS_A_TOKEN
        budgets = {split: held * (rows + 8) * self._data.context_size for split, rows in needed.items()}
        self._pieces = sampled_pieces(self.corpus, self._data, self._wanted, budgets)

    def fill(self, needed: Mapping[Split, int], parallel_map: ParallelMap, report: Callable[[], None]) -> None:
        """Tokenise about as much as is still missing of the `needed` rows of each split."""
        wave = self._next_wave(needed)
        if not wave:
            return
        shards = _shards(wave)
        encode = _join_ids if self.corpus.holds_ids else self._tokenizer
        results = parallel_map(encode, [[piece.content for piece in shard] for shard in shards])
        for shard, (flat, lengths) in zip(shards, results, strict=True):
            self.check_ids(flat)
            self._size_taken += sum(len(piece.content) for piece in shard)
            self._tokens_taken += len(flat)
            for piece, ids in zip(shard, np.split(flat, np.cumsum(lengths)[:-1]), strict=True):
                self.cutters[piece.split].add(ids, piece.document)
            report()

    def _next_wave(self, needed: Mapping[Split, int]) -> list[Piece]:
        size_a_token = 1.0 if self.corpus.holds_ids else 4.0
        if self._tokens_taken:
            size_a_token = self._size_taken / self._tokens_taken
        wave: list[Piece] = []
        for split, rows in needed.items():
            cutter, pending, size = self.cutters[split], self._pending[split], 0.0
            if cutter.n_rows >= rows:
                continue
            target = min(1.02 * size_a_token * cutter.body * (rows - cutter.n_rows), _WAVE_SIZE)
            while size < target or not size:
                while not pending and (piece := next(self._pieces, None)) is not None:
                    if piece.split in self._wanted:
                        self._pending[piece.split].append(piece)
                if not pending:
                    break
                wave.append(pending.popleft())
                size += len(wave[-1].content) + size_a_token
            if not size:
                self.exhausted.add(split)
        return wave

    def check_ids(self, ids: np.ndarray) -> None:
        if not self.corpus.holds_ids or self._vocab_size is None or not len(ids):
            return
        if not 0 <= ids.min() <= ids.max() < self._vocab_size:
            raise DataError(f"{self.corpus.source.field('tokens_column')} holds ids from {ids.min()} to {ids.max()}; "
                            f"the model accepts 0 to {self._vocab_size - 1}")  # fmt: skip

    def kept(self, split: Split) -> np.ndarray:
        """int32 [n]: kept tokens of each row so far."""
        return self.cutters[split].rows().kept

    def used(self, split: Split, rows: int) -> UsedSource:
        """Of `rows` rows of a split: all that are there, where they are fewer."""
        kept = self.kept(split)[:rows]
        return UsedSource(self.corpus.source.spec.dataset, rows, len(kept), int(kept.sum(dtype=np.int64)))


class _Builder:
    """Takes pieces of documents from the sources, in waves, until every missing split has its rows.

    How many rows are taken, and which, is told from the rows alone: neither waves nor workers have a say in it.
    """

    def __init__(
        self, data: DataSpec, train: TrainSpec | None, tokenizer: Tokenizer, mixture: _Mixture, missing: set[Split],
        vocab_size: int | None, progress: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._data, self._train, self._mixture = data, train, mixture
        self._wanted = set(missing)  # shrinks as splits fill; the readers of the corpora look at it too
        self._supplies = [_Supply(corpus, data, tokenizer, self._wanted, vocab_size) for corpus in mixture.corpora]
        self._splits: list[Split] = sorted(missing)
        self._needed = {split: mixture.quotas(self._fewest_rows(split)) for split in self._splits}  # rows a source
        self._progress, self._reported_at = progress, 0.0

    def sees_plenty(self, index: int) -> bool:
        """Whether a look into a source finds more text than all splits can need, or more than can be counted."""
        supply = self._supplies[index]
        size_a_row = (1.1 if supply.corpus.holds_ids else _HELD_CHARACTERS_A_TOKEN) * self._data.context_size
        missing = {split: size_a_row * needed[index] for split, needed in self._needed.items()}
        seen = 0
        for content in supply.corpus.read():
            if not isinstance(content, str):
                supply.check_ids(content)
            if (split := split_of_document(content)) in missing:
                missing[split] -= len(content)
            seen += len(content)
            if seen > _COUNTED_SIZE or max(missing.values()) <= 0:
                return True
        return False

    def count(self, index: int) -> None:
        """Tokenise one source. Raises `DataError` where it lacks rows for the fewest that the splits can need."""
        supply, needed = self._supplies[index], {split: rows[index] for split, rows in self._needed.items()}
        supply.open(needed)
        while lacking := {
            split: rows for split, rows in needed.items()
            if split not in supply.exhausted and supply.cutters[split].n_rows < rows
        }:  # fmt: skip
            supply.fill(lacking, map_in_process, lambda: None)
        for split, rows in needed.items():
            used = supply.used(split, rows)
            if used.rows > used.distinct * (self._data.epochs if split == "train" else 1):
                raise self._refusal(split, index, about=True)

    def build(self, parallel_map: ParallelMap) -> Iterator[tuple[Split, _Rows, list[UsedSource]]]:
        for index, supply in enumerate(self._supplies):
            supply.open({split: needed[index] for split, needed in self._needed.items()})
        while self._wanted:
            for index, supply in enumerate(self._supplies):
                needed = {split: self._needed[split][index] for split in self._splits if split in self._wanted}
                supply.fill(needed, parallel_map, self._report)
            for split in self._splits:
                if split not in self._wanted:
                    continue
                order = self._train_order() if split == "train" else self._evaluated_order(split)
                if order is None:
                    continue
                used = [supply.used(split, self._needed[split][i]) for i, supply in enumerate(self._supplies)]
                self._wanted.discard(split)
                yield split, _joined([supply.cutters.pop(split).rows() for supply in self._supplies]).take(order), used

    def _fewest_rows(self, split: Split) -> int:
        if split == "train":
            assert self._train is not None
            return math.ceil(self._train.steps / self._most_steps_a_block) * self._data.block_rows
        return math.ceil(_asked(self._data, split) / self._most_kept_a_row)

    def _lacks(self, split: Split, n_rows: int) -> list[int]:
        """The sources that have too few rows for `n_rows` of all, which is noted as what is needed."""
        self._needed[split] = self._mixture.quotas(n_rows)
        return [
            index for index, quota in enumerate(self._needed[split])
            if quota > len(self._supplies[index].kept(split))
        ]  # fmt: skip

    def _evaluated_order(self, split: Split) -> np.ndarray | slice | None:
        """The rows of the search or the report split, the fewest that will do, or None while some are missing."""
        totals = [np.cumsum(supply.kept(split), dtype=np.int64) for supply in self._supplies]
        n_rows = self._fewest_rows(split)
        while True:
            for index in (lacking := self._lacks(split, n_rows)):
                if split in self._supplies[index].exhausted:
                    raise self._refusal(split, index)
            if lacking:
                return None
            quotas = self._needed[split]
            kept = sum(int(total[quota - 1]) for total, quota in zip(totals, quotas, strict=True) if quota)
            if kept >= _asked(self._data, split):
                break
            n_rows += math.ceil((_asked(self._data, split) - kept) / self._most_kept_a_row)
        if len(totals) == 1:
            return slice(0, n_rows)
        starts = np.cumsum([0] + [len(total) for total in totals])
        order = np.concatenate([start + np.arange(quota) for start, quota in zip(starts, quotas, strict=False)])
        places = np.concatenate([(np.arange(quota) + 0.5) / quota for quota in quotas if quota])
        return order[np.argsort(places, kind="stable")]  # each source spread evenly

    def _train_order(self) -> np.ndarray | None:
        """The train rows in their order, whole blocks that hold `train.steps` batches, or None while some are missing.

        Whatever a source's rows are worth, one permutation of all rows says which places in it are the source's.
        """
        data, train = self._data, self._train
        assert train is not None
        kept = [supply.kept("train") for supply in self._supplies]
        all_kept = np.concatenate(kept)
        n_blocks = self._fewest_rows("train") // data.block_rows
        while True:
            n_rows = n_blocks * data.block_rows
            lacking = self._lacks("train", n_rows)
            if any("train" not in self._supplies[index].exhausted for index in lacking):
                return None
            repeats = [self._supplies[index].used("train", self._needed["train"][index]) for index in lacking]
            worst = max(zip(repeats, lacking, strict=True), key=_passes, default=None)
            refused = worst is not None and not 0 < _passes(worst) <= data.epochs
            if refused and (n_rows > _COUNTED_ROWS or not worst[0].distinct):
                raise self._refusal("train", worst[1], about=True)
            order = self._permuted(n_rows, [len(rows) for rows in kept])
            steps = all_kept[order].reshape(n_blocks, data.block_rows).sum(1, dtype=np.int64) // train.batch_tokens
            if steps.sum() >= train.steps:
                if refused:
                    raise self._refusal("train", worst[1])
                return order
            if not steps.any():
                tokens = int(all_kept[order].sum(dtype=np.int64) / n_blocks)
                raise DataError(f"train.batch_tokens {train.batch_tokens} is larger than a block of data.block_tokens "
                                f"{data.block_tokens}, which holds about {tokens} tokens that are not excluded"
                                )  # fmt: skip
            missing = math.ceil((train.steps - int(steps.sum())) / self._most_steps_a_block)
            n_blocks += missing if lacking or len(kept) > 1 else 1

    def _permuted(self, n_rows: int, there: Sequence[int]) -> np.ndarray:
        """int64 [n_rows]: indices into the rows of all sources, one source after the other, `there` rows of each."""
        order = row_generator(self._data.seed).permutation(n_rows)
        begin, start = 0, 0
        places = order.copy() if len(there) > 1 else order
        for quota, rows in zip(self._needed["train"], there, strict=True):
            own = slice(None) if quota == n_rows else (begin <= places) & (places < begin + quota)
            if quota <= rows:
                order[own] += start - begin
            else:
                order[own] = start + _epochs_of(rows, quota, self._data.seed)
            begin, start = begin + quota, start + rows
        return order

    @property
    def _most_steps_a_block(self) -> int:
        assert self._train is not None
        return max(1, self._data.block_rows * self._most_kept_a_row // self._train.batch_tokens)

    @property
    def _most_kept_a_row(self) -> int:
        excluded = self._data.exclude
        leading = max(excluded.first_positions, int(self._data.bos and excluded.special_tokens))
        return max(1, self._data.context_size - leading)

    def _report(self) -> None:
        if time.monotonic() - self._reported_at >= 1:
            self._reported_at = time.monotonic()
            shares = []
            for split in self._wanted:
                n_rows = sum(supply.cutters[split].n_rows for supply in self._supplies)
                shares.append(f"{split} {min(1.0, n_rows / sum(self._needed[split])):.0%}")
            self._progress(f"tokenising {self._data.label}: {', '.join(sorted(shares))}")

    def _refusal(self, split: Split, index: int, *, about: bool = False) -> DataError:
        supply, rows = self._supplies[index], self._needed[split][index]
        used = supply.used(split, rows)
        if about and used.kept:  # the count of rows takes each for as full as it can be
            rows = max(rows, math.ceil(rows * self._most_kept_a_row * used.distinct / used.kept))
        return _too_few(split, supply.corpus, replace(used, rows=rows), self._data, self._train, about=about)


def _asked(data: DataSpec, split: Split) -> int:
    """Kept tokens that are asked for, of a split that is evaluated on."""
    return data.search_tokens if split == "search" else data.report_tokens


def _epochs_of(n_rows: int, quota: int, seed: int) -> np.ndarray:
    """int64 [quota]: all of `n_rows` rows in an order of their own, then all in another, the last as far as needed."""
    n_epochs = math.ceil(quota / n_rows)
    return np.concatenate([row_generator(seed, epoch, 1).permutation(n_rows) for epoch in range(n_epochs)])[:quota]


def _passes(repeated: tuple[UsedSource, int]) -> int:
    used, _ = repeated
    return math.ceil(used.rows / used.distinct) if used.distinct else 1 << 62


def _too_few(
    split: Split, corpus: Corpus, used: UsedSource, data: DataSpec, train: TrainSpec | None, *, about: bool = False
) -> DataError:
    """A source has fewer rows than it would have to give; `about` where that number is an estimate."""
    source, estimate, rows = corpus.source, "about " if about else "", f"rows of {data.context_size}"
    accepted = ["fewer tokens", "a larger dataset"]
    if data.mixture is not None:
        accepted.insert(1, "a smaller weight")
    if split == "train":
        assert train is not None
        asked = f"train.tokens {train.tokens}"
        details = [f"data.block_tokens {data.block_tokens}", f"train.batch_tokens {train.batch_tokens}"]
        if data.epochs > 1:
            details.append(f"data.epochs {data.epochs}")
        if used.distinct:
            accepted.insert(0, f"data.epochs: {estimate}{math.ceil(used.rows / used.distinct)}")
    else:
        asked, details = f"data.{split}_tokens {_asked(data, split)}", []
    needed = f"{estimate}{used.rows} {rows}"
    if data.mixture is None:
        wanted = f" (with {', '.join(details)}: {needed})" if details else ""
        message = f"{asked}{wanted} is more than {source.field()} has: its"
    else:
        weights = f"weight {source.spec.weight:g} of {math.fsum(each.weight for each in data.sources):g}"
        wanted = f" (with {', '.join(details)})" if details else ""
        message = f"{source.field()} ({weights}) has too few rows for {asked}{wanted}: {needed} are its share; its"
    return DataError(f"{message} {split} split (by document, train 90%, search 5%, report 5%) gives {used.distinct} "
                     f"rows with {used.kept} tokens that are not excluded; accepted: {', '.join(accepted[:-1])} or "
                     f"{accepted[-1]}")  # fmt: skip


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


def _write_part(storage: Storage, part: str, rows: _Rows, used: Sequence[UsedSource]) -> None:
    """Write a split's rows in files of a bounded size, then `part.json`, then the manifest."""
    n_rows, context_size = rows.tokens.shape
    rows_a_file = max(1, _FILE_BYTES // (4 * context_size))
    sums, sizes = {}, {}
    for index, start in enumerate(range(0, n_rows, rows_a_file)):
        name, data = _file_name(index), _arrow_file(rows.take(slice(start, start + rows_a_file)))
        storage.write(f"{_folder(part)}/{name}", data)
        sums[name], sizes[name] = blake2b(data, digest_size=16).hexdigest(), len(data)
    content = blake2b(np.ascontiguousarray(rows.tokens).data, digest_size=16).hexdigest()
    description = {
        "n_rows": n_rows,
        "rows_a_file": rows_a_file,
        "sizes": sizes,
        "content": content,
        "sources": [asdict(source) for source in used],
    }
    data = json.dumps(description, indent=1).encode()
    storage.write(f"{_folder(part)}/{_PART}", data)
    storage.write_json(f"{_folder(part)}/{MANIFEST}", {**sums, _PART: blake2b(data, digest_size=16).hexdigest()})


def _arrow_file(rows: _Rows) -> bytes:
    context_size = rows.tokens.shape[1]
    tokens = pa.FixedSizeListArray.from_arrays(pa.array(rows.tokens.reshape(-1)), context_size)
    columns = {"tokens": tokens, "document": pa.array(rows.document), "kept": pa.array(rows.kept)}
    if rows.source is not None:
        columns["source"] = pa.array(rows.source)
    batch = pa.record_batch(list(columns.values()), list(columns))
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
        self.sources = [UsedSource(**used) for used in description.get("sources", [])]  # older parts lack it
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
    `given` identifies the activations that are given in place of train rows: None where there are none. A store to
    evaluate on alone has no `train_id`: it is empty.
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
        given = description.get("activations", {})
        self.given: str | None = given.get("identity")
        self._given_kept: list[int] = given.get("kept_per_block", [])
        stream = {key: value for key, value in description.items() if key not in ("parts", "activations")}
        train = self.given or (self._parts["train"].content if "train" in self._parts else None)
        self.train_id = "" if train is None else _address([train, stream])

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
        """int32 [stop - start]: the position, in its source, of the document that each row begins with."""
        return self._parts[split].column("document", start, stop)

    def sources(self, split: Split) -> list[UsedSource]:
        """What each source gives to a split, in an order that their content decides; none to one that is given."""
        return self._parts[split].sources if split in self._parts else []

    def source_of(self, split: Split, start: int, stop: int) -> np.ndarray:
        """int32 [stop - start]: the source of each row, an index into `sources`."""
        if len(self.sources(split)) <= 1:
            return np.zeros(len(self.documents(split, start, stop)), dtype=np.int32)
        return self._parts[split].column("source", start, stop)

    @property
    def epochs(self) -> float:
        """How often the train rows of a source are used, of the one whose are used most often: 1.0 where all have
        enough."""
        return max((used.epochs for used in self.sources("train")), default=1.0)

    def kept(self, rows: np.ndarray) -> np.ndarray:
        """bool [n, context_size]: the tokens that count, neither special nor among the first positions."""
        return keep_mask(rows, self._excluded_ids, self._first_positions)

    @cached_property
    def kept_per_block(self) -> np.ndarray:
        """int64 [n_blocks]: kept tokens of each whole block of `block_rows` train rows, or of each that is given."""
        if self.given is not None:
            return np.array(self._given_kept, dtype=np.int64)
        n_blocks = self.n_rows("train") // self.block_rows
        kept = self._parts["train"].column("kept", 0, n_blocks * self.block_rows)
        return kept.reshape(n_blocks, self.block_rows).sum(1, dtype=np.int64)
