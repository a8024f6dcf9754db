"""Evaluating sweeps and folders of a tiny model, by one protocol or another, with everything but Ray."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

import penstock
from penstock import decisions
from penstock import evaluate as evaluate_module
from penstock.cli import main
from penstock.errors import CheckpointError, DataError, SweepError
from penstock.evaluate import Asked, evaluate_sweep
from penstock.evaluation import evaluation_of, figures_of, in_process, of_sae, rows_of
from penstock.home import Home
from penstock.model_host import ModelHost
from penstock.resolved import ResolvedSweep
from penstock.results import sae_table
from penstock.sae_folders import evaluate_folders
from penstock.search import Figures, Stop, stops
from penstock.session import this_machine
from penstock.spec import ResourceSpec
from penstock.statistics import HEADLINE, Bootstrap
from penstock.storage import Storage
from penstock.subjects import load_mean, load_subject
from penstock.tokens import TokenStore
from penstock.tracking import SweepRuns, find_sweep
from sae_core import SAE, EvaluationSums
from sae_core.evaluation import ROW_SUMS, metrics_of
from whole_sweeps import evaluate, publish_sweep, quiet, resolve, run_sweep, train, write_inputs, write_spec

HOOK = "blocks.1.hook_resid_post"
TOPK = "{architecture: topk, d_sae: 2x, k: [2, 6]}"


@pytest.fixture(scope="module", autouse=True)
def _no_environment():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.delenv("RAY_ADDRESS", raising=False)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluation")


@pytest.fixture(scope="module")
def inputs(folder):
    return write_inputs(folder)


@pytest.fixture(scope="module")
def sweep(folder, inputs) -> ResolvedSweep:
    """A published sweep. Only read it, or add to it what no other test looks at."""
    return run_sweep(write_spec(folder / "plain.yaml", inputs, "plain", HOOK, TOPK), Home(folder / "home"))


@pytest.fixture(scope="module")
def host(sweep):
    return ModelHost(sweep.spec.model, device="cpu")


@pytest.fixture
def on_this_host(monkeypatch, host):
    """A model host of this process in place of Ray's; what it has evaluated."""
    done = []

    def run(sweep, evaluation, address):
        done.append(evaluation.protocol_id)
        in_process(evaluation, host, sweep.spec.data, quiet)

    monkeypatch.setattr(evaluate_module, "_on_a_cluster", run)
    return done


def candidates(sweep):
    return [sae for sae in sweep.saes if sae.baseline is None]


def stored(storage: Storage, below: str) -> dict[str, bytes]:
    return {file.name: storage.read(file.name) for file in storage.files(below)}


# ---- rows, intervals, protocols -------------------------------------------------------------------------------------


def test_rows_of_slices_are_those_of_the_whole_in_order(sweep, host):
    whole = evaluation_of(sweep)
    [site] = sweep.spec.sites
    sliced = replace(whole, protocol={**whole.protocol, "version": "sliced"}, rows_at_once=1)
    parts = sliced.left()
    assert len(parts) > 2
    loaded = {subject: load_subject(subject, sweep.storage) for subject in parts[0].work.subjects}
    saes, bases = ({s.name: m for s, m in loaded.items() if bool(s.basis) == basis} for basis in (False, True))
    tokens = 0
    for part in reversed(parts):  # whatever order hosts are done in
        rows = "report", part.start_row, part.stop_row
        tokens += sliced.add(part, host.evaluate_site(sweep.store, sweep.spec.data, site, saes, bases, *rows))
    assert sliced.left() == [] and tokens == sum(whole.figures(one, site)["n_tokens"] for one in loaded)
    pd.testing.assert_frame_equal(sliced.rows(), whole.rows(), rtol=1e-4)
    at_once = host.evaluate_site(sweep.store, sweep.spec.data, site, saes, bases, "report", 0, whole.n_rows)
    for name, sums in at_once.items():
        own = sliced.rows().query(f"sae == '{name}'")
        for column, values in sums.rows().items():
            np.testing.assert_allclose(own[column], values, rtol=1e-3, atol=1e-4, err_msg=column)


