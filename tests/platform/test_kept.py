"""SAEs that are kept on the way (`train.keep`)."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load as load_tensors

import penstock
from penstock.errors import SweepError
from penstock.fence import FencedError
from penstock.home import Home
from penstock.tracking import Tracker, kept_tokens, sweep_table
from penstock.worker import _train
from sae_core import SAE
from test_worker import MEMBERS, Blocks, free, start, weights  # noqa: F401 -- `start` is a fixture
from tracked_sweep import EARLY, SAES, figures, tracked, write_sae


def kept(job) -> dict[str, dict[str, torch.Tensor]]:
    """The weights of what was kept, by SAE and tokens."""
    return {
        f"{member.sae_id}/{tokens}": load_tensors(
            job.storage.read_folder(f"saes/{member.sae_id}/kept/{tokens}")["sae_weights.safetensors"]
        )
        for member in MEMBERS
        for tokens in job.storage.names(f"saes/{member.sae_id}/kept")
    }


def test_saes_are_kept_at_evenly_spread_points_and_change_nothing(start):  # noqa: F811
    plain, stream = start("plain")
    _train(plain, stream, free)
    job, stream = start("kept")
    _train(replace(job, keep=3), stream, free)
    steps = job.training.steps
    points = {str(steps * part // 4 * job.training.batch_tokens) for part in (1, 2, 3)}
    assert {name.split("/")[1] for name in kept(job)} == points
    assert len(kept(job)) == 3 * len(MEMBERS)
    ours, theirs = weights(job), weights(plain)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_what_is_kept_is_folded_and_says_when_it_was(start, tmp_path):  # noqa: F811
    job, stream = start("kept")
    _train(replace(job, keep=1), stream, free)
    for member in MEMBERS:
        (tokens,) = job.storage.names(f"saes/{member.sae_id}/kept")
        sae = SAE.load(job.storage.path(f"saes/{member.sae_id}/kept/{tokens}"))
        assert sae.cfg.normalize_activations == "none"
        assert sae.cfg.metadata.kept_at_tokens == int(tokens) == job.training.steps // 2 * job.training.batch_tokens
        final = SAE.load(job.storage.path(f"saes/{member.sae_id}/final"))
        assert "kept_at_tokens" not in final.cfg.metadata
        assert type(sae) is type(final) and not torch.equal(sae.W_dec, final.W_dec)


def test_a_pack_that_is_stopped_and_goes_on_keeps_the_same_bits(start):  # noqa: F811
    whole, stream = start("whole")
    _train(replace(whole, keep=3), stream, free)
    broken, stream = start("broken")
    job = replace(broken, keep=3, checkpoints=3)
    saves = []

    def guard() -> None:  # taken over by another driver after a few writes
        saves.append(None)
        if len(saves) > 6:
            raise FencedError("another driver")

    with pytest.raises(FencedError):
        _train(job, stream, guard)
    before = kept(job)
    assert 0 < len(before) < len(kept(whole))
    _train(job, Blocks(), free)
    ours, theirs = kept(job), kept(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[sae][name], theirs[sae][name]) for sae in theirs for name in theirs[sae])


def test_a_full_disk_stops_no_training(start, monkeypatch):  # noqa: F811
    job, stream = start("full")
    commit = type(job.storage).commit_folder

    def fail(storage, folder, files, guard=free):
        if "/kept/" in folder:
            raise OSError(28, "No space left on device")
        commit(storage, folder, files, guard)

    monkeypatch.setattr(type(job.storage), "commit_folder", fail)
    _train(replace(job, keep=2), stream, free)
    assert kept(job) == {} and weights(job)
    said = [event["message"] for event in stream.events if event["kind"] == "log"]
    assert sum("could not be kept" in message and "No space left" in message for message in said) == 2 * len(MEMBERS)


# ---- pull --at ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home with one finished SAE that was kept at 100 and 2000 tokens."""
    tmp_path = tmp_path_factory.mktemp("kept")
    home = Home(tmp_path / "home")
    tracker = Tracker(home, "demo", "sweep-1")
    tracker.open("name: demo\n", {}, [tracked("early-8")])
    write_sae(tmp_path / "final", EARLY)
    for tokens in (2000, 100):
        sae = write_sae(tmp_path / "kept" / str(tokens), EARLY)
        sae.replaced({"b_dec": torch.full((4,), float(tokens))}).save(tmp_path / "kept" / str(tokens))
    end = figures(*SAES["early-8"][3:])
    tracker.finish_sae(
        "early-8", status="finished", metrics=end, folder=tmp_path / "final", kept=tmp_path / "kept"
    )
    return home


def test_pull_gives_what_an_sae_was(home, tmp_path):
    row = sweep_table(home, "demo").iloc[0]
    assert kept_tokens(home, row["run_id"]) == [100, 2000]
    folder = penstock.pull("demo", sae="early-8", at="2k", to=tmp_path / "out", home=home)
    assert (SAE.load(folder).b_dec == 2000).all()
    about = json.loads((folder / "penstock.json").read_text())
    assert about["at_tokens"] == 2000 and about["sae_id"] == "early-8" and about["k"] == 8
    assert not {"l0", "ce_recovered", "explained_variance", "on_front", "mse"} & about.keys()
    assert (penstock.load_sae("demo", hook_point=EARLY, at=100, home=home).b_dec == 100).all()
    assert not (penstock.load_sae("demo", sae="early-8", home=home).b_dec >= 100).any()


@pytest.mark.parametrize("at", [99, "3k", "x"])
def test_points_that_were_not_kept_are_refused_with_those_that_were(home, tmp_path, at):
    accepted = "at 'x': a count is" if at == "x" else f"at {at!r}: SAE early-8 .*: it was kept at 100, 2000"
    with pytest.raises(SweepError, match=accepted):
        penstock.pull("demo", sae="early-8", at=at, to=tmp_path / "out", home=home)


def test_the_command_pulls_at_a_number_of_tokens(home, tmp_path, capsys):
    from penstock.cli import main

    to = str(tmp_path / "out")
    assert main(["pull", "demo", "--sae", "early-8", "--at", "2k", "--to", to, "--home", str(home.path)]) == 0
    assert f"topk at {EARLY} after 2,000 tokens (SAE early-8)" in capsys.readouterr().out
    assert main(["pull", "demo", "--sae", "early-8", "--at", "7", "--to", to, "--home", str(home.path)]) == 2
    assert "it was kept at 100, 2000" in capsys.readouterr().err
