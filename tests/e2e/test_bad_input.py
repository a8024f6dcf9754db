"""What a user gets wrong: one message that names the place, the value and what is accepted, before Ray is started."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import penstock
from penstock import demo
from penstock.cli import main
from penstock.errors import CheckpointError, SweepError
from penstock.home import Home
from penstock.tracking import Tracker, find_sweep
from sae_core import SAE

sys.path.insert(0, str(Path(__file__).parents[1] / "platform"))
from tracked_sweep import EARLY, LATE, SPEC, make_sweep, tracked, write_sae

GOOD = """\
name: tiny
model: {name: demo}
data: {dataset: demo, search_tokens: 2k, report_tokens: 2k, block_tokens: 8k}
hook_points: [blocks.1.hook_resid_post]
train: {tokens: 16k, batch_tokens: 512}
saes:
  - {architecture: topk, d_sae: 4x, k: [4, 8]}
"""
TEXTS = [f"def f{i}(x):\n    return x + {i} * {i % 7}\n" * 20 for i in range(100)]


@pytest.fixture(autouse=True)
def no_ray(monkeypatch, tmp_path):
    """A home of its own for each test, and none may start Ray."""
    import ray

    def started(*_, **__):
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "init", started)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("PENSTOCK_HOME", str(tmp_path / "home"))


def write_spec(folder, *changes):
    text = GOOD
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = folder / "sweep.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refused(capsys, arguments, *parts):
    """The message of a command that ends with status 2."""
    assert main([str(argument) for argument in arguments]) == 2
    out, message = capsys.readouterr()
    assert out == "" and message.startswith("penstock: ") and message.count("penstock: ") == 1
    assert "Traceback" not in message
    for part in parts:
        assert part in message, message
    return message


def refused_by_plan_and_run(capsys, spec, *parts):
    begun = time.monotonic()
    planned = refused(capsys, ["plan", spec], *parts)
    assert refused(capsys, ["run", spec], *parts) == planned
    assert time.monotonic() - begun < 30
    assert not (spec.parent / "home").exists()


# ---- the spec itself ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("train:", "trian:", ["line 5", "unknown key `trian`", "did you mean `train`?"]),
        ("batch_tokens: 512", "batch_tokns: 512", ["line 5", "`train.batch_tokns`", "did you mean `batch_tokens`?"]),
        ("k: [4, 8]", "kk: [4, 8]", ["line 7", "saes[0]", "'kk'", "did you mean 'k'?"]),
        ("architecture: topk", "architecture: topq", ["line 7", "'topq'", "standard", "gated", "topk"]),
        ("architecture: topk, ", "", ["line 7", "saes[0]: architecture is missing", "standard, gated, topk"]),
        ("k: [4, 8]", "k: []", ["line 7", "k is an empty list", "one value or more"]),
        ("k: [4, 8]", "k: [4, -8]", ["line 7", "k is -8", "int > 0"]),
        ("k: [4, 8]", "k: [4, true]", ["line 7", "k is True"]),
        ("k: [4, 8]", "k: [4, 8], lr: .inf", ["line 7", "lr is inf", "finite"]),
        ("k: [4, 8]", "k: [4, 8], seed: [0, -1]", ["line 7", "seed is -1", "int >= 0"]),
        ("d_sae: 4x", "d_sae: 0x", ["line 7", "d_sae is 0", "int > 0"]),
        ("d_sae: 4x", "d_sae: x4", ["line 7", "d_sae 'x4'", "a multiple of d_in (8x)"]),
        ("batch_tokens: 512", "batch_tokens: 9k", ["line 5", "train.batch_tokens 9000", "a block", "7874"]),
        ("batch_tokens: 512", "batch_tokens: 512, lr: fast", ["line 5", "`train.lr` is 'fast'", "number"]),
        ("512}", "512, lr_warm_up_steps: 30}", ["line 5", "lr_warm_up_steps 30", "lr_decay_steps 6", "31 steps"]),
        ("tokens: 16k,", "tokens: 16q,", ["line 5", "`train.tokens` is '16q'", "500k, 100M"]),
        ("dataset: demo,", "dataset: demo, seed: -3,", ["line 3", "`data.seed` is -3", "0"]),
        ("name: tiny", "name: a/b", ["line 1", "`name` is 'a/b'", "letters, digits"]),
        ("name: tiny", "name: tiny\nselect: {l0_band: 20:5}", ["line 2", "'20:5'", "LO:HI"]),
        ("name: tiny", "name: tiny\nselect: {l0_band: [20, 5]}", ["line 2", "[20, 5]", "LO:HI"]),
        ("[blocks.1.hook_resid_post]", "[]", ["line 4", "`hook_points` is []", "one or more"]),
        ("data: {", "\tdata: {", ["line 3", "is not YAML", "indent with spaces"]),
        ("name: tiny", "? [a, b]\n: c\nname: tiny", ["line 1", "is not YAML", "a key is one word"]),
        ("name: tiny", "name: &a [*a]", ["an alias in it refers to itself"]),
        ("{tokens: 16k, batch_tokens: 512}", "16k", ["line 5", "`train` is '16k'", "tokens, batch_tokens"]),
        ("saes:\n  - {", "saes:\n    {", ["line 6", "`saes`", "accepted is a list"]),
    ],
)  # fmt: skip
def test_a_wrong_spec_is_refused_with_its_line(old, new, parts, tmp_path, capsys):
    refused_by_plan_and_run(capsys, write_spec(tmp_path, (old, new)), "sweep.yaml", *parts)


def test_a_band_is_read_as_it_is_written(tmp_path):
    from penstock.spec import load_spec

    assert load_spec(write_spec(tmp_path, ("train:", "select: {l0_band: 10:20}\ntrain:"))).select.l0_band == (10, 20)


@pytest.mark.parametrize(
    ("content", "part"),
    [(None, "Is a directory"), (b"", "but nothing"), (b"\xff\xfe\x00", "not text in UTF-8"), (b"- a", "but a list")],
)
def test_a_file_that_is_no_spec_is_named(content, part, tmp_path, capsys):
    path = tmp_path / "sweep.yaml"
    path.mkdir() if content is None else path.write_bytes(content)
    refused_by_plan_and_run(capsys, path, str(path), part)


# ---- the spec beside its model --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("hook_resid_post", "hook_resid_pst", ["line 4", "'blocks.1.hook_resid_pst'", "nearest", EARLY]),
        ("blocks.1.", "blocks.11.", ["line 4", "6 layers", "'blocks.11.hook_resid_post'", "nearest", EARLY]),
        ("k: [4, 8]", "k: [4, 800]", ["line 7", "saes[0]: k is 800", "1 to d_sae (512)"]),
        ("8]}", "8]}\n  - {architecture: topk, d_sae: 512, k: 8}", ["line 8", "saes[1]", "k: 8", "in saes[0] already"]),
        ("saes:", "baselines: {k: [4000]}\nsaes:", ["line 6", "baselines.k: k is 4000", "d_sae (512)"]),
        ("d_sae: 4x", "d_sae: 400000x", ["line 6", "51200000", "resources.pack_memory_gb is 8", "a smaller d_sae"]),
        ("dataset: demo,", "dataset: demo, context_size: 4096,", ["line 3", "data.context_size 4096", "at most 256"]),
        ("train:", "evaluate: {context_size: 4096}\ntrain:", ["line 5", "evaluate.context_size 4096", "at most 256"]),
        ("data: {", "evaluate: {context_size: 2}\ndata: {exclude: {first_positions: 2}, ",
         ["line 3", "evaluate.context_size 2", "data.exclude.first_positions is 2"]),
        ("{name: demo}", "{name: ./nowhere}", ["line 2", "model.name './nowhere'", "no such folder", "`demo`"]),
        ("{name: demo}", "{name: gpt2-smal}", ["line 2", "model.name 'gpt2-smal'", "did you mean 'gpt2-small'?"]),
    ],
)  # fmt: skip
def test_what_the_model_does_not_allow_is_refused_with_its_line(old, new, parts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused_by_plan_and_run(capsys, write_spec(tmp_path, (old, new)), "sweep.yaml", *parts)


@pytest.mark.parametrize(
    ("name", "size", "part"),
    [
        ("config.json", None, "not a complete model"),
        ("config.json", 40, "not a complete model"),
        ("tokenizer.json", None, "its tokenizer cannot be loaded"),
        ("tokenizer.json", 40, "its tokenizer cannot be loaded"),
        ("model.safetensors", None, "holds no weights"),
        ("model.safetensors", 0, "is cut short"),
        ("model.safetensors", 200_000, "is cut short"),
    ],
)
def test_an_incomplete_model_folder_is_refused(name, size, part, tmp_path, capsys):
    """`size`: bytes that are left of the file, None for none of it."""
    folder = tmp_path / "model"
    shutil.copytree(demo.MODEL_FOLDER, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    if size is None:
        (folder / name).unlink()
    else:
        os.truncate(folder / name, size)
    spec = write_spec(tmp_path, ("{name: demo}", f"{{name: {folder}}}"))
    refused_by_plan_and_run(capsys, spec, "line 2: model.name", str(folder), part)


def test_a_folder_that_lacks_one_of_its_weight_files_is_refused(tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(demo.MODEL_FOLDER, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    spec = write_spec(tmp_path, ("{name: demo}", f"{{name: {folder}}}"))
    refused_by_plan_and_run(capsys, spec, "line 2: model.name", "lacks model-2.safetensors")


# ---- the corpus -----------------------------------------------------------------------------------------------------


def parquet(**columns):
    return lambda path: pq.write_table(pa.table(columns), path)


DATASETS = {
    "nowhere.parquet": (None, "", "no such file or folder"),
    "folder": (Path.mkdir, "", "no file of an accepted kind"),
    "table.csv": (lambda path: path.write_text("text\na\n"), "", "no file of an accepted kind"),
    "empty.txt": (lambda path: path.write_text(""), "", "holds no document"),
    "empty.jsonl": (lambda path: path.write_text(""), "", "holds no document in the column 'text'"),
    "broken.jsonl": (lambda path: path.write_text('{"text": "a"}\n{"text": \n'), "", "cannot be read as json"),
    "binary.txt": (lambda path: path.write_bytes(bytes(range(256))), "", "cannot be read as text"),
    "damaged.parquet": (lambda path: path.write_bytes(b"PAR1 and no more"), "", "cannot be read as parquet"),
    "other.parquet": (parquet(body=TEXTS), "", "has no column 'text'; its columns: 'body'"),
    "other.jsonl": (lambda path: path.write_text('{"body": "a"}\n'), "", "has no column 'text'; its columns: 'body'"),
    "texts.parquet": (parquet(text=TEXTS), ", tokens_column: ids", "has no column 'ids'; its columns: 'text'"),
    "numbers.parquet": (parquet(text=[1, 2]), "", "data.text_column 'text'"),
    "words.parquet": (parquet(ids=["a", "b"]), ", tokens_column: ids", "holds str; accepted: a list of token ids"),
    "lists.parquet": (parquet(ids=[["a"], ["b"]]), ", tokens_column: ids", "holds texts, not whole numbers"),
    "single.parquet": (parquet(ids=[1, 2]), ", tokens_column: ids", "holds int; accepted: a list of token ids"),
    "foreign.parquet": (parquet(ids=[[1, 50_000]]), ", tokens_column: ids", "50000; the model accepts 0 to 4095"),
    "huge.parquet": (parquet(ids=[[1, 2**40]]), ", tokens_column: ids", "1099511627776; accepted: those of the model"),
    "small.parquet": (parquet(text=TEXTS[:20]), "", "is more than data.dataset"),
}


@pytest.mark.parametrize("name", DATASETS)
def test_a_dataset_that_will_not_do_is_refused(name, tmp_path, capsys):
    make, options, part = DATASETS[name]
    if make is not None:
        make(tmp_path / name)
    spec = write_spec(tmp_path, ("dataset: demo", f"dataset: {tmp_path / name}{options}"))
    refused_by_plan_and_run(capsys, spec, "line 3: data.", part)


def test_a_hub_dataset_without_the_column_is_refused(tmp_path, capsys, monkeypatch):
    import datasets
    import huggingface_hub

    info = huggingface_hub.hf_api.DatasetInfo(id="someone/waterworks", sha="c0ffee")
    stream = datasets.IterableDataset.from_generator(lambda: iter([{"body": "the wheel turns", "source": 1}]))
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: info)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
    spec = write_spec(tmp_path, ("dataset: demo", "dataset: someone/waterworks"))
    refused_by_plan_and_run(capsys, spec, "line 3: data.", "has no column 'text'; its columns: 'body', 'source'")


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("report_tokens: 2k", "report_tokens: 1M", ["line 3: data.report_tokens 1000000", "its report split"]),
        ("tokens: 16k,", "tokens: 1M,", ["line 5: train.tokens 1000000", "its train split", "tokens that are not"]),
    ],
)
def test_too_few_tokens_are_counted_before_anything_starts(old, new, parts, tmp_path, capsys):
    parquet(text=[text + str(index) for index in range(5) for text in TEXTS])(tmp_path / "small.parquet")
    spec = write_spec(tmp_path, (old, new), ("dataset: demo", f"dataset: {tmp_path / 'small.parquet'}"))
    refused_by_plan_and_run(capsys, spec, *parts)


MIXTURES = [  # the entries, from line 5 on, and what follows them
    ([], "", ["line 4", "`data.mixture` is []", "one or more"]),
    (["{dataset: demo, wieght: 3}"], "", ["line 5", "unknown key `data.mixture.0.wieght`", "did you mean `weight`?"]),
    (["{dataset: demo, lr: 3}"], "", ["line 5", "`data.mixture.0.lr`", "accepted here: dataset, weight, subset, hub_"]),
    (["{dataset: demo}", "{weight: 3}"], "", ["line 6", "`data.mixture.1.dataset` is missing"]),
    (["{dataset: demo, weight: 0}"], "", ["line 5", "`data.mixture.0.weight` is 0", "greater than 0"]),
    (["{dataset: demo, weight: most}"], "", ["line 5", "`data.mixture.0.weight` is 'most'", "number"]),
    (["{dataset: demo}", "{dataset: demo, weight: 3}"], "", ["line 6", "has the documents of data.mixture[0]"]),
    (["{dataset: demo}"], "dataset: demo", ["line 4", "data: mixture and dataset are both given", "one of them"]),
    (["{dataset: demo}"], "epochs: 0", ["line 6", "`data.epochs` is 0", "greater than 0"]),
    (["{dataset: demo, tokens_column: ids}"], "", ["line 5: data.mixture[0].tokens_column 'ids'", "no columns"]),
    (
        ["{dataset: demo}", "{dataset: ./nowhere}"], "",
        ["line 6: data.mixture[1].dataset './nowhere'", "no such", "accepted: `demo`, a file or folder"],
    ),
    (
        ["{dataset: demo}", "{dataset: FOLDER/other.parquet}"], "",
        ["line 6: data.mixture[1].dataset: ", "has no column 'text'", "'body'", "data.mixture[1].text_column"],
    ),
    (
        ["{dataset: demo, weight: 3}", "{dataset: FOLDER/small.parquet}"], "",
        ["line 6: data.mixture[1].dataset", "(weight 1 of 4) has too few rows for data.report_tokens 2000",
         "its report split", "accepted: fewer tokens, a smaller weight or a larger dataset"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("entries", "more", "parts"), MIXTURES)
def test_a_mixture_that_will_not_do_is_refused_with_its_line(entries, more, parts, tmp_path, capsys):
    parquet(body=TEXTS)(tmp_path / "other.parquet")
    parquet(text=TEXTS[:5])(tmp_path / "small.parquet")
    lines = [f"    - {entry.replace('FOLDER', str(tmp_path))}" for entry in entries]
    mixture = "\n".join(["data:", "  mixture:" if lines else "  mixture: []", *lines, *([f"  {more}"] if more else [])])
    rest = "\n  search_tokens: 2k\n  report_tokens: 2k\n  block_tokens: 8k"
    old = next(line for line in GOOD.splitlines() if line.startswith("data:"))
    refused_by_plan_and_run(capsys, write_spec(tmp_path, (old, mixture + rest)), "sweep.yaml, ", *parts)


def test_epochs_that_would_be_enough_are_named_and_are_enough(tmp_path, capsys):
    parquet(text=[text + str(index) for index in range(5) for text in TEXTS])(tmp_path / "small.parquet")
    changes = [("dataset: demo", f"dataset: {tmp_path / 'small.parquet'}"), ("tokens: 16k,", "tokens: 1M,")]
    message = refused(capsys, ["plan", write_spec(tmp_path, *changes)], "line 5: train.tokens 1000000")
    enough = int(message.split("; accepted: data.epochs: ")[1].split(",")[0])
    assert enough > 2
    spec = write_spec(tmp_path, *changes, ("search_tokens", f"epochs: {enough - 1}, search_tokens"))
    refused_by_plan_and_run(capsys, spec, f"data.epochs {enough - 1}: ", f"accepted: data.epochs: {enough}, fewer")
    spec = write_spec(tmp_path, *changes, ("search_tokens", f"epochs: {enough}, search_tokens"))
    assert main(["plan", str(spec)]) == 0


# ---- where things are kept ------------------------------------------------------------------------------------------


def test_a_home_that_cannot_be_written_to_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for home in (tmp_path / "file" / "home", tmp_path / "file"):
        for command in ("plan", "run"):
            refused(capsys, [command, write_spec(tmp_path), "--home", home], str(home))


@pytest.mark.parametrize(
    ("storage", "part"), [("{folder}/file", "cannot be written to"), ("foo://x/y", "cannot be used")]
)
def test_a_storage_that_cannot_be_used_is_refused(storage, part, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    storage = storage.format(folder=tmp_path)
    spec = write_spec(tmp_path, ("name: tiny", f"name: tiny\nstorage: {storage}"))
    refused_by_plan_and_run(capsys, spec, f"storage '{storage}'", part)


def test_an_mlflow_server_that_does_not_answer_is_named_at_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    begun = time.monotonic()
    for arguments in (["run", write_spec(tmp_path)], ["front", "x"], ["list"], ["report", "x", "--to", "x.html"]):
        refused(capsys, arguments, "MLFLOW_TRACKING_URI 'http://127.0.0.1:9'", "no MLflow server answers there")
    assert time.monotonic() - begun < 10


def test_a_password_of_the_tracking_database_is_not_shown(capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql+nothing://me:secret@127.0.0.1:9/x")
    message = refused(capsys, ["list"], "me:***@127.0.0.1")
    assert "secret" not in message


def test_a_cluster_is_not_asked_before_the_spec_is_right(tmp_path, capsys):
    spec = write_spec(tmp_path, ("k: [4, 8]", "k: [4, 800]"))
    refused(capsys, ["submit", spec, "--address", "http://127.0.0.1:9"], "line 7", "k is 800")
    refused(capsys, ["run", spec, "--address", "auto"], "line 7", "k is 800")


def test_an_address_where_nothing_listens_is_refused_at_once(tmp_path, capsys, monkeypatch):
    begun = time.monotonic()
    for address in ("127.0.0.1:9", "ray://127.0.0.1:9", "127.0.0.1:99999", "", "head"):
        for command in ("run", "plan"):
            spec = write_spec(tmp_path)
            refused(capsys, [command, spec, "--address", address], f"--address '{address}'", "HOST:PORT")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    refused(capsys, ["run", write_spec(tmp_path)], "RAY_ADDRESS '127.0.0.1:9'", "no Ray cluster answers there")
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    message = refused(capsys, ["run", write_spec(tmp_path)], "RAY_ADDRESS 'http://127.0.0.1:9'", "HOST:PORT")
    assert "the address of a dashboard, to which `penstock submit` sends jobs" in message
    assert time.monotonic() - begun < 10


def test_more_than_this_machine_has_is_planned_with_a_warning_and_not_run(tmp_path, capsys):
    spec = write_spec(tmp_path, ("saes:", "resources: {gpus_per_pack: 99}\nsaes:"))
    assert main(["plan", str(spec)]) == 0
    assert "planned for a cluster where all packs run at once" in capsys.readouterr().out
    assert main(["run", str(spec)]) == 2
    message = capsys.readouterr().err
    assert "resources.gpus_per_pack: 99 for a pack: no node has" in message and "the cluster has" in message


# ---- reading what a sweep made --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home with a finished sweep `demo`. Only read it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        made = Home(tmp_path_factory.mktemp("finished") / "home")
        make_sweep(made, tmp_path_factory.mktemp("saes"))
        return made


def test_what_is_not_in_a_sweep_is_refused_with_what_is(home, tmp_path, capsys):
    pull = ["pull", "demo", "--to", tmp_path / "new", "--home", home.path, "--hook-point"]
    refused(capsys, ["front", "demx", "--home", home.path], "no sweep 'demx'", "there is demo")
    refused(capsys, ["report", "demx", "--home", home.path, "--to", tmp_path / "r.html"], "no sweep 'demx'")
    refused(capsys, ["front", "demo", "--hook-point", "x", "--home", home.path], "'x'", EARLY, LATE)
    refused(capsys, [*pull, "x"], "'x'", EARLY, LATE)
    refused(capsys, [*pull, EARLY, "--architecture", "topq"], "'topq'", "topk")
    refused(capsys, [*pull, EARLY, "--l0", "90:99"], EARLY, "90:99", "there are 4, 8, 9, 32")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SystemExit) as exit_:
        main(["front", "demo", "--l0", "5"])
    assert exit_.value.code == 2 and "LO:HI" in capsys.readouterr().err


def test_a_place_that_is_taken_is_not_overwritten(home, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("mine")
    pull = ["pull", "demo", "--hook-point", EARLY, "--home", home.path, "--to"]
    refused(capsys, [*pull, tmp_path / "file"], "it is a file")
    refused(capsys, [*pull, tmp_path / "folder"], "it holds mine.txt", "an empty folder")
    refused(capsys, [*pull, tmp_path / "file" / "below"], "cannot pull to", "Not a directory")
    refused(capsys, [*pull, ""], "name a folder")
    refused(capsys, ["report", "demo", "--home", home.path, "--to", tmp_path / "folder"], "cannot be written")
    assert (tmp_path / "file").read_text() == "mine"
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["mine.txt"]


def test_a_damaged_database_is_named(home, tmp_path, capsys):
    whole = (home.path / "mlflow.db").read_bytes()
    for name, content in (("none", b"no database" * 99), ("half", whole[: len(whole) // 2])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mlflow.db").write_bytes(content)
        refused(capsys, ["front", "demo", "--home", tmp_path / name], f"{name}/mlflow.db", "cannot be used")
    (tmp_path / "folder" / "mlflow.db").mkdir(parents=True)
    refused(capsys, ["front", "demo", "--home", tmp_path / "folder"], "it is a folder; a database is a file")


def test_a_sweep_that_is_still_running_shows_what_it_has(tmp_path, capsys):
    running = Home(tmp_path / "home")
    tracker = Tracker(running, "young", "abcdefabcdef")
    tracker.open(SPEC, {}, [tracked("early-4"), tracked("late-8")])
    assert main(["front", "young", "--json"]) == 0
    saes = json.loads(capsys.readouterr().out)
    assert [(sae["status"], sae["l0"], sae["on_front"]) for sae in saes] == [("queued", None, False)] * 2
    assert main(["front", "young"]) == 0 and "0 of 2" in capsys.readouterr().out
    refused(capsys, ["pull", "young", "--hook-point", EARLY, "--to", tmp_path / "new"], EARLY)
    assert not (tmp_path / "new").exists()


# ---- Python ---------------------------------------------------------------------------------------------------------


def test_python_refuses_what_the_command_line_refuses(home):
    for call, message in (
        (lambda: penstock.front("demx", home=home), "no sweep 'demx'"),
        (lambda: penstock.front("demo", hook_point="x", home=home), f"it has {EARLY}"),
        (lambda: penstock.load_sae("demo", hook_point="x", home=home), f"it has {EARLY}"),
        (lambda: penstock.load_sae("demo", hook_point=EARLY, architecture="topq", home=home), "'topq'"),
        (lambda: penstock.load_sae("demo", hook_point=EARLY, l0=(90, 99), home=home), "there are 4, 8, 9, 32"),
    ):
        with pytest.raises(SweepError, match=message):
            call()
    assert penstock.front("demo", l0=(90, 99), home=home).empty


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("cfg.json", None, "cfg.json is missing"),
        ("cfg.json", b'{"architecture"', "not valid JSON"),
        ("cfg.json", b"[]", "expected a JSON object"),
        ("cfg.json", b'{"architecture": ["topk"], "metadata": {}}', "unknown architecture"),
        ("cfg.json", b'{"architecture": "topk", "d_in": -1, "metadata": {}}', "d_in is -1"),
        ("sae_weights.safetensors", None, "sae_weights.safetensors is missing"),
        ("sae_weights.safetensors", b"", "truncated or damaged"),
        ("sae_weights.safetensors", 200, "truncated or damaged"),
    ],
)
def test_a_checkpoint_with_a_missing_or_truncated_file_is_refused(name, content, part, tmp_path):
    write_sae(tmp_path / "sae", EARLY)
    path = tmp_path / "sae" / name
    if content is None:
        path.unlink()
    elif isinstance(content, int):
        os.truncate(path, content)
    else:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=part) as caught:
        SAE.load(tmp_path / "sae")
    assert str(tmp_path / "sae") in str(caught.value)


def test_a_checkpoint_folder_that_is_not_there_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for place, why in ((tmp_path / "nowhere", "no such folder"), (tmp_path / "file", "a file in no known format")):
        with pytest.raises(CheckpointError, match=f"{place}: {why}"):
            SAE.load(place)


@pytest.mark.parametrize(("name", "size"), [("sae_weights.safetensors", None), ("sae_weights.safetensors", 200)])
def test_a_damaged_artifact_is_not_pulled(name, size, tmp_path, capsys):
    damaged = Home(tmp_path / "home")
    make_sweep(damaged, tmp_path / "saes")
    run = next(run for run in find_sweep(damaged, "demo").children() if run.data.tags["sae_id"] == "late-8")
    [path] = (tmp_path / "home" / "artifacts").glob(f"{run.info.run_id}/**/{name}")
    path.unlink() if size is None else os.truncate(path, size)
    refused(capsys, ["pull", "demo", "--hook-point", LATE, "--to", tmp_path / "new"], name)
    with pytest.raises(CheckpointError, match=name):
        penstock.load_sae("demo", hook_point=LATE)


# ---- the real command -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["run", "sweep.yaml"], "sweep.yaml, line 3: data.dataset: other.parquet has no column 'text'"),
        (["front", "nosuch", "--home", "{home}"], "no sweep 'nosuch'"),
        (["run", "sweep.yml"], "sweep.yml: cannot be read as a sweep spec: No such file or directory"),
    ],
)
def test_the_real_command_ends_with_status_2_and_one_message(arguments, part, home, tmp_path):
    parquet(body=TEXTS)(tmp_path / "other.parquet")
    write_spec(tmp_path, ("dataset: demo", "dataset: other.parquet"))
    command = [sys.executable, "-m", "penstock.cli", *(argument.format(home=home.path) for argument in arguments)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert part in done.stderr.replace(f"{tmp_path}/", "")
    assert done.stderr.startswith("penstock: ") and len(done.stderr.splitlines()) == 1