def test_figures_come_from_the_rows_and_lie_in_their_intervals(sweep):
    rows = rows_of(sweep)
    assert list(rows.columns) == ["sae", "hook_point", "row", "document", *ROW_SUMS]
    assert set(rows["hook_point"]) == {HOOK}
    assert set(rows["sae"]) == {*(sae.sae_id for sae in sweep.saes), "neurons-4", "pca-4"}
    for sae in candidates(sweep):
        own = rows[rows["sae"] == sae.sae_id]
        n_rows = len(own)
        assert list(own["row"]) == list(range(n_rows))
        assert list(own["document"]) == list(sweep.store.documents("report", 0, n_rows))
        figures = figures_of(sweep, of_sae(sae), sae.site)
        from_rows = metrics_of({name: own[name].sum() for name in ROW_SUMS})
        for name in HEADLINE:
            assert figures[name] == pytest.approx(from_rows[name], rel=1e-9)
            assert figures[f"{name}_low"] <= figures[name] <= figures[f"{name}_high"]
        assert figures["ce_recovered_low"] < figures["ce_recovered_high"]
        assert Bootstrap(rows).intervals(sae.sae_id).items() <= figures.items()


def test_the_published_table_and_artifacts_have_intervals_and_rows(sweep):
    runs = find_sweep(sweep.home, "plain")
    pd.testing.assert_frame_equal(runs.evaluation_rows(), rows_of(sweep))
    table = penstock.front("plain", home=sweep.home).set_index("sae_id")
    for sae in candidates(sweep):
        figures = figures_of(sweep, of_sae(sae), sae.site)
        for name in ("l0", "ce_increase", "ce_recovered_low", "mse_high"):
            assert table.loc[sae.sae_id, name] == pytest.approx(figures[name])
    assert table["on_front"].any()


def test_mean_ablation_is_another_protocol_that_moves_what_is_ablated_alone(sweep, host):
    zero, [site] = evaluation_of(sweep), sweep.spec.sites
    changed = replace(sweep, spec=sweep.spec.model_copy(update={"evaluate": Asked(ablation="mean").evaluate(
        sweep.spec.evaluate)}))  # fmt: skip
    mean = replace(zero, protocol=changed.protocol)
    assert in_process(mean, host, sweep.spec.data, quiet) > 0 and mean.left() == []
    subject = of_sae(candidates(sweep)[0])
    by_zero, by_mean = zero.figures(subject, site), mean.figures(subject, site)
    same = ("l0", "ce_sae", "explained_variance", "mse")
    assert {name: by_mean[name] for name in same} == pytest.approx({name: by_zero[name] for name in same}, rel=1e-4)
    vector = load_mean(sweep.storage, sweep.calibration_file(HOOK))
    loaded = {"sae": load_subject(subject, sweep.storage)}
    [direct] = host.evaluate(
        sweep.store, sweep.spec.data, HOOK, loaded, "report", 0, zero.n_rows, ablation=vector
    ).values()
    assert by_mean["ce_ablated"] == pytest.approx(direct.metrics()["ce_ablated"], rel=1e-5)
    assert abs(by_mean["ce_ablated"] - by_zero["ce_ablated"]) > 1e-3


def test_a_spec_may_ask_for_another_context_than_it_trains_on(sweep, host, folder, inputs):
    rest = "evaluate: {context_size: 8, ablation: mean}\n"
    path = write_spec(folder / "short.yaml", inputs, "short", HOOK, TOPK, rest=rest)
    short, _ = resolve(path, sweep.home)
    assert [sae.sae_id for sae in short.saes] == [sae.sae_id for sae in sweep.saes]  # nothing is trained for it
    assert short.left() == [] and short.sweep_id != sweep.sweep_id
    assert short.evaluated.context_size == 8 and short.evaluated.train_id == ""
    assert short.protocol["context_size"] == 8 and short.protocol["tokens"] == short.evaluated.id != short.store.id
    for split in ("search", "report"):
        evaluate(short, host, split)
        assert evaluation_of(short, split).left() == []
    sae = candidates(short)[0]
    figures = figures_of(short, of_sae(sae), sae.site)
    assert 300 <= figures["n_tokens"] < 320
    assert figures["ce_clean"] != figures_of(sweep, of_sae(sae), sae.site)["ce_clean"]


