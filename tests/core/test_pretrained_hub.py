"""From a hub that answers, from its cache where it does not, and what a user is told where neither has the files."""

import json
import os
import subprocess
import sys
import time

import huggingface_hub.constants
import pretrained_formats as world
import pytest
import torch
from hub_server import COMMIT, hub_of
from pretrained_formats import CASES, in_cache, in_folder

from sae_core import SAE, CheckpointError, UserError
from sae_core.pretrained import hub, releases
from sae_core.pretrained.table import find, named

RELEASE, SAE_ID = "gpt2-small-res-jb", "blocks.8.hook_resid_pre"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def fill(cache, name="SAELens of 2024", **given):
    case = CASES[name]
    entry = find(case.release, case.sae_id)
    written = case.write(entry.path)
    in_cache(cache, entry.repo_id, written, **given)
    return case, entry, written


# ---- a hub that answers ----

SCRIPT = """
import json, sys, time
from sae_core import SAE, UserError
from sae_core.pretrained import hub
said = []
for what, *given in json.loads(sys.argv[1]):
    start = time.monotonic()
    try:
        sae = getattr(SAE, what)(*given)
        said.append({"source": sae.cfg.metadata["source"], "sparsity": sae[2] is not None, "d_sae": sae.d_sae})
    except UserError as error:
        said.append({"error": str(error)})
    said[-1]["seconds"] = time.monotonic() - start
print(json.dumps(said))
"""


def in_a_process(calls, endpoint, home):
    """A process of its own: huggingface_hub reads where the hub and its cache are when it is imported."""
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE"))}
    env = {**keep, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "no_proxy": "*"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(calls)], capture_output=True, text=True, env=env, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_what_was_downloaded_once_loads_without_the_hub(tmp_path):
    entry = find(RELEASE, SAE_ID)
    in_folder(tmp_path / "repos" / entry.repo_id, CASES["SAELens of 2024"].write(entry.path))
    in_folder(tmp_path / "repos/someone/saes", world.llama_scope("a/b"))
    calls = [["from_pretrained", RELEASE, SAE_ID], ["from_hub", "someone/saes", "a/b"]]
    wrong = [["from_hub", "someone/saes", "nowhere"], ["from_hub", "someone/else", "a"], ["from_hub", "someone/saes"]]
    asked = []
    with hub_of(tmp_path / "repos", asked) as endpoint:
        first = in_a_process([*calls, *wrong], endpoint, tmp_path / "home")
    source = first[0]["source"]
    assert (source["repo_id"], source["revision"], source["release"]) == (entry.repo_id, COMMIT, RELEASE)
    assert first[0]["sparsity"] and first[1]["source"]["format"] == "llama_scope"
    assert "empty, or not there" in first[2]["error"]
    assert "someone/else: the hub does not give it (RepositoryNotFoundError" in first[3]["error"]
    assert "no SAE; it has a" in first[4]["error"]
    # all files of an SAE come from the commit that the first of them came from
    resolved = [line for line in asked if "/resolve/" in line and entry.repo_id in line]
    assert sum("/resolve/main/" in line for line in resolved) <= 2  # HEAD, GET

    gone = in_a_process([*calls, ["from_pretrained", "gemma-2b-res-jb", "blocks.6.hook_resid_post"]], endpoint,
                        tmp_path / "home")  # fmt: skip
    for before, after in zip(first, gone[:2], strict=False):
        assert {**before, "seconds": 0} == {**after, "seconds": 0}
    assert gone[0]["seconds"] < 10  # the client alone would try for half a minute a file
    assert "cfg.json is not in the cache of the hub" in gone[2]["error"]
    assert "HF_HUB_CACHE" in gone[2]["error"]


def test_asking_a_hub_that_is_not_there_is_over_at_once():
    start = time.monotonic()
    assert not hub._ask("http://127.0.0.1:9")
    assert time.monotonic() - start < 5


