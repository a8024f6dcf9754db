"""Where documents come from: the demo corpus, local files, or a dataset of the Hugging Face hub; one corpus a source.

A corpus yields documents (a text, or an array of token ids) in its own order. `sampled_pieces` turns it into the order
in which they are used. Documents are cut into pieces of a few rows, so that a run that needs little of a corpus sees a
little of many documents and not all of a few; the split is still decided by the whole document.
"""

import heapq
import io
import json
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from penstock.errors import DataError
from penstock.spec import DataSpec, SourceSpec
from penstock.splits import Split, document_hash, split_of
from sae_core.errors import one_line

Content = str | np.ndarray

_COMPRESSIONS = (".gz", ".zst", ".bz2")
_KINDS = {  # in this order: a folder that `datasets` saved holds arrow beside json
    "parquet": (".parquet",),
    "arrow": (".arrow",),
    "json": (".jsonl", ".ndjson", ".json"),
    "text": (".txt", ".text", ".md"),
}
_ACCEPTED = ", ".join(suffix for suffixes in _KINDS.values() for suffix in suffixes)
_PIECE_ROWS = 8
_CHARACTERS_A_TOKEN = 4
_SHUFFLE_BUFFER_DOCUMENTS = 10_000


@dataclass(frozen=True)
class Source:
    """A dataset of the spec, and the section of the file that its messages name."""

    spec: SourceSpec
    section: str

    def field(self, name: str = "dataset") -> str:
        """`data.dataset 'x'`, as messages begin."""
        return f"{self.section}.{name} {getattr(self.spec, name)!r}"

    @property
    def column(self) -> str:
        return self.spec.tokens_column or self.spec.text_column


@dataclass(frozen=True)
class Corpus:
    """The documents of one source. `identity` names the content, all of which may have to be read for it; `read()`
    begins again at the first document; `stream` is true where the order of `read()` is already random and the end may
    be far away. `probe()` reads one document, for a check, where `read()` would first read thousands."""

    source: Source
    identify: Callable[[], str]
    read: Callable[[], Iterator[Content]]
    probe: Callable[[], object] = lambda: None
    stream: bool = False

    @cached_property
    def identity(self) -> str:
        return self.identify()

    @property
    def holds_ids(self) -> bool:
        return self.source.spec.tokens_column is not None


class Piece(NamedTuple):
    split: Split
    document: int  # position of the document in its corpus
    content: Content


def open_corpora(data: DataSpec) -> list[Corpus]:
    """A corpus for each of `data.sources`. Raises `DataError` for one that is not there or cannot be read as asked."""
    sections = ["data"] if data.mixture is None else [f"data.mixture[{index}]" for index in range(len(data.mixture))]
    return [_open(Source(*named), data.seed) for named in zip(data.sources, sections, strict=True)]


def _open(source: Source, seed: int) -> Corpus:
    name = source.spec.dataset
    local = Path(name).expanduser()
    if name == "demo":
        return _open_demo(source)
    if local.exists():
        return _open_local(source, local)
    if name.startswith((".", "/", "~")) or _kind_of(local):
        raise DataError(f"{source.field()}: there is no such file or folder; accepted: `demo`, a file or folder "
                        f"({_ACCEPTED}), or the name of a hub dataset")  # fmt: skip
    return _open_hub(source, seed)


# ---- the order in which a corpus is used ----------------------------------------------------------------------------


