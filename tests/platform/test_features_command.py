"""`penstock features` of a real SAE of the demo model, and of a sweep of a tiny one, in this process."""

import json
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import penstock.features as features_module
from penstock.activations import from_wire
from penstock.cli import main
from penstock.errors import CheckpointError, DataError, SweepError
from penstock.evaluate import Asked
from penstock.evaluation import of_sae
from penstock.features import Which, Workers, features_of_folder, features_of_sweep
from penstock.home import Home
from penstock.model_host import ModelHost
from penstock.sites import Site
from penstock.spec import DataSpec, ExcludeSpec, ModelSpec
from penstock.storage import Storage
from penstock.tokens import TokenStore, load_tokenizer
from penstock.tracking import find_sweep, sweep_table
from sae_core import SAE
from sae_core.analysis.feature_files import read_features
from sae_core.analysis.features import FeatureSettings
from tiny_models import write_model, write_tokenizer
from whole_sweeps import resolve, run_sweep, write_inputs, write_spec

HOOK = "blocks.4.hook_resid_post"
FIRST, LAST = "blocks.0.hook_resid_post", "blocks.2.hook_resid_post"
ASKED = Asked(tokens=4000)
SMALL = FeatureSettings(top=5, quantiles=3, per_quantile=2, before=4, after=3, logits=3, neighbours=4)


@pytest.fixture(scope="module", autouse=True)
def _no_environment():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS", "PENSTOCK_HOME"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Home:
    return Home(tmp_path_factory.mktemp("features") / "home")


@pytest.fixture(scope="module")
def made(home, demo_saes) -> Path:
    """The features of an SAE of the demo model. Only read them."""
    return features_of_folder(home, str(demo_saes[HOOK]), ASKED, settings=SMALL)


@pytest.fixture(scope="module")
def activations(home, made, demo_saes):
    """What the SAE makes of the rows in one go: (tokens, kept, activations [rows, context, d_sae])."""
    about = read_features(made).about
    store = TokenStore.open(Storage(home.path), about["data"]["store"])
    rows = store.rows("report", 0, about["data"]["rows"])
    host = ModelHost(ModelSpec(), device="cpu")
    x = from_wire(host._activations(rows, np.ones_like(rows, bool), np.arange(rows.size), [HOOK])[HOOK], "float32")
    kept = store.kept(rows)
    f = SAE.load(demo_saes[HOOK]).encode(x).view(*rows.shape, -1) * torch.from_numpy(kept)[:, :, None]
    return rows, kept, f


# ---- of a folder ----------------------------------------------------------------------------------------------------


def test_the_folder_says_what_it_is_of(home, made, activations, demo_saes):
    features = read_features(made)
    about, (_, kept, f) = features.about, activations
    assert made == home.path / "features" / f"{HOOK}-{about['sae']['id']}"
    assert about["sae"] | {"metadata": None, "id": None} == {
        "architecture": "topk", "d_in": 128, "d_sae": 512, "id": None, "sweep": None, "folder": HOOK, "metadata": None,
    }  # fmt: skip
    assert about["sae"]["metadata"]["model_name"] == "demo" and about["sae"]["metadata"]["hook_name"] == HOOK
    assert about["data"]["tokens"] == kept.sum() >= 4000 and about["data"]["split"] == "report"
    assert about["figures"]["l0"] == pytest.approx(float((f > 0).sum() / kept.sum()), rel=1e-6)
    assert about["figures"]["dead_fraction"] == float(((f > 0).sum((0, 1)) == 0).float().mean())
    assert 0.5 < about["figures"]["explained_variance"] < 1
    assert len(about["bins"]) == len(features.latents["histogram"][0].as_py()) + 1


def test_figures_and_examples_are_those_of_the_sae_on_all_tokens(made, activations):
    features, (rows, _, f) = read_features(made), activations
    assert features.latents["fired"].to_pylist() == (f > 0).sum((0, 1)).tolist()
    np.testing.assert_allclose(features.latents["max_activation"], f.amax((0, 1)), rtol=1e-4)
    examples = features.examples.to_pylist()
    for row in examples[::7]:
        start, stop = max(0, row["position"] - 4), row["position"] + 4
        assert row["tokens"] == rows[row["row"], start:stop].tolist()
        own = f[row["row"], start:stop, row["latent"]]
        np.testing.assert_allclose(row["activations"], own, rtol=1e-3, atol=1e-3)
        assert row["position"] > 0  # the first of a row is excluded: it is shown, but is no peak
    assert {token for row in examples for token in row["tokens"]} >= {0}  # BOS
    busiest = int(np.argmax(features.latents["fired"]))
    top = [row for row in examples if row["latent"] == busiest and row["group"] == "top"]
    peaks = f[:, :, busiest].amax(1).sort(descending=True).values[:5]
    np.testing.assert_allclose([row["activation"] for row in top], peaks, rtol=1e-4)


