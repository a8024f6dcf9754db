"""SAELens' configuration of a training run, of its several ages, as a sweep's spec (`resolve`)."""

import difflib
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar

from penstock.compat.keywords import KEYWORDS, OLDER, shown
from penstock.corpus import columns_of
from penstock.errors import ConfigError, SpecError
from penstock.models import ModelDescription, describe_model, processing_of
from penstock.plan import LOW_L1_COEFFICIENT, check_sweep
from penstock.spec import LEAST_BLOCK_TOKENS, MOST_BLOCK_TOKENS, ModelSpec, SweepSpec, check_spec
from penstock.train_one import local_gpus, plain

SOURCE = "LanguageModelSAERunnerConfig"
ARCHITECTURES = {
    "standard": "standard", "gated": "gated", "topk": "topk", "batchtopk": "batch_topk", "jumprelu": "jumprelu",
    "matryoshka_batchtopk": "matryoshka",
}  # fmt: skip
_SPARSE_BY_K = ("topk", "batchtopk", "matryoshka_batchtopk")
_SCHEDULES = {  # SAELens' names, those of version 1 among them, as ours
    "constant": "constant", "constantwithwarmup": "constant", "linearwarmupdecay": "linear",
    "cosineannealing": "cosine", "cosineannealingwarmup": "cosine", "cosine": "cosine",
}  # fmt: skip
_EPOCHS = 1000  # SAELens begins a dataset again as often as it takes; the plan says how often that is
# The keywords of the SAE that mean something for some architectures alone.
_ONLY_FOR = {
    "k": _SPARSE_BY_K,
    "aux_loss_coefficient": _SPARSE_BY_K,
    "matryoshka_widths": ("matryoshka_batchtopk",),
    "mse_loss_normalization": ("standard", "gated"),
    **dict.fromkeys(("l0_coefficient", "l0_warm_up_steps", "target_l0", "jumprelu_init_threshold"), ("jumprelu",)),
    **dict.fromkeys(("jumprelu_bandwidth", "jumprelu_sparsity_loss_mode", "jumprelu_tanh_scale"), ("jumprelu",)),
    **dict.fromkeys(("jumprelu_ste_to_input", "pre_act_loss_coefficient"), ("jumprelu",)),
    **dict.fromkeys(("l1_coefficient", "l1_warm_up_steps"), ("standard", "gated", "jumprelu")),
}
# What is reckoned with here, before the spec's own checks; of the counts none may be 0.
_COUNTS = ("training_tokens", "train_batch_size_tokens", "context_size", "store_batch_size_prompts",
           "n_batches_in_buffer")  # fmt: skip
_NUMBERS = ("n_eval_batches", "eval_batch_size_prompts", "lr_warm_up_steps", "dead_feature_window", "d_sae",
            "expansion_factor", "l1_coefficient")  # fmt: skip


class CompatibilityNotice(UserWarning):
    """What a SAELens script asks for and gets in another way here."""


# ---- what scripts write ---------------------------------------------------------------------------------------------


class TrainingSAEConfig:
    """The SAE's part of a configuration of SAELens 6: its keywords are those of `LanguageModelSAERunnerConfig` before.
    """

    architecture: ClassVar[str]
    own: ClassVar[tuple[str, ...]] = ()
    shared: ClassVar[tuple[str, ...]] = (
        "d_in", "d_sae", "dtype", "device", "apply_b_dec_to_input", "normalize_activations", "reshape_activations",
        "metadata", "decoder_init_norm",
    )  # fmt: skip

    def __init__(self, d_in: int, d_sae: int, **keywords: Any) -> None:
        accepted = self.shared + self.own
        for name in keywords:
            if name not in accepted:
                raise _unknown(type(self).__name__, name, accepted)
        self.given = {"d_in": d_in, "d_sae": d_sae, **keywords}
        for name in accepted:
            setattr(self, name, self.given.get(name, KEYWORDS[name].default))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.given.items())})"


class StandardTrainingSAEConfig(TrainingSAEConfig):
    architecture = "standard"
    own = ("l1_coefficient", "lp_norm", "l1_warm_up_steps")


class GatedTrainingSAEConfig(TrainingSAEConfig):
    architecture = "gated"
    own = ("l1_coefficient", "l1_warm_up_steps")


