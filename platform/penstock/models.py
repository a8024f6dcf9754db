"""Language models: what a name stands for, what a model looks like from its config alone, and loading one.

Importing this module loads neither torch nor transformers; describing a model reads its config; only `load_model`
needs TransformerLens.
"""

import difflib
import importlib.util
import json
import math
import pickle
import runpy
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from penstock.errors import ModelError
from penstock.sites import Site
from penstock.spec import ModelSpec
from sae_core.errors import one_line
from sae_core.model_processing import processing_of as processing_of
from sae_core.pretrained import hub

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

# Attention and MLP read the same residual stream, after one norm; GPT-NeoX, which can be so too, has two norms.
_PARALLEL = {"gptj", "codegen", "phi", "cohere", "cohere2"}
_FINGERPRINT_BYTES = 1 << 20
_LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError)


class Location(NamedTuple):
    """A local folder, or a name and revision of the hub."""

    name: str
    revision: str | None
    is_local: bool


@dataclass(frozen=True)
class ModelDescription:
    """What is known of a model without loading its weights. `hook_points` maps each one's name to its width."""

    name: str
    n_layers: int
    d_model: int
    context_limit: int | None
    vocab_size: int
    n_parameters: int
    fingerprint: str
    hook_points: dict[str, int] = field(repr=False)


def location(model: ModelSpec) -> Location:
    """Where a model comes from: `demo`, a folder, a TransformerLens alias (`gpt2-small`) or a hub name."""
    if model.name == "demo":
        from penstock import demo

        return Location(str(demo.MODEL_FOLDER), None, True)
    folder = Path(model.name).expanduser()
    if folder.is_dir():
        return Location(str(folder.resolve()), None, True)
    if model.name.startswith((".", "/", "~")) or model.name.count("/") > 1:
        raise ModelError(f"model.name {model.name!r}: there is no such folder; accepted: `demo`, a folder in Hugging "
                         "Face format, or the name of a model on the hub")  # fmt: skip
    return Location(_aliases().get(model.name, model.name), model.revision, False)


@cache
def _aliases() -> dict[str, str]:
    """TransformerLens' short names. Its table is a file of plain data, read without the seconds of its import."""
    package = importlib.util.find_spec("transformer_lens")
    table = Path(package.origin).with_name("supported_models.py") if package and package.origin else None
    if table is None or not table.exists():
        return {}
    official = runpy.run_path(str(table)).get("MODEL_ALIASES", {})
    return {alias: name for name, aliases in official.items() for alias in aliases}


# ---- describing -----------------------------------------------------------------------------------------------------


def describe_model(model: ModelSpec) -> ModelDescription:
    """Describe a model from its config. Raises `ModelError` when there is none or it is no causal language model."""
    place = location(model)
    config = _load_config(model, place)
    text = config.get_text_config()
    try:
        n_layers, d_model, vocab_size = text.num_hidden_layers, text.hidden_size, text.vocab_size
        hook_points = _hook_points(text)
    except AttributeError as error:
        raise ModelError(f"model.name {model.name!r}: a {config.model_type} is no causal language model with attention "
                         f"({one_line(error)})") from None  # fmt: skip
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"model.name {model.name!r}: a {config.model_type} is an encoder and decoder; accepted: "
                         "causal language models")  # fmt: skip
    headers = _weight_headers(Path(place.name)) if place.is_local else []
    return ModelDescription(
        name=model.name,
        n_layers=n_layers,
        d_model=d_model,
        context_limit=getattr(text, "max_position_embeddings", None),
        vocab_size=vocab_size,
        n_parameters=_stored_parameters(headers) or _estimated_parameters(text),
        fingerprint=_fingerprint(place, config, model.trust_remote_code),
        hook_points=hook_points,
    )


def _load_config(model: ModelSpec, place: Location) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            place.name, revision=place.revision, local_files_only=not may_download(place),
            trust_remote_code=model.trust_remote_code,
        )  # fmt: skip
    except _LOAD_ERRORS as error:
        raise ModelError(_reason(model, place, error)) from None


