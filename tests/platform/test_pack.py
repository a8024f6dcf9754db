import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load as load_tensors

import penstock.pack
from penstock.batches import Schedule
from penstock.errors import SweepError
from penstock.fence import FencedError
from penstock.pack import Pack, PackMember, PackOutOfMemoryError
from penstock.storage import Storage
from penstock.worker import last_tokens
from sae_core import SAE, SAETrainer, TrainingSettings, calibrate, parse_settings

HOOK, OUT = "blocks.0.hook_resid_post", "blocks.0.hook_mlp_out"
STEPS, BATCH, D_IN, D_OUT = 12, 32, 8, 5


def batch(step):
    return torch.randn(BATCH, D_IN, generator=torch.Generator().manual_seed(step)) + 1.0


TRAINING = TrainingSettings(steps=STEPS, batch_tokens=BATCH, lr=1e-2, dead_after_tokens=96)
MAP = torch.randn(D_IN, D_OUT, generator=torch.Generator().manual_seed(99))


def target(step):
    """What a transcoder is to predict: rows of the same tokens at another hook point."""
    return (batch(step) @ MAP).relu()


CALIBRATION = {
    HOOK: calibrate(torch.cat([batch(step) for step in range(20)])),
    OUT: calibrate(torch.cat([target(step) for step in range(20)])),
}


def member(name, **settings):
    return PackMember(name, HOOK, HOOK, parse_settings({"d_sae": 16, **settings}), {"hook_name": HOOK})


def transcoder(name, **settings):
    parsed = parse_settings({"d_sae": 16, **settings})
    return PackMember(name, HOOK, OUT, parsed, {"hook_name": HOOK, "hook_name_out": OUT})


TOPK = member("topk", architecture="topk", k=3)
STANDARD = member("standard", architecture="standard", l1_coefficient=0.5)
GATED = member("gated", architecture="gated", l1_coefficient=0.5)
EXPLODING = member("exploding", architecture="standard", l1_coefficient=0.5, lr=1e6)


def make(folder, *members, **options):
    return Pack(list(members), TRAINING, CALIBRATION, Storage(folder), **options)


def train(pack, until=STEPS):
    for step in range(pack.next_step, until):
        pack.step(step, {HOOK: batch(step), OUT: target(step)})


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


def test_transcoders_train_beside_saes_on_rows_of_the_same_tokens(tmp_path):
    plain = transcoder("plain", architecture="topk", k=4)
    skipping = transcoder("skipping", architecture="standard", l1_coefficient=0.1, skip=True)
    pack = make(tmp_path / "whole", TOPK, plain, skipping)
    train(pack)
    pack.finish()
    for name in ("plain", "skipping"):
        sae = SAE.load(tmp_path / "whole" / "saes" / name / "final")
        assert (sae.d_in, sae.d_out) == (D_IN, D_OUT)
        assert (sae.cfg.metadata["hook_name"], sae.cfg.metadata["hook_name_out"]) == (HOOK, OUT)
        before, after = (float((reconstruct(batch(3)) - target(3)).square().sum())
                         for reconstruct in (lambda x: CALIBRATION[OUT].mean.expand(BATCH, -1), sae))  # fmt: skip
        assert after < before
    assert "W_skip" in final(tmp_path / "whole", "skipping")
    first = make(tmp_path / "broken", TOPK, plain, skipping)
    train(first, until=5)
    first.checkpoint()
    second = make(tmp_path / "broken", TOPK, plain, skipping)
    train(second)
    second.finish()
    for name in ("topk", "plain", "skipping"):
        assert_same(final(tmp_path / "whole", name), final(tmp_path / "broken", name))


def test_thresholds_are_calibrated_on_the_last_tokens_of_the_run(tmp_path):
    tails = {HOOK: torch.cat([batch(step) for step in range(STEPS - 4, STEPS)])}
    batch_topk = member("batch_topk", architecture="batch_topk", k=3)
    pack = make(tmp_path, batch_topk)
    train(pack)
    pack.finish(tails)
    sae = SAE.load(tmp_path / "saes/batch_topk/final")
    assert float((sae.encode(tails[HOOK]) != 0).sum(1).float().mean()) == pytest.approx(3, abs=0.1)


