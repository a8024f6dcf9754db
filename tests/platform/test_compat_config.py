"""SAELens' keywords of a training run, as a sweep's spec."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import penstock.compat as compat
from penstock.compat import (
    KEYWORDS,
    BatchTopKTrainingSAEConfig,
    CompatibilityNotice,
    HookedSAETransformer,
    JumpReLUTrainingSAEConfig,
    LanguageModelSAERunnerConfig,
    LoggingConfig,
    MatryoshkaBatchTopKTrainingSAEConfig,
    SAETrainingRunner,
    StandardTrainingSAEConfig,
    TopKTrainingSAEConfig,
)
from penstock.compat.config import resolve
from penstock.errors import ConfigError, UserError

HOOK = "blocks.4.hook_resid_post"
DEMO = {"model_name": "demo", "hook_name": HOOK, "dataset_path": "demo", "training_tokens": 1_000_000}
# Said of every script that leaves these two open.
OPEN = {"exclude_special_tokens": False, "seqpos_slice": (0, None)}


def spec_of(**keywords):
    return resolve(LanguageModelSAERunnerConfig(**(DEMO | OPEN | keywords))).spec


def notices(**keywords) -> list[str]:
    return list(resolve(LanguageModelSAERunnerConfig(**(DEMO | OPEN | keywords))).notices)


def sae_of(**keywords):
    (sae,) = spec_of(**keywords).saes
    return sae


def test_the_script_that_circulates():
    spec = spec_of(
        hook_layer=4, d_in=128, architecture="standard", d_sae=128 * 8, activation_fn="relu", lr=4e-4,
        l1_coefficient=5, l1_warm_up_steps=100, train_batch_size_tokens=2048, context_size=64, n_checkpoints=5,
        log_to_wandb=True, wandb_project="sae-training", checkpoint_path="checkpoints", adam_beta1=0.0,
        store_batch_size_prompts=16, n_batches_in_buffer=128, dead_feature_window=50, lr_warm_up_steps=10,
        lr_decay_steps=60, seed=7, prepend_bos=False, n_eval_batches=4, eval_batch_size_prompts=20,
        run_name="my run/1", normalize_activations="expected_average_only_in",
    )  # fmt: skip
    assert spec.saes == [{"architecture": "standard", "d_sae": 1024, "seed": 7, "l1_coefficient": 5.0,
                          "l1_warm_up_steps": 100, "normalize_activations": "expected_average_only_in"}]  # fmt: skip
    assert spec.hook_points == [HOOK] and spec.name == "my-run-1"
    assert spec.model.harvest_rows == 16 and spec.model.processing == "none"
    assert spec.data.block_tokens == 128 * 16 * 64 and spec.data.seed == 7 and spec.data.bos is False
    assert spec.data.report_tokens == 4 * 20 * 64 and spec.data.context_size == 64
    train = spec.train
    assert (train.tokens, train.batch_tokens, train.lr, train.keep) == (1_000_000, 2048, 4e-4, 5)
    assert (train.lr_warm_up_steps, train.lr_decay, train.lr_decay_steps) == (10, "linear", 60)
    assert train.dead_after_tokens == 50 * 2048 and train.adam_betas == (0.0, 0.999)
    assert spec.tracking.wandb_project == "sae-training" and spec.baselines.k == []
    assert not spec.data.exclude.special_tokens and spec.data.exclude.first_positions == 0


@pytest.mark.parametrize(
    ("columns", "tokenized", "expected"),
    [
        (["text"], None, (None, "text")),
        (["tokens", "text"], None, ("tokens", "text")),
        (["input_ids"], True, ("input_ids", "text")),
        (["tokens", "text"], False, (None, "text")),
        (["problem"], None, (None, "problem")),
    ],
)
def test_the_column_is_found_and_a_small_dataset_is_begun_again(tmp_path, columns, tokenized, expected):
    values = {"tokens": [5] * 40, "input_ids": [5] * 40, "text": "def area(width): return 1", "problem": "x = 1 + 2"}
    rows = [{name: values[name] for name in columns} for _ in range(200)]
    for index, row in enumerate(rows):  # which split a document is in depends on it
        for name in columns:
            row[name] = [*row[name], index] if isinstance(row[name], list) else f"{row[name]} {index}"
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    data = spec_of(
        dataset_path=str(tmp_path / "data.jsonl"), is_dataset_tokenized=tokenized, context_size=16, n_eval_batches=1,
        eval_batch_size_prompts=1, training_tokens=200_000,
    ).data  # fmt: skip
    assert (data.tokens_column, data.text_column) == expected and data.epochs > 1


def test_the_names_of_the_first_versions():
    older = dict(DEMO)
    older["hook_point"], older["total_training_tokens"] = older.pop("hook_name"), older.pop("training_tokens")
    cfg = LanguageModelSAERunnerConfig(
        **older, hook_point_layer=4, train_batch_size=1024, store_batch_size=8, hook_point_head_index=None,
        expansion_factor=2, lr_scheduler_name="constantwithwarmup", lr_warm_up_steps=5, l1_coefficient=2e-3,
    )  # fmt: skip
    spec = resolve(cfg).spec
    assert spec.train.batch_tokens == 1024 and spec.model.harvest_rows == 8 and spec.saes[0]["d_sae"] == 256
    assert cfg.hook_name == cfg.hook_point == HOOK and cfg.total_training_steps == 976
    assert spec.train.lr_decay == "constant" and spec.train.lr_warm_up_steps == 5


@pytest.mark.parametrize(
    ("sae", "expected"),
    [
        (TopKTrainingSAEConfig(d_in=128, d_sae=512, k=16), {"architecture": "topk", "k": 16}),
        (BatchTopKTrainingSAEConfig(d_in=128, d_sae=512, k=8.5, aux_loss_coefficient=0.5),
         {"architecture": "batch_topk", "k": 8.5, "aux_coefficient": 0.5}),
        (MatryoshkaBatchTopKTrainingSAEConfig(d_in=128, d_sae=512, k=16, matryoshka_widths=[64, 128]),
         {"architecture": "matryoshka", "k": 16, "widths": [64, 128, 512]}),
        (StandardTrainingSAEConfig(d_in=128, d_sae=512, l1_coefficient=3),
         {"architecture": "standard", "l1_coefficient": 3.0, "normalize_activations": "none"}),
        (JumpReLUTrainingSAEConfig(d_in=128, d_sae=512, l0_coefficient=2.0, l0_warm_up_steps=9),
         {"architecture": "jumprelu", "l0_coefficient": 2.0, "sparsity": "step", "l0_warm_up_steps": 9,
          "normalize_activations": "none"}),
        (JumpReLUTrainingSAEConfig(d_in=128, d_sae=512, target_l0=20, jumprelu_sparsity_loss_mode="quadratic"),
         {"architecture": "jumprelu", "target_l0": 20, "normalize_activations": "expected_average_only_in"}),
    ],
)  # fmt: skip
def test_the_nested_configurations_of_version_6(sae, expected):
    found = sae_of(sae=sae, logger=LoggingConfig(log_to_wandb=False))
    assert found["d_sae"] == 512
    assert {name: found.get(name) for name in expected} == expected
    assert not {"l1_coefficient", "l0_coefficient"} & (found.keys() - expected.keys())


@pytest.mark.parametrize("keywords", [
    {"architecture": "topk", "k": 32},
    {"architecture": "topk", "activation_fn_kwargs": {"k": 32}},
    {"activation_fn": "topk", "activation_fn_kwargs": {"k": 32}},
])  # fmt: skip
def test_top_k_by_all_its_names(keywords):
    found = sae_of(**keywords, d_sae=256)
    assert (found["architecture"], found["k"], found["normalize_activations"]) == (
        "topk", 32, "expected_average_only_in"
    )  # fmt: skip


# ---- l1_coefficient -------------------------------------------------------------------------------------------------


def test_coefficients_of_the_older_loss_are_converted_aloud():
    """(1/d) |e|^2 / |x| + c |f|, times d |x|, is today's loss with c d |x|; and |x| is sqrt(d) here."""
    found = sae_of(l1_coefficient=8e-5)
    assert found["l1_coefficient"] == pytest.approx(8e-5 * 128**1.5, rel=1e-5)
    assert found["normalize_activations"] == "expected_average_only_in"
    (said,) = notices(l1_coefficient=8e-5)
    assert "l1_coefficient=8e-05" in said and "0.115852" in said and "128**1.5" in said


