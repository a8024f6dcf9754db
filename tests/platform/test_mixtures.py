"""Rows of several datasets in proportion to their weights, and rows that are used more than once."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import penstock.tokens
from penstock import corpus as corpora
from penstock.errors import DataError
from penstock.plan import read_sweep
from penstock.spec import DataSpec, ModelSpec, TrainSpec
from penstock.splits import SPLITS, document_hash, split_of
from penstock.storage import Storage
from penstock.tokens import Tokenizer, TokenStore, build_token_store, check_data
from tiny_models import VOCAB, write_model

TRAIN = TrainSpec(tokens=2_000, batch_tokens=100)
LONG = TrainSpec(tokens=8_000, batch_tokens=100)  # more than the rows of `few` are good for
SMALL = {"search_tokens": 40, "report_tokens": 40}
SIZES = {"context_size": 16, "block_tokens": 512, "search_tokens": 200, "report_tokens": 300}
ARTICLES = [f"article{i} " + "the wheel turns the water " * (1 + i % 16) for i in range(400)]
CODE = [f"def turn{i}(wheel): return wheel " * (1 + i % 11) for i in range(400)]
IDS = [[(i * 7 + j) % 299 + 1 for j in range(i % 40 + 2)] for i in range(400)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> ModelSpec:
    return ModelSpec(name=str(write_model(tmp_path_factory.mktemp("model"))))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, column, documents in (("articles", "text", ARTICLES), ("code", "content", CODE), ("ids", "ids", IDS),
                                    ("few", "text", ARTICLES[:60])):  # fmt: skip
        lines = (json.dumps({column: document}) + "\n" for document in documents)
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def storage(tmp_path) -> Storage:
    return Storage(tmp_path / "storage")


def source(folder: Path, name: str, weight: float = 1) -> dict:
    column = {"code": {"text_column": "content"}, "ids": {"tokens_column": "ids"}}.get(name, {})
    return {"dataset": str(folder / f"{name}.jsonl"), "weight": weight, **column}


def mixture(folder: Path, _settings=None, **weights: float) -> DataSpec:
    entries = [source(folder, name, weight) for name, weight in weights.items()]
    return DataSpec(mixture=entries, **{**SIZES, **(_settings or {})})


def alone(folder: Path, name: str, **settings) -> DataSpec:
    entry = source(folder, name)
    del entry["weight"]
    return DataSpec(**{**SIZES, **entry, **settings})


def no_map(fn, items):
    raise AssertionError("something was tokenised")


def all_rows(store: TokenStore, split) -> np.ndarray:
    return store.rows(split, 0, store.n_rows(split))


def all_sources(store: TokenStore, split) -> np.ndarray:
    return store.source_of(split, 0, store.n_rows(split))


def named(store: TokenStore, split) -> dict[str, int]:
    """The index of each source by its file's name."""
    return {Path(used.dataset).stem: index for index, used in enumerate(store.sources(split))}


def same_rows(first: TokenStore, second: TokenStore) -> None:
    assert (first.id, first.train_id) == (second.id, second.train_id)
    for split in SPLITS:
        np.testing.assert_array_equal(all_rows(first, split), all_rows(second, split))
        np.testing.assert_array_equal(all_sources(first, split), all_sources(second, split))
        np.testing.assert_array_equal(*(store.documents(split, 0, store.n_rows(split)) for store in (first, second)))


# ---- a single dataset -----------------------------------------------------------------------------------------------


def test_rows_of_a_single_dataset_are_those_of_the_first_version(folder, model, storage):
    """SAEs and token stores that are there stay valid."""
    store = build_token_store(alone(folder, "ids"), model, TRAIN, storage)
    assert store.train_id == "7e05e9c1fec650916e4a5891"
    assert store._parts["report"].content == "875f1f7910fef5bd647dc2b4c9815407"
    demo = DataSpec(block_tokens=4096, search_tokens=2000, report_tokens=2000)
    store = build_token_store(demo, ModelSpec(), TrainSpec(tokens=20_000, batch_tokens=500), storage)
    assert store.train_id == "b75dbbd1b7bbab6972de3527"
    assert store._parts["search"].content == "921458b4f95bf3c707215fcd49af146d"


