import gzip
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import penstock.tokens
from penstock import corpus as corpora
from penstock.corpus import Source, open_corpora, sampled_pieces
from penstock.errors import DataError, ModelError
from penstock.spec import DataSpec, ModelSpec, SourceSpec, TrainSpec
from penstock.splits import SPLITS, document_hash, split_of
from penstock.storage import Storage
from penstock.tokens import TokenStore, build_token_store, load_tokenizer
from tiny_models import EOS, VOCAB, write_model, write_tokenizer

TRAIN = TrainSpec(tokens=2_000, batch_tokens=100)


def texts(n=400):
    """Documents of 5 to 80 words, each with a word of its own."""
    return [f"document{i} " + "the wheel turns the water " * (1 + i % 16) for i in range(n)]


def spec(dataset, **settings) -> DataSpec:
    defaults = {"context_size": 16, "block_tokens": 512, "search_tokens": 200, "report_tokens": 300}
    return DataSpec(dataset=str(dataset), **{**defaults, **settings})


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> ModelSpec:
    return ModelSpec(name=str(write_model(tmp_path_factory.mktemp("model"))))


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text, "source": "test"}) + "\n" for text in texts()))
    return path


@pytest.fixture
def storage(tmp_path) -> Storage:
    return Storage(tmp_path / "storage")


def no_map(fn, items):
    raise AssertionError("something was tokenised")


def all_rows(store: TokenStore, split) -> np.ndarray:
    return store.rows(split, 0, store.n_rows(split))


# ---- what is in a store ----


def test_rows_begin_with_bos_and_only_ordinary_tokens_are_kept(jsonl, model, storage):
    store = build_token_store(spec(jsonl), model, TRAIN, storage)
    assert store.context_size == 16
    assert store.block_rows == 32
    for split in SPLITS:
        rows = all_rows(store, split)
        assert rows.dtype == np.int32
        assert rows.shape == (store.n_rows(split), 16)
        assert (rows[:, 0] == 0).all()
        kept = store.kept(rows)
        assert not kept[:, 0].any()
        np.testing.assert_array_equal(kept, rows != 0)  # 0 is the only special token
    assert (all_rows(store, "train")[:, 1:] == 0).any()  # documents are separated


def test_exclusion_can_be_turned_off_and_widened(jsonl, model, storage):
    data = spec(jsonl, exclude={"special_tokens": False, "first_positions": 0})
    assert (store := build_token_store(data, model, TRAIN, storage)).kept(all_rows(store, "train")).all()
    data = spec(jsonl, exclude={"special_tokens": False, "first_positions": 5})
    store = build_token_store(data, model, TRAIN, storage)
    kept = store.kept(all_rows(store, "search"))
    assert not kept[:, :5].any()
    assert kept[:, 5:].all()


def test_there_are_just_enough_rows(jsonl, model, storage):
    data = spec(jsonl)
    store = build_token_store(data, model, TRAIN, storage)
    rows = all_rows(store, "train")
    assert len(rows) % store.block_rows == 0
    per_block = store.kept(rows).reshape(-1, store.block_rows * store.context_size).sum(1)
    np.testing.assert_array_equal(store.kept_per_block, per_block)
    steps = per_block // TRAIN.batch_tokens
    assert steps.sum() >= TRAIN.steps
    assert steps.sum() - steps.max() < TRAIN.steps
    for split, asked in (("search", data.search_tokens), ("report", data.report_tokens)):
        kept = store.kept(all_rows(store, split)).sum(1)
        assert kept[:-1].sum() < asked <= kept.sum()


def test_every_row_begins_in_a_document_of_its_own_split(jsonl, model, storage):
    store = build_token_store(spec(jsonl), model, TRAIN, storage)
    split_of_document = [split_of(document_hash(text)) for text in texts()]
    for split in SPLITS:
        documents = store.documents(split, 0, store.n_rows(split))
        assert {split_of_document[document] for document in documents} == {split}
    assert len(set(store.documents("train", 0, store.block_rows))) > 10