def test_the_last_tokens_are_those_before_the_end_of_the_run():
    schedule = Schedule((100, 100), 32, 5)  # three batches a block: the last step is the second of block 1
    assert last_tokens(schedule) == slice(0, 64)
    assert last_tokens(Schedule((20_000,), 100, 150)) == slice(15_000 - 8192, 15_000)


def test_dead_latents_of_a_prefix_are_counted_apart(tmp_path):
    pack = make(tmp_path, member("nested", architecture="matryoshka", k=3, widths=[4, 16]))
    train(pack)
    pack.finish({HOOK: batch(STEPS - 1)})
    summary = json.loads((tmp_path / "saes/nested/final/summary.json").read_bytes())
    assert SAE.load(tmp_path / "saes/nested/final").prefix_widths == (4,)
    [(width, dead)] = summary["dead_fraction_of_prefix"].items()
    assert width == "4" and dead * 4 <= summary["dead_fraction"] * 16


def test_an_sae_of_all_heads_says_how_its_activations_come(tmp_path):
    of_heads = PackMember("heads", HOOK, HOOK, TOPK.settings, {}, reshape_activations="hook_z")
    pack = make(tmp_path, of_heads)
    train(pack)
    pack.finish()
    assert json.loads((tmp_path / "saes/heads/final/cfg.json").read_text())["reshape_activations"] == "hook_z"


def test_saes_that_step_at_the_same_time_get_the_same_bits(tmp_path):
    members = [TOPK, STANDARD, GATED, EXPLODING]
    events = {}
    for name, at_once in (("one", 1), ("three", 3)):
        events[name] = []
        pack = make(tmp_path / name, *members, saes_at_once=at_once, emit=events[name].append)
        train(pack)
        pack.finish()
    for sae in ("topk", "standard", "gated"):
        assert_same(final(tmp_path / "one", sae), final(tmp_path / "three", sae))
    assert events["one"] == events["three"]
    assert {"kind": "stopped", "sae_id": "exploding"}.items() <= next(
        event for event in events["three"] if event["kind"] == "stopped"
    ).items()


FULL_DISK = """
import resource, signal, sys
sys.path.insert(0, {folder!r})
import test_pack
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails then, in its middle, as on a disk that is full
said = []
pack = test_pack.make({home!r}, test_pack.TOPK, test_pack.GATED, log=said.append)
test_pack.train(pack, until=4)
pack.checkpoint()
test_pack.train(pack, until=8)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
pack.checkpoint()
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print("\\n".join(said))
"""


def test_a_disk_that_is_full_loses_a_checkpoint_and_nothing_else(tmp_path):
    """The second checkpoint fails in the middle of a file; the pack resumes from the first and ends the same."""
    code = FULL_DISK.format(folder=str(Path(__file__).parent), home=str(tmp_path / "full"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("could not be written") == 2 and "File too large" in done.stdout
    left = sorted(path.name for path in tmp_path.glob("full/saes/*/checkpoints/*"))
    assert left == ["step-000000004", "step-000000004"] and not list(tmp_path.glob("full/staging/*"))
    resumed, plain = make(tmp_path / "full", TOPK, GATED), make(tmp_path / "plain", TOPK, GATED)
    assert resumed.next_step == 4
    for pack in (resumed, plain):
        train(pack)
        pack.finish()
    for name in ("topk", "gated"):
        assert_same(final(tmp_path / "full", name), final(tmp_path / "plain", name))


def test_a_pack_that_may_not_write_any_more_writes_nothing(tmp_path):
    def fenced():
        raise FencedError("taken over")

    pack = make(tmp_path, TOPK, guard=fenced)
    train(pack)
    for write in (pack.checkpoint, pack.finish):
        with pytest.raises(FencedError):
            write()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_pack_without_memory_for_its_saes_says_so_and_one_alone_is_stopped(tmp_path, monkeypatch):
    def failing(self, x, target, **options):
        raise torch.OutOfMemoryError("CUDA out of memory (of a test)")

    two, alone = make(tmp_path / "two", TOPK, GATED), make(tmp_path / "alone", TOPK)
    monkeypatch.setattr(SAETrainer, "train_step", failing)
    with pytest.raises(PackOutOfMemoryError, match="micro-batches of 4 tokens"):
        train(two)
    train(alone)
    assert json.loads((tmp_path / "alone/saes/topk/stopped.json").read_text())["status"] == "failed"
