"""Feature dashboards of a whole SAE: the pass over the tokens, against harvesting the same rows alone.

    python jobs/benchmarks/features.py [--quick] [--json FILE] [--repeats N] [--only NAME,...] [--threads N]

Both sides run rows of Python's source through the demo model up to blocks.4.hook_resid_post, with the same model host,
rows a forward pass and threads, in one process, one after the other. Harvesting is the host's own path (`rows_of`):
the activations of all tokens as arrays on the CPU. The features pass puts them through an SAE as well and keeps, for
each latent, top and sampled examples with their contexts, histogram, counts and sums, in slices that are merged, as
`penstock features` does; a JumpReLU SAE of d_sae 1024, trained for it on the spot.

Rows (`--only` takes their names):
  pass     tokens a second of the features pass against harvesting alone; the goal is half of it
  errors   the same with the reconstruction's error summed up, as the command does it
  groups   the same with latents in two groups, for a budget that holds half of them: two passes over the tokens
  end      what follows the pass: logits, neighbours and the files, in seconds, whatever the number of tokens
  memory   what is kept of each latent at most, by count, against what was announced

CPU time is shown beside the wall time that the goals are about: it depends less on what else a machine does.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from common import Comparison, count, interleaved, machine, medians, parse_rows, parser, report

from penstock.feature_work import Group, LatentsWork, RowsWork
from penstock.model_host import ModelHost
from penstock.sites import Site
from penstock.spec import DataSpec, ModelSpec, TrainSpec
from penstock.storage import Storage
from penstock.tokens import TokenStore, build_token_store, load_tokenizer
from sae_core import SAE, SAETrainer, TrainingSettings, calibrate, parse_settings
from sae_core.analysis.features import (
    BINS,
    FeatureSettings,
    FeatureWriter,
    MergedFeatures,
    example_tables,
    latent_groups,
    latents_table,
)

HOOK_POINT = "blocks.4.hook_resid_post"
SITE = Site(HOOK_POINT, HOOK_POINT)
NAMES = ("pass", "errors", "groups", "end", "memory")
VERSIONS = ("penstock", "torch", "transformer-lens", "pyarrow")
SLICE_ROWS = 128


@dataclass(frozen=True)
class Size:
    tokens: int  # looked at
    train_tokens: int
    d_sae: int
    target_l0: int


FULL = Size(tokens=262_144, train_tokens=400_000, d_sae=1024, target_l0=32)
QUICK = Size(tokens=8192, train_tokens=16_000, d_sae=256, target_l0=32)


def train(host: ModelHost, store: TokenStore, data: DataSpec, size: Size) -> SAE:
    """An SAE that has seen as many tokens as it takes to have an L0 near its target."""
    settings = {"architecture": "jumprelu", "d_sae": size.d_sae, "target_l0": size.target_l0}
    batch_tokens, trainer, done = 512, None, 0
    steps = size.train_tokens // batch_tokens
    for block in range(store.n_rows("train") // store.block_rows):
        activations = torch.from_numpy(host.harvest(store, data, block, [HOOK_POINT])[HOOK_POINT])
        if trainer is None:
            how = TrainingSettings(
                steps=steps, batch_tokens=batch_tokens, lr=4e-3, lr_warm_up_steps=min(50, steps // 4),
                dead_after_tokens=size.train_tokens // 4,
            )  # fmt: skip
            trainer = SAETrainer(parse_settings(settings), how, calibrate(activations))
        for batch in activations.split(batch_tokens):
            if done < steps and len(batch) == batch_tokens:
                trainer.train_step(batch)
                done += 1
    assert trainer is not None
    return trainer.export({"hook_name": HOOK_POINT})


@dataclass(frozen=True)
class Setting:
    host: ModelHost
    store: TokenStore
    data: DataSpec
    n_rows: int
    sae: SAE

    @property
    def starts(self) -> range:
        return range(0, self.n_rows, SLICE_ROWS)

    def harvest(self) -> dict[str, float]:
        started = time.perf_counter(), time.process_time()
        for start in self.starts:
            self.host.rows_of(self.store, self.data, [SITE], "report", start, min(start + SLICE_ROWS, self.n_rows))
        return self._rate(started)

    def features(self, groups: Sequence[range], *, with_errors: bool = False) -> dict[str, float]:
        started = time.perf_counter(), time.process_time()
        for latents in groups:
            self.merged(latents, with_errors=with_errors)
        return self._rate(started)

    def merged(self, latents: range, *, with_errors: bool = False) -> MergedFeatures:
        settings = FeatureSettings()
        merged = MergedFeatures(len(latents), settings)
        group = Group("sae", SITE, latents, with_errors and latents.start == 0)
        for number, start in enumerate(self.starts):
            stop = min(start + SLICE_ROWS, self.n_rows)
            work = RowsWork(self.store.id, "report", start, stop, (group,), settings)
            done = work.run(self.host, self.store, self.data, {"sae": self.sae}, (merged.limits,))
            merged.add(number, done.parts[0])
        return merged

    def finish(self, merged: MergedFeatures) -> dict[str, float]:
        """What comes after the pass."""
        settings, latents = merged.settings, range(self.sae.d_sae)
        started = time.perf_counter()
        work = LatentsWork(self.store.id, Group("sae", SITE, latents, False), settings)
        found = work.run(self.host, self.store, self.data, {"sae": self.sae})
        rows = self.store.rows("report", 0, self.n_rows)
        with tempfile.TemporaryDirectory() as folder, FeatureWriter(Path(folder, "features")) as writer:
            table = latents_table(merged, latents, found.logits, found.neighbours)
            writer.add(table, example_tables(merged, latents, lambda wanted: rows[wanted]))
            about = {"sae": {}, "data": {}, "settings": {}, "bins": BINS.tolist(), "figures": {}}
            writer.close(about, load_tokenizer(ModelSpec()).texts)
        return {"seconds": time.perf_counter() - started}

    def _rate(self, started: tuple[float, float]) -> dict[str, float]:
        tokens, (wall, cpu) = self.n_rows * self.store.context_size, started
        return {"rate": tokens / (time.perf_counter() - wall), "cpu": tokens / (time.process_time() - cpu)}


def measure(setting: Setting, arguments: argparse.Namespace, quick: bool) -> list[Comparison]:
    d_sae, settings = setting.sae.d_sae, FeatureSettings()
    whole, halves = [range(d_sae)], latent_groups(d_sae, settings, d_sae // 2 * settings.bytes_per_latent)
    assert len(halves) == 2
    sides = {
        "pass": lambda: setting.features(whole),
        "errors": lambda: setting.features(whole, with_errors=True),
        "groups": lambda: setting.features(halves),
    }
    titles = {
        "pass": "the features pass against harvesting",
        "errors": "with the reconstruction's error",
        "groups": "in two groups of latents, two passes",
    }
    sides = {name: side for name, side in sides.items() if name in arguments.only}
    rows = []
    if sides:
        setting.harvest()  # what a first call costs, on all sides
        found = interleaved({"harvest": setting.harvest, **sides}, arguments.repeats)
        rates = {name: medians(runs) for name, runs in found.items()}
        goals = {} if quick else {"pass": 0.5, "errors": 0.5}
        for name in sides:
            title, ours, alone = titles[name], rates[name], rates["harvest"]
            rows += [
                Comparison(title, "tokens/s", ours["rate"], alone["rate"], goals.get(name), lower_is_better=False),
                Comparison(f"{title}, CPU time", "tokens/s", ours["cpu"], alone["cpu"], lower_is_better=False),
            ]
    if {"end", "memory"} & set(arguments.only):
        merged = setting.merged(range(d_sae), with_errors=True)
        rows.append(Comparison("L0 of the SAE", "", merged.totals.l0))
        if "end" in arguments.only:
            seconds = medians([setting.finish(merged) for _ in range(arguments.repeats)])["seconds"]
            rows.append(Comparison("logits, neighbours and files", "s", seconds))
        if "memory" in arguments.only:
            held = sum(array.nbytes for part in (merged.top, merged.sample) for array in vars(part).values())
            held += merged.totals.histogram.nbytes
            announced = settings.bytes_per_latent
            rows.append(Comparison("kept of each latent", "bytes", held / d_sae, announced, None if quick else 1,
                                   at_most=True))  # fmt: skip
    return rows


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--threads", metavar="N", type=count, default=1, help="of torch, on both sides; 1")
    arguments = parse_rows(options, NAMES, repeats=5)
    described, size = machine(), QUICK if arguments.quick else FULL
    host = ModelHost(ModelSpec(), device="cpu", threads=arguments.threads)
    with tempfile.TemporaryDirectory(prefix="penstock-features-") as folder:
        block = 16_384 if not arguments.quick else 4096
        data = DataSpec(
            dataset="demo", context_size=128, block_tokens=block, search_tokens=256, report_tokens=size.tokens
        )  # fmt: skip
        store = build_token_store(
            data, ModelSpec(), TrainSpec(tokens=size.train_tokens, batch_tokens=512), Storage(folder)
        )  # fmt: skip
        sae = train(host, store, data, size)
        setting = Setting(host, store, data, size.tokens // 128, sae)
        rows = measure(setting, arguments, arguments.quick)
    notes = [f"{size.tokens:,} tokens in rows of 128, {arguments.threads} thread(s), d_sae {size.d_sae}."]
    if arguments.quick:
        notes.append("QUICK: next to no tokens and an SAE that has learnt nothing. These figures mean nothing.")
    report("Feature dashboards against harvesting alone", rows, arguments, described, VERSIONS, notes)


if __name__ == "__main__":
    main()