def test_token_ids_are_joined_and_cut_by_hand(model, storage, tmp_path):
    documents = [[i + 1] * (i % 5 + 2) for i in range(VOCAB - 1)]
    path = tmp_path / "ids.parquet"
    pq.write_table(pa.table({"ids": pa.array(documents, pa.list_(pa.int64()))}), path)
    data = spec(
        path, tokens_column="ids", bos=False, context_size=8, block_tokens=64, search_tokens=20, report_tokens=20
    )
    store = build_token_store(data, model, TrainSpec(tokens=400, batch_tokens=10), storage, parallel_map=map)
    stream = all_rows(store, "search").reshape(-1).tolist()
    separators = [i for i, token in enumerate(stream) if token == 0]
    assert separators
    begin = 0
    for end in separators:
        document = stream[begin:end]
        assert document == documents[document[0] - 1]
        assert split_of(document_hash(np.array(document, dtype=np.int32).tobytes())) == "search"
        begin = end + 1
    for row, document in zip(all_rows(store, "train"), store.documents("train", 0, store.n_rows("train")), strict=True):
        assert row[0] in (0, document + 1)


def test_long_documents_are_cut_into_pieces_that_lose_nothing():
    words = " ".join(f"w{i}" for i in range(5_000))
    whole = corpora.Corpus(Source(SourceSpec(dataset="one"), "data"), lambda: "one", lambda: iter([words]))
    split = split_of(document_hash(words))
    pieces = list(sampled_pieces(whole, spec("demo"), {split}, {split: 10**9}))
    assert max(len(piece.content) for piece in pieces) <= 8 * 16 * 4
    assert all(piece.content.endswith(" ") for piece in pieces if not piece.content.endswith("w4999"))
    assert sorted(" ".join(piece.content for piece in pieces).split()) == sorted(words.split())


def test_tokens_are_those_of_the_models_own_tokenizer(model):
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(model.name)
    samples = ["the wheel turns", f"a {EOS} b", "", "naïve ☃\n\n  def"]
    flat, lengths = pickle.loads(pickle.dumps(load_tokenizer(model)))(samples)
    expected = [reference(text, add_special_tokens=False)["input_ids"] for text in samples]
    assert lengths.tolist() == [len(ids) for ids in expected]
    assert flat.tolist() == [token for ids in expected for token in ids]


def test_the_demo_corpus_needs_little_of_it_tokenised(model, storage):
    sizes = []

    def counting_map(fn, items):
        sizes.extend(len(text) for item in items for text in item)
        return map(fn, items)

    data = DataSpec(context_size=64, block_tokens=4096, search_tokens=2_000, report_tokens=2_000)
    train = TrainSpec(tokens=20_000, batch_tokens=500)
    store = build_token_store(data, model, train, storage, parallel_map=counting_map)
    assert (store.kept_per_block // 500).sum() >= 40
    assert sum(sizes) < 200_000  # of about 30 million characters
    assert len(set(store.documents("train", 0, 64))) > 8


# ---- kinds of files ----


def write_corpus(kind: str, folder: Path) -> Path:
    documents = texts()
    table = pa.table({"text": documents, "n": list(range(len(documents)))})
    path = folder / kind
    if kind == "documents.parquet":
        pq.write_table(table, path, row_group_size=70)
    elif kind == "file.arrow":
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=90)
    elif kind == "stream.arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    elif kind == "documents.jsonl.gz":
        path.write_bytes(gzip.compress("\n".join(json.dumps({"text": text}) for text in documents).encode()))
    elif kind == "array.json":
        path.write_text(json.dumps([{"text": text} for text in documents], indent=1))
    elif kind == "paragraphs.txt":
        path.write_text("\n\n".join(documents))
    elif kind == "shards":
        path.mkdir()
        for i in range(4):
            pq.write_table(table.slice(i * 100, 100), path / f"part-{i}.parquet")
        (path / "README.md").write_text("not data")
    elif kind == "texts":
        path.mkdir()
        for i, text in enumerate(documents):
            (path / f"{i:03d}.txt").write_text(text)
    return path


