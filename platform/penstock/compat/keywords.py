"""Every keyword of SAELens' `LanguageModelSAERunnerConfig`, of its several ages, and what becomes of it here.

None is ever dropped: a keyword is

    mapped         to a field of the sweep's spec
    checked        against the model or another keyword, and refused where they differ
    replaced       by this project's own way of doing the same, which is said when another one is asked for
    no difference  here, which is said when it is given another value than SAELens' own
    limited        to the values that are named; others are refused, with the reason

`python -m penstock.compat` prints the table.
"""

from dataclasses import dataclass
from typing import Any, Literal

Treatment = Literal["mapped", "checked", "replaced", "no difference", "limited"]


@dataclass(frozen=True)
class Keyword:
    """default: SAELens' own (of what is replaced, the one that comes to the same here), which a configuration has as
    its attribute where the keyword is not given. text: the field that it is mapped to, or what is said. accepted: the
    values that are not refused."""

    default: Any
    treatment: Treatment
    text: str
    accepted: tuple[Any, ...] | None = None


def _mapped(default: Any, text: str) -> Keyword:
    return Keyword(default, "mapped", text)


def _checked(default: Any, text: str) -> Keyword:
    return Keyword(default, "checked", text)


def _replaced(default: Any, text: str) -> Keyword:
    return Keyword(default, "replaced", text)


def _same(default: Any, text: str) -> Keyword:
    return Keyword(default, "no difference", text)


def _limited(default: Any, text: str, *accepted: Any) -> Keyword:
    return Keyword(default, "limited", text, accepted or (default,))


_DEAD = "dead latents are revived by this project's losses for them (aux_coefficient, pre_act_coefficient)"
_START = "SAEs start in this project's way: decoder rows of random directions and equal norm, the encoder its transpose"
_POINTS = "a curve has 100 points, and the figures are measured at the end, whatever is logged"