def test_logits_are_those_that_the_demo_model_gives_to_a_decoder_row(made, demo_saes):
    """Put far out along a row, the model's own norm and unembedding predict the tokens that are listed."""
    features, sae = read_features(made), SAE.load(demo_saes[HOOK])
    model = ModelHost(ModelSpec(), device="cpu").model
    with torch.inference_mode():
        logits = model.unembed(model.ln_final(1e4 * sae.W_dec[None])) - model.unembed(model.ln_final(
            -1e4 * sae.W_dec[None]))  # fmt: skip
    for latent in (0, 17, 511):
        order = logits[0, latent].argsort(descending=True)
        assert features.latents["top_tokens"][latent].as_py() == order[:3].tolist()
        assert features.latents["bottom_tokens"][latent].as_py() == order[-3:].flip(0).tolist()
    assert all(len(row) == 4 for row in features.latents["neighbours"].to_pylist())


def test_texts_join_to_what_the_tokenizer_says(made):
    features, tokenizer = read_features(made), load_tokenizer(ModelSpec())
    row = next(row for row in features.examples.to_pylist() if 0 not in row["tokens"])
    joined = "".join(features.texts[token] for token in row["tokens"])
    from tokenizers import Tokenizer

    whole = Tokenizer.from_str(tokenizer.json).decode(row["tokens"])
    assert joined == whole or "\ufffd" in joined


