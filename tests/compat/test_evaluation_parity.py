"""Every number of an evaluation equals what the released sae_lens package's `run_evals` says of the same folder on the
same model and tokens."""

import inspect
import json.decoder
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from penstock.models import load_model
from penstock.spec import ModelSpec
from sae_core import SAE, SAETrainer, TrainingSettings, calibrate, evaluate_rows, metrics_of, parse_settings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    sae_lens = pytest.importorskip("sae_lens", reason="sae_lens is not installed (extra `compat`)")
    from sae_lens.evals import EvalConfig, get_eval_everything_config
    from sae_lens.training.activation_scaler import ActivationScaler
    from transformer_lens import HookedTransformer, HookedTransformerConfig

pytestmark = [pytest.mark.compat, pytest.mark.filterwarnings("ignore")]

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "jobs/benchmarks"))
from evaluation import THEIR_NAMES  # noqa: E402

ROWS, CONTEXT, D_SAE = 6, 64, 192
SETTINGS = {
    "standard": {"architecture": "standard", "l1_coefficient": 0.3},
    "gated": {"architecture": "gated", "l1_coefficient": 0.3},
    "topk": {"architecture": "topk", "k": 9},
    "jumprelu": {"architecture": "jumprelu", "target_l0": 9},
    "batch_topk": {"architecture": "batch_topk", "k": 8.5},
    "matryoshka": {"architecture": "matryoshka", "k": 8.5},
}


class Rows:
    """The part of sae_lens' activation store that its evaluation reads: the rows in order, and again after a reset."""

    store_batch_size_prompts = ROWS
    context_size = CONTEXT

    def __init__(self, tokens: torch.Tensor):
        self.tokens, self.next = tokens, 0

    def get_batch_tokens(self, batch_size: int) -> torch.Tensor:
        self.next += batch_size
        return self.tokens[self.next - batch_size : self.next]

    def reset_input_dataset(self) -> None:
        self.next = 0


@pytest.fixture(scope="module")
def demo():
    """The demo language model in the form in which the platform runs models, and rows of text it knows."""
    model = load_model(ModelSpec(name="demo"), "cpu")
    ids = model.tokenizer(inspect.getsource(json.decoder))["input_ids"][: ROWS * CONTEXT]
    return model, torch.tensor(ids).view(ROWS, CONTEXT)


@pytest.fixture(scope="module")
def hooked():
    """A random HookedTransformer, the model of most older work."""
    config = HookedTransformerConfig(
        n_layers=3, d_model=32, n_ctx=CONTEXT, d_head=8, n_heads=4, d_vocab=50, act_fn="gelu", seed=1, device="cpu"
    )
    model = HookedTransformer(config)
    for parameter in model.parameters():  # the usual start is too small for layers to matter
        parameter.data.mul_(4)
    return model, torch.randint(0, 50, (ROWS, CONTEXT), generator=torch.Generator().manual_seed(1))


def saved_saes(model, tokens, hook_point, folder):
    """A folder for each architecture, of an SAE trained for a moment on the model's own activations."""
    seen = []
    hook = (hook_point, lambda activation, hook: seen.append(activation.detach().flatten(2).flatten(0, 1)))
    with torch.no_grad():
        model.run_with_hooks(tokens, return_type="logits", fwd_hooks=[hook])
    x = seen[0]
    training = TrainingSettings(steps=60, batch_tokens=64, lr=3e-3, dead_after_tokens=500)
    for name, settings in SETTINGS.items():
        trainer = SAETrainer(parse_settings({**settings, "d_sae": D_SAE}), training, calibrate(x))
        for step in range(training.steps):
            start = step * 64 % (len(x) - 64)
            trainer.train_step(x[start : start + 64])
        # Thresholds not set on these very tokens: one would be an activation, and rounding decide whether it counts.
        trainer.export({"hook_name": hook_point, "model_name": "some"}).save(folder / name)