# ---- its cache ----


def test_a_revision_may_be_a_commit(cache):
    other = "a" * 40
    fill(cache, commit=other)
    fill(cache)  # the main branch moves on
    assert SAE.from_pretrained(RELEASE, SAE_ID)[1]["source"]["revision"] == world.COMMIT
    assert SAE.from_pretrained(RELEASE, SAE_ID, revision=other)[1]["source"]["revision"] == other
    with pytest.raises(UserError, match="at revision 'v2': cfg.json|at revision 'v2'"):
        SAE.from_pretrained(RELEASE, SAE_ID, revision="v2")


def test_files_of_another_commit_are_not_mixed_in(cache):
    case, entry, written = fill(cache, commit="b" * 40)
    partly = world.Written({name: f for name, f in written.files.items() if name.endswith("cfg.json")}, print)
    in_cache(cache, entry.repo_id, partly)  # of the newer commit the cache has the configuration alone
    with pytest.raises(UserError, match=f"at revision '{world.COMMIT}'.*sae_weights.safetensors is not in the cache"):
        SAE.from_pretrained(case.release, case.sae_id)


def test_what_is_not_there_is_said_with_what_to_do(cache):
    with pytest.raises(UserError, match=r"cfg.json is not in the cache of the hub \(.*accepted: a connection"):
        SAE.from_pretrained(RELEASE, SAE_ID)
    with pytest.raises(UserError, match="someone/sae: not in the cache"):
        SAE.from_hub("someone/sae", "layer_3")
    with pytest.raises(UserError, match="force_download is true"):
        SAE.from_pretrained(RELEASE, SAE_ID, force_download=True)


@pytest.mark.parametrize("path", ["../other", "a/../../b", "/etc", "~/x", "a\0b", None])
def test_a_path_stays_in_the_repository(path, cache):
    with pytest.raises(UserError, match="accepted is a folder or file in the repository"):
        SAE.from_hub("someone/sae", path)


@pytest.mark.parametrize("repo_id", ["../..", "a/b/c", "a b", ""])
def test_a_repositorys_name_is_one(repo_id, cache):
    with pytest.raises(UserError):
        SAE.from_hub(repo_id, "layer_3/params.npz")
    with pytest.raises(UserError):
        SAE.from_hub(repo_id, "layer_3")


# ---- names ----


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("gemma-2b-res", "gemma-2b-res-jb"),
        ("gpt2-small-res", "gpt2-small-res-jb"),
        ("Llama-Scope-LXR-8x", "llama_scope_lxr_8x"),
        ("gemma-scope-2b-pt-res", "gemma-scope-2b-pt-res"),
    ],
)
def test_a_release_may_go_by_another_name(given, meant):
    assert named(given) == meant


@pytest.mark.parametrize(
    ("release", "sae_id", "message"),
    [
        ("gpt2-small-resjb", SAE_ID, r"none of the 170 that are known \(did you mean 'gpt2-small-res-jb'.*releases"),
        (RELEASE, "blocks.8.hook_resid", r"has 13 SAEs, .*did you mean 'blocks.8.hook_resid_pre'"),
        (RELEASE, "", r"releases\(release='gpt2-small-res-jb'\) lists them"),
        ("temporal-sae-gemma-2-2b", "blocks.12.hook_resid_post", "cannot be loaded: temporal SAEs"),
        ("gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_70", "average_l0_71"),
        (RELEASE, 8, "sae_id is 8; accepted is a name"),
        (None, SAE_ID, "release is None; accepted is a name"),
    ],
)
def test_an_unknown_name_gets_the_nearest(release, sae_id, message, cache):
    with pytest.raises(UserError, match=message):
        SAE.from_pretrained(release, sae_id)


