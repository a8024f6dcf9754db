"""The sweep spec: what a user writes, checked in full before anything runs.

`load_spec(path)` reads a YAML file into a frozen `SweepSpec`; whatever is wrong is a `SpecError` that names the file's
line, the field, the value and what is accepted. `SweepSpec.sae_settings()` expands the axes (every list in an entry of
`saes`, but for settings that are lists themselves) into one mapping an SAE; `SweepSpec.sites` are the places they are
trained at.
"""

import difflib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from penstock.errors import ConfigError, SpecError
from penstock.labels import check_devices, check_label_key, check_resource, check_selector
from penstock.redaction import secrets_in
from penstock.sites import Site

_COUNT_SUFFIXES = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9}


def parse_count(value: Any) -> Any:
    """`100M`, `500k`, `1.5B` or a plain number as an integer; anything else is left for pydantic to refuse."""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?)\s*([kMB]?)\s*", value)
        if not match:
            raise ValueError("a count is a whole number, or a number with k, M or B (500k, 100M)")
        value = float(match[1].replace("_", "")) * _COUNT_SUFFIXES[match[2]]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


Count = Annotated[int, BeforeValidator(parse_count), Field(gt=0)]
Cores = Annotated[float, Field(ge=0)]
GPUs = Annotated[float, Field(ge=0), AfterValidator(check_devices)]
# Smaller blocks cost an SAE about 1% of its loss at 64k and 1 to 4% at 16k; larger ones than 256k gain nothing that
# `jobs/benchmarks/mixing.py` can measure. A short run has smaller ones, or it would wait for its first.
LEAST_BLOCK_TOKENS, MOST_BLOCK_TOKENS = 65_536, 262_144
_WIDTHS = {"d_sae", "widths"}  # settings that may be multiples of d_in
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def _hook_point(value: Any) -> str | dict[str, str]:
    """An entry of `hook_points`; a mapping whose two names are equal is the name alone."""
    if isinstance(value, str):
        return value
    names = list(value.values()) if isinstance(value, dict) and set(value) == {"reads", "writes"} else []
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"{value!r} is no hook point; accepted: a name (an SAE reads and writes it), or {{reads: NAME, writes: "
            "NAME}, two names, for transcoders"
        )
    return value["reads"] if value["reads"] == value["writes"] else dict(value)