def test_spaces_and_ids_beyond_the_vocabulary_are_shown(tmp_path):
    write_tokenizer(tmp_path)
    write_model(tmp_path)
    tokenizer = load_tokenizer(ModelSpec(name=str(tmp_path)))
    ids, _ = tokenizer(["the water"])
    assert "".join(tokenizer.texts([int(one) for one in ids])) == "the water"
    assert tokenizer.texts([0, 10_000]) == ["<|endoftext|>", "<10000>"]
    written = json.loads(tokenizer.json)
    written["decoder"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    written["model"]["vocab"]["▁wheel"] = 300
    metaspace = replace(tokenizer, json=json.dumps(written))
    assert metaspace.texts([300]) == [" wheel"]


def test_what_is_there_is_not_made_again_and_other_settings_are(home, made, demo_saes, capsys, monkeypatch):
    written = (made / "about.json").stat().st_mtime_ns
    assert features_of_folder(home, str(demo_saes[HOOK]), ASKED, settings=SMALL) == made
    assert (made / "about.json").stat().st_mtime_ns == written
    assert "is there already" in capsys.readouterr().err
    copy = made.parent / "copy"
    shutil.copytree(made, copy)
    other = features_of_folder(home, str(demo_saes[HOOK]), Asked(tokens=1000), settings=SMALL, to=copy)
    assert read_features(other).about["data"]["tokens"] < 4000
    (copy / "examples.parquet").unlink()  # somebody has tampered with it
    features_of_folder(home, str(demo_saes[HOOK]), Asked(tokens=1000), settings=SMALL, to=copy)
    assert read_features(copy).examples.num_rows > 0
    shutil.rmtree(copy)


def test_slices_and_groups_change_nothing(home, made, demo_saes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(features_module, "SLICE_TOKENS", 1)  # slices of one forward pass
    budget = 200 * SMALL.bytes_per_latent / 1e9
    other = features_of_folder(
        home, str(demo_saes[HOOK]), ASKED, settings=SMALL, to=tmp_path / "groups", budget_gb=budget
    )
    assert "latents are done in 3 groups, 3 passes over the tokens" in capsys.readouterr().err
    one, many = read_features(made), read_features(other)
    assert one.examples.equals(many.examples) and one.vocabulary.equals(many.vocabulary)
    for name in one.latents.column_names:
        if name == "mean_activation":
            np.testing.assert_allclose(one.latents[name].to_numpy(), many.latents[name].to_numpy(), rtol=1e-6)
        else:
            assert one.latents[name].equals(many.latents[name]), name
    assert one.about["figures"] == pytest.approx(many.about["figures"], rel=1e-9)


def test_an_sae_from_elsewhere_that_fits_no_activations_is_warned_of(home, demo_saes, tmp_path, capsys):
    pytest.importorskip("sae_core.pretrained")
    sae = SAE.load(demo_saes[HOOK])
    source = {"repo_id": "someone/saes", "format": "sae_lens"}
    for name, factor, is_warned_of in (("foreign", 1, False), ("misread", 4, True)):
        other = sae.replaced({"W_dec": sae.W_dec * factor}, metadata={**sae.cfg.metadata, "source": source})
        other.save(tmp_path / name)
        folder = features_of_folder(home, str(tmp_path / name), Asked(tokens=1000), settings=SMALL)
        assert ("warning: " in capsys.readouterr().err) == is_warned_of
        assert read_features(folder).about["sae"]["metadata"]["source"] == source


# ---- of a sweep -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A published sweep at two hook points, a Matryoshka SAE and a transcoder among it."""
    folder = tmp_path_factory.mktemp("sweep")
    transcoder = "{reads: blocks.1.mlp.hook_in, writes: blocks.1.hook_mlp_out}"
    inputs = write_inputs(folder)
    path = write_spec(
        folder / "sweep.yaml", inputs, "tiny", f"{FIRST}, {LAST}, {transcoder}", "{architecture: topk, d_sae: 2x, k: 6}"
    )
    return run_sweep(path, Home(folder / "home"))


def test_the_best_of_each_hook_point_in_one_pass(sweep, capsys):
    folders = features_of_sweep(sweep.home, "tiny", Which(l0=(0, 100)), Asked(tokens=200), settings=SMALL)
    abouts = [read_features(folder).about for folder in folders]
    assert [about["sae"]["metadata"]["hook_name"] for about in abouts] == [FIRST, LAST, "blocks.1.mlp.hook_in"]
    assert abouts[2]["sae"]["metadata"]["hook_name_out"] == "blocks.1.hook_mlp_out"
    assert len({about["data"]["store"] for about in abouts}) == 1
    said = capsys.readouterr().err
    assert "features of 3 SAE(s)" in said
    table = sweep_table(sweep.home, find_sweep(sweep.home, "tiny")).set_index("sae_id")
    for folder, about in zip(folders, abouts, strict=True):
        assert folder == sweep.home.path / "features" / f"tiny-{about['sae']['id']}"
        assert about["sae"]["sweep"] == "tiny" and about["sae"]["id"] in table.index
        assert all(len(row) == 3 for row in read_features(folder).latents["top_tokens"].to_pylist())
    tags = {run.data.tags["sae_id"]: run.data.tags.get("features") for run in find_sweep(sweep.home, "tiny").children()}
    assert tags[abouts[0]["sae"]["id"]] == str(folders[0])


def test_outliers_neither_count_nor_peak(sweep):
    """With `exclude.norm_over_median` the tokens are those of an evaluation."""
    _, host = resolve(sweep.home.path.parent / "sweep.yaml", sweep.home)
    data = sweep.spec.data.model_copy(update={"exclude": ExcludeSpec(norm_over_median=1.05)})
    site = Site("blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out")
    store = sweep.store
    found, kept = host.rows_of(store, data, [site, Site(FIRST, FIRST)], "report", 0, 10)
    rows = store.rows("report", 0, 10)
    for one in kept:
        expected = store.kept(rows)
        for name in one.hook_points:
            expected = host._without_outliers(store, data, name, "report", rows, expected)
        np.testing.assert_array_equal(kept[one], expected)
        assert expected.sum() < store.kept(rows).sum()
    assert found[FIRST].shape == (10, 16, 32) and set(found) == {FIRST, *site.hook_points}


def test_one_sae_by_its_id_or_hook_point(sweep, tmp_path):
    saes = [sae for sae in sweep.saes if sae.baseline is None and sweep.is_finished(sae)]
    chosen = saes[0]
    [folder] = features_of_sweep(
        sweep.home, "tiny", Which(sae=chosen.sae_id[:6]), Asked(tokens=200), settings=SMALL, to=tmp_path / "by-id"
    )
    assert folder == tmp_path / "by-id" and read_features(folder).about["sae"]["id"] == chosen.sae_id
    assert of_sae(chosen).name == chosen.sae_id
    [other] = features_of_sweep(
        sweep.home, "tiny", Which(hook_point=LAST, l0=(0, 100)), Asked(tokens=200), settings=SMALL, to=tmp_path / "best"
    )
    assert read_features(other).about["sae"]["metadata"]["hook_name"] == LAST


def test_unless_told_a_small_split_is_looked_at_as_far_as_figures_are_made_of_it(sweep, tmp_path, capsys):
    [folder] = features_of_sweep(
        sweep.home, "tiny", Which(hook_point=LAST, l0=(0, 100)), Asked(), settings=SMALL, to=tmp_path / "all"
    )
    assert read_features(folder).about["data"]["tokens"] >= 300
    assert "fewer than 500,000 tokens: 300 are looked at" in capsys.readouterr().err
    with pytest.raises(DataError, match="--tokens 5000000 is more than"):
        features_of_sweep(sweep.home, "tiny", Which(hook_point=LAST, l0=(0, 100)), Asked(tokens=5_000_000))


def test_other_documents_in_other_rows(sweep, tmp_path):
    documents = tmp_path / "others.txt"
    documents.write_text("\n\n".join(f"paper{i} the water is still" + " and deep" * (i % 5) for i in range(600)))
    asked = Asked(dataset=str(documents), tokens=100, context_size=8)
    [folder] = features_of_sweep(
        sweep.home, "tiny", Which(hook_point=LAST, l0=(0, 100)), asked, settings=SMALL, to=tmp_path / "others"
    )
    about = read_features(folder).about
    assert about["data"]["dataset"] == str(documents) and about["data"]["context_size"] == 8


# ---- what is refused, and the command -------------------------------------------------------------------------------


def run(*arguments) -> int:
    return main(["features", *map(str, arguments)])


def test_the_command_prints_the_folder_figures_and_what_comes_next(home, made, demo_saes, tmp_path, capsys):
    to = tmp_path / "cli"
    assert run(demo_saes[HOOK], "--tokens", "1k", "--workers", 1, "--to", to, "--home", home.path) == 0
    printed = capsys.readouterr().out
    assert f"{to}: 512 latents" in printed and "L0 16" in printed and "of the variance explained" in printed
    assert f"penstock features {to} --serve" in printed and f"penstock features {to} --page cli.html" in printed
    page, exported = tmp_path / "cli.html", tmp_path / "neuronpedia"
    assert run(to, "--page", page, "--neuronpedia", exported) == 0  # a finished folder: nothing is computed
    printed = capsys.readouterr()
    assert printed.err == "" and f"page: {page}" in printed.out and "--serve" not in printed.out
    assert page.read_text().startswith("<!doctype html>") and any(exported.glob("batch-*.json"))
    assert read_features(to).about["settings"]["top"] == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere/sae",), "nowhere/sae: no such folder"),
        (("unknown-sweep",), "holds no sweeps yet"),
        (("SAE", "--sae", "abc"), "--sae cannot be given for an SAE folder; accepted: for a sweep"),
        (("SAE", "--to", "FOREIGN"), "holds keep.txt; accepted: a new or empty folder, or one of features"),
        (("SAE", "--to", "FOREIGN/keep.txt"), "is a file"),
        (("SAE", "--to", "FOREIGN/keep.txt/features"), "features cannot be written to"),
        (("SAE", "--memory", "0"), "--memory 0: accepted is a number of GB from"),
        (("SAE", "--hook-point", "blocks.99.hook_resid_post"), "has no 'blocks.99.hook_resid_post'"),
        (("SAE", "--dataset", "/nowhere.txt"), "/nowhere.txt"),
        (("SAE", "--context", "1"), "--context 1: input should be greater than 1"),
        (("SAE", "--page", "page.txt"), "--page 'page.txt': accepted is an .html file"),
        (("SAE", "--port", "80"), "--port 80: accepted with --serve alone"),
        (("SAE", "--neuronpedia", "FOREIGN"), "is there already; accepted: a new or empty folder"),
        (("MADE", "--tokens", "10"), "--tokens cannot be given for features"),
        (("MADE", "--to", "x"), "--to cannot be given for features"),
        (("SAE", "--address", "127.0.0.1:1"), "no Ray cluster answers there"),
    ],
)
def test_what_cannot_be_is_refused_in_one_message(arguments, message, home, made, demo_saes, tmp_path, capsys):
    (tmp_path / "keep.txt").write_text("mine")
    names = {"SAE": str(demo_saes[HOOK]), "MADE": str(made)}
    given = [names.get(one, one.replace("FOREIGN", str(tmp_path))) for one in arguments]
    assert run(*given, "--home", home.path) == 2
    printed = capsys.readouterr().err
    assert message in printed and "Traceback" not in printed
    assert (tmp_path / "keep.txt").read_text() == "mine"