def test_the_table_is_for_browsing():
    table = releases(model="gpt2-small")
    row = table[(table.release == RELEASE) & (table.sae_id == SAE_ID)].iloc[0]
    assert (row.neuronpedia_id, row.l0, row.repo_id) == (
        "gpt2-small/8-res-jb", 60.0, "jbloom/GPT2-Small-SAEs-Reformatted",
    )  # fmt: skip
    assert set(releases(release="gemma-scope-2b").model) == {"gemma-2-2b"}
    assert "temporal" not in set(releases().format)


def test_a_repository_of_a_release_is_known_by_its_path(cache):
    """What only the release states (scale, processing of the model) holds for it by any name."""
    case, entry, written = fill(cache, "SAELens, scale in the release")
    for load in (
        lambda: SAE.from_hub(entry.repo_id, entry.path),
        lambda: SAE.from_pretrained(entry.repo_id, entry.path),
    ):
        sae = load()
        x = world.activations()
        torch.testing.assert_close(sae(x), written.function(x)[1], rtol=1e-5, atol=1e-5)
        assert sae.cfg.metadata["model_from_pretrained_kwargs"] == {"center_writing_weights": True}
        assert sae.cfg.metadata["source"]["release"] == case.release


def test_a_scale_that_nobody_states_is_asked_for(cache):
    entry = find(RELEASE, SAE_ID)
    in_cache(cache, entry.repo_id, world.legacy(entry.path, normalize_activations=True))
    with pytest.raises(CheckpointError, match="expected_average_only_in.*is missing"):
        SAE.from_pretrained(RELEASE, SAE_ID)


def test_a_release_by_another_name_loads(cache):
    fill(cache, "SAELens of 2024, another release")
    sae = SAE.from_pretrained("gemma-2b-res", "blocks.6.hook_resid_post")
    assert sae.cfg.metadata["source"]["release"] == "gemma-2b-res-jb"
    assert sae.cfg.metadata["neuronpedia_id"] == "gemma-2b/6-res-jb"


# ---- unpacking ----


def test_one_object_or_three(cache):
    fill(cache)
    sae = SAE.from_pretrained(release=RELEASE, sae_id=SAE_ID, device="cpu")
    same, cfg, sparsity = sae
    assert same is sae and sae[0] is sae and sae[1] == cfg and sae[2] is sparsity
    assert sparsity.shape == (sae.d_sae,) and float(sparsity.max()) == -1.0
    wanted = {
        "architecture": "standard", "d_in": 16, "d_sae": 40, "dtype": "float32", "device": "cpu",
        "model_name": "gpt2-small", "hook_name": SAE_ID, "hook_layer": 8, "context_size": 128, "prepend_bos": True,
        "dataset_path": "Skylion007/openwebtext", "neuronpedia_id": "gpt2-small/8-res-jb",
        "normalize_activations": "none", "apply_b_dec_to_input": True, "activation_fn_str": "relu",
    }  # fmt: skip
    assert wanted.items() <= cfg.items() and cfg["metadata"]["hook_name"] == SAE_ID
    json.dumps(cfg)  # as people print and log it
    assert len(SAE.from_pretrained_with_cfg_and_sparsity(RELEASE, SAE_ID)) == 3
    with pytest.raises(IndexError):
        sae[3]


def test_only_what_came_with_a_configuration_is_unpacked(cache):
    fill(cache)
    made = SAE.from_pretrained(RELEASE, SAE_ID).replaced()
    for use in (lambda: list(made), lambda: made[1]):
        with pytest.raises(TypeError, match="can be unpacked or indexed"):
            use()


def test_a_sparsity_of_another_width(cache):
    entry = find(RELEASE, SAE_ID)
    written = world.legacy(entry.path)
    written.files[f"{entry.path}/sparsity.safetensors"] = {"sparsity": torch.zeros(3)}
    in_cache(cache, entry.repo_id, written)
    with pytest.raises(CheckpointError, match=r"sparsity has shape \[3\]"):
        SAE.from_pretrained(RELEASE, SAE_ID)