def sampled_pieces(corpus: Corpus, data: DataSpec, wanted: Set[Split], budgets: Mapping[Split, int]) -> Iterator[Piece]:
    """Pieces of the documents of the `wanted` splits, which the caller may shrink on the way.

    A corpus that can be read again comes ordered by hash(data.seed, document, piece), so any prefix is a random sample
    of it; a stream comes as it is. `budgets` (characters, or ids) bounds what is held at once of each split: what lies
    beyond is read again if it turns out to be needed.
    """
    size = _PIECE_ROWS * data.context_size * (1 if corpus.holds_ids else _CHARACTERS_A_TOKEN)
    if corpus.stream:
        for document, content in enumerate(corpus.read()):
            split = split_of_document(content)
            if split in wanted:
                for part in _cut(content, size):
                    yield Piece(split, document, part)
        return
    budgets = dict(budgets)
    done: dict[Split, tuple[int, int, int]] = {}
    while True:
        held, dropped = _smallest_keys(corpus, data.seed, size, wanted, budgets, done)
        for split, entries in held.items():
            for key, content in entries:
                if split not in wanted:
                    break
                done[split] = key
                yield Piece(split, key[1], content)
        if not dropped & set(wanted):
            return
        budgets = {split: 4 * budget for split, budget in budgets.items()}


def _smallest_keys(
    corpus: Corpus, seed: int, size: int, wanted: Set[Split], budgets: Mapping[Split, int],
    done: Mapping[Split, tuple[int, int, int]],
) -> tuple[dict[Split, list[tuple[tuple[int, int, int], Content]]], set[Split]]:  # fmt: skip
    """The pieces with the smallest keys beyond `done`, sorted, up to each split's budget; and the splits with more."""
    heaps: dict[Split, list[tuple[int, int, int, Content]]] = {split: [] for split in budgets if split in wanted}
    totals = dict.fromkeys(heaps, 0)
    dropped: set[Split] = set()
    for document, content in enumerate(corpus.read()):
        content_hash = _hash(content)
        split = split_of(content_hash)
        if split not in heaps:
            continue
        heap = heaps[split]
        for index, part in enumerate(_cut(content, size)):
            digest = blake2b(f"{seed}/{index}/".encode() + content_hash, digest_size=8).digest()
            key = (int.from_bytes(digest, "little"), document, index)
            if split in done and key <= done[split]:
                continue
            heapq.heappush(heap, (-key[0], -key[1], -key[2], part))  # the largest key on top
            totals[split] += len(part)
            while totals[split] - len(heap[0][3]) >= budgets[split]:
                totals[split] -= len(heapq.heappop(heap)[3])
                dropped.add(split)
    ordered = {
        split: [((-key, -document, -index), part) for key, document, index, part in sorted(heap, reverse=True)]
        for split, heap in heaps.items()
    }
    return ordered, dropped


def split_of_document(content: Content) -> Split:
    """The split that a document belongs to, by its content."""
    return split_of(_hash(content))


def _hash(content: Content) -> bytes:
    return document_hash(content if isinstance(content, str) else content.tobytes())


