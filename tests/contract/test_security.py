"""What others may hand to Penstock and what it must not do with it: run code, leave a folder, show a secret.

Each attack is made for real. The page of a feature server is attacked in tests/dashboards/test_features_page.py, files
of SAEs in tests/core/test_sae_folders.py and test_pretrained_hub.py, a cluster in tests/ray/test_secrets.py.
"""

import ast
import json
import os
import pickle
import socket
import sys
from pathlib import Path

import pytest
import torch

from penstock.cli import main
from penstock.errors import CheckpointError, DataError, ModelError, SpecError, SweepError
from penstock.home import Home, recall
from penstock.models import check_weight_files, describe_model, load_model
from penstock.plan import warnings
from penstock.redaction import redacted, secret_in, without_user
from penstock.spec import ModelSpec, parse_spec
from penstock.spool import Spool
from penstock.storage import MANIFEST, Storage
from penstock.tokens import load_tokenizer

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests/platform"))
from tiny_models import write_model  # noqa: E402

FOLDERS = ("sae_core", "platform", "dashboards", "jobs", "cluster")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))

# ---- code in files --------------------------------------------------------------------------------------------------

# Whoever reads one of these runs what its writer wanted; or unpacks names of its writer's choice.
MODULES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "runpy", "tarfile", "zipfile", "imp", "code"}
CALLS = {"eval", "exec", "compile", "__import__"}
METHODS = {"read_pickle", "to_pickle", "unpack_archive", "extractall", "extract", "unsafe_load", "full_load", "system",
           "popen", "exec_module", "load_module"}  # fmt: skip
ALLOWED = {
    ("platform/penstock/sweep.py", "pickle"): "writes the job of a pack's worker, which Ray carries to it",
    ("platform/penstock/trial.py", "pickle"): "reads that job, which came through Ray's own channel and no file: as "
                                              "bytes, so that the trial's process needs no torch",
    ("platform/penstock/models.py", "pickle"): "names the error of torch.load by weights_only",
    ("platform/penstock/models.py", "runpy"): "a table of names in the installed package transformer_lens",
    ("sae_core/pretrained/reading.py", "zipfile"): "adds up what an archive would unpack to, and unpacks nothing",
    ("jobs/benchmarks/stream_on_ray.py", "pickle"): "as trial.py",
    ("jobs/benchmarks/scale_simulation.py", "pickle"): "measures how long a reply would be",
}  # fmt: skip