def test_parts_of_a_single_dataset_are_where_the_first_version_puts_them():
    tokenizer = Tokenizer("{}", 1, 2, (1, 2))
    parts = [
        penstock.tokens._part_id(split, "demo:abc", tokenizer, DataSpec(block_tokens=65_536), TrainSpec(tokens=10**6))
        for split in SPLITS
    ]
    assert parts == ["304bb6b6b81aaf7a5c3412d6", "8ba240fcedddb4c61be324b4", "867c38abd403ef31723e1e7a"]


def test_a_mixture_of_one_is_that_dataset(folder, model, storage):
    single = build_token_store(alone(folder, "code"), model, TRAIN, storage)
    mixed = build_token_store(mixture(folder, code=7), model, TRAIN, storage, parallel_map=no_map)
    same_rows(single, mixed)


# ---- proportions ----------------------------------------------------------------------------------------------------


def test_every_split_has_rows_by_weight_to_the_nearest_row(folder, model, storage):
    store = build_token_store(mixture(folder, articles=3, code=1, ids=1.5), model, TRAIN, storage)
    for split in SPLITS:
        counts = np.bincount(all_sources(store, split), minlength=3)
        assert counts.tolist() == [used.rows for used in store.sources(split)]
        index = named(store, split)
        for name, weight in (("articles", 3), ("code", 1), ("ids", 1.5)):
            assert abs(counts[index[name]] - store.n_rows(split) * weight / 5.5) < 1
    assert store.n_rows("train") % store.block_rows == 0
    assert (store.kept_per_block // 100).sum() >= 20


def test_remainders_go_to_the_largest_first(folder):
    data = mixture(folder, articles=5, code=3, ids=1)
    shared = penstock.tokens._Mixture(data, corpora.open_corpora(data))
    by_name = [Path(corpus.source.spec.dataset).stem for corpus in shared.corpora]
    for n_rows, articles, code, ids in ((9, 5, 3, 1), (10, 6, 3, 1), (11, 6, 4, 1), (4, 2, 1, 1), (1, 1, 0, 0)):
        quotas = dict(zip(by_name, shared.quotas(n_rows), strict=True))
        assert quotas == {"articles": articles, "code": code, "ids": ids}


def test_every_block_is_a_mixture_and_so_is_the_beginning_of_every_split(folder, model, storage):
    store = build_token_store(mixture(folder, articles=1, code=1), model, TRAIN, storage)
    for block in all_sources(store, "train").reshape(-1, store.block_rows):
        assert 5 < block.sum() < 27  # of 32
    for split in ("search", "report"):
        assert abs(all_sources(store, split)[:10].sum() - 5) <= 1


def test_no_row_straddles_two_datasets_and_each_document_is_in_its_split(folder, model, storage):
    store = build_token_store(mixture(folder, articles=2, ids=1), model, TRAIN, storage)
    hashes = {
        "articles": [document_hash(text) for text in ARTICLES],
        "ids": [document_hash(np.array(ids, dtype=np.int32).tobytes()) for ids in IDS],
    }
    for split in SPLITS:
        sources, documents = all_sources(store, split), store.documents(split, 0, store.n_rows(split))
        for name, index in named(store, split).items():
            assert {split_of(hashes[name][document]) for document in documents[sources == index]} == {split}
    rows = all_rows(store, "train")[all_sources(store, "train") == named(store, "train")["ids"]]
    for row in rows:  # ids of a document count up, to 299 and on with 1
        steps = np.diff(row[1:])
        assert np.isin(steps[(row[1:-1] != 0) & (row[2:] != 0)], (1, -298)).all()


def test_rows_of_a_source_are_those_that_it_gives_alone(folder, model, storage):
    single = {name: build_token_store(alone(folder, name), model, TRAIN, storage) for name in ("articles", "code")}
    store = build_token_store(mixture(folder, articles=1, code=1), model, TRAIN, storage)
    for name, index in named(store, "report").items():
        rows = all_rows(store, "report")[all_sources(store, "report") == index]
        np.testing.assert_array_equal(rows, all_rows(single[name], "report")[: len(rows)])


def test_hub_streams_and_the_demo_corpus_take_part(folder, model, storage, monkeypatch):
    import datasets
    import huggingface_hub

    class Info:
        sha = "c0ffee"

    def endless():
        for i in range(10**9):
            yield {"body": f"document{i} the wheel turns the water"}

    monkeypatch.setattr(corpora, "_SHUFFLE_BUFFER_DOCUMENTS", 50)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, **kwargs: Info)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.IterableDataset.from_generator(endless))
    entries = [{"dataset": "someone/waterworks", "text_column": "body"}, {"dataset": "demo"}, source(folder, "ids")]
    data = DataSpec(mixture=entries, **SIZES)
    check_data(data, model, TRAIN, VOCAB)
    store = build_token_store(data, model, TRAIN, storage)
    assert {used.dataset for used in store.sources("train")} == {entry["dataset"] for entry in entries}
    assert np.ptp(np.bincount(all_sources(store, "train"))) <= 1
    assert build_token_store(data, model, TRAIN, storage, parallel_map=no_map).id == store.id