def test_a_loss_divided_by_the_norm_is_converted_by_the_norm():
    found = sae_of(l1_coefficient=2.0, mse_loss_normalization="dense_batch", normalize_activations="none")
    assert found["l1_coefficient"] == pytest.approx(2 * 128**0.5, rel=1e-5)
    assert found["normalize_activations"] == "expected_average_only_in"
    assert "128**0.5" in notices(l1_coefficient=2.0, mse_loss_normalization="dense_batch")[0]


@pytest.mark.parametrize("scale", ["none", "layer_norm", "expected_average_only_in", "constant_norm_rescale"])
def test_coefficients_of_todays_loss_stay_what_they_are(scale):
    found = sae_of(l1_coefficient=5, mse_loss_normalization=None, normalize_activations=scale)
    assert found["l1_coefficient"] == 5.0 and found["normalize_activations"] == scale
    assert notices(l1_coefficient=5, mse_loss_normalization=None, normalize_activations=scale) == []


def test_a_penalty_that_the_architecture_lacks_is_said():
    (said,) = notices(architecture="topk", k=8, l1_coefficient=5)
    assert "l1_coefficient=5" in said and "k sets its sparsity" in said


# ---- what is said ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"use_ghost_grads": True}, "dead latents are revived by this project's losses"),
        ({"b_dec_init_method": "zeros"}, "b_dec starts at the mean of the first block"),
        ({"apply_b_dec_to_input": False}, "b_dec is subtracted from the input"),
        ({"normalize_sae_decoder": False}, "penalties weigh a latent by its decoder row's norm"),
        ({"compile_llm": True}, "nothing is compiled"),
        ({"streaming": False}, "local files are read"),
        ({"act_store_device": "cpu"}, "Ray's object store"),
        ({"feature_sampling_window": 1000}, "those of the whole run"),
        ({"dead_feature_window": 1000}, "a quarter of the run"),
        ({"n_batches_in_buffer": 2}, "65,536"),
        ({"n_batches_in_buffer": 1000}, "262,144"),
        ({"is_dataset_tokenized": True}, "its text is tokenised"),
        ({"lr_scheduler_name": "cosineannealing"}, "half a cosine"),
        ({"cached_activations_path": "x"}, "use_cached_activations is False"),
        ({"dtype": "bfloat16"}, "weights and optimiser stay float32"),
        ({"wandb_log_frequency": 5}, "100 points"),
        ({"resume": True}, "goes on where it was interrupted"),
        ({"device": "mps"}, "on the CPU"),
    ],
)
def test_what_is_done_in_another_way_or_makes_no_difference_is_said(keywords, words):
    (said,) = notices(**keywords)
    assert next(iter(keywords)) in said and words in said


