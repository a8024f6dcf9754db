"""A sweep that looks like a real one, for the report's tests and its screenshots: two hook points, six architectures,
three seeds of one of them, a prefix, a pruned and a diverged SAE, baselines, curves, firing rates and evaluation rows.

`python tests/dashboards/sample_sweep.py FOLDER` writes its report and takes the screenshots; with `--report FILE.html`
it takes them of a report that is there already.
"""

import argparse
import hashlib
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from penstock.pareto import key_of, mark_front
from penstock.statistics import HEADLINE, Bootstrap, add_intervals
from penstock_dashboards.details import details
from penstock_dashboards.report import Source, write_report

HOOK_POINTS = ("blocks.1.hook_resid_post", "blocks.4.hook_resid_post")
BAND = (8.0, 64.0)
TOKENS = 50_000_000
SPEC = """\
name: python-front
model: {name: demo, dtype: float32, processing: none}
data:
  dataset: demo
  context_size: 128
  bos: true
  exclude: {special_tokens: true, first_positions: 1}
  report_tokens: 500000
hook_points: [blocks.1.hook_resid_post, blocks.4.hook_resid_post]
train: {tokens: 50000000, batch_tokens: 4096, lr: 0.0004}
saes:
- {architecture: standard, d_sae: 4096, l1_coefficient: [0.5, 1, 2, 4]}
- {architecture: gated, d_sae: 4096, l1_coefficient: [0.5, 1, 2]}
- {architecture: topk, d_sae: 4096, k: [8, 16, 32, 64], seed: [0, 1, 2]}
- {architecture: batch_topk, d_sae: 4096, k: [8, 16, 32, 64]}
- {architecture: jumprelu, d_sae: 4096, target_l0: [16, 32, 64]}
- {architecture: matryoshka, d_sae: 4096, k: [32]}
search: {prune: true, fill: 4}
targets: {l0: [8, 64], ce_recovered: 0.95, dead_fraction: 0.05}
select: {l0_band: [8, 64]}
"""
COST = {
    "seconds_start": 31.0, "seconds_train": 2010.0, "seconds_search": 96.0, "seconds_evaluate": 184.0,
    "seconds_total": 2342.0, "seconds_to_first_step": 38.2, "sae_tokens": 1_875_000_000.0, "forward_passes": 391_168.0,
    "sae_tokens_per_second": 932_836.0, "harvested_tokens": 50_069_504.0, "evaluated_tokens": 41_000_000.0,
    "pruned_sae_tokens": 27_500_000.0, "blocks_made": 764.0, "harvest_seconds": 811.0,
}  # fmt: skip
_LOSS = {HOOK_POINTS[0]: (2.47, 9.8), HOOK_POINTS[1]: (2.47, 8.1)}  # clean, ablated
_SKILL = {"standard": 1.75, "gated": 1.12, "topk": 1.08, "batch_topk": 1.0, "jumprelu": 0.97, "matryoshka": 1.3}


@dataclass(frozen=True)
class Sample:
    table: pd.DataFrame
    baselines: pd.DataFrame
    details: Mapping[str, Any]
    rows: pd.DataFrame


def source(sample: Sample) -> Source:
    return Source(
        title="python-front", sweep="63e4b5064e54", l0_band=BAND, spec=SPEC,
        facts={"status": "finished", "started": "2026-11-20 21:04 UTC"},
        provenance={"sweep": "63e4b5064e54", "code": "475e11694dac721f", "protocol": "637818f431ec"},
        protocol={"ablation": "zero"}, cost=COST, details=sample.details, rows=sample.rows,
    )  # fmt: skip


def sample_sweep() -> Sample:
    generator = np.random.default_rng(0)
    table = pd.DataFrame([record for hook in range(2) for record in _records(hook)])
    leading = ["sae_id", "hook_point", "architecture", "d_sae", "k", "l1_coefficient", "target_l0", "seed", "lr"]
    table = table[[*leading, *table.columns.difference(leading, sort=False)]]
    rows = _evaluation_rows(table[table["status"] == "finished"], generator)
    table = mark_front(add_intervals(_measured(table, rows), rows), BAND, rows)
    return Sample(table, _baselines(), _details(table, generator), rows)


