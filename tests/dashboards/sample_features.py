"""A features folder that looks like a real one, of any number of latents: what the browser's tests look at.

Latent `i` fires on the token `WORDS[i % len(WORDS)]`, and on ` return` in half of its examples where `i` is odd. Every
`DEAD`-th latent never fires. `HOSTILE` tokens stand in the contexts of latent 1 and among its promoted tokens.

`python tests/dashboards/sample_features.py FOLDER [--latents N]` writes such a folder and its page;
`python tests/dashboards/sample_features.py FOLDER --page FILE.html` takes the screenshots of a page that is there.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sae_core.analysis.feature_files import EXAMPLE_SCHEMA
from sample_sweep import CHROMIUM, CHROMIUM_SWITCHES

WORDS = (
    " return", " self", "def", " import", "(", ")", ":", "\n", "\n    ", "        ", " class", " not", " None", ".",
    ",", " =", " for", " in", " range", "__", "init", " raise", " Value", "Error", "\t", "�", " the",
)  # fmt: skip
HOSTILE = (
    "</script>", "<img src=x onerror=hacked()>", "<!--", "\u2028", "\u202egnp.exe", "\u200b", "&amp;", "${hacked()}",
    "\x00\x1b[31m", "العربية", "' onmouseover='hacked()", '"><svg onload=hacked()>',
)  # fmt: skip
BINS = 10 ** (np.arange(-25, 41) / 10)
DEAD = 16  # every latent of this many is dead, the first of them latent 15
BEFORE, AFTER = 16, 8
TOKENS = 2_000_000
VOCABULARY = 4096


def write_features(
    folder: Path,
    latents: int = 64,
    *,
    top: int = 20,
    per_quantile: int = 4,
    neuronpedia_id: str | None = None,
    sae: dict[str, Any] | None = None,
    hostile: bool = True,
    fires: bool = True,
    seed: int = 0,
) -> Path:
    """Write a folder of format 1 and return it."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    texts = [*WORDS, *HOSTILE]
    texts += [f" {''.join(generator.choice(list('abcdefghijklmnopqrstuvwxyz'), 4))}{number}"
              for number in range(VOCABULARY - len(texts))]  # fmt: skip
    ids = np.arange(latents)
    alive = (ids % DEAD != DEAD - 1) & fires
    rate = np.where(alive, 10 ** generator.uniform(-5, -1, latents), 0.0)
    most = np.where(alive, generator.uniform(2, 40, latents), 0).astype(np.float32)
    shape = np.exp(-(((np.log10(BINS[:-1]) - np.log10(np.maximum(most[:, None] / 4, 1e-3))) / 0.4) ** 2))
    reached = (BINS[:-1] < most[:, None]) & (shape > 0.01) & alive[:, None]
    counts = np.where(reached, np.ceil(rate[:, None] * TOKENS / 8 * shape), 0).astype(np.int64)
    fired = counts.sum(1)
    logits = -np.sort(-generator.normal(0, 1, (latents, 20)).astype(np.float32))
    tokens_of = generator.integers(len(WORDS) + len(HOSTILE), VOCABULARY, (latents, 20))
    tokens_of[:, 0] = ids % len(WORDS)
    if hostile and latents > 1:
        tokens_of[1, 1:10] = len(WORDS) + np.arange(9)
    neighbours = min(8, latents - 1)
    others = (ids[:, None] + 1 + np.arange(neighbours)) % latents
    columns = {
        "latent": pa.array(ids, pa.int32()),
        "fired": pa.array(fired, pa.int64()),
        "firing_rate": pa.array(fired / TOKENS, pa.float64()),
        "max_activation": pa.array(most, pa.float32()),
        "mean_activation": pa.array(most / 5, pa.float32(), mask=~alive),
        "histogram": _lists(counts, pa.int64()),
        "top_tokens": _lists(tokens_of[:, :10], pa.int32()),
        "top_logits": _lists(logits[:, :10], pa.float32()),
        "bottom_tokens": _lists(tokens_of[:, :9:-1], pa.int32()),
        "bottom_logits": _lists(logits[:, :9:-1], pa.float32()),
        "neighbours": _lists(others, pa.int32()),
        "neighbour_cosines": _lists(np.tile(0.9 - 0.1 * np.arange(neighbours), (latents, 1)), pa.float32()),
    }
    pq.write_table(pa.table(columns), folder / "latents.parquet")
    _write_examples(folder, ids[alive], most[alive], top, per_quantile, hostile, generator)
    pq.write_table(pa.table({"token": pa.array(np.arange(VOCABULARY), pa.int32()), "text": texts}),
                   folder / "vocabulary.parquet")  # fmt: skip
    metadata = {"model_name": "demo", "hook_name": "blocks.4.hook_resid_post", "model_processing": "none"}
    about = {
        "format": 1,
        "sae": {"architecture": "topk", "d_in": 128, "d_sae": latents, "id": "1d782de0973a", "sweep": "demo",
                "folder": "best-sae",
                "metadata": metadata | ({"neuronpedia_id": neuronpedia_id} if neuronpedia_id else {})} | (sae or {}),
        "data": {"dataset": "demo", "split": "train", "context_size": 128, "bos": True, "tokens": TOKENS,
                 "rows": TOKENS // 128, "exclude": {"special_tokens": True, "first_positions": 1}},
        "settings": {"top": top, "quantiles": 5, "per_quantile": per_quantile, "before": BEFORE, "after": AFTER,
                     "logits": 10, "neighbours": neighbours},
        "bins": BINS.tolist(),
        "figures": {"l0": 31.6, "dead_fraction": float((~alive).mean()), "explained_variance": 0.78},
        "penstock_version": "0.1.0",
    }  # fmt: skip
    (folder / "about.json").write_text(json.dumps(about))
    return folder


def _lists(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    offsets = np.arange(len(values) + 1) * values.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values.ravel(), kind))