def _cut(content: Content, size: int) -> Iterator[Content]:
    """Pieces of at most `size`; a text is cut behind a line or a word where there is one."""
    start = 0
    while len(content) - start > size:
        stop = start + size
        if isinstance(content, str):
            cuts = (content.rfind(mark, start + size // 2, stop) + 1 for mark in "\n ")
            stop = next((cut for cut in cuts if cut), stop)
        yield content[start:stop]
        start = stop
    if start < len(content):
        yield content[start:]


# ---- demo and local files -------------------------------------------------------------------------------------------


def _open_demo(source: Source) -> Corpus:
    from penstock import demo

    if source.spec.tokens_column:
        raise DataError(f"{source.field('tokens_column')}: the demo corpus has no columns; leave it out")
    texts: list[str] = []  # kept once the whole has been read

    def identify() -> str:
        texts[:] = demo.documents()
        digest = blake2b(digest_size=16)
        for text in texts:
            digest.update(document_hash(text))
        return f"demo:{digest.hexdigest()}"

    return Corpus(source, identify, lambda: iter(texts) if texts else demo.documents())


def _open_local(source: Source, root: Path) -> Corpus:
    files, kind = _files(source, root)
    if kind == "text" and source.spec.tokens_column:
        raise DataError(f"{source.field('tokens_column')}: text files have no columns; accepted with a column of token "
                        "ids: parquet, arrow, jsonl")  # fmt: skip

    def identify() -> str:
        digest = blake2b(f"{kind}/{source.column}/{bool(source.spec.tokens_column)}".encode(), digest_size=16)
        try:
            for file in files:
                digest.update(_file_digest(file))
        except OSError as error:
            raise DataError(f"{source.field()} cannot be read: {error}") from None
        return f"local:{digest.hexdigest()}"

    def read() -> Iterator[Content]:
        empty = True
        for file in files:
            for value in _read_file(file, kind, source, whole_files=len(files) > 1):
                content = _checked(value, source, str(file))
                if len(content):
                    empty = False
                    yield content
        if empty:
            raise DataError(f"{source.field()} holds no document"
                            + ("" if kind == "text" else f" in the column {source.column!r}"))  # fmt: skip

    return Corpus(source, identify, read)


def _files(source: Source, root: Path) -> tuple[list[Path], str]:
    candidates = [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file())
    for kind in _KINDS:
        files = [path for path in candidates if _kind_of(path) == kind]
        if files:
            return files, kind
    raise DataError(f"{source.field()}: no file of an accepted kind; accepted: {_ACCEPTED}")


def _kind_of(path: Path) -> str | None:
    name = path.name.lower()
    for compression in _COMPRESSIONS:
        name = name.removesuffix(compression)
    return next((kind for kind, suffixes in _KINDS.items() if name.endswith(suffixes)), None)


def _file_digest(path: Path) -> bytes:
    digest = blake2b(digest_size=16)
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.digest()


def _read_file(path: Path, kind: str, source: Source, *, whole_files: bool) -> Iterator[Any]:
    """The values of a column; of text files, the documents. Every failure to read is a `DataError` naming the file."""
    column = source.column
    try:
        if kind == "parquet":
            file = pq.ParquetFile(path)
            _require_column(source, file.schema_arrow.names, path)
            for batch in file.iter_batches(batch_size=256, columns=[column]):
                yield from _values(batch.column(0))
        elif kind == "arrow":
            for batch in _arrow_batches(path):
                _require_column(source, batch.schema.names, path)
                yield from _values(batch.column(column))
        elif kind == "json":
            for row in _json_rows(path):
                _require_column(source, list(row) if isinstance(row, dict) else [], path)
                yield row[column]
        else:
            text = _text_stream(path).read()
            yield from [text] if whole_files else text.replace("\r\n", "\n").split("\n\n")
    except (OSError, pa.ArrowException, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{source.section}.dataset: {path} cannot be read as {kind}: {one_line(error)}") from None


def _require_column(source: Source, names: list[str], place: Path | str) -> None:
    if source.column not in names:
        section = source.section
        raise DataError(f"{section}.dataset: {place} has no column {source.column!r}; its columns: "
                        f"{', '.join(map(repr, names)) or 'none'} ({section}.text_column, or {section}.tokens_column "
                        "for token ids)")  # fmt: skip


def _values(array: pa.Array) -> Iterator[Any]:
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type):
        for value in array:
            yield value.values.to_numpy(zero_copy_only=False) if value.is_valid else None
    else:
        for value in array:
            yield value.as_py()


def _arrow_batches(path: Path) -> Iterator[pa.RecordBatch]:
    source = pa.memory_map(str(path))
    try:
        reader = pa.ipc.open_file(source)
    except pa.ArrowInvalid:  # `datasets` writes the streaming format under the same suffix
        source.seek(0)
        yield from pa.ipc.open_stream(source)
    else:
        for index in range(reader.num_record_batches):
            yield reader.get_batch(index)


def _text_stream(path: Path) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BufferedReader(pa.input_stream(str(path), compression="detect")), encoding="utf-8")


def _json_rows(path: Path) -> Iterator[Any]:
    stream = _text_stream(path)
    first = stream.readline()
    while first and not first.strip():
        first = stream.readline()
    if first.lstrip().startswith("["):
        yield from json.loads(first + stream.read())
        return
    try:
        rows = [json.loads(first)] if first else []
    except json.JSONDecodeError:  # one object over several lines
        rows = [json.loads(first + stream.read())]
    yield from rows
    for line in stream:
        if line.strip():
            yield json.loads(line)


def _checked(value: Any, source: Source, place: str) -> Content:
    """A document as a text, or as int32 ids; an empty one for a missing value."""
    if source.spec.tokens_column is None:
        if value is None:
            return ""
        if not isinstance(value, str):
            raise DataError(f"{source.field('text_column')} of {place} holds {type(value).__name__}, not text (a "
                            f"column of token ids is named by {source.section}.tokens_column)")  # fmt: skip
        return value if value.strip() else ""
    field = f"{source.field('tokens_column')} of {place} holds"
    if not isinstance(value, list | np.ndarray | None):
        raise DataError(f"{field} {type(value).__name__}; accepted: a list of token ids a document")
    ids = np.asarray([] if value is None else value)
    if ids.size and (ids.ndim > 1 or not np.issubdtype(ids.dtype, np.integer)):
        kind = {"O": "texts", "U": "texts"}.get(ids.dtype.kind, str(ids.dtype))
        raise DataError(f"{field} {'lists of lists' if ids.ndim > 1 else kind}, not whole numbers")
    if ids.size and not 0 <= ids.min() <= ids.max() <= np.iinfo(np.int32).max:
        raise DataError(f"{field} ids from {ids.min()} to {ids.max()}; accepted: those of the model, 0 or more")
    return ids.astype(np.int32)


def columns_of(dataset: str) -> list[str]:
    """The columns of a dataset, of its first file or row; none of the demo corpus, of text files, and of what cannot be
    read: why not is said by whoever opens it."""
    local = Path(dataset).expanduser()
    if dataset == "demo":
        return []
    try:
        if not local.exists():
            import datasets

            return list(next(iter(datasets.load_dataset(dataset, split="train", streaming=True)), {}))
        files, kind = _files(Source(SourceSpec(dataset=dataset), "data"), local)
        if kind == "parquet":
            return list(pq.read_schema(files[0]).names)
        if kind == "arrow":
            return list(next(batch.schema.names for batch in _arrow_batches(files[0])))
        row = next(_json_rows(files[0]), {}) if kind == "json" else {}
        return list(row) if isinstance(row, dict) else []
    except Exception:  # of whatever library reads it
        return []


# ---- the hub --------------------------------------------------------------------------------------------------------


def _open_hub(source: Source, seed: int) -> Corpus:
    revision = _hub_revision(source)
    name, subset, hub_split = source.spec.dataset, source.spec.subset, source.spec.hub_split

    def read(*, shuffled: bool = True) -> Iterator[Content]:
        import datasets

        where = f"hub dataset {name!r}"
        try:
            stream = datasets.load_dataset(name, subset, split=hub_split, streaming=True, revision=revision)
            if shuffled:
                stream = stream.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER_DOCUMENTS)
            for row in stream:
                _require_column(source, list(row), where)
                content = _checked(row[source.column], source, where)
                if len(content):
                    yield content
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise DataError(f"{source.field()} (subset {subset!r}, hub_split {hub_split!r}) cannot be read from the "
                            f"hub: {one_line(error)}") from None  # fmt: skip

    identity = f"hub:{name}/{subset}/{hub_split}@{revision}/{source.column}"
    return Corpus(source, lambda: identity, read, lambda: next(read(shuffled=False), None), stream=True)


def _hub_revision(source: Source) -> str:
    """The commit that the dataset's name stands for now: the content's address, and what is then read."""
    import huggingface_hub

    try:
        return huggingface_hub.HfApi().dataset_info(source.spec.dataset, timeout=20).sha
    except (OSError, ValueError) as error:
        reason = one_line(error)
    except Exception as error:  # the HTTP client's own errors share no base with OSError
        if not type(error).__module__.startswith(("httpx", "httpcore", "huggingface_hub", "requests")):
            raise
        reason = one_line(error)
    raise DataError(f"{source.field()} is no local file or folder, and the hub does not give it: {reason}")