def _reason(model: ModelSpec, place: Location, error: Exception) -> str:
    if not model.trust_remote_code and "trust_remote_code" in str(error):
        return wants_to_run_code(model)
    if place.is_local:
        return (f"model.name {model.name!r}: the folder is not a complete model in Hugging Face format (config.json, "
                f"model.safetensors, tokenizer.json): {one_line(error)}")  # fmt: skip
    near = [] if model.name in _aliases() else difflib.get_close_matches(model.name, _aliases(), n=1, cutoff=0.8)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    at = f" at revision {place.revision!r}" if place.revision else ""
    why = one_line(error) if may_download(place) else "it cannot be reached, and its cache here has no such model"
    return (f"model.name {model.name!r} is not a folder, and the hub does not give it{at}{hint}: {why}; accepted: "
            "`demo`, a folder, or the name of a model on the hub")  # fmt: skip


def wants_to_run_code(model: ModelSpec) -> str:
    """Why a model is refused that Python code of its own comes with."""
    return (f"model.name {model.name!r} needs Python code that comes with it (auto_map in its config), and such code "
            "is not run; accepted: a model that transformers knows by itself, or model.trust_remote_code: true, which "
            "runs that code here and on every model host, with all that their processes may do")  # fmt: skip


def may_download(place: Location) -> bool:
    """Whether the hub is to be asked for a model: not for a folder, nor where the hub cannot be reached."""
    return not place.is_local and hub.answers()