def _write_examples(
    folder: Path,
    ids: np.ndarray,
    most: np.ndarray,
    top: int,
    per_quantile: int,
    hostile: bool,
    generator: np.random.Generator,
) -> None:
    each = top + 5 * per_quantile
    width = BEFORE + 1 + AFTER
    group = np.array([*["top"] * top, *np.repeat([f"q{i}" for i in range(1, 6)], per_quantile)])
    rank = np.concatenate([np.arange(top), np.tile(np.arange(per_quantile), 5)])
    share = np.concatenate([np.linspace(1, 0.9, top), *[np.linspace(0.2 * i, 0.2 * i - 0.1, per_quantile)
                                                         for i in range(1, 6)]])  # fmt: skip
    order = np.lexsort((rank, group))
    group, rank, share = group[order], rank[order], share[order]
    with pq.ParquetWriter(folder / "examples.parquet", EXAMPLE_SCHEMA) as writer:
        for begin in range(0, len(ids), 64):
            some = ids[begin : begin + 64]
            count = len(some) * each
            tokens = np.minimum(generator.zipf(1.3, (count, width)) + 6, VOCABULARY - 1)
            tokens = np.where((tokens >= len(WORDS)) & (tokens < len(WORDS) + len(HOSTILE)), 7, tokens)
            latent = np.repeat(some, each)
            peaks = np.where((latent % 2 == 1) & (np.tile(rank, len(some)) % 2 == 1), 0, latent % len(WORDS))
            tokens[:, BEFORE] = peaks
            if hostile:
                at = np.nonzero(latent == 1)[0]
                tokens[at[:, None], np.arange(len(HOSTILE))] = len(WORDS) + np.arange(len(HOSTILE))
            activation = (np.tile(share, len(some)) * np.repeat(most[begin : begin + 64], each)).astype(np.float32)
            values = np.zeros((count, width), np.float32)
            values[:, BEFORE] = activation
            values[:, BEFORE + 1] = activation / 3
            writer.write_table(pa.table({
                "latent": pa.array(latent, pa.int32()),
                "group": pa.array(np.tile(group, len(some))),
                "rank": pa.array(np.tile(rank, len(some)), pa.int32()),
                "activation": pa.array(activation, pa.float32()),
                "row": pa.array(generator.integers(0, TOKENS // 128, count), pa.int64()),
                "position": pa.array(generator.integers(1, 128, count), pa.int32()),
                "peak": pa.array(np.full(count, BEFORE), pa.int32()),
                "tokens": _lists(tokens, pa.int32()),
                "activations": _lists(values, pa.float32()),
            }, EXAMPLE_SCHEMA))  # fmt: skip


# ---- screenshots ----------------------------------------------------------------------------------------------------

SHOTS = {  # width, height, colour scheme, what the address asks for
    "desktop-light": (1280, 860, "light", "latent={latent}"),
    "desktop-dark": (1280, 860, "dark", "latent={latent}"),
    "overview": (1280, 860, "light", ""),
    "search": (1280, 860, "light", "q=return"),
    "phone": (390, 844, "light", ""),
    "phone-latent": (390, 844, "light", "latent={latent}"),
    "phone-dark": (390, 844, "dark", "latent={latent}"),
}


def take_screenshots(
    page_file: Path, folder: Path, latent: int = 0, names: Sequence[str] = (), browser: Any = None
) -> None:
    """Pictures `NAME.png` of a page in a folder: all of `SHOTS`, or those named. In a Playwright browser, one of their
    own unless one is given."""
    from playwright.sync_api import sync_playwright

    if browser is None:
        with sync_playwright() as playwright:
            own = playwright.chromium.launch(executable_path=CHROMIUM, args=list(CHROMIUM_SWITCHES))
            take_screenshots(page_file, folder, latent, names, own)
            return own.close()
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or SHOTS:
        width, height, scheme, asked = SHOTS[name]
        size = {"width": width, "height": height}
        page = browser.new_page(viewport=size, color_scheme=scheme, device_scale_factor=2)
        page.goto(f"{page_file.resolve().as_uri()}#{asked.format(latent=latent)}")
        page.locator("body[data-ready]").wait_for()
        page.screenshot(path=folder / f"{name}.png", animations="disabled")
        page.close()
    return None


def main() -> None:
    from penstock_dashboards.features import write_page

    parser = argparse.ArgumentParser(description="Write a sample's page and take screenshots of it.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--latents", type=int, default=1024)
    parser.add_argument("--latent", type=int, default=0, help="the one that the screenshots show")
    parser.add_argument("--page", type=Path, help="of this page instead")
    arguments = parser.parse_args()
    page = arguments.page
    if page is None:
        written = write_features(arguments.folder / "features", arguments.latents)
        page = write_page(written, arguments.folder / "features.html")
    take_screenshots(page, arguments.folder, arguments.latent)


if __name__ == "__main__":
    main()
