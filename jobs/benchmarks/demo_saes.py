"""SAEs of the demo model, trained here in seconds, and prompts: what benchmarks and tests of analysis look at."""

from pathlib import Path
from typing import Any

from penstock.activations import from_wire
from penstock.batches import batches
from penstock.home import Home
from penstock.model_host import ModelHost
from penstock.plan import read_sweep, training_settings
from penstock.resolved import ResolvedSweep
from penstock.storage import Storage
from penstock.tokens import build_token_store
from sae_core import SAETrainer, calibrate

HOOK_POINTS = ("blocks.1.hook_resid_post", "blocks.4.hook_resid_post")
SPEC = f"""\
name: analysis
model: {{name: demo}}
data: {{dataset: demo, context_size: 128, search_tokens: 1000, report_tokens: 4000, block_tokens: %s}}
hook_points: [{", ".join(HOOK_POINTS)}]
train: {{tokens: %s, batch_tokens: 512, lr: 4.0e-3, lr_warm_up_steps: 20, dead_after_tokens: %s}}
saes: [{{architecture: topk, d_sae: 4x, k: 16}}]
baselines: {{k: []}}
"""
PROMPTS = [
    "import os\n\ndef read(path):\n    with open(path) as f:\n        return f.",
    "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n    return total / len(",
    "class Stack:\n    def __init__(self, items):\n        self.items = list(items)\n\n"
    "    def pop(self):\n        return self.",
    "try:\n    import json\nexcept ImportError:\n    json =",
    "def main(argv=None):\n    if argv is None:\n        argv = sys.",
    "for key, value in sorted(table.items()):\n    print(key,",
    "if not isinstance(name, str):\n    raise TypeError('name must be a string, not %r' %",
    "def __eq__(self, other):\n    if not isinstance(other, Point):\n        return",
]  # fmt: skip


def train_saes(folder: Path, tokens: int = 250_000) -> dict[str, Path]:
    """Train a topk SAE (d_sae 512, k 16) at each of `HOOK_POINTS` on that many tokens: the folder of each, as
    `penstock pull` would write it."""
    (folder / "spec.yaml").write_text(SPEC % (min(65_536, tokens), tokens, min(60_000, tokens // 4)))
    spec, description = read_sweep(folder / "spec.yaml")
    home = Home(folder / "home")
    storage = Storage(home.storage_uri(None))
    store = build_token_store(spec.data, spec.model, spec.train, storage)
    sweep = ResolvedSweep(spec, description, store, storage, home)
    host = ModelHost(spec.model, device="cpu")
    settings = training_settings(spec.train)
    trainers: dict[str, SAETrainer] = {}
    for block in range(sweep.schedule.n_blocks):
        made = host.harvest(store, spec.data, block, HOOK_POINTS)
        for sae in sweep.saes:
            activations = from_wire(made[sae.reads], spec.model.dtype)
            if block == 0:
                trainers[sae.sae_id] = SAETrainer(sae.settings, settings, calibrate(activations))
            for _, batch in batches(sweep.schedule, block, len(activations), 0):
                trainers[sae.sae_id].train_step(activations[batch])
    folders: dict[str, Any] = {}
    for sae in sweep.saes:
        trainer = trainers[sae.sae_id]
        folders[sae.reads] = folder / sae.reads
        trainer.export({**sweep.metadata, "hook_name": sae.reads}).save(folders[sae.reads], sparsity=trainer.sparsity())
    return folders