def _head_width(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _mlp_width(config: Any) -> int:
    widths = (getattr(config, name, None) for name in ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"))
    return next((width for width in widths if isinstance(width, int)), 4 * config.hidden_size)


def _n_experts(config: Any) -> int:
    counts = (getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts"))
    return next((count for count in counts if count), 0)


def _is_parallel(config: Any) -> bool:
    flags = (getattr(config, name, False) for name in ("use_parallel_residual", "parallel_attn"))
    return config.model_type in _PARALLEL or any(flags)


def _hook_points(config: Any) -> dict[str, int]:
    """Name and width of what an SAE may read or write, in the order of the forward pass. Several heads count as one
    vector. `hook_normalized` lies before a norm's own weights, `mlp.hook_in` after those of the second norm."""
    d_model, heads = config.hidden_size, config.num_attention_heads * _head_width(config)
    of_a_block = {"hook_resid_pre": d_model, "ln1.hook_normalized": d_model, "attn.hook_z": heads,
                  "hook_attn_out": d_model, "hook_resid_mid": d_model, "ln2.hook_normalized": d_model,
                  "mlp.hook_in": d_model, "mlp.hook_pre": _mlp_width(config), "mlp.hook_post": _mlp_width(config),
                  "hook_mlp_out": d_model, "hook_resid_post": d_model}  # fmt: skip
    if _is_parallel(config):  # nothing lies between attention and MLP
        del of_a_block["hook_resid_mid"]
    if config.model_type in _PARALLEL or getattr(config, "parallel_attn", False):
        del of_a_block["ln2.hook_normalized"]
    if _n_experts(config):  # every expert has its own
        del of_a_block["mlp.hook_pre"], of_a_block["mlp.hook_post"]
    return {
        f"blocks.{layer}.{name}": width
        for layer in range(config.num_hidden_layers)
        for name, width in of_a_block.items()
    }


def _estimated_parameters(config: Any) -> int:
    """Embeddings, attention and MLP, counted from the config; norms and biases left out."""
    d_model, heads = config.hidden_size, config.num_attention_heads * _head_width(config)
    key_values = (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * _head_width(config)
    gated = hasattr(config, "rms_norm_eps")  # the families with RMS norms have gated MLPs
    mlp = (3 if gated else 2) * d_model * _mlp_width(config) * max(1, _n_experts(config))
    embeddings = config.vocab_size * d_model * (1 if getattr(config, "tie_word_embeddings", False) else 2)
    return embeddings + config.num_hidden_layers * (2 * d_model * heads + 2 * d_model * key_values + mlp)


def _weight_headers(folder: Path) -> list[dict[str, Any]]:
    return [_weight_header(path) for path in sorted(folder.glob("*.safetensors"))]


def _weight_header(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > size - 8:
            raise ModelError(f"model.name: {path} is cut short: its header does not fit into it")
        try:
            header = json.loads(stream.read(length))
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ModelError(f"model.name: {path} is damaged: its header is not that of safetensors") from None
    if size < (expected := 8 + length + max(ends, default=0)):
        raise ModelError(f"model.name: {path} is cut short: its header names {expected:,} bytes, it has {size:,}")
    return header


def _stored_parameters(headers: Sequence[dict[str, Any]]) -> int:
    return sum(math.prod(tensor["shape"]) for header in headers for name, tensor in header.items()
               if name != "__metadata__")  # fmt: skip


def _fingerprint(place: Location, config: Any, trust_remote_code: bool) -> str:
    """What tells one set of weights from another: of a folder its config and the sizes, first and last megabyte of its
    weight files; of a hub model its name and commit. Where code that comes with a model may run it is another model:
    of a folder, that code counts too."""
    if not place.is_local:
        commit = f"{place.name}@{getattr(config, '_commit_hash', None) or place.revision or 'main'}"
        return f"{commit}+code" if trust_remote_code else commit
    digest = blake2b(digest_size=16)
    folder = Path(place.name)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings.pop("transformers_version", None)
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as stream:
            digest.update(stream.read(_FINGERPRINT_BYTES))
            stream.seek(max(0, size - _FINGERPRINT_BYTES))
            digest.update(stream.read(_FINGERPRINT_BYTES))
    if trust_remote_code:
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{path.relative_to(folder)}:{path.stat().st_size}".encode() + path.read_bytes())
    return digest.hexdigest()


def check_weight_files(model: ModelSpec) -> None:
    """Raise `ModelError` for a folder that lacks weight files. Whether they hold every weight, loading finds out."""
    place = location(model)
    if not place.is_local:
        return
    folder = Path(place.name)
    index = folder / "model.safetensors.index.json"
    try:
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) if index.exists() else set()
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"model.name {model.name!r}: {index.name} is damaged: {one_line(error)}") from None
    if foreign := sorted(name for name in named if Path(name).name != name):
        raise ModelError(f"model.name {model.name!r}: {index.name} names {foreign[0]!r}, no file of the folder")
    if missing := sorted(name for name in named if not (folder / name).is_file()):
        raise ModelError(f"model.name {model.name!r}: the folder lacks {', '.join(missing[:5])}, which {index.name} "
                         "names")  # fmt: skip
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise ModelError(f"model.name {model.name!r}: the folder holds no weights; accepted: model.safetensors")


def check_hook_points(description: ModelDescription, names: Sequence[str]) -> None:
    """Raise `ModelError` for a hook point that the model lacks, naming the nearest ones that it has."""
    for name in names:
        if name not in description.hook_points:
            near = difflib.get_close_matches(name, description.hook_points, n=3, cutoff=0.4)
            raise ModelError(f"hook_points: model.name {description.name!r} ({description.n_layers} layers) has no "
                             f"{name!r}; the nearest it has: {', '.join(near or list(description.hook_points)[:3])}"
                             )  # fmt: skip


def check_sites(description: ModelDescription, sites: Sequence[Site]) -> None:
    """Raise `ModelError` for a site whose hook points the model lacks, or that writes before it reads."""
    check_hook_points(description, [name for site in sites for name in site.hook_points])
    order = {name: position for position, name in enumerate(description.hook_points)}
    for site in sites:
        if order[site.reads] > order[site.writes]:
            raise ModelError(f"hook_points: {site.reads!r} lies behind {site.writes!r} in the model: what is read "
                             "comes too late for what is written; accepted: `writes` at or behind `reads`")  # fmt: skip


def check_context_size(
    description: ModelDescription, context_size: int, field: str = "data.context_size"
) -> None:
    """Raise `ModelError` when rows are longer than what the model can read."""
    if description.context_limit is not None and context_size > description.context_limit:
        raise ModelError(f"{field} {context_size}: model.name {description.name!r} reads at most "
                         f"{description.context_limit} tokens")  # fmt: skip


# ---- loading --------------------------------------------------------------------------------------------------------


def load_model(model: ModelSpec, device: str) -> "TransformerBridge":
    """Load a model for reading activations: evaluation mode, no gradients, weights as `model.processing` says.

    `fold_ln` folds the norms' weights into what follows, `center` centres what writes to the residual stream, and
    `fold_ln_center` is all that TransformerLens' `HookedTransformer` does by default (value biases and the
    unembedding too). None of them changes the model's predictions. Raises `ModelError` when it cannot be loaded, when
    its files lack weights, or when its norms do not allow the processing.
    """
    place = location(model)
    if not place.is_local:
        _load_config(model, place)  # a clear error before the slow import
    import torch
    from safetensors import SafetensorError
    from transformer_lens.model_bridge import TransformerBridge
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        bridge = TransformerBridge.boot_transformers(
            place.name, device=device, dtype=getattr(torch, model.dtype), revision=place.revision,
            trust_remote_code=model.trust_remote_code,
        )  # fmt: skip
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except pickle.UnpicklingError:  # of torch.load by weights_only; its own message says how to run the code
        raise ModelError(f"model.name {model.name!r}: its weights are a pickle with more than tensors in it, which "
                         "could run any code and is not read; accepted: model.safetensors") from None  # fmt: skip
    except (*_LOAD_ERRORS, SafetensorError) as error:
        raise ModelError(_unsupported(model, error) or _reason(model, place, error)) from None
    finally:
        if bars:
            logging.enable_progress_bar()
    if place.is_local:
        _check_complete(model, Path(place.name))
    _process(model, bridge)
    # The bridge asks for every layer's attention pattern and for a key-value cache; nobody here reads either.
    bridge.original_model.config.output_attentions = False
    bridge.original_model.config.use_cache = False
    _fuse_gelu(bridge)
    return bridge.eval().requires_grad_(False)


def _fuse_gelu(bridge: "TransformerBridge") -> None:
    """GPT-2's activation as one kernel. Transformers spells the same formula in eight passes over memory, which is a
    third of a small model's time on a CPU; the results differ in the last bits."""
    from torch import nn
    from transformers.activations import NewGELUActivation

    for module in list(bridge.original_model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))


def _unsupported(model: ModelSpec, error: Exception) -> str | None:
    if "supported architecture" not in str(error):
        return None
    return f"model.name {model.name!r}: TransformerLens supports no model of this architecture"


def _check_complete(model: ModelSpec, folder: Path) -> None:
    """Transformers fills weights that a file lacks with random numbers; SAEs on those would mean nothing."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    stored = _stored_parameters(_weight_headers(folder))
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=model.trust_remote_code)
    if not stored or getattr(config, "quantization_config", None):
        return
    with torch.device("meta"):
        try:
            whole = AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)
            described = sum(parameter.numel() for parameter in whole.parameters())
        except ValueError:  # an architecture of another kind, which the bridge may still know
            return
    if stored < described:
        raise ModelError(f"model.name {model.name!r}: its files hold {stored} weights, its config describes {described}"
                         ": the folder is not complete")  # fmt: skip


def _process(model: ModelSpec, bridge: "TransformerBridge") -> None:
    if model.processing == "none":
        return
    if model.processing != "fold_ln" and bridge.cfg.uses_rms_norm:
        raise ModelError(f"model.processing {model.processing!r}: the RMS norms of model.name {model.name!r} do not "
                         "take out a mean, so centring would change the model; accepted: none, fold_ln")  # fmt: skip
    everything = model.processing == "fold_ln_center"
    bridge.process_weights(
        fold_ln=model.processing != "center",
        center_writing_weights=model.processing != "fold_ln",
        center_unembed=everything,
        fold_value_biases=everything,
    )