def _measured(table: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """The table with the figures that its evaluation rows come to."""
    measured = {}
    for _, group in rows.groupby("hook_point"):
        bootstrap = Bootstrap(group, replicates=1)
        measured |= {name: bootstrap.figures(name) for name in bootstrap.names}
    keys = [key_of(record) for record in table.to_dict("records")]
    names = [*HEADLINE, "ce_clean", "ce_ablated", "ce_sae"]
    return table.assign(**{name: [measured.get(key, {}).get(name, math.nan) for key in keys] for name in names})


def _records(hook: int) -> list[dict[str, Any]]:
    found = []

    def add(architecture: str, l0: float, off: float = 1.0, **settings: Any) -> dict[str, Any]:
        rest = 0.5 * (1 + 0.75 * hook) * l0**-0.72 * _SKILL[architecture] * off
        clean, ablated = _LOSS[HOOK_POINTS[hook]]
        identity = hashlib.blake2b(f"{hook}{architecture}{l0}{settings}".encode(), digest_size=6).hexdigest()
        record = {
            "sae_id": identity, "hook_point": HOOK_POINTS[hook], "architecture": architecture, "d_sae": 4096,
            "seed": 0, "lr": 4e-4, **settings, "l0": l0, "ce_recovered": 1 - rest, "kl_recovered": 1 - 1.15 * rest,
            "explained_variance": 1 - 2.3 * rest,
            "dead_fraction": 0.004 * (1 + l0 % 7) + 0.09 * (architecture == "topk"),
            "ce_increase": rest * (ablated - clean), "ce_clean": clean, "ce_ablated": ablated,
            "ce_sae": clean + rest * (ablated - clean), "mse": 60 * rest, "l2_ratio": 1 - rest, "n_tokens": 499_712.0,
            "dead_over_tokens": 1_000_000.0,
            "seed_stability": 0.62 - 0.04 * hook if architecture == "topk" else math.nan,
            "status": "finished", "reason": None, "proposed": math.nan, "missed": None, "remedy": None,
        }  # fmt: skip
        if record["ce_recovered"] < 0.95:
            record |= {"missed": f"ce_recovered {record['ce_recovered']:.3g} < 0.95",
                       "remedy": "less sparsity: a higher k or a smaller coefficient"}  # fmt: skip
        found.append(record)
        return record

    for coefficient, l0 in ((4.0, 6.3), (2.0, 14.1), (1.0, 30.2), (0.5, 71.0)):
        add("standard", l0 * (1 + 0.2 * hook), l1_coefficient=coefficient)
    for coefficient, l0 in ((2.0, 10.4), (1.0, 22.8), (0.5, 49.0)):
        add("gated", l0 * (1 + 0.12 * hook), l1_coefficient=coefficient)
    for k in (8, 16, 32, 64):
        for seed in range(3 if k in (16, 32) else 1):
            add("topk", k * (1 - 0.004 * seed), 1 + 0.05 * seed - 0.03 * hook, k=k, seed=seed)
    for k in (8, 16, 32, 64):
        add("batch_topk", k * 0.985, k=k)
    for target in (16, 32, 64):
        add("jumprelu", target * (0.96 + 0.03 * hook), target_l0=target)
    add("jumprelu", 45.2, target_l0=45)["proposed"] = 1.0
    whole = add("matryoshka", 31.7, k=32)
    found.append(whole | {"prefix": 1024.0, "l0": 19.4, "ce_recovered": whole["ce_recovered"] - 0.03,
                          "ce_increase": whole["ce_increase"] + 0.03 * 6})  # fmt: skip
    figures = ("l0", "ce_recovered", "kl_recovered", "explained_variance", "dead_fraction", "ce_increase", "ce_sae",
               "mse", "l2_ratio", "n_tokens", "dead_over_tokens", "seed_stability")  # fmt: skip
    pruned = "at 12.5M tokens its explained variance is 0.41 at L0 3.1; that of topk k=8 is 0.58 at L0 8.0"
    diverged = "the loss was nan at 1.2M tokens"
    for architecture, coefficient, status, reason in (
        ("standard", 8.0, "pruned", pruned),
        ("gated", 16.0, "diverged", diverged),
    ):
        ended = {"status": status, "reason": reason, "missed": None, "remedy": None}
        add(architecture, 3.0, l1_coefficient=coefficient).update(dict.fromkeys(figures, math.nan) | ended)
    return found


def _evaluation_rows(table: pd.DataFrame, generator: np.random.Generator) -> pd.DataFrame:
    """240 sequences of 60 documents. What an SAE costs varies with the document, for all SAEs alike, and a little."""
    count, tokens = 240, 127.0
    hard = np.repeat(generator.lognormal(0.0, 0.6, 60), 4)
    frames = []
    for record in table.to_dict("records"):
        clean, ablated = record["ce_clean"] * np.sqrt(hard), record["ce_ablated"] * np.sqrt(hard)
        cost = record["ce_increase"] * hard / hard.mean() * generator.lognormal(0, 0.5, count)
        lost = (1 - record["explained_variance"]) * hard * generator.lognormal(0, 0.1, count)
        frame = {
            "sae": key_of(record), "hook_point": record["hook_point"], "row": np.arange(count),
            "document": np.repeat(np.arange(60), 4), "n_tokens": tokens, "n_predictions": tokens,
            "ce_clean": clean * tokens, "ce_ablated": ablated * tokens, "ce_sae": (clean + cost) * tokens,
            "kl_ablated": 6 * hard * tokens, "kl_sae": cost * tokens,
            "l0": record["l0"] * tokens * (1 + 0.4 * generator.normal(size=count)), "l1": 40 * tokens,
            "squared_error": lost * tokens, "square_centred": tokens * hard, "square_x": 2 * tokens * hard,
            "square_x_hat": 1.8 * tokens * hard, "x_dot_x_hat": 1.85 * tokens * hard, "cosine": 0.95 * tokens,
            "l2_ratio": 0.96 * tokens,
        }  # fmt: skip
        frames.append(pd.DataFrame(frame))
    return pd.concat(frames, ignore_index=True)


def _baselines() -> pd.DataFrame:
    found = []
    for hook, hook_point in enumerate(HOOK_POINTS):
        for kind, worst, power in (("neurons", 2.0, 0.52), ("pca", 1.5, 0.62), ("frozen_decoder", 1.55, 0.5)):
            for k in (8, 16, 32, 64):
                rest = min(worst * (1 + 0.25 * hook) * k**-power, 0.95)
                figures = dict.fromkeys(("ce_recovered", "kl_recovered", "explained_variance"), 1 - rest)
                where = {"kind": kind, "hook_point": hook_point, "k": k, "l0": float(k)}
                found.append(where | figures | {"ce_increase": 6 * rest})
    return pd.DataFrame(found)


def _details(table: pd.DataFrame, generator: np.random.Generator) -> dict[str, Any]:
    histories, sparsities = {}, {}
    for record in table.drop_duplicates("sae_id").to_dict("records"):
        finished = record["status"] == "finished"
        histories[record["sae_id"]] = _history(record if finished else None, generator)
        if finished:
            rates = generator.normal(np.log10(record["l0"] / 4096), 0.55, 4096).clip(-6, 0)
            rates[: int(4096 * record["dead_fraction"])] = -10.0
            sparsities[record["sae_id"]] = rates
    return details(histories, sparsities, {sae_id: (1024,) for sae_id in table.dropna(subset="prefix")["sae_id"]})


def _history(record: Mapping[str, Any] | None, generator: np.random.Generator) -> list[dict[str, Any]]:
    """A curve of 120 points; one that ends early and badly without a record."""
    found = []
    for step in range(1, 121 if record else 30):
        part, noise = step / 120, generator.normal(0, 0.01)
        decay = math.exp(-9 * part)
        l0 = (record["l0"] if record else 3.0) * (1 + 14 * decay + noise)
        explained = (record["explained_variance"] if record else 0.4) - 2.2 * decay * part**0.2 - 0.3 * decay + noise
        dead = (record["dead_fraction"] if record else 0.6) * (1 - decay)
        loss = (1000 * decay + 55 + 300 / (1 + 40 * part)) * (1 + noise)
        metrics = {"loss": loss, "l0": l0, "explained_variance": explained, "dead_fraction": dead, "lr": 4e-4}
        found.append({"tokens": int(TOKENS * part), "metrics": metrics})
    if record is None:
        found[-1]["metrics"]["loss"] = math.nan
    return found


# ---- screenshots ----------------------------------------------------------------------------------------------------

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHROMIUM_SWITCHES = (
    "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-breakpad", "--disable-extensions",
)  # fmt: skip


SHOTS = {  # width, height, colour scheme, the whole page, an SAE opened
    "desktop-light": (1280, 1560, "light", False, False),
    "desktop-dark": (1280, 1560, "dark", False, False),
    "whole": (1280, 900, "light", True, False),
    "whole-dark": (1280, 900, "dark", True, False),
    "detail": (1280, 900, "light", False, True),
    "detail-dark": (1280, 900, "dark", False, True),
    "phone": (390, 844, "light", True, False),
    "phone-detail": (390, 844, "light", False, True),
}


def take_screenshots(report: Path, folder: Path, names: Sequence[str] = (), browser: Any = None) -> None:
    """Pictures `NAME.png` of a report in a folder: all of `SHOTS`, or those named. `desktop-light` is the answer
    and the fronts, for a README. They are taken in a Playwright browser, one of their own unless one is given."""
    from playwright.sync_api import sync_playwright

    if browser is None:
        with sync_playwright() as playwright:
            own = playwright.chromium.launch(executable_path=CHROMIUM, args=list(CHROMIUM_SWITCHES))
            take_screenshots(report, folder, names, own)
            return own.close()
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or SHOTS:
        width, height, scheme, whole, opened = SHOTS[name]
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme, device_scale_factor=2)
        page.goto(report.resolve().as_uri())
        if opened:
            page.locator("#answers .link").last.click()
        page.screenshot(path=folder / f"{name}.png", full_page=whole, animations="disabled")
        page.close()
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the sample's report and take screenshots of it.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--report", type=Path, help="of this report instead")
    parser.add_argument("--only", nargs="*", default=(), help="these screenshots")
    arguments = parser.parse_args()
    written = arguments.report
    if written is None:
        sample = sample_sweep()
        written = write_report(sample.table, sample.baselines, arguments.folder / "report.html", source(sample))
    take_screenshots(written, arguments.folder, names=arguments.only)


if __name__ == "__main__":
    main()