@pytest.mark.parametrize(
    "kind",
    ["documents.parquet", "file.arrow", "stream.arrow", "documents.jsonl.gz", "array.json", "paragraphs.txt", "shards",
     "texts"],
)  # fmt: skip
def test_every_kind_of_file_gives_the_same_rows(kind, tmp_path, jsonl, model, storage):
    expected = build_token_store(spec(jsonl), model, TRAIN, storage)
    store = build_token_store(spec(write_corpus(kind, tmp_path)), model, TRAIN, storage)
    for split in SPLITS:
        np.testing.assert_array_equal(all_rows(store, split), all_rows(expected, split))
    assert store.train_id == expected.train_id


def test_a_folder_that_datasets_saved_is_read(tmp_path, jsonl, model, storage):
    import datasets

    datasets.Dataset.from_dict({"text": texts()}).save_to_disk(tmp_path / "saved")
    store = build_token_store(spec(tmp_path / "saved"), model, TRAIN, storage)
    assert store.train_id == build_token_store(spec(jsonl), model, TRAIN, storage).train_id


def test_documents_without_text_are_passed_over(tmp_path, jsonl, model, storage):
    path = tmp_path / "with-gaps.jsonl"
    rows = [{"text": text} for text in texts()]
    path.write_text("\n".join(json.dumps(row) for row in [{"text": None}, {"text": " \n"}, *rows]))
    store = build_token_store(spec(path), model, TRAIN, storage)
    assert store.train_id == build_token_store(spec(jsonl), model, TRAIN, storage).train_id


# ---- identity, reuse, order ----


def test_a_second_build_tokenises_nothing(jsonl, model, storage):
    first = build_token_store(spec(jsonl), model, TRAIN, storage)
    second = build_token_store(spec(jsonl), model, TRAIN, storage, parallel_map=no_map)
    assert (second.id, second.train_id) == (first.id, first.train_id)


def test_a_store_is_the_same_wherever_and_however_it_is_made(tmp_path, jsonl, model, monkeypatch):
    first = build_token_store(spec(jsonl), model, TRAIN, Storage(tmp_path / "a"))
    monkeypatch.setattr(penstock.tokens, "_SHARD_SIZE", 100)
    monkeypatch.setattr(penstock.tokens, "_WAVE_SIZE", 700)
    with ThreadPoolExecutor(3) as pool:
        second = build_token_store(spec(jsonl), model, TRAIN, Storage(tmp_path / "b"), parallel_map=pool.map)
    assert (second.id, second.train_id) == (first.id, first.train_id)
    for split in SPLITS:
        np.testing.assert_array_equal(all_rows(first, split), all_rows(second, split))
        documents = (store.documents(split, 0, store.n_rows(split)) for store in (first, second))
        np.testing.assert_array_equal(*documents)


def test_asking_for_more_report_tokens_leaves_the_train_stream_alone(jsonl, model, storage):
    first = build_token_store(spec(jsonl), model, TRAIN, storage)
    shards = []

    def listening_map(fn, items):
        shards.extend(items)
        return map(fn, items)

    second = build_token_store(spec(jsonl, report_tokens=400), model, TRAIN, storage, parallel_map=listening_map)
    assert second.id != first.id
    assert second.train_id == first.train_id
    tokenised = {text for shard in shards for text in shard}
    assert tokenised
    assert {split_of(document_hash(text)) for text in tokenised & set(texts())} == {"report"}
    kept = first.rows("report", 0, first.n_rows("report"))
    np.testing.assert_array_equal(second.rows("report", 0, len(kept)), kept)


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"context_size": 32}, {"bos": False}, {"block_tokens": 256}, {"exclude": {"first_positions": 2}},
     {"exclude": {"norm_over_median": 10}}],
)  # fmt: skip
def test_what_changes_the_train_stream_changes_its_id(change, jsonl, model, storage):
    first = build_token_store(spec(jsonl), model, TRAIN, storage)
    second = build_token_store(spec(jsonl, **change), model, TRAIN, storage)
    assert second.train_id != first.train_id