class TopKTrainingSAEConfig(TrainingSAEConfig):
    architecture = "topk"
    own = ("k", "use_sparse_activations", "aux_loss_coefficient", "rescale_acts_by_decoder_norm")


class BatchTopKTrainingSAEConfig(TrainingSAEConfig):
    architecture = "batchtopk"
    own = (*TopKTrainingSAEConfig.own, "topk_threshold_lr")


class MatryoshkaBatchTopKTrainingSAEConfig(TrainingSAEConfig):
    architecture = "matryoshka_batchtopk"
    own = (*BatchTopKTrainingSAEConfig.own, "matryoshka_widths", "use_matryoshka_aux_loss")


class JumpReLUTrainingSAEConfig(TrainingSAEConfig):
    architecture = "jumprelu"
    own = (
        "jumprelu_init_threshold", "jumprelu_bandwidth", "jumprelu_sparsity_loss_mode", "l0_coefficient",
        "l0_warm_up_steps", "pre_act_loss_coefficient", "jumprelu_tanh_scale", "jumprelu_ste_to_input", "target_l0",
    )  # fmt: skip


class LoggingConfig:
    """The logger's part of a configuration of SAELens 6."""

    names: ClassVar[tuple[str, ...]] = (
        "log_to_wandb", "log_activations_store_to_wandb", "log_optimizer_state_to_wandb", "log_weights_to_wandb",
        "wandb_project", "wandb_id", "run_name", "wandb_entity", "wandb_log_frequency", "eval_every_n_wandb_logs",
    )  # fmt: skip

    def __init__(self, **keywords: Any) -> None:
        for name in keywords:
            if name not in self.names:
                raise _unknown("LoggingConfig", name, self.names)
        self.given = keywords
        for name in self.names:
            setattr(self, name, keywords.get(name, KEYWORDS[name].default))


class LanguageModelSAERunnerConfig:
    """A training run as SAELens' scripts configure it: flat keywords of its versions 1 to 5, or `sae` and `logger` of
    version 6 with the rest flat. `penstock.compat.KEYWORDS` says what becomes of each.

    Raises ConfigError for a keyword that is unknown, given twice or limited to other values. What only the model can
    tell (widths, layers) is checked by `resolve`, with which `SAETrainingRunner` begins. Keywords may be set as
    attributes, too, until then.
    """

    def __init__(self, sae: Any = None, *, logger: Any = None, **keywords: Any) -> None:
        given: dict[str, Any] = {}
        for part in (_part(sae, "sae"), _part(logger, "logger"), keywords):
            for name, value in part.items():
                new = OLDER.get(name, name)
                if new not in KEYWORDS:
                    raise _unknown(SOURCE, name, (*KEYWORDS, *OLDER, "sae", "logger"))
                if new in given and new not in ("device", "dtype"):  # which SAELens asks for twice
                    raise ConfigError(f"{SOURCE}: {name} is given twice; accepted: once")
                given[new] = value
        object.__setattr__(self, "given", {})
        for name, keyword in KEYWORDS.items():
            object.__setattr__(self, name, keyword.default)
        for name, value in given.items():
            setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        new = OLDER.get(name, name)
        if new not in KEYWORDS:
            raise _unknown(SOURCE, name, tuple(KEYWORDS))
        keyword = KEYWORDS[new]
        if keyword.accepted is not None and not any(_equal(value, one) for one in keyword.accepted):
            raise ConfigError(f"{SOURCE}: {name} is {value!r}: {keyword.text}; accepted: {shown(keyword.accepted)}")
        self.given[new] = value
        object.__setattr__(self, new, value)

    @property
    def total_training_tokens(self) -> int:
        return int(self.training_tokens)

    @property
    def total_training_steps(self) -> int:
        return self.total_training_tokens // int(self.train_batch_size_tokens)

    @property
    def tokens_per_buffer(self) -> int:
        return int(self.n_batches_in_buffer) * int(self.store_batch_size_prompts) * int(self.context_size)

    @property
    def hook_point(self) -> str:
        return str(self.hook_name)

    def to_dict(self) -> dict[str, Any]:
        """Every keyword with its value, SAELens' own where it was not given."""
        return {name: getattr(self, name) for name in KEYWORDS}

    def __repr__(self) -> str:
        return f"{SOURCE}({', '.join(f'{name}={value!r}' for name, value in self.given.items())})"