def test_what_a_script_leaves_open_and_is_not_as_in_saelens_is_said():
    found = resolve(LanguageModelSAERunnerConfig(**DEMO))
    assert [notice.split(":")[0] for notice in found.notices] == ["exclude_special_tokens", "seqpos_slice"]
    assert found.spec.data.exclude.special_tokens and found.spec.data.exclude.first_positions == 1


def test_it_is_said_in_one_place(tmp_path):
    cfg = LanguageModelSAERunnerConfig(**DEMO, use_ghost_grads=True, compile_sae=True)
    with pytest.warns(CompatibilityNotice) as said:
        SAETrainingRunner(cfg, home=tmp_path)
    (warning,) = said
    assert warning.filename == __file__
    assert all(word in str(warning.message) for word in ("use_ghost_grads", "compile_sae", "seqpos_slice"))


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"l1_coeficient": 5}, r"unknown keyword 'l1_coeficient'; did you mean 'l1_coefficient'\?"),
        ({"hook_layer": 3}, r"hook_layer is 3: .* is of layer 4; accepted: hook_layer=4"),
        ({"d_in": 768}, r"d_in is 768: .* has width 128; accepted: d_in=128"),
        ({"d_sae": 100, "expansion_factor": 4}, "d_sae is 100 and expansion_factor 4, which is 512"),
        ({"hook_head_index": 2}, "hook_head_index is 2: an SAE reads all heads"),
        ({"lp_norm": 0.5}, "lp_norm is 0.5: the penalty is an L1 norm"),
        ({"noise_scale": 0.1}, "noise_scale is 0.1"),
        ({"architecture": "ridge"}, "architecture is 'ridge'"),
        ({"architecture": "topk"}, "k is missing"),
        ({"architecture": "standard", "k": 3}, "k is 3 with architecture 'standard'"),
        ({"activation_fn": "tanh-relu"}, "activation_fn is 'tanh-relu'"),
        ({"from_pretrained_path": "x"}, "from_pretrained_path is 'x': training always begins anew"),
        ({"model_class_name": "HookedMamba"}, "model_class_name is 'HookedMamba'"),
        ({"model_from_pretrained_kwargs": {"n_ctx": 5}}, "model_from_pretrained_kwargs has 'n_ctx'"),
        ({"lr_scheduler_name": "cosineannealingwarmrestarts"}, "lr_scheduler_name is 'cosineannealingwarmrestarts'"),
        ({"seqpos_slice": (5, -5)}, r"seqpos_slice is \(5, -5\)"),
        ({"exclude_special_tokens": [1, 2]}, r"exclude_special_tokens is \[1, 2\]"),
        ({"use_cached_activations": True}, "cached_activations_path is missing"),
        ({"dtype": "int8"}, "dtype is 'int8'; accepted: float32"),
        ({"l1_coefficient": 0}, "l1_coefficient is 0; accepted is a number above 0"),
        ({"hook_point": HOOK}, "hook_point is given twice"),
        ({"dataset_path": ""}, "dataset_path is missing"),
        ({"lr": -1}, r"`train.lr` is -1.*\(train.lr comes from lr\)"),
        ({"training_tokens": 100}, "tokens 100 is less than one batch"),
        ({"context_size": 4000}, "reads at most 256 tokens"),
        ({"disable_concat_sequences": True}, "disable_concat_sequences is True"),
        ({"training_tokens": "2M"}, "training_tokens is '2M'; accepted is a number above 0"),
        ({"train_batch_size_tokens": 0}, "train_batch_size_tokens is 0; accepted is a number above 0"),
        ({"expansion_factor": "8x"}, "expansion_factor is '8x'; accepted is a number"),
        ({"architecture": "topk", "k": 0}, "k is 0: input should be greater than 0"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_reason(keywords, message):
    with pytest.raises(UserError, match=message):
        spec_of(**keywords)


def test_numbers_of_numpy_and_torch_are_numbers():
    found = spec_of(architecture="topk", k=torch.tensor(8), d_sae=np.int64(256), training_tokens=np.float64(1e6))
    again = spec_of(architecture="topk", k=8, d_sae=256, training_tokens=1_000_000)
    assert found == again and type(found.saes[0]["k"]) is type(found.saes[0]["d_sae"]) is int


def test_a_typo_in_a_nested_configuration_or_an_attribute_is_refused():
    with pytest.raises(ConfigError, match=r"TopKTrainingSAEConfig: unknown keyword 'kk'; did you mean 'k'\?"):
        TopKTrainingSAEConfig(d_in=128, d_sae=256, kk=3)
    with pytest.raises(ConfigError, match="LoggingConfig: unknown keyword 'wandb_projct'"):
        LoggingConfig(wandb_projct="x")
    cfg = LanguageModelSAERunnerConfig(**DEMO)
    with pytest.raises(ConfigError, match="unknown keyword 'traning_tokens'"):
        cfg.traning_tokens = 3
    cfg.training_tokens = 500_000
    assert resolve(cfg).spec.train.tokens == 500_000


@pytest.mark.parametrize("override", ["override_dataset", "override_model", "override_sae", "resume_from_checkpoint"])
def test_overrides_are_refused_with_what_to_do_instead(override, tmp_path):
    with pytest.raises(ConfigError, match=f"{override} is a list.*accepted:"):
        SAETrainingRunner(LanguageModelSAERunnerConfig(**DEMO), **{override: [1]}, home=tmp_path)


def test_names_that_are_not_here_say_what_there_is_instead():
    with pytest.raises(ImportError, match=r"no MultiSAETrainingRunner: .*penstock\.train"):
        from penstock.compat import MultiSAETrainingRunner  # noqa: F401
    assert not hasattr(compat, "nonsense")


def test_the_table_of_keywords_can_be_printed():
    done = subprocess.run([sys.executable, "-m", "penstock.compat"], capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in KEYWORDS)


# ---- the model ------------------------------------------------------------------------------------------------------


def test_models_are_processed_as_the_names_promise():
    from sae_core.model_processing import state_of

    plain = HookedSAETransformer.from_pretrained_no_processing("demo")
    processed = HookedSAETransformer.from_pretrained("demo")
    for step in ("fold_ln", "center_writing_weights"):
        assert state_of(plain, step) is False and state_of(processed, step) is True
    assert isinstance(plain, HookedSAETransformer) and plain.acts_to_saes == {}
    centred = HookedSAETransformer.from_pretrained_no_processing("demo", center_writing_weights=True)
    assert state_of(centred, "center_writing_weights") is True and state_of(centred, "fold_ln") is False


@pytest.mark.parametrize("load", [HookedSAETransformer.from_pretrained, HookedSAETransformer.boot_transformers])
def test_gradients_reach_the_hooks_of_scripts(load):
    model, seen = load("demo"), {}
    model.add_hook("blocks.2.hook_resid_post", lambda gradient, hook: seen.update({hook.name: gradient}), "bwd")
    model("class Shape:", return_type="loss").backward()
    model.reset_hooks()
    assert seen and all(gradient.abs().sum() > 0 for gradient in seen.values())


def test_arguments_of_models_are_honoured_or_refused():
    with pytest.raises(ConfigError, match=r"first_n_layers is 2; accepted: None; the whole model"):
        HookedSAETransformer.from_pretrained("demo", first_n_layers=2)
    with pytest.raises(ConfigError, match="unknown argument 'fold_nl'"):
        HookedSAETransformer.from_pretrained("demo", fold_nl=True)
    with pytest.raises(ConfigError, match=r"with_saes\(model\)"):
        HookedSAETransformer({})
    model = HookedSAETransformer.boot_transformers("demo", dtype="bfloat16", default_prepend_bos=False, n_devices=1)
    assert str(model.W_E.dtype) == "torch.bfloat16" and model.cfg.default_prepend_bos is False