def test_another_tokenizer_makes_another_store(jsonl, model, storage, tmp_path):
    write_tokenizer(tmp_path / "other", bos_token="<s>", eos_token=EOS)
    other = build_token_store(spec(jsonl), ModelSpec(name=str(tmp_path / "other")), TRAIN, storage)
    first = build_token_store(spec(jsonl), model, TRAIN, storage)
    assert other.train_id != first.train_id
    assert (all_rows(other, "train")[:, 0] == load_tokenizer(ModelSpec(name=str(tmp_path / "other"))).bos_id).all()
    assert not (all_rows(first, "train") == all_rows(other, "train")[0, 0]).any()


def test_a_part_that_was_cut_is_made_again(jsonl, model, storage):
    store = build_token_store(spec(jsonl), model, TRAIN, storage)
    before = all_rows(store, "train").copy()
    for path in Path(storage.path("tokens/parts")).glob("*/rows-*.arrow"):
        path.write_bytes(path.read_bytes()[:100])
    again = build_token_store(spec(jsonl), model, TRAIN, storage)
    np.testing.assert_array_equal(all_rows(again, "train"), before)


def test_a_budget_too_small_only_makes_it_read_again(jsonl):
    data = spec(jsonl)
    [corpus] = open_corpora(data)
    everything = {split: 10**9 for split in SPLITS}
    plenty = [piece for piece in sampled_pieces(corpus, data, set(SPLITS), everything)]
    scarce = [piece for piece in sampled_pieces(corpus, data, set(SPLITS), dict.fromkeys(SPLITS, 1_000))]
    assert len(plenty) == len(scarce) >= 400
    for split in SPLITS:
        assert [piece for piece in scarce if piece.split == split] == [
            piece for piece in plenty if piece.split == split
        ]
    assert [piece.document for piece in plenty] != sorted(piece.document for piece in plenty)


def test_another_seed_is_another_sample(jsonl, model, storage):
    stores = [build_token_store(spec(jsonl, seed=seed), model, TRAIN, storage) for seed in (0, 1)]
    documents = [store.documents("report", 0, store.n_rows("report")).tolist() for store in stores]
    assert documents[0] != documents[1]


# ---- reading ----


def test_a_store_opens_by_its_id_and_travels_between_processes(jsonl, model, storage):
    store = build_token_store(spec(jsonl), model, TRAIN, storage)
    for other in (TokenStore.open(storage, store.id), pickle.loads(pickle.dumps(store))):
        assert other.train_id == store.train_id
        np.testing.assert_array_equal(all_rows(other, "search"), all_rows(store, "search"))


def test_rows_may_lie_in_several_files(jsonl, model, tmp_path, monkeypatch):
    one = build_token_store(spec(jsonl), model, TRAIN, Storage(tmp_path / "one"))
    monkeypatch.setattr(penstock.tokens, "_FILE_BYTES", 7 * 4 * 16)
    many = build_token_store(spec(jsonl), model, TRAIN, Storage(tmp_path / "many"))
    assert (many.id, many.train_id) == (one.id, one.train_id)
    for start, stop in ((0, 7), (3, 9), (6, 40), (7, 14), (5, 5), (0, one.n_rows("train"))):
        np.testing.assert_array_equal(many.rows("train", start, stop), one.rows("train", start, stop))
    np.testing.assert_array_equal(many.kept_per_block, one.kept_per_block)
    with pytest.raises(IndexError):
        one.rows("train", 0, one.n_rows("train") + 1)