def _part(part: Any, name: str) -> dict[str, Any]:
    """The keywords of `sae` or `logger`: an object of a class here, or a mapping."""
    if part is None:
        return {}
    if isinstance(part, Mapping):
        return dict(part)
    if isinstance(part, LoggingConfig):
        return dict(part.given)
    if isinstance(part, TrainingSAEConfig):
        return {"architecture": part.architecture, **part.given}
    accepted = "one of TopKTrainingSAEConfig, StandardTrainingSAEConfig, ..." if name == "sae" else "a LoggingConfig"
    raise ConfigError(f"{SOURCE}: {name} is a {type(part).__name__}; accepted: {accepted} of penstock.compat")


def _unknown(where: str, name: str, accepted: tuple[str, ...]) -> ConfigError:
    near = difflib.get_close_matches(name, accepted, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return ConfigError(f"{where}: unknown keyword {name!r}; {hint}accepted: {', '.join(accepted)}")


def _equal(a: Any, b: Any) -> bool:
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)


# ---- as a spec ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resolved:
    """The spec that a configuration stands for, checked, and what has to be said about it."""

    spec: SweepSpec
    model: ModelDescription
    notices: tuple[str, ...]

    def say(self) -> None:
        """One warning, a `CompatibilityNotice`, with all that was said."""
        if self.notices:
            warnings.warn("\n".join(["", *(f"  {notice}" for notice in self.notices)]), CompatibilityNotice, 3)


def resolve(cfg: LanguageModelSAERunnerConfig) -> Resolved:
    """What `cfg` comes to. Raises a `UserError` for what does not fit the model, or cannot be done here."""
    return _Resolver(cfg).resolve()