def test_a_disk_without_room_is_said_and_left_as_it_was(home, demo_saes, tmp_path, capsys):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        status = run(demo_saes[HOOK], "--tokens", "4000", "--to", tmp_path / "full", "--home", home.path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 2 and "full': File too large; accepted: --to with a folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_an_sae_is_no_sweeps_name(home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("layer_4.pt").write_bytes(b"no SAE")
    assert run("layer_4.pt", "--home", home.path) == 2
    assert "layer_4.pt" in (said := capsys.readouterr().err) and "sweep" not in said


def test_no_tokens_are_refused(demo_saes, capsys):
    with pytest.raises(SystemExit) as ended:
        run(demo_saes[HOOK], "--tokens", "0")
    assert ended.value.code == 2 and "a number of tokens of 1 or more" in capsys.readouterr().err


def test_a_folder_without_a_hook_point_says_which_option_names_it(home, demo_saes, tmp_path):
    folder = tmp_path / "anonymous"
    shutil.copytree(demo_saes[HOOK], folder)
    config = json.loads((folder / "cfg.json").read_text())
    del config["metadata"]["hook_name"]
    (folder / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="no metadata.hook_name; accepted: --hook-point NAME"):
        features_of_folder(home, str(folder), ASKED)


def test_a_page_of_several_saes_is_refused_before_anything_is_computed(sweep, capsys):
    assert run("tiny", "--home", sweep.home.path, "--page", "x.html") == 2
    assert "--page is of one SAE" in capsys.readouterr().err
    with pytest.raises(SweepError, match="no SAE 'zz'"):
        features_of_sweep(sweep.home, "tiny", Which(sae="zz"), ASKED)


def test_features_of_several_saes_do_not_go_into_those_of_one(sweep, tmp_path):
    (tmp_path / "cfg.json").write_text("{}")
    with pytest.raises(SweepError, match="is a folder of one SAE, and there are several; accepted: a folder to hold"):
        features_of_sweep(sweep.home, "tiny", Which(l0=(0, 100)), Asked(tokens=200), settings=SMALL, to=tmp_path)
    with pytest.raises(SweepError, match="is a file, and there are several"):
        features_of_sweep(sweep.home, "tiny", Which(l0=(0, 100)), Asked(tokens=200), to=tmp_path / "cfg.json")
    assert [path.name for path in tmp_path.iterdir()] == ["cfg.json"]


def test_features_on_another_model_are_others(home, demo_saes, tmp_path, capsys):
    """The SAE on a copy of its model, whose weights may be other ones."""
    from penstock import demo

    copy, to = tmp_path / "model", tmp_path / "features"
    shutil.copytree(demo.MODEL_FOLDER, copy)
    for model in (None, str(copy)):
        features_of_folder(home, str(demo_saes[HOOK]), Asked(tokens=1000), model=model, settings=SMALL, to=to)
        assert "is there already" not in capsys.readouterr().err
    assert read_features(to).about["sae"]["metadata"]["model_name"] == str(copy)


def test_where_the_work_is_done(monkeypatch):
    assert Workers().in_process and Workers(n=1).in_process
    assert not Workers(n=2).in_process and not Workers(address="auto").in_process
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    assert not Workers(n=1).in_process  # a submitted job


def test_memory_is_bounded_by_latents_and_rows_are_those_asked_for(home, made):
    about = read_features(made).about
    store = TokenStore.open(Storage(home.path), about["data"]["store"])
    kept = np.cumsum(store.kept(store.rows("report", 0, store.n_rows("report"))).sum(1))
    assert about["data"]["rows"] == int(np.searchsorted(kept, 4000)) + 1
    assert features_module._n_rows(store, 10**9) == store.n_rows("report")
    assert DataSpec(dataset="demo").exclude.first_positions == 1