def test_remote_files_are_fetched_once(jsonl, model, tmp_path, monkeypatch):
    class Remote(Storage):
        def __init__(self, uri):
            super().__init__(uri)
            self.is_local = False
            self.read_names = []

        def read(self, name):
            self.read_names.append(name)
            return super().read(name)

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "cache"))
    local = build_token_store(spec(jsonl), model, TRAIN, Storage(tmp_path / "storage"))
    for expected in (1, 0):
        remote = Remote(tmp_path / "storage")
        store = TokenStore.open(remote, local.id)
        np.testing.assert_array_equal(all_rows(store, "train"), all_rows(local, "train"))
        assert sum(name.endswith(".arrow") for name in remote.read_names) == expected


def test_a_store_that_is_not_there_is_named(storage):
    with pytest.raises(DataError, match="no token store 'abc'"):
        TokenStore.open(storage, "abc")


# ---- the hub ----


def test_a_hub_dataset_is_streamed_until_there_is_enough(model, storage, monkeypatch):
    import datasets
    import huggingface_hub

    taken = []

    def endless():
        for i in range(10**9):
            taken.append(i)
            yield {"text": f"document{i} the wheel turns the water", "source": i}

    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.IterableDataset.from_generator(endless)

    class Info:
        sha = "c0ffee"

    monkeypatch.setattr(corpora, "_SHUFFLE_BUFFER_DOCUMENTS", 50)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, **kwargs: Info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = spec("someone/waterworks", subset="en", hub_split="validation")
    store = build_token_store(data, model, TRAIN, storage)
    assert asked == [
        (("someone/waterworks", "en"), {"split": "validation", "streaming": True, "revision": "c0ffee"}),
    ]
    assert (store.kept_per_block // 100).sum() >= 20
    assert len(taken) < 5_000
    assert build_token_store(data, model, TRAIN, storage, parallel_map=no_map).id == store.id
    with pytest.raises(DataError, match=r"'someone/waterworks' has no column 'body'; its columns: 'text', 'source'"):
        build_token_store(spec("someone/waterworks", text_column="body"), model, TRAIN, storage)


def test_an_unreachable_hub_is_said_so(model, storage, monkeypatch):
    import huggingface_hub

    def refuse(self, name, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    with pytest.raises(DataError, match=r"data.dataset 'someone/waterworks' is no local file or folder.*no route"):
        build_token_store(spec("someone/waterworks"), model, TRAIN, storage)


# ---- what a user can get wrong ----


@pytest.mark.parametrize(
    ("settings", "train", "message"),
    [
        ({}, 10**6, r"train.tokens 1000000 .* is more than data.dataset .* its train split"),
        ({"search_tokens": 10**6}, 2_000, r"data.search_tokens 1000000 is more than"),
        ({"report_tokens": 10**6}, 2_000, r"data.report_tokens 1000000 is more than"),
    ],
)
def test_too_few_tokens_are_counted(settings, train, message, jsonl, model, storage):
    with pytest.raises(DataError, match=message):
        build_token_store(spec(jsonl, **settings), model, TrainSpec(tokens=train, batch_tokens=100), storage)


def test_a_batch_larger_than_what_a_block_keeps_is_refused(jsonl, model, storage):
    with pytest.raises(DataError, match=r"train.batch_tokens 480 is larger than a block of data.block_tokens 512"):
        build_token_store(spec(jsonl), model, TrainSpec(tokens=4_800, batch_tokens=480), storage)


def test_a_missing_column_is_named_with_those_there(jsonl, model, storage):
    with pytest.raises(DataError, match=r"no column 'body'; its columns: 'text', 'source'"):
        build_token_store(spec(jsonl, text_column="body"), model, TRAIN, storage)
    with pytest.raises(DataError, match=r"no column 'ids'"):
        build_token_store(spec(jsonl, tokens_column="ids"), model, TRAIN, storage)


def write_bad(kind: str, folder: Path) -> Path:
    path = folder / {"parquet": "a.parquet", "arrow": "a.arrow", "utf8": "a.txt"}.get(kind, "a.jsonl")
    if kind == "empty":
        path.write_text("")
    elif kind == "blank":
        path.write_text('{"text": ""}\n')
    elif kind == "json":
        path.write_text('{"text": "one"}\n{"text": \n')
    elif kind == "numbers":
        path.write_text('{"text": 3}\n')
    else:
        path.write_bytes(b"\xff\xfe not what it says")
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("parquet", "a.parquet cannot be read as parquet"),
        ("arrow", "a.arrow cannot be read as arrow"),
        ("utf8", "a.txt cannot be read as text"),
        ("json", "a.jsonl cannot be read as json"),
        ("numbers", "data.text_column 'text' of .*a.jsonl holds int, not text"),
        ("empty", "holds no document in the column 'text'"),
        ("blank", "holds no document in the column 'text'"),
    ],
)
def test_files_that_cannot_be_read_are_named(kind, message, tmp_path, model, storage):
    with pytest.raises(DataError, match=message):
        build_token_store(spec(write_bad(kind, tmp_path)), model, TRAIN, storage)