class _Resolver:
    def __init__(self, cfg: LanguageModelSAERunnerConfig) -> None:
        self.cfg = cfg
        self.given = cfg.given
        self.notices: list[str] = []
        self.architecture = self._architecture()

    def resolve(self) -> Resolved:
        for name in ("model_name", "hook_name", "dataset_path"):
            if not self.given.get(name):
                hint = ", like 'demo' or 'gpt2-small'" if name == "model_name" else ""
                raise ConfigError(f"{SOURCE}: {name} is missing{hint}")
        self._check_numbers()
        for name, keyword in KEYWORDS.items():
            value = self.given.get(name, keyword.default)
            if keyword.treatment in ("replaced", "no difference") and not _same_value(value, keyword.default):
                self._say(name, keyword.text)
        model = self._model()
        description = describe_model(ModelSpec.model_validate(model))
        d_in = self._check_place(description)
        raw = {
            "name": self._name(),
            "model": model,
            "data": self._data(),
            "hook_points": [self.cfg.hook_name],
            "train": self._train(),
            "saes": [self._sae(d_in)],
            "baselines": {"k": []},
            "resources": self._resources(),
        }
        if self.given.get("log_to_wandb"):
            raw["tracking"] = {"wandb_project": self.cfg.wandb_project, "wandb_entity": self.cfg.wandb_entity}
        try:
            spec, description = check_sweep(check_spec(plain(raw), SOURCE))
        except SpecError as error:
            raise SpecError(f"{error}{self._origins(str(error))}") from None
        return Resolved(spec, description, tuple(self.notices))

    def _check_numbers(self) -> None:
        for name in (*_COUNTS, *_NUMBERS):
            value, is_count = plain(getattr(self.cfg, name)), name in _COUNTS
            if value is None and not is_count:
                continue
            if isinstance(value, bool) or not isinstance(value, Real) or (is_count and not value > 0):
                raise ConfigError(f"{SOURCE}: {name} is {value!r}; accepted is a number"
                                  f"{' above 0' if is_count else ''}")  # fmt: skip

    def _say(self, name: str, text: str) -> None:
        self.notices.append(f"{name}={self.given.get(name)!r}: {text}" if name in self.given else f"{name}: {text}")

    def _origins(self, message: str) -> str:
        """Which keywords the fields that a message names come from."""
        named = {
            field: name
            for name in self.given
            for field in re.findall(r"(?:train|data|model|tracking)\.\w+", KEYWORDS[name].text)
            if field in message
        }
        return f" ({', '.join(f'{field} comes from {name}' for field, name in named.items())})" if named else ""

    def _name(self) -> str:
        given = self.given.get("run_name") or f"{self.cfg.model_name}-{self.cfg.hook_name}"
        return re.sub(r"[^A-Za-z0-9._-]+", "-", str(given)).strip("-._") or "saelens"

    # ---- the model ----

    def _model(self) -> dict[str, Any]:
        model: dict[str, Any] = {"name": self.cfg.model_name}
        kwargs = dict(self.given.get("model_from_pretrained_kwargs") or {})
        processing = processing_of({"model_from_pretrained_kwargs": kwargs})
        model["processing"] = processing or "none"
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
        if (revision := kwargs.pop("revision", None)) is not None:
            model["revision"] = revision
        if kwargs.pop("trust_remote_code", None):
            model["trust_remote_code"] = True
        left = {
            name: value for name, value in kwargs.items()
            if name not in ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases",
                            "refactor_factored_attn_matrices")
            and not (name == "n_devices" and value == 1)
        }  # fmt: skip
        if left:
            raise ConfigError(
                f"{SOURCE}: model_from_pretrained_kwargs has {', '.join(map(repr, left))}; accepted: fold_ln, "
                "center_writing_weights, center_unembed, fold_value_biases, dtype, revision, trust_remote_code"
            )
        asked = _dtype_name(dtype if dtype is not None else self.cfg.dtype, "dtype")
        if self.given.get("autocast_lm"):
            asked = "bfloat16"
        model["dtype"] = asked
        if "store_batch_size_prompts" in self.given:
            model["harvest_rows"] = self.cfg.store_batch_size_prompts
        return model

    def _check_place(self, model: ModelDescription) -> int:
        """The width at hook_name; d_in and hook_layer are checked."""
        name = str(self.cfg.hook_name)
        if name not in model.hook_points:
            from penstock.models import check_hook_points

            check_hook_points(model, [name])
        d_in = model.hook_points[name]
        asked = self.given.get("d_in")
        if asked is not None and asked != d_in:
            raise ConfigError(f"{SOURCE}: d_in is {asked!r}: hook_name {name!r} of model_name {model.name!r} has width "
                              f"{d_in}; accepted: d_in={d_in}, or no d_in")  # fmt: skip
        layer, found = self.given.get("hook_layer"), re.match(r"blocks\.(\d+)\.", name)
        if layer is not None and (found is None or int(found[1]) != layer):
            place = f"layer {found[1]}" if found else "no layer"
            raise ConfigError(f"{SOURCE}: hook_layer is {layer!r}: hook_name {name!r} is of {place}; accepted: "
                              f"{'hook_layer=' + found[1] if found else 'None'}, or no hook_layer")  # fmt: skip
        return d_in

    # ---- data, training, place ----

    def _data(self) -> dict[str, Any]:
        cfg = self.cfg
        data: dict[str, Any] = {
            "dataset": cfg.dataset_path, "context_size": cfg.context_size, "bos": cfg.prepend_bos, "seed": cfg.seed,
            "epochs": _EPOCHS,
            "search_tokens": cfg.context_size,  # of a split by which nothing is decided here
        }  # fmt: skip
        data |= self._column()
        data["exclude"] = self._exclude()
        if cfg.use_cached_activations:
            if not cfg.cached_activations_path:
                raise ConfigError(f"{SOURCE}: use_cached_activations is True, and cached_activations_path is missing")
            data["activations"] = str(cfg.cached_activations_path)
        elif self.given.get("cached_activations_path"):
            self._say("cached_activations_path", "not read, since use_cached_activations is False")
        if "n_batches_in_buffer" in self.given:
            asked = cfg.tokens_per_buffer
            data["block_tokens"] = min(max(asked, LEAST_BLOCK_TOKENS), MOST_BLOCK_TOKENS)
            if data["block_tokens"] != asked:
                self._say("n_batches_in_buffer", f"a buffer of {asked:,} tokens; activations are shuffled in blocks of "
                          f"{data['block_tokens']:,} (smaller ones cost accuracy, larger ones gain nothing)"
                          )  # fmt: skip
        if "n_eval_batches" in self.given:
            rows = cfg.eval_batch_size_prompts or cfg.store_batch_size_prompts
            data["report_tokens"] = max(1, int(cfg.n_eval_batches)) * int(rows) * int(cfg.context_size)
        elif "eval_batch_size_prompts" in self.given:
            self._say("eval_batch_size_prompts", "not used without n_eval_batches; 50,000 tokens are evaluated")
        return data

    def _column(self) -> dict[str, str]:
        columns = columns_of(str(self.cfg.dataset_path))
        tokenized = self.given.get("is_dataset_tokenized")
        ids = next((name for name in ("tokens", "input_ids") if name in columns), None)
        text = next((name for name in ("text", "problem") if name in columns), None)
        if ids is not None and (tokenized is not False or text is None):
            return {"tokens_column": ids}
        if tokenized:
            self._say("is_dataset_tokenized", f"dataset_path {self.cfg.dataset_path!r} has no column tokens or "
                      "input_ids; its text is tokenised")  # fmt: skip
        return {} if text in (None, "text") else {"text_column": str(text)}

    def _exclude(self) -> dict[str, Any]:
        exclude: dict[str, Any] = {}
        special = self.given.get("exclude_special_tokens")
        if special is None:
            self._say("exclude_special_tokens", "unless given, special tokens are left out of training and evaluation, "
                      "as SAELens' own evaluation leaves them out")  # fmt: skip
        elif not isinstance(special, bool):
            raise ConfigError(f"{SOURCE}: exclude_special_tokens is {special!r}; accepted: True (all of the "
                              "tokenizer's), False")  # fmt: skip
        else:
            exclude["special_tokens"] = special
        positions = self.given.get("seqpos_slice")
        if positions is None:
            self._say("seqpos_slice", "unless given, the first position of a row is left out: its activations have "
                      "many times the norm of others'; seqpos_slice=(0, None) keeps it")  # fmt: skip
        else:
            positions = tuple(positions)
            start, *others = positions if len(positions) > 1 else (0, *positions)
            if any(item not in (None, 1) for item in others) or not (start is None or start >= 0):
                raise ConfigError(f"{SOURCE}: seqpos_slice is {positions!r}: only positions at the beginning of a row "
                                  "can be left out; accepted: (N, None)")  # fmt: skip
            exclude["first_positions"] = start or 0
        return exclude

    def _train(self) -> dict[str, Any]:
        cfg, given = self.cfg, self.given
        steps = cfg.total_training_steps
        train: dict[str, Any] = {
            "tokens": cfg.training_tokens, "batch_tokens": cfg.train_batch_size_tokens, "lr": cfg.lr,
            "lr_warm_up_steps": cfg.lr_warm_up_steps, "adam_betas": [cfg.adam_beta1, cfg.adam_beta2],
            "keep": cfg.n_checkpoints,
        }  # fmt: skip
        schedule = str(cfg.lr_scheduler_name).lower()
        if schedule not in _SCHEDULES:
            raise ConfigError(f"{SOURCE}: lr_scheduler_name is {cfg.lr_scheduler_name!r}; accepted: "
                              f"{', '.join(_SCHEDULES)}")  # fmt: skip
        decay, rest = _SCHEDULES[schedule], max(0, steps - int(cfg.lr_warm_up_steps))
        if decay == "cosine":
            train |= {"lr_decay": "cosine", "lr_decay_steps": rest}
            self._say("lr_scheduler_name", "the lr falls along half a cosine from the end of the warm-up to 0 at the "
                      "end of the run, and not to a tenth first")  # fmt: skip
        elif decay == "linear" or cfg.lr_decay_steps:
            train |= {"lr_decay": "linear", "lr_decay_steps": cfg.lr_decay_steps or rest}
        else:
            train |= {"lr_decay": "constant"}
        if "dead_feature_window" in given and steps:
            asked = int(cfg.dead_feature_window) * int(cfg.train_batch_size_tokens)
            most = max(1, int(cfg.training_tokens) // 4)
            train["dead_after_tokens"] = min(asked, most)
            if asked > most:
                self._say("dead_feature_window", f"{asked:,} tokens; dead is a latent that has not fired for {most:,}, "
                          "a quarter of the run")  # fmt: skip
        dtype = _dtype_name(cfg.dtype, "dtype")
        if given.get("autocast") or dtype != "float32":
            train["encoder_dtype"] = dtype if dtype != "float32" else "bfloat16"
            if dtype != "float32":
                self._say("dtype", f"activations and the encoder's product are {dtype}; weights and optimiser stay "
                          "float32")  # fmt: skip
        return train

    def _resources(self) -> dict[str, float]:
        import torch

        device = self.given.get("device")
        device = None if device is None else str(device)
        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            raise ConfigError(f"{SOURCE}: device is {device!r}: this machine has no CUDA device; accepted: 'cpu', or "
                              "no device for a GPU where there is one")  # fmt: skip
        if device is not None and device.startswith("mps"):
            self._say("device", "Ray knows no such device: the run takes place on the CPU")
        return local_gpus(device)

    # ---- the SAE ----

    def _architecture(self) -> str:
        named = str(self.cfg.architecture)
        activation = str(self.cfg.activation_fn or "relu")
        if named not in ARCHITECTURES:
            near = difflib.get_close_matches(named, ARCHITECTURES, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(f"{SOURCE}: architecture is {named!r}; {hint}accepted: {', '.join(ARCHITECTURES)}")
        if activation == "topk" and named == "standard":
            return "topk"
        if activation not in ("relu", "topk") or (activation == "topk" and named not in _SPARSE_BY_K):
            raise ConfigError(f"{SOURCE}: activation_fn is {activation!r} with architecture {named!r}; accepted: "
                              "'relu', and 'topk' with architecture 'standard' or 'topk'")  # fmt: skip
        return named

    def _sae(self, d_in: int) -> dict[str, Any]:
        cfg, given, architecture = self.cfg, self.given, self.architecture
        factor, wide = given.get("expansion_factor"), given.get("d_sae")
        if factor and wide and wide != factor * d_in:
            raise ConfigError(f"{SOURCE}: d_sae is {wide} and expansion_factor {factor}, which is {factor * d_in}; "
                              "accepted: one of them")  # fmt: skip
        for name, kinds in _ONLY_FOR.items():
            if architecture in kinds or given.get(name) in (None, KEYWORDS[name].default):
                continue
            if name in ("l1_coefficient", "l1_warm_up_steps"):  # which flat scripts give whatever the architecture
                self._say(name, f"architecture {architecture} has no such penalty: k sets its sparsity")
                continue
            raise ConfigError(f"{SOURCE}: {name} is {given[name]!r} with architecture {architecture!r}; accepted with: "
                              f"{', '.join(kinds)}")  # fmt: skip
        d_sae = wide or int((factor or 4) * d_in)
        entry: dict[str, Any] = {"architecture": ARCHITECTURES[architecture], "d_sae": d_sae, "seed": cfg.seed}
        own = dict(self._sparsity(architecture, d_in))
        scale = own.pop("normalize_activations", None)
        wanted = given.get("normalize_activations")
        if scale is None:
            raw = {"l1_coefficient", "l0_coefficient"} & own.keys()
            scale = wanted if wanted is not None else "none" if raw else "expected_average_only_in"
        return {**entry, "normalize_activations": scale, **own}

    def _sparsity(self, architecture: str, d_in: int) -> Iterator[tuple[str, Any]]:
        cfg, given = self.cfg, self.given
        if architecture in _SPARSE_BY_K:
            k = given.get("k")
            k = (given.get("activation_fn_kwargs") or {}).get("k") if k is None else k
            if k is None:
                raise ConfigError(f"{SOURCE}: k is missing: how many latents are active on a token (k=32, or "
                                  "activation_fn_kwargs={'k': 32})")  # fmt: skip
            yield "k", k
            if "aux_loss_coefficient" in given:
                yield "aux_coefficient", cfg.aux_loss_coefficient
            if cfg.matryoshka_widths:
                d_sae = given.get("d_sae") or int((given.get("expansion_factor") or 4) * d_in)
                widths = [int(width) for width in cfg.matryoshka_widths]
                yield "widths", widths if widths[-1] == d_sae else [*widths, d_sae]
        elif architecture == "jumprelu":
            yield from self._jumprelu()
        else:
            coefficient, scale = self._l1(d_in)
            yield "l1_coefficient", coefficient
            yield "l1_warm_up_steps", cfg.l1_warm_up_steps
            if scale is not None:
                yield "normalize_activations", scale

    def _jumprelu(self) -> Iterator[tuple[str, Any]]:
        cfg, given = self.cfg, self.given
        target = given.get("target_l0")
        mode = cfg.jumprelu_sparsity_loss_mode
        if target is not None:
            yield "target_l0", target
            if given.get("l0_coefficient") is not None:
                self._say("l0_coefficient", "a controller sets it, so that target_l0 is reached")
            if mode == "quadratic":
                mode = None
                self._say("jumprelu_sparsity_loss_mode", "a controller of the coefficient holds target_l0")
        else:
            coefficient = given.get("l0_coefficient", given.get("l1_coefficient"))
            yield "l0_coefficient", 1.0 if coefficient is None else coefficient
            warm_up = given.get("l0_warm_up_steps", given.get("l1_warm_up_steps", 0))
            yield "l0_warm_up_steps", warm_up
        if mode is not None and (target is None or "jumprelu_sparsity_loss_mode" in given):
            if mode not in ("step", "tanh"):
                raise ConfigError(f"{SOURCE}: jumprelu_sparsity_loss_mode is {mode!r}; accepted: 'step', 'tanh', and "
                                  "'quadratic' with a target_l0")  # fmt: skip
            yield "sparsity", mode
        names = {
            "jumprelu_init_threshold": "threshold_at_start", "jumprelu_bandwidth": "bandwidth",
            "jumprelu_tanh_scale": "tanh_scale", "jumprelu_ste_to_input": "ste_to_input",
            "pre_act_loss_coefficient": "pre_act_coefficient",
        }  # fmt: skip
        for theirs, ours in names.items():
            if given.get(theirs) is not None:
                yield ours, given[theirs]

    def _l1(self, d_in: int) -> tuple[float, str | None]:
        """The coefficient here, and the scale of activations that goes with it where it is one of older units.

        SAELens before version 3, and the code it grew from, averaged the squared error over d_in and divided it by the
        token's norm: (1/d) |e|^2 / |x| + c |f|. Times d |x| that is today's loss with a coefficient c d |x|, which for
        activations of norm sqrt(d) is c d^1.5. Versions 3 to 5 sum over d_in; with mse_loss_normalization they divide
        by the norm, so that c is today's c sqrt(d).
        """
        given = self.given.get("l1_coefficient")
        coefficient = 1.0 if given is None else float(given)
        if not coefficient > 0 or not math.isfinite(coefficient):
            raise ConfigError(f"{SOURCE}: l1_coefficient is {given!r}; accepted is a number above 0")
        normalized = self.given.get("mse_loss_normalization")
        if normalized not in (None, "dense_batch"):
            raise ConfigError(f"{SOURCE}: mse_loss_normalization is {normalized!r}; accepted: None, 'dense_batch'")
        if coefficient < LOW_L1_COEFFICIENT:
            power, why = 1.5, "belongs to an older loss, averaged over d_in and divided by the activation's norm"
        elif normalized is not None:
            power, why = 0.5, "with mse_loss_normalization belongs to a loss divided by the activation's norm"
        else:
            return coefficient, None
        converted = float(f"{coefficient * d_in**power:.6g}")
        self._say("l1_coefficient", f"{why}; here it is {converted:g} ({coefficient:g} * {d_in}**{power:g}), on "
                  "activations scaled to a mean norm of sqrt(d_in)")  # fmt: skip
        return converted, "expected_average_only_in"


def _same_value(value: Any, default: Any) -> bool:
    return value is None or value == default or str(value) == str(default)


def _dtype_name(dtype: Any, keyword: str) -> str:
    name = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(str(dtype), str(dtype).removeprefix("torch."))
    if name not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"{SOURCE}: {keyword} is {dtype!r}; accepted: float32, bfloat16, float16")
    return name


__all__ = [
    "BatchTopKTrainingSAEConfig", "CompatibilityNotice", "GatedTrainingSAEConfig", "JumpReLUTrainingSAEConfig",
    "LanguageModelSAERunnerConfig", "LoggingConfig", "MatryoshkaBatchTopKTrainingSAEConfig", "Resolved",
    "StandardTrainingSAEConfig", "TopKTrainingSAEConfig", "TrainingSAEConfig", "resolve",
]  # fmt: skip
