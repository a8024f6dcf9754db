"""The folder of a feature dashboard: about.json and three Parquet files, written by `FeatureWriter`, read by
`read_features`. Reading needs neither torch nor a model.

    about.json           format, sae, data, settings, bins (edges of the histogram), figures, penstock_version
    latents.parquet      one row a latent, in order: how often it fires, histogram, logits, neighbours
    examples.parquet     by latent, group (q1 to qN, weakest to strongest, and top) and rank (from 0): a place, the
                         tokens around it and the latent's activations there; `peak` is the place's index among them
    vocabulary.parquet   the text of every token that the others name

An activation of 0 at a token that is excluded (BOS, first positions) says nothing about it: it does not count. Row
groups of examples.parquet hold whole latents, so that the examples of one are read in an instant.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sae_core.errors import CheckpointError

FORMAT = 1
ABOUT, LATENTS, EXAMPLES, VOCABULARY = "about.json", "latents.parquet", "examples.parquet", "vocabulary.parquet"
LATENT_SCHEMA = pa.schema([
    ("latent", pa.int32()), ("fired", pa.int64()), ("firing_rate", pa.float64()), ("max_activation", pa.float32()),
    ("mean_activation", pa.float32()), ("histogram", pa.list_(pa.int64())),
    ("top_tokens", pa.list_(pa.int32())), ("top_logits", pa.list_(pa.float32())),
    ("bottom_tokens", pa.list_(pa.int32())), ("bottom_logits", pa.list_(pa.float32())),
    ("neighbours", pa.list_(pa.int32())), ("neighbour_cosines", pa.list_(pa.float32())),
])  # fmt: skip
EXAMPLE_SCHEMA = pa.schema([
    ("latent", pa.int32()), ("group", pa.string()), ("rank", pa.int32()), ("activation", pa.float32()),
    ("row", pa.int64()), ("position", pa.int32()), ("peak", pa.int32()),
    ("tokens", pa.list_(pa.int32())), ("activations", pa.list_(pa.float32())),
])  # fmt: skip
VOCABULARY_SCHEMA = pa.schema([("token", pa.int32()), ("text", pa.string())])


@dataclass
class FeatureWriter:
    """Writes a folder of features, group after group of latents in their order; `close` puts it in its place.

    Nothing is seen at `folder` before `close`; an earlier result there is replaced, about.json last, without which none
    is read. As a context manager it removes what was not closed.
    """

    folder: Path
    _named: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{self.folder.name}-"
        self._staged = Path(tempfile.mkdtemp(dir=self.folder.parent, prefix=prefix))
        self._latents = pq.ParquetWriter(self._staged / LATENTS, LATENT_SCHEMA, compression="zstd")
        self._examples = pq.ParquetWriter(self._staged / EXAMPLES, EXAMPLE_SCHEMA, compression="zstd")

    def __enter__(self) -> "FeatureWriter":
        return self

    def __exit__(self, *error: Any) -> None:
        for file in (self._latents, self._examples):
            with contextlib.suppress(OSError):  # no room for its end either; `close` has told otherwise
                file.close()
        shutil.rmtree(self._staged, ignore_errors=True)

    def add(self, latents: pa.Table, examples: Iterable[pa.Table]) -> None:
        self._latents.write_table(latents)
        self._name(latents, ("top_tokens", "bottom_tokens"))
        for table in examples:
            self._examples.write_table(table)
            self._name(table, ("tokens",))

    def _name(self, table: pa.Table, columns: Sequence[str]) -> None:
        self._named += [np.unique(pc.list_flatten(table[column]).to_numpy()) for column in columns]
        if len(self._named) > 64:
            self._named = [np.unique(np.concatenate(self._named))]

    def close(self, about: Mapping[str, Any], texts_of: Callable[[list[int]], list[str]]) -> Path:
        """`texts_of`: how a tokenizer decodes tokens, each alone."""
        self._latents.close()
        self._examples.close()
        tokens = np.unique(np.concatenate(self._named)).astype(np.int32) if self._named else np.empty(0, np.int32)
        texts = pa.array(texts_of([int(token) for token in tokens]), pa.string())
        pq.write_table(pa.table([pa.array(tokens), texts], schema=VOCABULARY_SCHEMA), self._staged / VOCABULARY)
        text = json.dumps({"format": FORMAT, **about}, indent=1, ensure_ascii=False)
        (self._staged / ABOUT).write_text(text + "\n", encoding="utf-8")
        self.folder.mkdir(exist_ok=True)
        (self.folder / ABOUT).unlink(missing_ok=True)
        for name in (LATENTS, EXAMPLES, VOCABULARY, ABOUT):
            os.replace(self._staged / name, self.folder / name)
        return self.folder


@dataclass(frozen=True)
class Features:
    """A folder of features. `about` is its about.json, `latents` and `vocabulary` are read already."""

    folder: Path
    about: Mapping[str, Any]
    latents: pa.Table
    vocabulary: pa.Table

    @cached_property
    def examples(self) -> pa.Table:
        """All examples: some kilobytes a latent."""
        return pq.read_table(self.folder / EXAMPLES)

    def examples_of(self, latent: int) -> pa.Table:
        """The examples of one latent; no more is read than those of its neighbours beside it."""
        return pq.read_table(self.folder / EXAMPLES, filters=[("latent", "==", latent)])

    @cached_property
    def texts(self) -> dict[int, str]:
        """Text by token."""
        return dict(zip(self.vocabulary["token"].to_pylist(), self.vocabulary["text"].to_pylist(), strict=True))

    @property
    def summary(self) -> str:
        """A line of figures."""
        sae, data, figures = self.about["sae"], self.about["data"], self.about["figures"]
        dead, explained = round(figures["dead_fraction"] * sae["d_sae"]), figures.get("explained_variance")
        of_variance = "" if explained is None else f", {explained:.1%} of the variance explained"
        return (f"{sae['d_sae']:,} latents, {dead:,} of them dead on {data['tokens']:,} tokens; "
                f"L0 {figures['l0']:.3g}{of_variance}")  # fmt: skip


def is_features(folder: str | Path) -> bool:
    """Whether a folder holds features, of this format or another."""
    return (Path(folder) / ABOUT).is_file() and (Path(folder) / LATENTS).is_file()


def read_features(folder: str | Path) -> Features:
    """Open a folder of features. Raises `CheckpointError` that names the file, for one that is incomplete, damaged or
    of another format."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder of features; `penstock features` makes one")
    missing = [name for name in (ABOUT, LATENTS, EXAMPLES, VOCABULARY) if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder}: no complete folder of features, it lacks {', '.join(missing)}")
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{folder / ABOUT} is damaged: {error}") from None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        found = about.get("format") if isinstance(about, dict) else None
        raise CheckpointError(f"{folder / ABOUT}: format {found!r}; accepted: {FORMAT}")
    keys = ("sae", "data", "settings", "bins", "figures")
    if absent := [key for key in keys if key not in about]:
        raise CheckpointError(f"{folder / ABOUT} lacks {', '.join(absent)}")
    tables = {}
    for name, schema in ((LATENTS, LATENT_SCHEMA), (EXAMPLES, EXAMPLE_SCHEMA), (VOCABULARY, VOCABULARY_SCHEMA)):
        try:
            there = pq.read_schema(folder / name)
            if wrong := [one.name for one in schema if one.name not in there.names
                         or there.field(one.name).type != one.type]:  # fmt: skip
                wanted = ", ".join(f"{one} {schema.field(one).type}" for one in wrong)
                raise CheckpointError(f"{folder / name}: accepted are the columns {wanted}")
            if name != EXAMPLES:
                tables[name] = pq.read_table(folder / name)
        except (pa.ArrowInvalid, OSError) as error:
            raise CheckpointError(f"{folder / name} is damaged: {error}") from None
    return Features(folder, about, tables[LATENTS], tables[VOCABULARY])