HookPoint = Annotated[str | dict[str, str], BeforeValidator(_hook_point)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[info.field_name or ""].annotation is not bool:
            raise ValueError("a truth value, where none is accepted")
        return value


class ModelSpec(_Section):
    """The language model: `demo`, a Hugging Face / TransformerLens name, or a local Hugging Face folder."""

    name: str = "demo"
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    processing: Literal["none", "fold_ln", "center", "fold_ln_center"] = "none"
    harvest_rows: int = Field(32, gt=0, description="rows of a forward pass; halved when memory runs out")
    trust_remote_code: bool = Field(False, description="run the Python code that comes with the model")


class ExcludeSpec(_Section):
    """Tokens that count nowhere: not in calibration, training, dead counts, L0, explained variance or CE."""

    special_tokens: bool = True
    first_positions: int = Field(1, ge=0)
    norm_over_median: float | None = Field(None, gt=1)


_OF_ONE_DATASET = ("dataset", "subset", "hub_split", "text_column", "tokens_column")


class SourceSpec(_Section):
    """A dataset of a mixture; `weight` is its share of every split's rows, relative to the others'."""

    dataset: str
    weight: float = Field(1.0, gt=0)
    subset: str | None = None
    hub_split: str = "train"
    text_column: str = "text"
    tokens_column: str | None = None


class DataSpec(_Section):
    """The corpus: `demo`, a hub name, a local file or folder (parquet, jsonl, text, arrow), or a `mixture` of these."""

    dataset: str = "demo"
    subset: str | None = None
    hub_split: str = "train"
    text_column: str = "text"
    tokens_column: str | None = Field(None, description="a column of token ids, in place of text_column")
    mixture: list[SourceSpec] | None = Field(None, min_length=1, description="datasets, in place of the five above")
    activations: str | None = Field(None, description="a folder of activations to train on, that somebody else made")
    epochs: int = Field(1, gt=0, description="how often the train rows may be used where the corpus has too few")
    spool: str | None = Field(None, description="where blocks are kept on disk: a folder or URI, or `off`; in the "
                                                "storage, when there is more than one wave, unless given")  # fmt: skip
    spool_gb: float = Field(50.0, gt=0, description="what the spool may hold; sweeps that it served last go first")
    context_size: int = Field(128, gt=1)
    bos: bool = Field(True, description="begin every row with the BOS token")
    search_tokens: Count = 50_000
    report_tokens: Count = 50_000
    exclude: ExcludeSpec = ExcludeSpec()
    seed: int = Field(0, ge=0)
    block_tokens: Count = Field(MOST_BLOCK_TOKENS, description="the unit of shuffling; an eighth of the run, between "
                                                               "65,536 and 262,144, unless given")  # fmt: skip

    @field_validator("spool")
    @classmethod
    def _folder(cls, value: str | None) -> str | None:
        if value in ("", "on", "yes", "true"):
            raise ValueError("accepted are `off` and a folder or URI; unless given it is in the storage, where needed")
        return value

    @field_validator("activations")
    @classmethod
    def _named(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("accepted is a folder of activations; leave it out to harvest them from the model")
        return value

    @model_serializer(mode="wrap")
    def _without_unused(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A mixture is written without the dataset that it stands in place of, so that it is read again as it was."""
        written = write(self)
        unused = _OF_ONE_DATASET if self.mixture is not None else ()
        return {name: value for name, value in written.items() if name not in unused}

    @property
    def sources(self) -> tuple[SourceSpec, ...]:
        """The datasets of the corpus: those of the mixture, or the one."""
        if self.mixture is not None:
            return tuple(self.mixture)
        names = SourceSpec.model_fields.keys() - {"weight"}
        return (SourceSpec(**{name: getattr(self, name) for name in names}),)

    @property
    def label(self) -> str:
        """What tables and records call the corpus."""
        return " + ".join(f"{source.weight:g} {source.dataset}" for source in self.mixture or ()) or self.dataset

    @property
    def block_rows(self) -> int:
        """Rows of a block, the unit of harvesting and of shuffling."""
        return self.block_tokens // self.context_size

    @model_validator(mode="after")
    def _consistent(self) -> "DataSpec":
        if self.block_tokens < self.context_size:
            raise ValueError(f"block_tokens {self.block_tokens} is less than a row of context_size {self.context_size}")
        alone = [name for name in _OF_ONE_DATASET if name in self.model_fields_set]
        if self.mixture is not None and alone:
            raise ValueError(f"mixture and {alone[0]} are both given; accepted: one of them, and in each entry "
                             "of a mixture its own dataset, subset, hub_split, text_column, tokens_column")  # fmt: skip
        if self.activations is not None and self.spool not in (None, "off"):
            raise ValueError(f"spool {self.spool!r} would keep what is harvested, and with activations "
                             f"{self.activations!r} nothing is; accepted: one of them")  # fmt: skip
        if self.exclude.first_positions >= self.context_size:
            raise ValueError(f"exclude.first_positions {self.exclude.first_positions} leaves nothing of a row of "
                             f"context_size {self.context_size}")  # fmt: skip
        return self


class TrainSpec(_Section):
    """How every SAE is trained. `lr` may be overridden by an SAE."""

    tokens: Count
    batch_tokens: Count = 4096
    lr: float = Field(4e-4, gt=0)
    lr_warm_up_steps: int = Field(0, ge=0)
    lr_decay: Literal["linear", "cosine", "constant"] = Field("linear", description="the last steps' way down to 0")
    lr_decay_steps: int | None = Field(None, ge=0, description="steps of that way; the last fifth unless given")
    encoder_dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="of the encoder's product")
    dead_after_tokens: Count | None = Field(None, description="a quarter of the run unless given, and at most that")
    adam_betas: tuple[float, float] = (0.9, 0.999)
    checkpoints: int = Field(5, ge=0, le=1000, description="whole checkpoints on the way, beside the last")
    keep: int = Field(0, ge=0, le=1000, description="folded SAEs kept on the way, beside the last; see `pull --at`")
    micro_batch_tokens: Count | None = Field(None, description="tokens of a forward and backward pass; halved when "
                                                               "memory runs out; the same results")  # fmt: skip

    @property
    def steps(self) -> int:
        return self.tokens // self.batch_tokens

    @property
    def decay_steps(self) -> int:
        if self.lr_decay == "constant":
            return 0
        return self.steps // 5 if self.lr_decay_steps is None else self.lr_decay_steps

    @field_validator("adam_betas")
    @classmethod
    def _betas(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("accepted are two numbers of at least 0 and below 1")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "TrainSpec":
        if self.steps < 1:
            raise ValueError(f"tokens {self.tokens} is less than one batch of batch_tokens {self.batch_tokens}")
        if self.lr_decay == "constant" and self.lr_decay_steps:
            raise ValueError(f"lr_decay_steps {self.lr_decay_steps}: a constant lr (lr_decay) has no decay; accepted: "
                             "leave it out")  # fmt: skip
        if self.lr_warm_up_steps + self.decay_steps > self.steps:
            raise ValueError(f"lr_warm_up_steps {self.lr_warm_up_steps} and lr_decay_steps {self.decay_steps} "
                             f"{'(a fifth of the run unless given) ' if self.lr_decay_steps is None else ''}are more "
                             f"than the {self.steps} steps of the run (tokens / batch_tokens)")  # fmt: skip
        if self.dead_after_tokens is not None and self.dead_after_tokens > self.tokens // 4:
            raise ValueError(f"dead_after_tokens {self.dead_after_tokens} is more than a quarter of the run "
                             f"({self.tokens // 4} of {self.tokens} tokens)")  # fmt: skip
        return self


def _band(value: Any) -> Any:
    if isinstance(value, int | float):
        raise ValueError("an L0 band is LO:HI (50:200)")
    return parse_band(value) if isinstance(value, str) else value


def _ordered_band(value: tuple[float, float]) -> tuple[float, float]:
    if not 0 <= value[0] <= value[1]:
        raise ValueError("an L0 band is LO:HI with LO at most HI, neither below 0 (50:200)")
    return value


L0Band = Annotated[tuple[float, float], BeforeValidator(_band), AfterValidator(_ordered_band)]
Share = Annotated[float, Field(ge=0, le=1)]


class EvaluateSpec(_Section):
    """How the figures are measured. Those of different protocols are never compared."""

    ablation: Literal["zero", "mean"] = Field("zero", description="what CE recovered is measured against")
    context_size: int | None = Field(None, gt=1, description="of the evaluated rows; data.context_size unless given")


class SearchSpec(_Section):
    """What is decided while the sweep runs, by figures of the `search` split alone."""

    prune: bool = Field(False, description="stop SAEs on the way that others of their hook point and width beat")
    margin: float = Field(0.15, ge=0, description="by how much, of the variance that they leave unexplained")
    fill: int = Field(0, ge=0, description="so many more SAEs, where the front has its widest gaps")

    @property
    def is_on(self) -> bool:
        return self.prune or self.fill > 0


class TargetSpec(_Section):
    """What an SAE should reach; each is marked against it."""

    model_config = ConfigDict(allow_inf_nan=True)  # a band may have no upper end

    l0: L0Band | None = None
    ce_recovered: Share | None = None
    explained_variance: Share | None = None
    dead_fraction: Share | None = Field(None, description="at most")


class SelectSpec(_Section):
    """The L0 band inside which the front is taken, as `LO:HI`."""

    model_config = ConfigDict(allow_inf_nan=True)  # a band may have no upper end

    l0_band: L0Band | None = None


def parse_band(text: str) -> tuple[float, float]:
    """`50:200` as (50.0, 200.0); either end may be left out."""
    match = re.fullmatch(r"\s*([0-9.]*)\s*:\s*([0-9.]*)\s*", text)
    try:
        low, high = (float(match[1] or 0), float(match[2] or "inf")) if match else (1.0, 0.0)
    except ValueError:
        low, high = 1.0, 0.0
    if low > high:
        raise ValueError(f"an L0 band is LO:HI with LO at most HI (50:200), not {text!r}")
    return low, high


class BaselineSpec(_Section):
    """What every SAE has to beat, evaluated the same way at these `k`; an empty list leaves them out."""

    k: list[Annotated[int, Field(gt=0)]] = [8, 32]

    @field_validator("k")
    @classmethod
    def _distinct(cls, value: list[int]) -> list[int]:
        return _all_different(value)


def _texts(values: Any) -> Any:
    """Labels as they are read; `in(a, b)` without quotes is two entries in YAML, and 3 is no text."""
    accepted = "accepted are labels and what they are to be: {penstock/role: pack}, and in quotes '!pack', 'in(a,b)'"
    if not isinstance(values, dict):
        raise ValueError(accepted)
    if wrong := [name for name, value in values.items() if not isinstance(value, str)]:
        raise ValueError(f"{wrong[0]}: {values[wrong[0]]!r} is no text; {accepted}")
    return values


def _labels(values: dict[str, str]) -> dict[str, str]:
    return {check_label_key(key): check_selector(value) for key, value in values.items()}


def _amounts(values: dict[str, float]) -> dict[str, float]:
    for name, amount in values.items():
        check_resource(name, amount)
    return values


def _numbers(values: Any) -> Any:
    accepted = "accepted are custom resources and how much of each: {slot: 1}"
    if not isinstance(values, dict):
        raise ValueError(accepted)
    if wrong := [name for name, value in values.items() if type(value) not in (int, float)]:
        raise ValueError(f"{wrong[0]}: {values[wrong[0]]!r} is no number; {accepted}")
    return values


Labels = Annotated[dict[str, str], BeforeValidator(_texts), AfterValidator(_labels)]
Amounts = Annotated[dict[str, float], BeforeValidator(_numbers), AfterValidator(_amounts)]


class ResourceSpec(_Section):
    """Where it runs. Nothing here changes a result, except that thread counts may move the last bits."""

    model_hosts: int = Field(1, gt=0)
    cpus_per_host: Cores = 1
    gpus_per_host: GPUs = 0
    host_threads: int = Field(1, gt=0)
    host_labels: Labels = Field({}, description="labels of the nodes that hosts run on: a value, !value, in(a,b)")
    host_resources: Amounts = Field({}, description="custom resources of Ray that each host takes, by name")
    cpus_per_pack: Cores = 1
    gpus_per_pack: GPUs = 0
    pack_labels: Labels = Field({}, description="labels of the nodes that packs run on: a value, !value, in(a,b)")
    pack_resources: Amounts = Field({}, description="custom resources of Ray that each pack takes, by name")
    pack_threads: int = Field(1, gt=0)
    saes_at_once: int = Field(1, gt=0, description="SAEs of a pack that step at the same time, each with pack_threads")
    packs_per_hook_point: int = Field(1, gt=0, description="at least so many; more where memory needs it")
    pack_memory_gb: float | None = Field(None, gt=0, description="memory of a pack's worker; 8 unless given")
    lease_seconds: float = Field(60.0, gt=0, description="without a step, until the others no longer wait for a pack")
    yield_after_seconds: float = Field(180.0, ge=0, description="a pack runs so long before another sweep may have its "
                                                                "place")  # fmt: skip
    gpu_hour_cost: float | None = Field(None, ge=0, description="currency units a GPU hour, for the plan's estimate")


class TrackingSpec(_Section):
    """Where curves and figures are shown beside MLflow, which is the record."""

    wandb_project: str | None = Field(None, min_length=1, description="a project of Weights & Biases that mirrors them")
    wandb_entity: str | None = Field(None, min_length=1, description="whose project; the user's own unless given")

    @model_validator(mode="after")
    def _project(self) -> "TrackingSpec":
        if self.wandb_entity is not None and self.wandb_project is None:
            raise ValueError(f"wandb_entity {self.wandb_entity!r} is given, and no wandb_project; accepted: both")
        return self


class SweepSpec(_Section):
    """Layers x architectures x sparsity values, and what they are trained on."""

    name: str
    storage: str | None = None
    model: ModelSpec = ModelSpec()
    data: DataSpec = DataSpec()
    hook_points: list[HookPoint] = Field(min_length=1)
    train: TrainSpec
    saes: list[dict[str, Any]] = Field(min_length=1)
    baselines: BaselineSpec = BaselineSpec()
    evaluate: EvaluateSpec = EvaluateSpec()
    search: SearchSpec = SearchSpec()
    targets: TargetSpec = TargetSpec()
    select: SelectSpec = SelectSpec()
    tracking: TrackingSpec = TrackingSpec()
    resources: ResourceSpec = ResourceSpec()

    @field_validator("name")
    @classmethod
    def _plain(cls, value: str) -> str:
        if not _NAME.fullmatch(value):
            raise ValueError("accepted are letters, digits, `.`, `_` and `-`, a letter or a digit first")
        return value

    @field_validator("hook_points")
    @classmethod
    def _distinct(cls, value: list[HookPoint]) -> list[HookPoint]:
        _all_different([_site(entry).label for entry in value])
        return value

    @property
    def sites(self) -> tuple[Site, ...]:
        """What `hook_points` stands for: every SAE of the sweep is trained at every one of these."""
        return tuple(_site(entry) for entry in self.hook_points)

    @model_validator(mode="before")
    @classmethod
    def _size_blocks(cls, values: Any) -> Any:
        """`data.block_tokens` where it is not given; what is wrong with the sections is found later."""
        data, train = (values.get(name, {}) for name in ("data", "train")) if isinstance(values, dict) else (None, None)
        if not isinstance(data, dict) or not isinstance(train, dict) or "block_tokens" in data:
            return values
        try:
            eighth = parse_count(train.get("tokens")) // 8
        except (TypeError, ValueError):
            return values
        return {**values, "data": {**data, "block_tokens": min(max(eighth, LEAST_BLOCK_TOKENS), MOST_BLOCK_TOKENS)}}

    @model_validator(mode="after")
    def _consistent(self) -> "SweepSpec":
        first_positions, context_size = self.data.exclude.first_positions, self.evaluate.context_size
        if context_size is not None and first_positions >= context_size:
            raise ValueError(f"evaluate.context_size {context_size} leaves nothing of a row: "
                             f"data.exclude.first_positions is {first_positions}")  # fmt: skip
        usable = self.data.block_rows * (self.data.context_size - self.data.exclude.first_positions)
        if self.train.batch_tokens > usable:
            raise ValueError(
                f"train.batch_tokens {self.train.batch_tokens} is larger than a block, which holds at most {usable} "
                f"tokens (data.block_tokens {self.data.block_tokens}, less the excluded)"
            )
        return self

    def sae_settings(self, d_in: int) -> list[dict[str, Any]]:
        """One mapping an SAE, with every axis expanded and `d_sae` as a number (`8x` is 8 times `d_in`)."""
        return [resolved for entry in self.saes for resolved in expand_axes(entry, d_in)]


def _site(entry: HookPoint) -> Site:
    return Site(entry, entry) if isinstance(entry, str) else Site(entry["reads"], entry["writes"])


def _all_different(values: list[Any]) -> list[Any]:
    repeated = sorted({str(value) for value in values if values.count(value) > 1})
    if repeated:
        raise ValueError(f"named twice: {', '.join(repeated)}")
    return values


def expand_axes(entry: Mapping[str, Any], d_in: int) -> Iterator[dict[str, Any]]:
    """The Cartesian product over every axis in an entry of `saes`, in the order written."""
    axes = [value if is_axis(entry, name) else [value] for name, value in entry.items()]
    for values in itertools.product(*axes):
        settings = dict(zip(entry, values, strict=True))
        for name in _WIDTHS & settings.keys():
            value = settings[name]
            many = isinstance(value, list)
            settings[name] = [_width(name, item, d_in) for item in value] if many else _width(name, value, d_in)
        yield settings


def is_axis(entry: Mapping[str, Any], name: str) -> bool:
    """Whether a value in an entry of `saes` is a list of values to try, and not the value of a setting that is a list
    itself: of such a setting only a list of lists is an axis."""
    value = entry[name]
    if not isinstance(value, list):
        return False
    return not _is_sequence(entry, name) or not value or any(item is None or isinstance(item, list) for item in value)


def _is_sequence(entry: Mapping[str, Any], name: str) -> bool:
    from sae_core.architectures import ARCHITECTURES

    named = entry.get("architecture")
    for architecture in named if isinstance(named, list) else [named]:
        known = ARCHITECTURES[architecture].settings_type.model_fields if str(architecture) in ARCHITECTURES else {}
        annotation = known[name].annotation if name in known else None
        if any(get_origin(kind) in (list, tuple) for kind in (annotation, *get_args(annotation))):
            return True
    return False


def _width(name: str, value: Any, d_in: int) -> Any:
    if isinstance(value, str) and (match := re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)x\s*", value)):
        return int(float(match[1]) * d_in)
    try:
        return parse_count(value)
    except ValueError:
        raise ValueError(f"{name} {value!r}: a number of latents, or a multiple of d_in (8x)") from None


# ---- reading a file -------------------------------------------------------------------------------------------------

Location = tuple[str | int, ...]
Lines = Mapping[Location, int]


def load_spec(path: str | Path) -> SweepSpec:
    """Read and check a spec file. Raises `SpecError` with the line, the field, the value and what is accepted."""
    return parse_spec(_read(path), source=str(path))


def place(path: str | Path, message: str) -> str:
    """`FILE, line N`: where a spec that `load_spec` accepts says what a message about it begins with, like
    `data.dataset 'x': ...` or `saes[1]: k is ...`; the file alone where it is a default that is wrong."""
    _, lines = _load_with_lines(_read(path))
    return _place(str(path), lines, _mentioned(message, lines))


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: cannot be read as a sweep spec: it is not text in UTF-8 ({error.reason})") from None
    except OSError as error:
        raise SpecError(f"{path}: cannot be read as a sweep spec: {error.strerror or error}") from None


def parse_spec(text: str, source: str = "spec") -> SweepSpec:
    """Check a spec given as YAML text; `source` names it in messages."""
    try:
        raw, lines = _load_with_lines(text)
    except (yaml.YAMLError, ValueError) as error:
        raise SpecError(_describe_yaml(error, source)) from None
    except RecursionError:
        raise SpecError(f"{source}: is nested too deeply, or an alias in it refers to itself") from None
    if not isinstance(raw, dict):
        what = "nothing" if raw is None else f"a {type(raw).__name__}"
        raise SpecError(f"{source}: holds no sweep spec, but {what}; it begins with `name: ...`")
    return check_spec(raw, source, lines)


def check_spec(raw: Mapping[str, Any], source: str, lines: Lines = MappingProxyType({})) -> SweepSpec:
    """Check a spec given as a mapping; `lines` says where each key stands in `source`, if that is a file."""
    for location, what in secrets_in(raw):
        raise SpecError(
            f"{_place(source, lines, location)}: `{'.'.join(map(str, location))}` holds {what}, and a spec is kept and "
            "shown in many places (storage, MLflow, reports); accepted: none, but in the environment of the processes "
            "that need it (AWS_..., HF_TOKEN, PGPASSWORD, ...), on a cluster of its `ray start`"
        )
    try:
        spec = SweepSpec.model_validate(raw)
        _check_entries(spec)
    except ValidationError as error:
        unknown_first = sorted(error.errors(), key=lambda problem: problem["type"] == "missing")
        problems = [_describe(problem, lines, source) for problem in unknown_first]
        raise SpecError("\n".join(problems)) from None
    except _EntryError as error:
        raise SpecError(f"{_place(source, lines, error.location)}: {error.message}") from None
    return spec


class _EntryError(Exception):
    def __init__(self, location: Location, message: str) -> None:
        self.location, self.message = location, message


def _check_entries(spec: SweepSpec) -> None:
    """Check every SAE of every entry, with a stand-in d_in: what depends on the real one is checked by the plan."""
    from sae_core.architectures import ARCHITECTURES, parse_settings

    for index, entry in enumerate(spec.saes):
        if "architecture" not in entry:
            accepted = ", ".join(ARCHITECTURES)
            raise _EntryError(("saes", index), f"saes[{index}]: architecture is missing; accepted: {accepted}")
        for key, value in entry.items():
            if not is_axis(entry, key):
                continue
            if not value:
                raise _EntryError(("saes", index, key), f"{key} is an empty list: an axis needs one value or more")
            if len({str(item) for item in value}) < len(value):
                raise _EntryError(("saes", index, key), f"{key} {value}: a value stands twice")
        try:
            for settings in expand_axes(entry, d_in=1 << 20):
                if not _mixes_widths(entry):
                    parse_settings(settings)
        except (ValueError, ConfigError) as error:
            named = next((word for word in re.findall(r"\w+", str(error)) if word in entry), None)
            location = ("saes", index, named) if named else ("saes", index)
            raise _EntryError(location, f"saes[{index}]: {error}") from None


def _mixes_widths(entry: Mapping[str, Any]) -> bool:
    """Whether d_sae and the widths of its prefixes are numbers in part and multiples of d_in in part: only with the
    real one can be said whether they fit."""
    if "widths" not in entry:
        return False
    given = [str(value) for name in _WIDTHS & entry.keys() for value in _flat(entry[name])]
    return len({value.strip().endswith("x") for value in given}) > 1


def _flat(value: Any) -> Iterator[Any]:
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, list):
            yield from _flat(item)
        elif item is not None:
            yield item


def _load_with_lines(text: str) -> tuple[Any, dict[Location, int]]:
    """The parsed YAML, and the line (from 1) of every key and item by its path."""
    lines: dict[Location, int] = {}

    def walk(node: yaml.Node, path: Location) -> None:
        lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            names: set[str] = set()
            for key, value in node.value:
                line = key.start_mark.line + 1
                if not isinstance(key, yaml.ScalarNode):
                    raise yaml.YAMLError(f"line {line}: a key is one word, not a list or a mapping")
                if key.value in names:
                    raise yaml.YAMLError(f"line {line}: the key {key.value!r} stands twice")
                names.add(key.value)
                lines[(*path, key.value)] = line
                walk(value, (*path, key.value))
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                walk(item, (*path, index))

    root = yaml.compose(text, Loader=_Loader)
    if root is not None:
        walk(root, ())
    return yaml.load(text, Loader=_Loader), lines


class _Loader(yaml.SafeLoader):
    """Scalars as YAML 1.2 reads them. By 1.1, PyYAML's, `4e-4` is a text, the band `10:20` is the number 620 (to base
    60), `no` is false, and `2024-01-01` a date."""


_SCALARS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    "float": (
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
}
_REPLACED = {f"tag:yaml.org,2002:{kind}" for kind in (*_SCALARS, "timestamp")}
_Loader.yaml_implicit_resolvers = {
    first: [resolver for resolver in resolvers if resolver[0] not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"^(?:{_pattern})$"), list(_first))


def _describe_yaml(error: Exception, source: str) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return f"{source}: is not YAML: {' '.join(str(error).split())}"
    problem = error.problem or ""
    hint = "; indent with spaces" if r"'\t'" in problem else ""
    return f"{source}, line {mark.line + 1}: is not YAML: {problem} (column {mark.column + 1}){hint}"


def _place(source: str, lines: Lines, location: Location) -> str:
    for length in range(len(location), 0, -1):
        if location[:length] in lines:
            return f"{source}, line {lines[location[:length]]}"
    return source


def _mentioned(message: str, lines: Lines, section: Location = ()) -> Location:
    """The path of the first field that a message names, like `tokens`, `train.tokens` or `saes[0]`, of those that a
    section of the file has; else the section of the first that is a default."""
    words = re.findall(r"[a-z][a-z0-9_]*(?:\.[a-z][a-z0-9_]*|\[[0-9]+\])*", message)
    paths = [tuple(int(part) if part.isdigit() else part for part in re.findall(r"\w+", word)) for word in words]
    candidates = [(*section, *path) for path in [*paths, *(path[:-1] for path in paths if len(path) > 1)]]
    return next((path for path in candidates if path in lines), section)


def _describe(problem: Mapping[str, Any], lines: Lines, source: str) -> str:
    location = tuple(problem["loc"])
    field = ".".join(str(part) for part in location)
    where = _place(source, lines, location)
    value = problem.get("input")
    if problem["type"] in ("extra_forbidden", "invalid_key"):
        known = _known_keys(location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"did you mean `{near[0]}`? " if near else ""
        return f"{where}: unknown key `{field.removesuffix('.[key]')}`; {hint}accepted here: {', '.join(known)}"
    if problem["type"] == "missing":
        return f"{where}: `{field}` is missing"
    message = _MESSAGES.get(problem["type"], problem["msg"].removeprefix("Value error, "))
    if isinstance(value, dict) and problem["type"] == "value_error":  # a rule over several fields names them itself
        where = _place(source, lines, _mentioned(message, lines, location))
        return f"{where}: {field}: {message}" if location else f"{where}: {message}"
    if problem["type"] == "model_type":
        message += f" with the keys {', '.join(_known_keys(location))}"
    return f"{where}: `{field}` is {value!r}: {message}"


_MESSAGES = {  # for what pydantic says in the language of Python
    "model_type": "accepted is a mapping",
    "dict_type": "accepted is a mapping of settings, like {architecture: topk, d_sae: 8x, k: 32}",
    "list_type": "accepted is a list",
    "tuple_type": "accepted is a pair",
    "string_type": "accepted is a text",
    "too_short": "accepted is a list of one or more",
}


def _known_keys(location: Sequence[str | int]) -> list[str]:
    section: type[BaseModel] = SweepSpec
    for part in location:
        if isinstance(part, int):  # an item of a list of sections
            continue
        annotation = section.model_fields[part].annotation if part in section.model_fields else None
        inside = [kind for kind in _types(annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not inside:
            return []
        section = inside[0]
    return list(section.model_fields)


def _types(annotation: Any) -> Iterator[Any]:
    """An annotation, or those that it is made of."""
    if not get_args(annotation):
        yield annotation
    for part in get_args(annotation):
        yield from _types(part)
