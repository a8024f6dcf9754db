import json

import pytest
import torch
from safetensors.torch import load as load_tensors

import penstock.pack
from penstock.errors import SweepError
from penstock.pack import Pack, PackMember
from penstock.storage import Storage
from sae_core import SAE, SAETrainer, TrainingSettings, calibrate, parse_settings

HOOK = "blocks.0.hook_resid_post"
STEPS, BATCH, D_IN = 12, 32, 8


def batch(step):
    return torch.randn(BATCH, D_IN, generator=torch.Generator().manual_seed(step)) + 1.0


TRAINING = TrainingSettings(steps=STEPS, batch_tokens=BATCH, lr=1e-2, dead_after_tokens=96)
CALIBRATION = {HOOK: calibrate(torch.cat([batch(step) for step in range(20)]))}


def member(name, **settings):
    return PackMember(name, HOOK, HOOK, parse_settings({"d_sae": 16, **settings}), {"hook_name": HOOK})


TOPK = member("topk", architecture="topk", k=3)
STANDARD = member("standard", architecture="standard", l1_coefficient=0.5)
GATED = member("gated", architecture="gated", l1_coefficient=0.5)
EXPLODING = member("exploding", architecture="standard", l1_coefficient=0.5, lr=1e6)


def make(folder, *members, **options):
    return Pack(list(members), TRAINING, CALIBRATION, Storage(folder), **options)


def train(pack, until=STEPS):
    for step in range(pack.next_step, until):
        pack.step(step, {HOOK: batch(step)})


def final(folder, name):
    return load_tensors(Storage(folder).read_folder(f"saes/{name}/final")["sae_weights.safetensors"])


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_weights_do_not_depend_on_pack_mates(tmp_path):
    together, alone = make(tmp_path / "together", TOPK, STANDARD, GATED), make(tmp_path / "alone", STANDARD)
    for pack in (together, alone):
        train(pack)
        pack.finish()
    assert_same(final(tmp_path / "together", "standard"), final(tmp_path / "alone", "standard"))


def test_a_resumed_pack_ends_with_the_bits_of_an_uninterrupted_one(tmp_path):
    whole = make(tmp_path / "whole", TOPK, GATED)
    train(whole)
    whole.finish()
    first = make(tmp_path / "broken", TOPK, GATED)
    train(first, until=5)
    first.checkpoint()
    train(first, until=9)  # lost with its process
    second = make(tmp_path / "broken", TOPK, GATED)
    assert second.next_step == 5
    train(second)
    second.finish()
    for name in ("topk", "gated"):
        assert_same(final(tmp_path / "whole", name), final(tmp_path / "broken", name))
    history = json.loads(Storage(tmp_path / "broken").read("saes/topk/final/summary.json"))["history"]
    assert [row["tokens"] for row in history] == [BATCH * (step + 1) for step in range(STEPS)]


def test_a_new_sae_catches_up_with_resumed_pack_mates(tmp_path):
    old = make(tmp_path, TOPK)
    train(old, until=6)
    old.checkpoint()
    mixed = make(tmp_path, TOPK, STANDARD)
    assert mixed.next_step == 0
    train(mixed)
    mixed.finish()
    fresh = make(tmp_path / "fresh", TOPK, STANDARD)
    train(fresh)
    fresh.finish()
    for name in ("topk", "standard"):
        assert_same(final(tmp_path, name), final(tmp_path / "fresh", name))


def test_an_sae_that_diverges_stops_alone_and_is_marked(tmp_path):
    events = []
    pack = make(tmp_path / "with", TOPK, EXPLODING, emit=events.append)
    train(pack)
    pack.finish()
    stopped = [event for event in events if event["kind"] == "stopped"]
    assert [(event["sae_id"], event["status"]) for event in stopped] == [("exploding", "diverged")]
    record = Storage(tmp_path / "with").read_json("saes/exploding/stopped.json")
    assert record["status"] == "diverged" and record["step"] < STEPS
    assert not Storage(tmp_path / "with").exists("saes/exploding/final")
    alone = make(tmp_path / "without", TOPK)
    train(alone)
    alone.finish()
    assert_same(final(tmp_path / "with", "topk"), final(tmp_path / "without", "topk"))


def test_an_sae_that_raises_stops_alone_with_its_reason(tmp_path, monkeypatch, capsys):
    pack = make(tmp_path, TOPK, STANDARD)
    right = SAETrainer.train_step

    def broken(self, x, target, **options):
        if self.settings.architecture == "standard" and self.steps_done == 3:
            raise ValueError("a bug in one loss")
        return right(self, x, target, **options)

    monkeypatch.setattr(SAETrainer, "train_step", broken)
    train(pack)
    pack.finish()
    record = Storage(tmp_path).read_json("saes/standard/stopped.json")
    assert (record["status"], record["step"]) == ("failed", 3)
    assert "a bug in one loss" in record["reason"]
    assert "Traceback" in capsys.readouterr().err
    assert Storage(tmp_path).is_committed("saes/topk/final")


def test_out_of_memory_halves_the_micro_batch_with_the_same_results(tmp_path, monkeypatch):
    plain = make(tmp_path / "plain", TOPK, GATED)
    train(plain)
    plain.finish()
    said = []
    small = make(tmp_path / "small", TOPK, GATED, log=said.append)
    right = SAETrainer.train_step

    def limited(self, x, target, **options):
        if (self.micro_batch_tokens or x.shape[0]) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory (of a test)")
        return right(self, x, target, **options)

    monkeypatch.setattr(SAETrainer, "train_step", limited)
    train(small)
    small.finish()
    assert "halved to 16" in said[0] and "halved to 8" in said[1] and len(said) == 4
    for name in ("topk", "gated"):
        a, b = final(tmp_path / "plain", name), final(tmp_path / "small", name)
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-4)


def test_a_damaged_checkpoint_is_passed_over_for_an_older_one(tmp_path):
    pack = make(tmp_path, TOPK)
    train(pack, until=3)
    pack.checkpoint()
    train(pack, until=6)
    pack.checkpoint()
    state = tmp_path / "saes/topk/checkpoints/step-000000006/state.safetensors"
    state.write_bytes(state.read_bytes()[:100])
    said = []
    assert make(tmp_path, TOPK, log=said.append).next_step == 3
    assert "damaged" in said[0]


def test_checkpoints_of_other_code_are_refused_without_the_flag(tmp_path, monkeypatch):
    pack = make(tmp_path, TOPK)
    train(pack, until=3)
    pack.checkpoint()
    monkeypatch.setattr(penstock.pack, "code_hash", lambda: "other")
    with pytest.raises(SweepError, match="--allow-code-change"):
        make(tmp_path, TOPK)
    assert make(tmp_path, TOPK, allow_code_change=True).next_step == 3


def test_what_is_exported_is_folded_and_loads(tmp_path):
    pack = make(tmp_path, TOPK)
    train(pack)
    pack.finish()
    sae = SAE.load(tmp_path / "saes/topk/final")
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(16))
    assert sae.cfg.metadata["hook_name"] == HOOK
    summary = json.loads((tmp_path / "saes/topk/final/summary.json").read_bytes())
    assert summary["dead_over_tokens"] == STEPS * BATCH // 2
    assert 0 <= summary["dead_fraction"] < 1