def test_a_path_that_is_not_there_or_holds_nothing_is_named(tmp_path, model, storage):
    for dataset in (tmp_path / "nowhere", "corpus.parquet"):
        with pytest.raises(DataError, match=f"data.dataset '{dataset}': there is no such file or folder; accepted"):
            build_token_store(spec(dataset), model, TRAIN, storage)
    (tmp_path / "picture.png").touch()
    with pytest.raises(DataError, match=r"no file of an accepted kind; accepted: \.parquet"):
        build_token_store(spec(tmp_path), model, TRAIN, storage)


def test_columns_of_ids_are_checked(tmp_path, model, storage):
    for name, wrong, message in (
        ("large.parquet", VOCAB, f"ids from [0-9]+ to {VOCAB}; the model accepts 0 to {VOCAB - 1}"),
        ("negative.parquet", -1, "ids from -1 to [0-9]+"),
        ("floats.parquet", 0.5, "holds float64, not whole numbers"),
    ):
        pq.write_table(pa.table({"ids": [[i % 256, i // 256, wrong] for i in range(400)]}), tmp_path / name)
        with pytest.raises(DataError, match=message):
            build_token_store(spec(tmp_path / name, tokens_column="ids"), model, TRAIN, storage)
    (tmp_path / "a.txt").write_text("text")
    for dataset in ("demo", tmp_path / "a.txt"):
        with pytest.raises(DataError, match=r"data.tokens_column 'ids'.*no columns"):
            build_token_store(spec(dataset, tokens_column="ids"), model, TRAIN, storage)


def test_a_tokenizer_without_the_special_tokens_needed_is_refused(tmp_path, jsonl, storage):
    write_tokenizer(tmp_path / "eos", eos_token=EOS)
    with pytest.raises(DataError, match=r"data.bos is true, but the tokenizer .* has no BOS token"):
        build_token_store(spec(jsonl), ModelSpec(name=str(tmp_path / "eos")), TRAIN, storage)
    assert build_token_store(spec(jsonl, bos=False), ModelSpec(name=str(tmp_path / "eos")), TRAIN, storage)
    write_tokenizer(tmp_path / "none", pad_token="<pad>")
    with pytest.raises(DataError, match="neither an EOS nor a BOS token"):
        build_token_store(spec(jsonl, bos=False), ModelSpec(name=str(tmp_path / "none")), TRAIN, storage)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ModelError, match="tokenizer cannot be loaded"):
        build_token_store(spec(jsonl), ModelSpec(name=str(tmp_path / "nothing")), TRAIN, storage)


def test_progress_says_what_is_going_on(jsonl, model, storage, monkeypatch):
    messages = []
    build_token_store(spec(jsonl), model, TRAIN, storage, progress=messages.append)
    assert messages[0] == f"reading {jsonl}"
    assert any("train" in message and "%" in message for message in messages[1:])