def their_evaluation(folder, model, tokens, excluded, batches=1):
    everything, features = sae_lens.run_evals(
        sae_lens.SAE.load_from_disk(folder),
        Rows(tokens),
        model,
        ActivationScaler(),
        get_eval_everything_config(ROWS // batches, batches, batches),
        exclude_special_tokens=excluded,
    )
    values = {name: value for group in everything.values() for name, value in group.items()}
    return {name: values[theirs] for name, theirs in THEIR_NAMES.items()}, features["feature_density"]


@pytest.mark.parametrize("excluded", [0, 8])  # how many of the most frequent tokens
@pytest.mark.parametrize(
    ("of", "hook_point"),
    [
        ("demo", "blocks.3.hook_resid_post"),
        ("demo", "blocks.1.hook_resid_pre"),
        ("demo", "blocks.2.hook_mlp_out"),
        ("demo", "blocks.0.attn.hook_z"),
        ("hooked", "blocks.1.hook_resid_post"),
        ("hooked", "blocks.1.hook_resid_mid"),
        ("hooked", "blocks.1.attn.hook_z"),
    ],
)
def test_every_number_equals_run_evals(of, hook_point, excluded, request, tmp_path):
    model, tokens = request.getfixturevalue(of)
    excluded = tokens.flatten().bincount().argsort(descending=True)[:excluded].tolist()
    kept = ~torch.isin(tokens, torch.tensor(excluded, dtype=torch.long))
    saved_saes(model, tokens, hook_point, tmp_path)
    saes = {name: SAE.load(tmp_path / name) for name in SETTINGS}
    results = evaluate_rows(model, saes, hook_point, tokens, kept, rows_per_forward=4)
    for name, sums in results.items():
        ours = sums.metrics()
        expected, density = their_evaluation(tmp_path / name, model, tokens, excluded)
        assert {key: ours[key] for key in expected} == pytest.approx(expected, rel=1e-4), name
        assert sums.feature_density == pytest.approx(density, rel=1e-5), name
        assert ours["dead_fraction"] == density.count(0.0) / D_SAE
        assert 0 < ours["l0"] < D_SAE and ours["ce_increase"] == pytest.approx(ours["ce_sae"] - ours["ce_clean"])


def test_over_several_batches_only_their_bias_depends_on_the_cut(demo, tmp_path):
    model, tokens = demo
    hook_point = "blocks.3.hook_resid_post"
    saved_saes(model, tokens, hook_point, tmp_path)
    kept = torch.ones_like(tokens, dtype=torch.bool)
    saes = {"topk": SAE.load(tmp_path / "topk")}
    sums = evaluate_rows(model, saes, hook_point, tokens, kept, rows_per_forward=4)["topk"]
    expected, density = their_evaluation(tmp_path / "topk", model, tokens, [], batches=3)
    bias = expected.pop("relative_reconstruction_bias")  # the mean of the batches' ratios
    assert {key: sums.metrics()[key] for key in expected} == pytest.approx(expected, rel=1e-4)
    assert sums.feature_density == pytest.approx(density, rel=1e-5)
    batches = {name: values.reshape(3, 2).sum(1) for name, values in sums.rows().items()}
    assert np.mean(metrics_of(batches)["relative_reconstruction_bias"]) == pytest.approx(bias, rel=1e-4)


def test_feature_density_alone_is_asked_for_by_its_own_flag(demo, tmp_path):
    model, tokens = demo
    hook_point = "blocks.3.hook_resid_post"
    saved_saes(model, tokens, hook_point, tmp_path)
    kept = torch.ones_like(tokens, dtype=torch.bool)
    saes = {name: SAE.load(tmp_path / name) for name in SETTINGS}
    results = evaluate_rows(model, saes, hook_point, tokens, kept, rows_per_forward=ROWS)
    flag = EvalConfig(batch_size_prompts=ROWS, compute_featurewise_density_statistics=True)
    for name, sums in results.items():
        theirs = sae_lens.SAE.load_from_disk(tmp_path / name)
        _, features = sae_lens.run_evals(theirs, Rows(tokens), model, ActivationScaler(), flag, {}, False)
        assert sums.feature_density == pytest.approx(features["feature_density"], rel=1e-5), name