def test_a_store_to_evaluate_on_alone_judges_norms_by_its_own_rows(sweep, host):
    data = sweep.spec.data
    limited = data.model_copy(update={"exclude": data.exclude.model_copy(update={"norm_over_median": 1.2})})
    found = evaluate_module.evaluation_store(
        limited.model_copy(update={"context_size": 8}), sweep.spec.model, sweep.model, sweep.storage
    )
    with pytest.raises(KeyError):
        found.n_rows("train")
    n_rows = found.n_rows("report")
    sums = [host.evaluate(found, limited, HOOK, {"sae": sae}, "report", *rows)["sae"]
            for sae in [load_subject(of_sae(candidates(sweep)[0]), sweep.storage)]
            for rows in ((0, n_rows), (0, 5), (5, n_rows))]  # fmt: skip
    assert (sums[0].n_tokens == EvaluationSums.merge(*sums[1:]).n_tokens).all()
    assert 0 < sums[0].n_tokens.sum() < found.kept(found.rows("report", 0, n_rows)).sum()


# ---- splits ---------------------------------------------------------------------------------------------------------


def test_nothing_that_is_trained_or_decided_reads_the_report_split(folder, inputs, monkeypatch):
    """The report rows are replaced once the store is there: all that comes before the published figures stays the same
    bit for bit, and they do not."""
    rest = "search: {prune: true, fill: 2}\nselect: {l0_band: 1:12}\n"
    path = write_spec(folder / "searched.yaml", inputs, "searched", HOOK, "{architecture: topk, d_sae: 2x, k: [1, 8]}",
                      rest=rest)  # fmt: skip

    def run(home, replaced):
        sweep, host = resolve(path, Home(folder / home))
        if replaced:
            replace_rows(sweep.storage, sweep.store, "report")
        decided, rungs = [], train(sweep, host)
        for step in sorted({step for at_rungs in rungs.values() for step in at_rungs}):
            there = {sae_id: found[step] for sae_id, found in rungs.items() if step in found}
            peers = {sae.as_peer(sweep.spec.train): Figures(**there[sae.sae_id])
                     for sae in candidates(sweep) if sae.sae_id in there}  # fmt: skip
            decided.append((step, peers, stops(peers, sweep.spec.search.margin)))
        monkeypatch.setattr(
            decisions, "evaluate_on_hosts",
            lambda sweep, hosts, say, check, **options: evaluate(sweep, *hosts, **options),
        )  # fmt: skip
        decisions.add_saes(sweep, [host], decided.append)
        proposals = sweep.journal.proposals()
        assert proposals
        again, _ = resolve(path, sweep.home)  # a sweep's SAEs are read once
        train(again, host)
        before = stored(sweep.storage, "saes") | stored(sweep.storage, "calibration") | stored(sweep.storage, "sweeps")
        evaluate(again, host)
        figures = [figures_of(again, of_sae(sae), sae.site) for sae in candidates(again)]
        assert len(figures) > 2
        return decided, proposals, before, figures

    decided, proposals, before, figures = run("as-it-is", False)
    other_decided, other_proposals, other_before, other_figures = run("replaced", True)
    assert decided == other_decided and proposals == other_proposals
    assert any("evaluation-" in name for name in before) and any("final/sae_weights" in name for name in before)
    assert before.keys() == other_before.keys()
    for name, data in before.items():
        if "filled.json" not in name:  # it says when
            assert data == other_before[name], name
    for one, other in zip(figures, other_figures, strict=True):
        assert one["ce_clean"] != other["ce_clean"] and one["explained_variance"] != other["explained_variance"]


def replace_rows(storage: Storage, store: TokenStore, split: str) -> None:
    """Other tokens in a split's rows, as many and of the same kinds, in files of the same size."""
    part = storage.read_json(f"tokens/{store.id}/store.json")["parts"][split]
    for name in storage.names(f"tokens/parts/{part}"):
        if name.endswith(".arrow"):
            file = f"tokens/parts/{part}/{name}"
            batch = pa.ipc.open_file(pa.py_buffer(storage.read(file))).get_batch(0)
            tokens = batch.column("tokens").flatten().to_numpy().reshape(batch.num_rows, -1).copy()
            tokens[:, 1:] = np.random.default_rng(0).permuted(tokens[:, 1:], axis=1)
            column = pa.FixedSizeListArray.from_arrays(pa.array(tokens.reshape(-1)), tokens.shape[1])
            sink = pa.BufferOutputStream()
            with pa.ipc.new_file(sink, batch.schema) as writer:
                columns = [column if field == "tokens" else batch.column(field) for field in batch.schema.names]
                writer.write_batch(pa.record_batch(columns, batch.schema.names))
            storage.write(file, sink.getvalue().to_pybytes())