def dangers(path):
    """The names of what a source imports or calls that could run or unpack what a file holds."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names if alias.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            yield (node.module or "").split(".")[0]
        elif isinstance(node, ast.Call):
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            called = ast.unparse(node.func)
            last = called.rpartition(".")[2]
            if called in CALLS or (last in METHODS and called != "platform.system"):
                yield last
            if keywords.get("allow_pickle", "False") != "False" or keywords.get("weights_only", "True") != "True":
                yield called
            if called == "torch.load" and "weights_only" not in keywords:
                yield called
            if called in ("yaml.load", "yaml.load_all") and "Safe" not in keywords.get("Loader", "") \
                    and keywords.get("Loader") != "_Loader":  # fmt: skip
                yield called
            if keywords.get("shell", "False") != "False":
                yield "shell=True"
            if keywords.get("trust_remote_code", "False") not in ("False", "model.trust_remote_code"):
                yield "trust_remote_code"


def test_no_source_reads_files_that_can_run_code_but_where_it_is_said_why():
    found = {(path.relative_to(ROOT).as_posix(), name) for path in SOURCES for name in dangers(path)}
    assert found - set(ALLOWED) == set()
    assert set(ALLOWED) - found == set()  # what is gone needs no leave


def test_models_and_tokenizers_are_loaded_with_a_word_on_their_code():
    """Without it transformers asks at the terminal, for 15 s, and takes a yes."""
    loaders = ("AutoConfig.from_pretrained", "AutoTokenizer.from_pretrained", "AutoModelForCausalLM.from_config",
               "AutoModelForCausalLM.from_pretrained", "TransformerBridge.boot_transformers")  # fmt: skip
    seen = 0
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in loaders:
                seen += 1
                assert "trust_remote_code" in {keyword.arg for keyword in node.keywords}, f"{path}:{node.lineno}"
    assert seen >= 5


def test_a_loader_of_specs_makes_no_objects():
    for attack in ("!!python/object/apply:os.system ['true']", "!!python/name:os.system", "!!python/module:os"):
        with pytest.raises(SpecError, match="could not determine a constructor"):
            parse_spec(f"name: {attack}")


@pytest.fixture
def hostile_model(tmp_path, monkeypatch):
    """A folder with a model that brings Python code along: (the folder, the file which that code would make). `kind`:
    whether transformers knows such models itself."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))

    def make(kind):
        folder, mark = write_model(tmp_path / kind, "llama"), tmp_path / "the code has run"
        (folder / f"planted_{kind}.py").write_text(
            f"open({str(mark)!r}, 'w').close()\n"
            "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
            f"class Config(LlamaConfig):\n    model_type = 'planted_{kind}'\n"
            "class Model(LlamaForCausalLM):\n    config_class = Config\n"
            "class Tokenizer(PreTrainedTokenizerFast):\n    pass\n"
        )
        add(folder / "config.json", auto_map={"AutoConfig": f"planted_{kind}.Config",
                                              "AutoModelForCausalLM": f"planted_{kind}.Model"})  # fmt: skip
        add(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, f"planted_{kind}.Tokenizer"]})
        if kind == "unknown":
            add(folder / "config.json", model_type="planted_unknown")
            add(folder / "tokenizer_config.json", tokenizer_class="Tokenizer")
        return folder, mark

    return make