# ---- identity, determinism, reuse -----------------------------------------------------------------------------------


def test_a_mixture_is_the_same_wherever_and_however_it_is_made(tmp_path, folder, model, monkeypatch):
    data = mixture(folder, {**SMALL, "epochs": 3}, articles=3, few=2, ids=1)
    first = build_token_store(data, model, LONG, Storage(tmp_path / "a"))
    monkeypatch.setattr(penstock.tokens, "_SHARD_SIZE", 100)
    monkeypatch.setattr(penstock.tokens, "_WAVE_SIZE", 700)
    with ThreadPoolExecutor(3) as pool:
        second = build_token_store(data, model, LONG, Storage(tmp_path / "b"), parallel_map=pool.map)
    assert first.epochs > 1
    same_rows(first, second)


def test_neither_the_order_of_the_sources_nor_the_scale_of_the_weights_matters(tmp_path, folder, model):
    first = build_token_store(mixture(folder, articles=3, code=1), model, TRAIN, Storage(tmp_path / "a"))
    second = build_token_store(mixture(folder, code=0.1, articles=0.3), model, TRAIN, Storage(tmp_path / "b"))
    same_rows(first, second)


def test_what_is_mixed_and_how_is_part_of_the_address(folder, model, storage):
    stores = [
        build_token_store(mixture(folder, **weights), model, TRAIN, storage)
        for weights in ({"articles": 1}, {"articles": 3, "code": 1}, {"articles": 2, "code": 1},
                        {"articles": 3, "ids": 1}, {"articles": 3, "code": 1, "ids": 0.1})
    ]  # fmt: skip
    assert len({store.id for store in stores}) == len({store.train_id for store in stores}) == 5


def test_only_missing_parts_of_a_mixture_are_made(folder, model, storage):
    first = build_token_store(mixture(folder, articles=1, ids=1), model, TRAIN, storage)
    same_rows(first, build_token_store(mixture(folder, articles=1, ids=1), model, TRAIN, storage, parallel_map=no_map))
    tokenised = []

    def listening_map(fn, items):
        tokenised.extend(content for item in items for content in item)
        return map(fn, items)

    more = mixture(folder, {"report_tokens": 400}, articles=1, ids=1)
    second = build_token_store(more, model, TRAIN, storage, parallel_map=listening_map)
    assert second.train_id == first.train_id and second.id != first.id
    whole = [text for text in tokenised if isinstance(text, str) and text in set(ARTICLES)]
    assert {split_of(document_hash(text)) for text in whole} == {"report"}
    for path in Path(storage.path(f"tokens/parts/{second._parts['search']._part}")).glob("rows-*.arrow"):
        path.write_bytes(path.read_bytes()[:100])
    same_rows(second, build_token_store(more, model, TRAIN, storage))


# ---- epochs ---------------------------------------------------------------------------------------------------------


def epochs_of(rows: np.ndarray, distinct: int) -> list[list[bytes]]:
    keys = [row.tobytes() for row in rows]
    return [keys[start : start + distinct] for start in range(0, len(keys), distinct)]


def test_no_row_comes_back_before_all_were_used(folder, model, storage):
    train = TrainSpec(tokens=16_000, batch_tokens=100)
    store = build_token_store(alone(folder, "ids", epochs=4), model, train, storage)
    [used] = store.sources("train")
    assert store.epochs == used.epochs == store.n_rows("train") / used.distinct
    assert 2 < store.epochs <= 4
    assert (store.kept_per_block // 100).sum() >= 160
    epochs = epochs_of(all_rows(store, "train"), used.distinct)
    assert [len(epoch) for epoch in epochs[:-1]] == [used.distinct] * (len(epochs) - 1)
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]
    everything = sorted(epochs[0])
    for key in set(epochs[-1]):
        assert epochs[-1].count(key) <= everything.count(key)