def test_a_pruned_sae_is_settled_without_figures(sweep, folder, inputs):
    path = write_spec(folder / "pruned.yaml", inputs, "plain", HOOK, "{architecture: topk, d_sae: 2x, k: [2, 6, 3]}",
                      rest="search: {prune: true}\n")  # fmt: skip
    pruned, host = resolve(path, sweep.home)
    [stopped] = pruned.left()
    pruned.journal.write_stop(Stop(stopped.sae_id, 15, "another one does better"), 750)
    assert pruned.left() == []
    evaluate(pruned, host)
    table = sae_table(pruned).set_index("sae_id")
    row = table.loc[stopped.sae_id]
    assert (row["status"], row["reason"]) == ("pruned", "another one does better")
    assert row[["l0", "ce_recovered", "ce_increase", "l0_low"]].isna().all() and not row["on_front"]
    assert (table.drop(stopped.sae_id)["status"] == "finished").all()


def test_a_sweep_of_which_nothing_but_a_baseline_has_figures_is_published(folder, inputs, tmp_path):
    path = write_spec(folder / "all-pruned.yaml", inputs, "all-pruned", HOOK, "{architecture: topk, d_sae: 2x, k: 5}",
                      rest="search: {prune: true}\n")  # fmt: skip
    pruned, host = resolve(path, Home(tmp_path))
    sae = pruned.saes[0]
    pruned.journal.write_stop(Stop(sae.sae_id, 15, "dead"), 750)
    train(pruned, host)
    evaluate(pruned, host)
    publish_sweep(pruned)
    table = penstock.front("all-pruned", home=pruned.home)
    assert table[["sae_id", "status", "reason"]].values.tolist() == [[sae.sae_id, "pruned", "dead"]]


# ---- penstock evaluate SWEEP ----------------------------------------------------------------------------------------