def add(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize("load", [describe_model, load_tokenizer, lambda model: load_model(model, "cpu")])
def test_code_that_comes_with_a_model_is_not_run(hostile_model, load):
    folder, mark = hostile_model("known")
    load(ModelSpec(name=str(folder)))  # by transformers' own classes
    assert not mark.exists()
    folder, mark = hostile_model("unknown")
    with pytest.raises(ModelError, match=r"is not run; accepted: .*model\.trust_remote_code: true"):
        load(ModelSpec(name=str(folder)))
    assert not mark.exists()


def test_code_that_comes_with_a_model_runs_where_the_spec_says_so(hostile_model):
    folder, mark = hostile_model("unknown")
    trusted = ModelSpec(name=str(folder), trust_remote_code=True)
    first = describe_model(trusted)
    assert mark.exists() and first.n_layers == 3
    load_tokenizer(trusted)
    assert load_model(trusted, "cpu").cfg.n_layers == 3
    spec = parse_spec(f"{SPEC}model: {{name: {folder}, trust_remote_code: true}}\n")
    assert any("trust_remote_code is true" in warning for warning in warnings(spec, []))
    # What may run is a part of what an SAE was made from; of every other model the ids are what they were.
    with (folder / "planted_unknown.py").open("a") as code:
        code.write("# another version\n")
    assert describe_model(trusted).fingerprint != first.fingerprint
    known, _ = hostile_model("known")
    plain = describe_model(ModelSpec(name=str(known))).fingerprint
    assert describe_model(ModelSpec(name=str(known), trust_remote_code=True)).fingerprint != plain
    (known / "planted_known.py").unlink()
    assert describe_model(ModelSpec(name=str(known))).fingerprint == plain


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("write", [lambda bomb, path: path.write_bytes(pickle.dumps({"x": bomb}, protocol=2)),
                                   lambda bomb, path: torch.save({"x": bomb}, path)])  # fmt: skip
def test_weights_that_are_a_program_are_not_run(tmp_path, write):
    folder, mark = write_model(tmp_path / "model"), tmp_path / "mark"
    (folder / "model.safetensors").unlink()
    write(Bomb(mark), folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="a pickle with more than tensors.*accepted: model.safetensors"):
        load_model(ModelSpec(name=str(folder)), "cpu")
    assert not mark.exists()


# ---- paths ----------------------------------------------------------------------------------------------------------

OUT = ("../outside", "a/../../outside", "..", "a/..")


@pytest.fixture
def outside(tmp_path):
    """A folder beside those that are attacked, with a file that must be neither read, changed nor removed."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "precious").write_text("as it was")
    yield folder
    assert [path.name for path in folder.iterdir()] == ["precious"]
    assert (folder / "precious").read_text() == "as it was"


@pytest.mark.parametrize("name", OUT)
def test_a_storage_knows_no_way_out(tmp_path, outside, name):
    storage = Storage(tmp_path / "storage")
    attempts = (storage.read, storage.reading, storage.exists, storage.names, storage.files, storage.delete,
                storage.remove, storage.at, storage.is_committed, storage.read_folder,
                lambda name: storage.write(name, b"x"), lambda name: storage.commit_folder(name, {"x": b"x"}),
                lambda name: storage.commit_folder("whole", {name: b"x"}))  # fmt: skip
    for attempt in attempts:
        with pytest.raises(SweepError, match="leads out of storage"):
            attempt(name)
    assert not (tmp_path / "storage" / "whole").exists()


def manifest(**sums):
    return json.dumps(sums).encode()


@pytest.mark.parametrize(
    "sums",
    [
        manifest(**{"../outside/precious": "0"}), manifest(**{"/etc/hostname": "0"}), manifest(**{"a//b": "0"}),
        manifest(**{"": "0"}), manifest(link="0"), b"[1]", b'{"x": 1}',
    ],
    ids=["..", "absolute", "empty part", "empty", "link", "list", "number"],
)  # fmt: skip
def test_a_manifest_names_files_of_its_folder_alone(tmp_path, outside, sums):
    storage = Storage(tmp_path / "storage")
    storage.write(f"folder/{MANIFEST}", sums)
    (tmp_path / "storage/folder/link").symlink_to(outside / "precious")
    with pytest.raises(CheckpointError, match="leads out of its folder|no table of checksums"):
        storage.read_folder("folder")


def test_links_in_a_spool_or_in_staging_lead_no_deletion_out(tmp_path, outside):
    spool = tmp_path / "spool"
    (spool / "staging").mkdir(parents=True)
    (spool / "0123456789ab" / "blocks.0.hook_resid_post").mkdir(parents=True)
    (spool / "0123456789ab" / "used").touch()
    (spool / "0123456789ab" / "blocks.0.hook_resid_post" / "inner").symlink_to(outside)
    (spool / "fedcba987654").symlink_to(outside)
    (spool / "staging" / "old").symlink_to(outside)
    os.utime(outside, (0, 0))
    Storage(spool).clean_staging()
    removed = Spool(Storage(spool)).prune()
    assert [info.id for info in removed] == ["0123456789ab"] and not (spool / "0123456789ab").exists()


def test_a_stream_is_named_by_its_beginning_and_by_no_path(tmp_path, outside, capsys):
    spool = tmp_path / "spool"
    (spool / "0123456789ab").mkdir(parents=True)
    (spool / "0123456789ab" / "used").touch()
    for name in ("../outside", str(outside), "", "*", "."):
        assert main(["spool", "prune", str(spool), "--stream", name, "--yes"]) == 2
        assert "names 0 streams" in capsys.readouterr().err
    assert (spool / "0123456789ab").exists()


@pytest.mark.parametrize("name", [*OUT, "/etc/passwd", "~", ".", "a b", "x\0y", ""])
def test_a_sweep_is_a_name_and_no_path(tmp_path, name, capsys):
    home = tmp_path / "home"
    (home / "sweeps").mkdir(parents=True)
    for target in (tmp_path / "outside.json", home / "outside.json", home / "sweeps" / ".json"):
        target.write_text(json.dumps({"name": "x", "sweep_id": "x", "storage": str(tmp_path)}))
    with pytest.raises(SweepError, match="no sweep"):
        recall(Home(home), name)
    for command in (["status", name], ["scale", name, "--model-hosts", "2"]) if name else ():
        assert main([*command, "--home", str(home)]) == 2
        assert "no sweep" in capsys.readouterr().err


def test_a_record_of_a_sweep_names_no_other_folder(tmp_path):
    home = tmp_path / "home"
    (home / "sweeps").mkdir(parents=True)
    record = {"name": "x", "sweep_id": "../../outside", "storage": str(tmp_path)}
    (home / "sweeps" / "x.json").write_text(json.dumps(record))
    with pytest.raises(SweepError, match="is damaged: its sweep_id"):
        recall(Home(home), "x")


SPEC = """\
name: attacked
hook_points: [blocks.1.hook_resid_post]
train: {tokens: 1M}
saes: [{architecture: topk, d_sae: 2x, k: 4}]
"""


@pytest.mark.parametrize("name", ["../x", "a/b", "/x", ".hidden", "", "a\\b", "x y", "..", "'x\"'", "-rf"])
def test_a_sweeps_name_is_no_path_and_no_option(name):
    with pytest.raises(SpecError, match="`name`"):
        parse_spec(SPEC.replace("attacked", json.dumps(name)))


def test_hook_points_are_the_models_own(tmp_path, capsys):
    """They become folders of the spool: any other name is refused before a folder is made."""
    spec = tmp_path / "spec.yaml"
    spec.write_text(SPEC.replace("blocks.1.hook_resid_post", "../../outside"))
    assert main(["plan", str(spec), "--home", str(tmp_path / "home")]) == 2
    assert "has no '../../outside'" in capsys.readouterr().err
    assert not (tmp_path / "outside").exists()


def test_an_index_of_weights_names_files_of_its_folder_alone(tmp_path):
    folder = write_model(tmp_path / "model")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../../etc/hostname"}}))
    with pytest.raises(ModelError, match="no file of the folder"):
        check_weight_files(ModelSpec(name=str(folder)))


def test_cached_activations_name_files_of_their_folder_alone(tmp_path):
    from penstock.given import _Cache

    (tmp_path / "dataset_info.json").write_text(json.dumps({"features": {}}))
    for name in ("../outside/precious", "/etc/hostname", ".."):
        state = {"_data_files": [{"filename": name}], "_fingerprint": "x"}
        (tmp_path / "state.json").write_text(json.dumps(state))
        with pytest.raises(DataError, match="leads out of the folder"):
            _Cache("data.activations", tmp_path)


# ---- secrets --------------------------------------------------------------------------------------------------------

KEY, TOKEN, PASSWORD = "AKIA" + "ABCDEFGHIJKLMNOP", "hf_" + "aB3" * 11, "correct/horse@battery"
SECRET_FIELDS = {
    "storage: s3://AK:PASSWORD@bucket/x": ("storage", "a password in a URI"),
    "storage: s3://bucket/x?access_key=A&secret_key=PASSWORD": ("storage", "a secret among the options"),
    "data: {dataset: 'https://me:PASSWORD@data.example/x'}": ("data.dataset", "a password in a URI"),
    "data: {spool: 's3://AK:PASSWORD@bucket/spool'}": ("data.spool", "a password in a URI"),
    "data: {activations: 'gs://me:PASSWORD@bucket/a'}": ("data.activations", "a password in a URI"),
    "data: {mixture: [{dataset: demo}, {dataset: 'https://h/x?token=PASSWORD'}]}": ("data.mixture.1.dataset",
                                                                                   "a secret among the options"),
    "model: {name: gpt2, revision: TOKEN}": ("model.revision", "a key of the Hugging Face hub"),
    "model: {name: KEY}": ("model.name", "a key of AWS"),
    "unknown: {deep: [1, {key: TOKEN}]}": ("unknown.deep.1.key", "a key of the Hugging Face hub"),
    "tracking: {TOKEN: x}": ("tracking", "a key of the Hugging Face hub as a key"),
}  # fmt: skip


@pytest.mark.parametrize("line", SECRET_FIELDS)
def test_a_spec_with_a_secret_is_refused_by_its_fields_name_and_the_secret_is_not_repeated(line):
    field, what = SECRET_FIELDS[line]
    text = SPEC + line.replace("PASSWORD", PASSWORD).replace("TOKEN", TOKEN).replace("KEY", KEY)
    with pytest.raises(SpecError) as caught:
        parse_spec(text, "spec.yaml")
    message = str(caught.value)
    assert f"spec.yaml, line 5: `{field}` holds {what}" in message and "ray start" in message
    assert not any(secret in message for secret in (KEY, TOKEN, PASSWORD))


@pytest.mark.parametrize(
    "text",
    ["monology/pile-uncopyrighted", "s3://bucket/path@1", "http://127.0.0.1:8265/x@y", "file:///a:b/c@d", "org/model",
     "postgresql://me@db.example/x", "0123456789abcdef0123456789abcdef01234567", "hf-internal-testing/tiny",
     "blocks.0.hook_resid_post"],
)  # fmt: skip
def test_what_is_no_secret_is_left_alone(text):
    assert secret_in(text) is None and redacted(text) == text


def test_one_redaction_hides_addresses_keys_and_the_environment(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of/the+environment")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"https://me:{PASSWORD}@mlflow.example")
    hidden = redacted(f"{KEY} {TOKEN} postgresql://u:{PASSWORD}@h/db?sslpassword=x of/the+environment, {PASSWORD}!")
    assert hidden == "*** *** postgresql://u:***@h/db?sslpassword=*** ***, ***!"
    assert without_user(f"https://me:{PASSWORD}@h:1/x") == "https://h:1/x" == without_user("https://me@h:1/x")


@pytest.mark.parametrize(
    "uri",
    ["http://me:SECRET@127.0.0.1:9", "https://me:SECRET@127.0.0.1:9", "postgresql+psycopg2://me:SECRET@127.0.0.1:9/x",
     "mysql+nothing://me:SECRET@127.0.0.1:9/x", "databricks://me:SECRET@h", "postgresql://127.0.0.1:9/x?password=SECRET"],
)  # fmt: skip
def test_no_message_repeats_the_password_of_the_tracking_address(tmp_path, monkeypatch, capsys, uri):
    """Of what sqlalchemy, requests, urllib and MLflow make of it."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.replace("SECRET", PASSWORD))
    assert main(["list", "--home", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    for part in (PASSWORD, *PASSWORD.replace("@", "/").split("/")):
        assert part not in printed.err + printed.out
    assert "***" in printed.err


def test_a_fault_of_ours_is_shown_without_secrets(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("penstock.home.Home.check_tracking", lambda self: 1 / int(f"s3://me:{PASSWORD}@bucket"))
    assert main(["list", "--home", str(tmp_path)]) == 1
    complaint = capsys.readouterr().err
    assert "Traceback" in complaint and "s3://me:***@bucket" in complaint and PASSWORD not in complaint


def test_submitting_with_a_password_in_the_tracking_address_is_refused_before_anything_is_sent(
    tmp_path, monkeypatch, capsys
):
    spec = tmp_path / "spec.yaml"
    spec.write_text(SPEC.replace("1M", "100k"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"https://me:{PASSWORD}@mlflow.example")
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen: whatever asks it fails
        address = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        assert main(["submit", str(spec), "--address", address, "--home", str(tmp_path / "home")]) == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith("penstock: MLFLOW_TRACKING_URI holds a password in a URI")
    assert "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in complaint and PASSWORD not in complaint