def test_epochs_that_are_not_needed_change_nothing(tmp_path, folder, model):
    once = build_token_store(alone(folder, "articles"), model, TRAIN, Storage(tmp_path / "a"))
    five = build_token_store(alone(folder, "articles", epochs=5), model, TRAIN, Storage(tmp_path / "b"))
    same_rows(once, five)
    assert five.epochs == 1.0


def test_a_small_source_comes_back_and_a_large_one_does_not(folder, model, storage):
    store = build_token_store(mixture(folder, {**SMALL, "epochs": 3}, articles=1, few=1), model, LONG, storage)
    used = {Path(used.dataset).stem: used for used in store.sources("train")}
    assert used["articles"].epochs == 1 and 1 < used["few"].epochs <= 3
    assert store.epochs == used["few"].epochs
    own = all_rows(store, "train")[all_sources(store, "train") == named(store, "train")["few"]]
    first, second, *_ = epochs_of(own, used["few"].distinct)
    assert set(second) <= set(first) and second != first[: len(second)]
    everywhere = all_sources(store, "train").reshape(-1, store.block_rows).sum(1)
    assert (everywhere > 5).all() and (everywhere < 27).all()


@pytest.mark.parametrize("data", ["alone", "mixture"])
def test_too_few_rows_say_how_many_epochs_are_enough(data, folder, model, storage, tmp_path):
    def spec(epochs):
        if data == "alone":
            return alone(folder, "few", **SMALL, epochs=epochs)
        return mixture(folder, {**SMALL, "epochs": epochs}, few=3, articles=1)

    enough = None
    for epochs in (1, 2):
        with pytest.raises(DataError, match=r"train split .* gives [0-9]+ rows .* accepted: data.epochs: ") as refused:
            build_token_store(spec(epochs), model, LONG, storage)
        with pytest.raises(DataError, match="accepted: data.epochs: ") as checked:
            check_data(spec(epochs), model, LONG, VOCAB)
        if data == "alone":  # of a mixture only the small source is counted, and the rest estimated
            assert str(checked.value) == str(refused.value)
        assert ("data.epochs 2" in str(refused.value)) == (epochs == 2)
        enough = int(str(refused.value).split("accepted: data.epochs: ")[1].split(",")[0])
    assert enough > 2
    with pytest.raises(DataError, match=f"data.epochs: {enough}, fewer tokens"):
        build_token_store(spec(enough - 1), model, LONG, storage)
    if data == "alone":
        with pytest.raises(DataError, match=f"data.epochs: {enough}, fewer tokens"):
            check_data(spec(enough - 1), model, LONG, VOCAB)
    check_data(spec(enough), model, LONG, VOCAB)
    store = build_token_store(spec(enough), model, LONG, storage)
    assert enough - 1 < store.epochs <= enough
    with pytest.raises(DataError, match=f"data.epochs: {enough}, fewer tokens"):  # though the rows are there
        build_token_store(spec(enough - 1), model, LONG, storage, parallel_map=no_map)


def test_epochs_of_a_run_far_too_long_are_estimated(folder, model, storage):
    data, train = alone(folder, "few", **SMALL), TrainSpec(tokens=10**12, batch_tokens=100)
    with pytest.raises(DataError, match=r"accepted: data.epochs: about [0-9]{8,9}, fewer tokens or a larger dataset"):
        build_token_store(data, model, train, storage)


def test_search_and_report_rows_are_used_once(folder, model, storage):
    for split in ("search", "report"):
        data = alone(folder, "few", **{**SMALL, "epochs": 9, f"{split}_tokens": 100_000})
        with pytest.raises(DataError, match=f"data.{split}_tokens 100000 .*: fewer tokens or a larger") as error:
            build_token_store(data, model, TRAIN, storage)
        assert "epochs" not in str(error.value)


# ---- from a spec file -----------------------------------------------------------------------------------------------