def test_a_sweep_is_evaluated_by_another_protocol_beside_what_was_published(sweep, on_this_host, capsys):
    runs = find_sweep(sweep.home, "plain")
    published = {path: runs.artifact(path).read_bytes() for path in ("front.json", "evaluation.parquet")}
    arguments = ["evaluate", "plain", "--home", str(sweep.home.path), "--tokens", "100", "--context", "12"]
    arguments += ["--ablation", "mean"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert on_this_host == [found["protocol_id"]] and found["protocol_id"] != sweep.protocol_id
    wanted = {"report_tokens": 100, "context_size": 12, "ablation": "mean", "split": "report"}
    assert wanted.items() <= found["protocol"].items()
    assert {one["sae_id"] for one in found["saes"]} == {sae.sae_id for sae in candidates(sweep)}
    for one in found["saes"]:
        assert 100 <= one["n_tokens"] < 112 and one["ce_recovered_low"] < one["ce_recovered"] < one["ce_recovered_high"]
    assert {one["kind"] for one in found["baselines"]} == {"neurons", "pca", "frozen_decoder"}
    assert main(arguments) == 0  # again: what is there is found again
    out, err = capsys.readouterr()
    assert len(on_this_host) == 1 and "there already" in err
    assert out.startswith(f"protocol   {found['protocol_id']}: ") and "context 12 with BOS; mean ablation" in out
    assert f"{found['saes'][0]['ce_recovered']:.3f} ±" in out
    kept = runs.artifact("evaluations")
    assert json.loads((kept / f"{found['protocol_id']}.json").read_text()) == found
    assert set(pd.read_parquet(kept / f"{found['protocol_id']}.parquet")["sae"]) == set(rows_of(sweep)["sae"])
    assert {path: runs.artifact(path).read_bytes() for path in published} == published


def test_the_sweeps_own_protocol_gives_the_published_figures_and_computes_nothing(sweep, on_this_host):
    found = evaluate_sweep(sweep.home, sweep.sweep_id, Asked(tokens=300, dataset=sweep.spec.data.dataset))
    assert on_this_host == [] and found.protocol == sweep.protocol
    own = sae_table(sweep).set_index("sae_id")
    for one in found.table.to_dict("records"):
        assert one["ce_recovered"] == own.loc[one["sae_id"], "ce_recovered"]


def test_on_another_dataset_its_report_documents_alone_are_used(sweep, on_this_host, folder):
    """Also those that the sweep was trained on, in a dataset of another name, are left out."""
    shutil.copy(folder / "documents.txt", folder / "the-same.txt")
    found = evaluate_sweep(sweep.home, "plain", Asked(dataset=str(folder / "the-same.txt")))
    assert found.protocol["dataset"] == str(folder / "the-same.txt") and len(on_this_host) == 1
    other = TokenStore.open(sweep.storage, found.protocol["tokens"])
    assert (other.rows("report", 0, 5) == sweep.store.rows("report", 0, 5)).all()
    assert found.table["n_tokens"].iloc[0] == sae_table(sweep)["n_tokens"].iloc[0]


def test_a_sweep_of_a_large_cluster_is_evaluated_with_what_this_machine_has():
    wanted = ResourceSpec(model_hosts=64, cpus_per_host=1, gpus_per_host=99, cpus_per_pack=0)
    machine = this_machine()
    fitting = evaluate_module._fitting(wanted)
    assert fitting.model_hosts == 1 and fitting.gpus_per_host == machine.nodes[0].resources["GPU"]
    assert machine.pack_slots(fitting) > 0
    modest = wanted.model_copy(update={"gpus_per_host": 0})
    assert 1 <= evaluate_module._fitting(modest).model_hosts <= machine.nodes[0].resources["CPU"]


# ---- penstock evaluate FOLDER... ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pulled(sweep, folder) -> Path:
    return penstock.pull("plain", hook_point=HOOK, to=folder / "pulled", home=sweep.home)


def test_a_folder_beside_a_sweep_stands_on_one_front_with_it(sweep, pulled, capsys):
    arguments = ["evaluate", str(pulled), "--beside", "plain", "--home", str(sweep.home.path)]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["protocol"] == sweep.protocol
    own = {one["sae_id"]: one for one in found["saes"]}
    assert own.keys() == {str(pulled), *(sae.sae_id for sae in candidates(sweep))}
    original = json.loads((pulled / "penstock.json").read_text())["sae_id"]
    for name in (*HEADLINE, "l0_low", "ce_recovered_high"):
        assert own[str(pulled)][name] == pytest.approx(own[original][name], rel=1e-4)
    assert own[str(pulled)]["on_front"] == own[original]["on_front"] is True
    assert {one["kind"] for one in found["baselines"]} == {"neurons", "pca", "frozen_decoder"}
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert "there already" in err and str(pulled) in out and original in out


def test_no_folder_is_put_beside_figures_of_another_protocol(sweep, pulled, tmp_path, monkeypatch):
    """Where the dataset has changed since, rows would be paired that are of other tokens."""
    (tmp_path / "protocol.json").write_text(json.dumps({**sweep.protocol, "tokens": "others"}))
    kept = SweepRuns.artifact
    monkeypatch.setattr(
        SweepRuns, "artifact", lambda runs, name: tmp_path / name if name == "protocol.json" else kept(runs, name)
    )
    with pytest.raises(SweepError, match=f"its spec comes to {sweep.protocol_id} now"):
        evaluate_folders(sweep.home, [str(pulled)], Asked(), beside="plain")


def test_folders_of_several_hook_points_are_evaluated_by_what_they_say(sweep, pulled, folder, host):
    sae, early = SAE.load(pulled), "blocks.0.hook_resid_post"
    sae.replaced(metadata={**sae.cfg.metadata, "hook_name": early}).save(folder / "early")
    found = evaluate_folders(sweep.home, [str(pulled), str(folder / "early")], Asked(tokens=300))
    assert list(found.table["hook_point"]) == [HOOK, early] and found.protocol["context_size"] == 16
    assert found.protocol["report_tokens"] == 300 and found.protocol["model"] == sweep.spec.model.name
    # By its word it sees the same documents as in its sweep.
    published = sae_table(sweep).set_index("sae_id")
    original = json.loads((pulled / "penstock.json").read_text())["sae_id"]
    assert found.table["ce_recovered"][0] == pytest.approx(published.loc[original, "ce_recovered"], rel=1e-4)
    assert found.table["explained_variance"][1] < found.table["explained_variance"][0]
    by_mean = evaluate_folders(sweep.home, [str(pulled)], Asked(tokens=300, ablation="mean"))
    assert by_mean.table["ce_sae"][0] == pytest.approx(found.table["ce_sae"][0], rel=1e-4)
    assert by_mean.table["ce_ablated"][0] != pytest.approx(found.table["ce_ablated"][0], rel=1e-4)


def test_a_folder_that_sae_lens_wrote_long_ago_is_evaluated_where_it_says(sweep, pulled, folder, host):
    old = folder / "old"
    old.mkdir()
    shutil.copy(pulled / "sae_weights.safetensors", old)
    cfg = json.loads((pulled / "cfg.json").read_text())
    flat = {
        "d_in": cfg["d_in"], "d_sae": cfg["d_sae"], "dtype": "torch.float32", "hook_point": HOOK,
        "activation_fn_str": "topk", "activation_fn_kwargs": {"k": cfg["k"]}, "model_name": sweep.spec.model.name,
        "context_size": 16, "prepend_bos": True, "dataset_path": sweep.spec.data.dataset,
        "model_from_pretrained_kwargs": {"center_writing_weights": False},
    }  # fmt: skip
    (old / "cfg.json").write_text(json.dumps(flat))
    found = evaluate_folders(sweep.home, [str(old)], Asked(tokens=300))
    assert found.protocol["processing"] == "none" and found.table["hook_point"][0] == HOOK
    ours = SAE.load(old)
    n_rows = evaluation_of(sweep).n_rows
    [direct] = host.evaluate(sweep.store, sweep.spec.data, HOOK, {"sae": ours}, "report", 0, n_rows).values()
    assert found.table["ce_recovered"][0] == pytest.approx(direct.metrics()["ce_recovered"], rel=1e-4)
    flat["model_from_pretrained_kwargs"] = {"fold_ln": True, "center_unembed": True}
    (old / "cfg.json").write_text(json.dumps(flat))
    with pytest.raises(CheckpointError, match=r"old: .*center_unembed, fold_ln, together no processing.*--processing"):
        evaluate_folders(sweep.home, [str(old)], Asked(tokens=300))


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def odd(sweep, pulled, folder):
    """Folders that do not fit, by name."""
    sae = SAE.load(pulled)

    def write(name, **metadata):
        kept = {key: value for key, value in {**sae.cfg.metadata, **metadata}.items() if value is not None}
        sae.replaced(metadata=kept).save(folder / name)

    write("nowhere", hook_name="blocks.7.hook_resid_post")
    write("wide", hook_name="blocks.1.mlp.hook_post")
    write("silent", hook_name=None)
    write("other-context", context_size=32)
    write("long", context_size=65)
    write("elsewhere", dataset_path="./nowhere.parquet")
    write("one-head", hook_head_index=2)
    return folder


REFUSED = [
    (["nosuch"], ["no sweep 'nosuch'", "there is"]),
    (["plain", "--dataset", "./nowhere.parquet"], ["--dataset './nowhere.parquet'", "no such file or folder"]),
    (["plain", "--tokens", "1M"], ["--tokens 1000000 is more than --dataset", "report split", "fewer tokens"]),
    (["plain", "--context", "65"], ["--context 65", "reads at most 64 tokens"]),
    (["plain", "--context", "1"], ["--context 1", "first 1 positions"]),
    (["plain", "--model", "demo"], ["--model", "sweep 'plain'", "for folders of SAEs"]),
    (["DIR/pulled", "--address", "auto"], ["--address", "for folders", "for a sweep"]),
    (["DIR/pulled", "--beside", "plain", "--tokens", "9"], ["--tokens", "--beside"]),
    (["DIR/pulled", "--beside", "nosuch"], ["no sweep 'nosuch'"]),
    (["DIR/nothing"], ["DIR/nothing", "no such folder"]),
    (["DIR/pulled", "plain"], ["plain", "no such folder"]),
    (["DIR/pulled", "DIR/nowhere"], ["DIR/nowhere", "no 'blocks.7.hook_resid_post'"]),
    (["DIR/pulled", "DIR/wide"], ["DIR/wide", "its d_in is 32", "'blocks.1.mlp.hook_post'", "128"]),
    (["DIR/wide", "--beside", "plain"], ["DIR/wide", "its d_in is 32"]),
    (["DIR/silent"], ["DIR/silent", "no metadata.hook_name", "--hook-point NAME"]),
    (["DIR/pulled", "--hook-point", "a -> b"], ["DIR/pulled", "'a -> b'", "one name"]),
    (["DIR/pulled", "DIR/other-context"], ["differ in metadata.context_size (16, 32)", "--context"]),
    (["DIR/long"], ["DIR/long: its metadata.context_size 65", "reads at most 64 tokens; another by --context"]),
    (["DIR/elsewhere"], ["DIR/elsewhere: its metadata.dataset_path", "nowhere.parquet'", "another by --dataset"]),
    (["DIR/one-head"], ["DIR/one-head", "head 2 alone"]),
    (["DIR/pulled", "--model", "./no-model"], ["--model './no-model'", "no such folder"]),
    (["DIR/pulled", "--dataset", "DIR/nowhere.txt"], ["--dataset 'DIR/nowhere.txt'", "no such file"]),
    (["DIR/pulled", "--tokens", "1M"], ["--tokens 1000000", "report split"]),
]


@pytest.mark.parametrize(("arguments", "parts"), REFUSED)
def test_what_cannot_be_evaluated_is_one_clear_message(arguments, parts, sweep, odd, on_this_host, capsys, monkeypatch):
    monkeypatch.chdir(odd)
    arguments = [argument.replace("DIR", str(odd)) for argument in arguments]
    assert main(["evaluate", *arguments, "--home", str(sweep.home.path)]) == 2
    out, err = capsys.readouterr()
    *_, message = err.strip().splitlines()  # what it was about to do comes before
    assert out == "" and message.startswith("penstock: ") and err.count("penstock: ") == 1 and on_this_host == []
    for part in parts:
        assert part.replace("DIR", str(odd)) in message


@pytest.mark.parametrize("value", ["0", "-5", "many", "0.5"])
def test_a_number_of_tokens_is_one_or_more(value, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["evaluate", "plain", "--tokens", value])
    assert exit_.value.code == 2 and "--tokens" in capsys.readouterr().err


def test_a_sweep_without_a_finished_sae_is_refused(sweep, folder, inputs, capsys, tmp_path):
    from penstock.tracking import TrackedSAE, Tracker

    one = "{architecture: topk, d_sae: 8, k: 3}"
    young, _ = resolve(write_spec(tmp_path / "young.yaml", inputs, "young", HOOK, one), sweep.home)
    tracker = Tracker(young.home, "young", young.sweep_id)
    tracker.open(young.yaml, {}, [TrackedSAE(sae.sae_id, sae.hook_point, sae.params) for sae in candidates(young)])
    assert main(["evaluate", "young", "--home", str(young.home.path)]) == 2
    assert "sweep 'young' has no finished SAE to evaluate" in capsys.readouterr().err


def test_a_model_that_is_another_one_by_now_is_refused(sweep, inputs, tmp_path, capsys):
    model, data = shutil.copytree(inputs[0], tmp_path / "model"), inputs[1]
    one = "{architecture: topk, d_sae: 8, k: 2}"
    run_sweep(write_spec(tmp_path / "moved.yaml", (model, data), "moved", HOOK, one), sweep.home)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "layer_norm_epsilon": 0.5}))
    assert main(["evaluate", "moved", "--home", str(sweep.home.path)]) == 2
    assert "the SAEs of sweep 'moved' are not those that its spec comes to now: its model" in capsys.readouterr().err


def test_the_job_is_the_command():
    job = Path(__file__).parents[2] / "jobs" / "evaluate.py"
    command = [sys.executable, job, "plain", "--home", "s3://bucket/home"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("penstock: --home 's3://bucket/home' is a URI")


def test_too_few_documents_of_a_dataset_are_told_in_the_commands_words(sweep, tmp_path):
    few = tmp_path / "few.txt"
    few.write_text("one document\n\nanother one")
    with pytest.raises(DataError, match=r"--tokens 300 is more than --dataset '.*few.txt' has: its report split"):
        evaluate_sweep(sweep.home, "plain", Asked(dataset=str(few)))
