"""The formats that SAEs come in: how each is recognised, which files it takes, and its reader.

To add one: write its reader (a place in, `Weights` out), and add a line to the table.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

from sae_core import checkpoint
from sae_core.errors import CheckpointError
from sae_core.pretrained.formats import (
    circuit_tracer,
    dictionary_learning,
    gemma_scope,
    llama_scope,
    single_files,
    sparsify,
)
from sae_core.pretrained.reading import Place, Weights

WEIGHT_FILES = (".pt", ".pth", ".bin", ".safetensors", ".npz")


@dataclass(frozen=True)
class Format:
    """required, optional: its files in the SAE's folder. `files`, where given, says them by the SAE's path instead, as
    seen from the repository's root. `read` is None for the format that checkpoint.py reads and writes."""

    name: str
    read: Callable[[Place], Weights] | None
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    files: Callable[[str], tuple[list[str], list[str]]] | None = None

    def files_of(self, path: str) -> tuple[list[str], list[str]]:
        """Required and optional files of the SAE at `path`, as seen from the repository's root."""
        if self.files is not None:
            return self.files(path)
        near = Place(root=PurePosixPath(), path=path).near  # type: ignore[arg-type]
        return [near(name) for name in self.required], [near(name) for name in self.optional]


def _of_sparsify(path: str) -> tuple[list[str], list[str]]:
    near = f"{path}/" if path else ""
    run = sparsify.run_config(path)
    return [near + sparsify.CONFIG, near + sparsify.WEIGHTS], [] if run is None else [run]


def _single(path: str) -> tuple[list[str], list[str]]:
    return [path], [single_files.config_beside(path)]


def _transcoder(path: str) -> tuple[list[str], list[str]]:
    return [path], [circuit_tracer.CONFIG, *circuit_tracer.RUN_CONFIGS]


def _clt(path: str) -> tuple[list[str], list[str]]:
    return [*circuit_tracer.clt_files(path)], [circuit_tracer.CONFIG]


_FOLDERS = [
    Format("sae_lens", None, (checkpoint.CONFIG, checkpoint.WEIGHTS), (checkpoint.SPARSITY, checkpoint.SCALER,
                                                                       checkpoint.WHITENING)),
    Format("gemma_scope", gemma_scope.read_gemma_scope, (gemma_scope.PARAMS,)),
    Format("gemma_scope_2", gemma_scope.read_gemma_scope_2, (gemma_scope.PARAMS_2,), (gemma_scope.CONFIG_2,)),
    Format("llama_scope", llama_scope.read_llama_scope, (llama_scope.HYPERPARAMS, llama_scope.FINAL)),
    Format("lm_saes", llama_scope.read_lm_saes, (llama_scope.CONFIG, llama_scope.WEIGHTS)),
    Format("dictionary_learning", dictionary_learning.read_dictionary_learning,
           (dictionary_learning.CONFIG, dictionary_learning.WEIGHTS)),
    Format("sparsify", sparsify.read_sparsify, (sparsify.CONFIG, sparsify.WEIGHTS), files=_of_sparsify),
]  # fmt: skip
_FILES = [
    Format("single_file", single_files.read_single_file, files=_single),
    Format("circuit_tracer", circuit_tracer.read_transcoder, files=_transcoder),
    Format("circuit_tracer_clt", circuit_tracer.read_clt_layer, files=_clt),
]
FORMATS: dict[str, Format] = {format.name: format for format in [*_FOLDERS, *_FILES]}
# Formats that one reader tells apart by their tensors.
for _name in ("openai", "goodfire", "linear_pair", "qwen_scope", "attention_kk"):
    FORMATS[_name] = FORMATS["single_file"]

ACCEPTED = (
    "a folder with "
    + ", or ".join(" + ".join(format.required) for format in _FOLDERS)
    + "; or one file .pt, .pth or .safetensors (OpenAI's, Goodfire's, Qwen Scope's, transcoders)"
)


def of_file(name: str) -> Format | None:
    """The format of an SAE that is one file (or two: of a layer's W_enc and W_dec), by its name."""
    last = PurePosixPath(name).name
    if last.endswith(".safetensors"):
        cross_layer = last.startswith(("W_enc_", "W_dec_"))
        return FORMATS["circuit_tracer_clt" if cross_layer else "circuit_tracer"]
    return FORMATS["single_file"] if last.endswith((".pt", ".pth", ".bin")) else None


def of_folder(names: Iterable[str], where: str) -> tuple[Format, str | None] | None:
    """The format of a folder with these files (those of sub-folders with their path), and the file to read where the
    SAE is one file. None if it holds no weights at all; CheckpointError for what is ambiguous or unknown."""
    there = set(names)
    known = [format for format in _FOLDERS if set(format.required) <= there]
    if FORMATS["sae_lens"] in known:  # which has a cfg.json of its own: a config.json beside it is of something else
        known = [format for format in known if format.name != "lm_saes"]
    if len(known) > 1:
        raise CheckpointError(
            f"{where}: has the files of several formats ({', '.join(format.name for format in known)}); accepted is "
            "one SAE a folder"
        )
    if known:
        return known[0], None
    beside = {checkpoint.SPARSITY, checkpoint.WHITENING}
    weights = sorted(name for name in there - beside if name.endswith(WEIGHT_FILES))
    alone = of_file(weights[0]) if len(weights) == 1 else None
    if alone is not None and not _FOLDER_WEIGHTS & there:
        return alone, weights[0]
    if not weights or {checkpoint.CONFIG, checkpoint.WEIGHTS} & there:
        return None
    seen = ", ".join(weights[:8]) + (", ..." if len(weights) > 8 else "")
    raise CheckpointError(f"{where}: an SAE in no known format; it has {seen}; accepted is {ACCEPTED}")


_FOLDER_WEIGHTS = {name for format in _FOLDERS for name in format.required if name.endswith(WEIGHT_FILES)}