def test_files_of_a_mixture_are_found_from_other_working_directories(tmp_path, folder, monkeypatch):
    spec_file = tmp_path / "sweep.yaml"
    spec_file.write_text(
        "name: tiny\nhook_points: [blocks.1.hook_resid_post]\ntrain: {tokens: 4k, batch_tokens: 512}\n"
        "saes:\n  - {architecture: topk, d_sae: 4x, k: 4}\n"
        "data:\n  mixture:\n    - {dataset: demo, weight: 100}\n    - {dataset: ./articles.jsonl, weight: 5}\n"
        "  search_tokens: 2k\n  report_tokens: 2k\n  block_tokens: 8k\n"
    )
    monkeypatch.chdir(folder)
    spec, _ = read_sweep(spec_file)
    assert [entry.dataset for entry in spec.data.sources] == ["demo", str(folder / "articles.jsonl")]
    assert spec.data.label == f"100 demo + 5 {folder}/articles.jsonl"


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_the_source_that_is_too_small_is_named_with_what_it_has(split, folder, model, storage):
    amounts = SMALL if split == "train" else {**SMALL, f"{split}_tokens": 2_000}
    data = mixture(folder, amounts, articles=1, few=3)
    with pytest.raises(DataError) as refused:
        build_token_store(data, model, LONG if split == "train" else TrainSpec(tokens=300, batch_tokens=100), storage)
    message = str(refused.value)
    assert message.startswith(f"data.mixture[1].dataset '{folder / 'few.jsonl'}' (weight 3 of 4) has too few rows for ")
    assert ("train.tokens 8000" if split == "train" else f"data.{split}_tokens 2000") in message
    assert f"rows of 16 are its share; its {split} split" in message and "a smaller weight" in message


def test_a_small_source_beside_large_ones_is_counted_and_the_large_ones_are_not(folder, model, monkeypatch):
    data = DataSpec(mixture=[{"dataset": "demo"}, source(folder, "few")], **{**SIZES, **SMALL})
    tokenised = []
    encode = Tokenizer.__call__
    monkeypatch.setattr(Tokenizer, "__call__", lambda self, texts: tokenised.extend(texts) or encode(self, texts))
    with pytest.raises(DataError, match=r"data.mixture\[1\].dataset .*few.jsonl.* accepted: data.epochs: about"):
        check_data(data, model, LONG, VOCAB)
    assert tokenised and set(tokenised) <= set(ARTICLES[:60])
    check_data(data.model_copy(update={"epochs": 50}), model, LONG, VOCAB)


def test_a_source_that_cannot_be_read_is_named_by_its_place(folder, model, storage):
    for entry, message in (
        ({"dataset": str(folder / "nowhere.jsonl")}, r"data\.mixture\[1\]\.dataset '.*': there is no such file"),
        ({"dataset": str(folder / "code.jsonl")}, r"data\.mixture\[1\]\.dataset: .*code\.jsonl has no column 'text'"),
        ({"dataset": "demo", "tokens_column": "ids"}, r"data\.mixture\[1\]\.tokens_column 'ids': the demo corpus"),
    ):
        data = DataSpec(mixture=[source(folder, "articles"), entry], **SIZES)
        with pytest.raises(DataError, match=message):
            check_data(data, model, TRAIN, VOCAB)
        with pytest.raises(DataError, match=message):
            build_token_store(data, model, TRAIN, storage)


def test_ids_of_a_source_are_checked_beside_texts(tmp_path, folder, model, storage):
    (tmp_path / "wrong.jsonl").write_text("".join(json.dumps({"ids": [i % 256, VOCAB]}) + "\n" for i in range(400)))
    wrong = {"dataset": str(tmp_path / "wrong.jsonl"), "tokens_column": "ids"}
    data = DataSpec(mixture=[source(folder, "articles"), wrong], **SIZES)
    with pytest.raises(DataError, match=rf"data\.mixture\[1\]\.tokens_column 'ids' holds ids .* 0 to {VOCAB - 1}"):
        build_token_store(data, model, TRAIN, storage)


def test_a_dataset_that_stands_twice_is_refused(tmp_path, folder, model):
    (tmp_path / "copy.jsonl").write_bytes((folder / "articles.jsonl").read_bytes())
    data = DataSpec(mixture=[source(folder, "articles"), source(folder, "code"), source(tmp_path, "copy")], **SIZES)
    with pytest.raises(DataError, match=r"mixture\[2\].dataset .*copy.* has the documents of data.mixture\[0\]"):
        check_data(data, model, TRAIN, VOCAB)


def test_progress_names_the_mixture(folder, model, storage):
    messages = []
    data = mixture(folder, articles=3, code=1)
    build_token_store(data, model, TRAIN, storage, progress=messages.append)
    assert messages[0] == f"reading 3 {folder}/articles.jsonl + 1 {folder}/code.jsonl"
    assert any("train" in message and "%" in message for message in messages[1:])