KEYWORDS: dict[str, Keyword] = {
    # the model
    "model_name": _mapped("gelu-2l", "model.name"),
    "model_class_name": _limited(
        "HookedTransformer", "models are loaded as TransformerBridge, which reads the same hook points",
        "HookedTransformer", "TransformerBridge", "HookedSAETransformer", "SAETransformerBridge",
    ),
    "model_from_pretrained_kwargs": _mapped(None, "model.processing (fold_ln, center_writing_weights, ...), "
                                                  "model.dtype, model.revision, model.trust_remote_code"),
    "model_kwargs": _limited({}, "no other arguments can be handed to the model's forward pass", {}, None),
    "hook_name": _mapped("blocks.0.hook_mlp_out", "hook_points"),
    "hook_layer": _checked(None, "against the layer in hook_name"),
    "hook_eval": _same("NOT_IN_USE", "SAELens does not use it either"),
    "hook_head_index": _limited(None, "an SAE reads all heads of hook_z together, not one", None),
    # the data
    "dataset_path": _mapped("", "data.dataset; one that is too small is begun again, and the plan says how often"),
    "dataset_trust_remote_code": _same(True, "code that comes with a dataset is never run"),
    "streaming": _same(True, "datasets of the hub are streamed, local files are read"),
    "is_dataset_tokenized": _checked(None, "a column tokens or input_ids is data.tokens_column, else text is "
                                           "data.text_column"),
    "use_chat_formatting": _limited(False, "documents are tokenised as they are", False),
    "context_size": _mapped(128, "data.context_size"),
    "prepend_bos": _mapped(True, "data.bos"),
    "disable_concat_sequences": _limited(False, "documents are joined and cut into rows", False),
    "sequence_separator_token": _replaced("bos", "documents are separated by the EOS token (BOS where there is none)"),
    "exclude_special_tokens": _mapped(None, "data.exclude.special_tokens, true unless given"),
    "seqpos_slice": _mapped(None, "data.exclude.first_positions, 1 unless given; of a slice (N, None)"),
    "use_cached_activations": _mapped(False, "data.activations, the folder cached_activations_path"),
    "cached_activations_path": _mapped(None, "data.activations, with use_cached_activations"),
    "n_batches_in_buffer": _mapped(20, "data.block_tokens, the unit of shuffling: n_batches_in_buffer * "
                                       "store_batch_size_prompts * context_size, from 65,536 to 262,144"),
    "store_batch_size_prompts": _mapped(32, "model.harvest_rows"),
    "activations_mixing_fraction": _same(0.5, "a block of activations is permuted as a whole, and no buffer is carried "
                                              "over"),
    "prefetch_llm_batches": _same(False, "model hosts always work ahead of training"),
    "n_batches_for_norm_estimate": _same(1000, "the norm is measured once, on the first block, and stored"),
    "seed": _mapped(42, "data.seed and the SAE's seed"),
    # where and in what type
    "device": _mapped(None, "resources.gpus_per_host and gpus_per_pack; a GPU where there is one unless given"),
    "llm_device": _same(None, "Ray places model hosts and packs"),
    "act_store_device": _same(None, "activations lie in Ray's object store, in the memory of the machine"),
    "dtype": _mapped("float32", "model.dtype and train.encoder_dtype; weights and optimiser are float32"),
    "autocast": _mapped(False, "train.encoder_dtype: bfloat16"),
    "autocast_lm": _mapped(False, "model.dtype: bfloat16"),
    "compile_llm": _same(False, "nothing is compiled"),
    "llm_compilation_mode": _same(None, "nothing is compiled"),
    "compile_sae": _same(False, "nothing is compiled"),
    "sae_compilation_mode": _same(None, "nothing is compiled"),
    # the SAE
    "architecture": _mapped("standard", "architecture: standard, gated, topk, batchtopk, jumprelu, "
                                        "matryoshka_batchtopk"),
    "d_in": _checked(None, "against the model's width at hook_name"),
    "d_sae": _mapped(None, "d_sae"),
    "expansion_factor": _mapped(None, "d_sae, as a multiple of d_in; 4 unless d_sae is given"),
    "activation_fn": _mapped("relu", "architecture: topk for `topk`"),
    "activation_fn_kwargs": _mapped({}, "k"),
    "k": _mapped(None, "k"),
    "normalize_activations": _mapped(None, "normalize_activations; unless given none with an l1_coefficient or "
                                           "l0_coefficient, whose meaning depends on it, else "
                                           "expected_average_only_in"),
    "reshape_activations": _limited("none", "activations of hook_z are reshaped without being asked", "none", "hook_z"),
    "apply_b_dec_to_input": _replaced(True, "b_dec is subtracted from the input; without it the same functions can be "
                                            "learned, b_enc making up for it"),
    "b_dec_init_method": _replaced("mean", "b_dec starts at the mean of the first block"),
    "decoder_init_norm": _replaced(0.1, _START),
    "decoder_heuristic_init": _replaced(True, _START),
    "decoder_heuristic_init_norm": _replaced(0.1, _START),
    "decoder_orthogonal_init": _replaced(False, _START),
    "init_encoder_as_decoder_transpose": _replaced(True, _START),
    "normalize_sae_decoder": _replaced(True, "penalties weigh a latent by its decoder row's norm, which has the same "
                                             "minimum, and rows are saved with norm 1"),
    "scale_sparsity_penalty_by_decoder_norm": _replaced(True, "penalties always weigh a latent by its decoder row's "
                                                              "norm"),
    "noise_scale": _limited(0.0, "no noise is added to activations", 0, 0.0, None),
    "use_sparse_activations": _same(False, "steps work on active latents alone wherever that is faster"),
    "metadata": _limited(None, "the metadata say what the SAE was made from, and nothing else", None, {}),
    # its loss
    "mse_loss_normalization": _mapped(None, "l1_coefficient, see there: dense_batch divides each token's squared error "
                                            "by its norm, sqrt(d_in) here"),
    "l1_coefficient": _mapped(None, "l1_coefficient, 1 unless given (l0_coefficient of jumprelu); one below 0.01 "
                                    "belongs to the older loss that is averaged over d_in and divided by the norm, and "
                                    "is multiplied by d_in**1.5, one with mse_loss_normalization by d_in**0.5"),
    "lp_norm": _limited(1.0, "the penalty is an L1 norm", 1, 1.0),
    "l1_warm_up_steps": _mapped(0, "l1_warm_up_steps (l0_warm_up_steps of jumprelu)"),
    "aux_loss_coefficient": _mapped(1.0, "aux_coefficient"),
    "use_ghost_grads": _replaced(False, f"there are no ghost gradients: {_DEAD}"),
    "rescale_acts_by_decoder_norm": _limited(True, "top-k SAEs rank latents by the length that they add", True),
    "topk_threshold_lr": _replaced(0.01, "the threshold is calibrated on the last tokens of training"),
    "matryoshka_widths": _mapped(None, "widths, with d_sae as the last"),
    "use_matryoshka_aux_loss": _replaced(False, _DEAD),
    "l0_coefficient": _mapped(None, "l0_coefficient"),
    "l0_warm_up_steps": _mapped(0, "l0_warm_up_steps"),
    "target_l0": _mapped(None, "target_l0, which a controller of the coefficient holds"),
    "jumprelu_init_threshold": _mapped(None, "threshold_at_start; where some of the latents are active unless given"),
    "jumprelu_bandwidth": _mapped(None, "bandwidth; 1 unless given"),
    "jumprelu_sparsity_loss_mode": _mapped("step", "sparsity: step or tanh"),
    "jumprelu_tanh_scale": _mapped(4.0, "tanh_scale"),
    "jumprelu_ste_to_input": _mapped(None, "ste_to_input"),
    "pre_act_loss_coefficient": _mapped(None, "pre_act_coefficient"),
    # training
    "training_tokens": _mapped(2_000_000, "train.tokens"),
    "train_batch_size_tokens": _mapped(4096, "train.batch_tokens"),
    "lr": _mapped(3e-4, "train.lr"),
    "lr_scheduler_name": _mapped("constant", "train.lr_decay: constant, cosineannealing"),
    "lr_warm_up_steps": _mapped(0, "train.lr_warm_up_steps"),
    "lr_decay_steps": _mapped(0, "train.lr_decay_steps"),
    "lr_end": _limited(None, "a decay ends at 0", None, 0, 0.0),
    "n_restart_cycles": _limited(1, "the lr is not restarted", 1),
    "adam_beta1": _mapped(0.9, "train.adam_betas"),
    "adam_beta2": _mapped(0.999, "train.adam_betas"),
    "from_pretrained_path": _limited(None, "training always begins anew", None),
    "finetuning_tokens": _limited(0, "there is no fine-tuning after training", 0, None),
    "finetuning_method": _limited(None, "there is no fine-tuning after training", None),
    "dead_feature_window": _mapped(1000, "train.dead_after_tokens, in tokens; at most a quarter of the run"),
    "feature_sampling_window": _same(2000, "firing rates are those of the whole run"),
    "dead_feature_threshold": _same(1e-8, "dead is a latent that has not fired at all"),
    "feature_sampling_method": _limited(None, "dead latents are not resampled; with penstock.train: "
                                              "resample_every_steps", None, "none"),
    "feature_reinit_scale": _same(0.2, "dead latents are not resampled"),
    # what is kept and shown
    "n_checkpoints": _mapped(0, "train.keep: so many SAEs on the way, folded, below checkpoint_path"),
    "checkpoint_path": _mapped("checkpoints", "a folder with the SAEs, each ready for use: SAE_ID/TOKENS and "
                                              "SAE_ID/final_TOKENS"),
    "save_final_checkpoint": _same(False, "the SAE is always saved"),
    "output_path": _mapped(None, "a folder with the SAE alone"),
    "resume": _same(False, "the same script goes on where it was interrupted, from its last checkpoint"),
    "resume_from_checkpoint": _limited(None, "the same script goes on where it was interrupted, from its last "
                                             "checkpoint, without being told", None),
    "n_eval_batches": _mapped(None, "data.report_tokens: n_eval_batches * eval_batch_size_prompts * context_size; "
                                    "50,000 unless given"),
    "eval_batch_size_prompts": _mapped(None, "data.report_tokens, with n_eval_batches; store_batch_size_prompts unless "
                                             "given"),
    "verbose": _same(True, "progress is always printed"),
    "log_to_wandb": _mapped(None, "tracking.wandb_project; no unless given"),
    "wandb_project": _mapped("sae_lens_training", "tracking.wandb_project, with log_to_wandb"),
    "wandb_entity": _mapped(None, "tracking.wandb_entity"),
    "wandb_id": _replaced(None, "a run of W&B is called by the SAE's id"),
    "run_name": _mapped(None, "name, of the sweep"),
    "wandb_log_frequency": _replaced(10, _POINTS),
    "eval_every_n_wandb_logs": _replaced(100, _POINTS),
    "log_activations_store_to_wandb": _limited(False, "W&B mirrors curves and figures alone", False),
    "log_optimizer_state_to_wandb": _limited(False, "W&B mirrors curves and figures alone", False),
    "log_weights_to_wandb": _same(True, "W&B mirrors curves and figures; the weights are in MLflow and on disk"),
    "sae_lens_version": _same(None, "it is no configuration"),
    "sae_lens_training_version": _same(None, "it is no configuration"),
}  # fmt: skip

# Names of versions 1 and 2, and what they have been called since.
OLDER = {
    "hook_point": "hook_name",
    "hook_point_layer": "hook_layer",
    "hook_point_head_index": "hook_head_index",
    "hook_point_eval": "hook_eval",
    "train_batch_size": "train_batch_size_tokens",
    "store_batch_size": "store_batch_size_prompts",
    "total_training_tokens": "training_tokens",
    "activation_fn_str": "activation_fn",
    "matryoshka_steps": "matryoshka_widths",
}


def as_text() -> str:
    """The table, one keyword a line."""
    from penstock.text import text_table

    rows = []
    for name, keyword in KEYWORDS.items():
        accepted = f"; accepted: {shown(keyword.accepted)}" if keyword.accepted else ""
        rows.append([name, keyword.treatment, f"{keyword.text}{accepted}"])
    rows += [[old, "mapped", f"an older name of {new}"] for old, new in OLDER.items()]
    return text_table(["keyword", "treatment", "to, or why"], rows)


def shown(values: tuple[Any, ...]) -> str:
    """What is accepted, in words."""
    return ", ".join(dict.fromkeys(f"{value!r}" for value in values))
