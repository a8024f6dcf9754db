"""The sweep spec: what a user writes, checked in full before anything runs.

`load_spec(path)` reads a YAML file into a frozen `SweepSpec`; whatever is wrong is a `SpecError` that names the file's
line, the field, the value and what is accepted. `SweepSpec.sae_settings()` expands the axes (every list in an entry of
`saes`) into one mapping an SAE.
"""

import difflib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from penstock.errors import SpecError

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


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSpec(_Section):
    """The language model: `demo`, a Hugging Face / TransformerLens name, or a local Hugging Face folder."""

    name: str = "demo"
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    processing: Literal["none", "fold_ln", "center", "fold_ln_center"] = "none"
    harvest_rows: int = Field(32, gt=0, description="rows of a forward pass; halved when memory runs out")


class ExcludeSpec(_Section):
    """Tokens that count nowhere: not in calibration, training, dead counts, L0, explained variance or CE."""

    special_tokens: bool = True
    first_positions: int = Field(1, ge=0)
    norm_over_median: float | None = Field(None, gt=1)


class DataSpec(_Section):
    """The corpus: `demo`, a hub name, or a local file or folder (parquet, jsonl, text, arrow)."""

    dataset: str = "demo"
    subset: str | None = None
    hub_split: str = "train"
    text_column: str = "text"
    tokens_column: str | None = Field(None, description="a column of token ids, in place of text_column")
    context_size: int = Field(128, gt=1)
    bos: bool = Field(True, description="begin every row with the BOS token")
    search_tokens: Count = 50_000
    report_tokens: Count = 50_000
    exclude: ExcludeSpec = ExcludeSpec()
    seed: int = Field(0, ge=0)
    block_tokens: Count = 65_536

    @property
    def block_rows(self) -> int:
        """Rows of a block, the unit of harvesting and of shuffling."""
        return self.block_tokens // self.context_size

    @model_validator(mode="after")
    def _consistent(self) -> "DataSpec":
        if self.block_tokens < self.context_size:
            raise ValueError(f"block_tokens {self.block_tokens} is less than a row of context_size {self.context_size}")
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
    lr_decay_steps: int | None = Field(None, ge=0, description="linear decay to 0; the last fifth unless given")
    dead_after_tokens: Count | None = Field(None, description="a quarter of the run unless given, and at most that")
    checkpoints: int = Field(5, ge=0, description="whole checkpoints on the way, beside the last")
    micro_batch_tokens: Count | None = Field(None, description="tokens of a forward and backward pass; halved when "
                                                               "memory runs out; the same results")  # fmt: skip

    @property
    def steps(self) -> int:
        return self.tokens // self.batch_tokens

    @model_validator(mode="after")
    def _consistent(self) -> "TrainSpec":
        if self.steps < 1:
            raise ValueError(f"tokens {self.tokens} is less than one batch of batch_tokens {self.batch_tokens}")
        if self.dead_after_tokens is not None and self.dead_after_tokens > self.tokens // 4:
            raise ValueError(f"dead_after_tokens {self.dead_after_tokens} is more than a quarter of the run "
                             f"({self.tokens // 4} of {self.tokens} tokens)")  # fmt: skip
        return self


class SelectSpec(_Section):
    """The L0 band inside which the front is taken, as `LO:HI`."""

    l0_band: tuple[float, float] | None = None

    @field_validator("l0_band", mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        return parse_band(value) if isinstance(value, str) else value


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


class ResourceSpec(_Section):
    """Where it runs. Nothing here changes a result, except that thread counts may move the last bits."""

    model_hosts: int = Field(1, gt=0)
    cpus_per_host: Cores = 1
    gpus_per_host: Cores = 0
    host_threads: int = Field(1, gt=0)
    cpus_per_pack: Cores = 1
    gpus_per_pack: Cores = 0
    pack_threads: int = Field(1, gt=0)
    packs_per_hook_point: int = Field(1, gt=0, description="at least so many; more where memory needs it")
    pack_memory_gb: float | None = Field(None, gt=0, description="memory of a pack's worker; 8 unless given")
    gpu_hour_cost: float | None = Field(None, ge=0, description="currency units a GPU hour, for the plan's estimate")


class SweepSpec(_Section):
    """Layers x architectures x sparsity values, and what they are trained on."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    storage: str | None = None
    model: ModelSpec = ModelSpec()
    data: DataSpec = DataSpec()
    hook_points: list[str] = Field(min_length=1)
    train: TrainSpec
    saes: list[dict[str, Any]] = Field(min_length=1)
    baselines: BaselineSpec = BaselineSpec()
    select: SelectSpec = SelectSpec()
    resources: ResourceSpec = ResourceSpec()

    @field_validator("hook_points")
    @classmethod
    def _distinct(cls, value: list[str]) -> list[str]:
        repeated = sorted({name for name in value if value.count(name) > 1})
        if repeated:
            raise ValueError(f"named twice: {', '.join(repeated)}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "SweepSpec":
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


def expand_axes(entry: Mapping[str, Any], d_in: int) -> Iterator[dict[str, Any]]:
    """The Cartesian product over every list in an entry of `saes`, in the order written."""
    axes = [value if isinstance(value, list) else [value] for value in entry.values()]
    for values in itertools.product(*axes):
        settings = dict(zip(entry, values, strict=True))
        if "d_sae" in settings:
            settings["d_sae"] = _width(settings["d_sae"], d_in)
        yield settings


def _width(value: Any, d_in: int) -> Any:
    if isinstance(value, str) and (match := re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)x\s*", value)):
        return int(float(match[1]) * d_in)
    try:
        return parse_count(value)
    except ValueError:
        raise ValueError(f"d_sae {value!r}: a number of latents, or a multiple of d_in (8x)") from None


# ---- reading a file -------------------------------------------------------------------------------------------------


def load_spec(path: str | Path) -> SweepSpec:
    """Read and check a spec file. Raises `SpecError` with the line, the field, the value and what is accepted."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: cannot be read as a sweep spec: {error}") from None
    return parse_spec(text, source=str(path))


def parse_spec(text: str, source: str = "spec") -> SweepSpec:
    """Check a spec given as YAML text; `source` names it in messages."""
    try:
        raw, lines = _load_with_lines(text)
    except yaml.YAMLError as error:
        raise SpecError(f"{source}: is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise SpecError(f"{source}: holds no sweep spec, but {type(raw).__name__}; it begins with `name: ...`")
    try:
        spec = SweepSpec.model_validate(raw)
        _check_entries(spec)
    except ValidationError as error:
        problems = [_describe(problem, lines, source) for problem in error.errors()]
        raise SpecError("\n".join(problems)) from None
    except _EntryError as error:
        raise SpecError(f"{_place(source, lines, error.location)}: {error.message}") from None
    return spec


class _EntryError(Exception):
    def __init__(self, location: tuple[str | int, ...], message: str) -> None:
        self.location, self.message = location, message


def _check_entries(spec: SweepSpec) -> None:
    """Check every SAE of every entry, with a stand-in d_in: what depends on the real one is checked by the plan."""
    from sae_core.architectures import parse_settings

    for index, entry in enumerate(spec.saes):
        for key, value in entry.items():
            if isinstance(value, list) and not value:
                raise _EntryError(("saes", index, key), f"{key} is an empty list: an axis needs one value or more")
            if isinstance(value, list) and len({str(item) for item in value}) < len(value):
                raise _EntryError(("saes", index, key), f"{key} {value}: a value stands twice")
        try:
            for settings in expand_axes(entry, d_in=1 << 20):
                parse_settings(settings)
        except (ValueError, SpecError.__base__) as error:
            named = next((key for key in entry if re.search(rf"\b{re.escape(str(key))}\b", str(error))), None)
            location = ("saes", index, named) if named else ("saes", index)
            raise _EntryError(location, f"saes[{index}]: {error}") from None


def _load_with_lines(text: str) -> tuple[Any, dict[tuple[str | int, ...], int]]:
    """The parsed YAML, and the line (from 1) of every key and item by its path."""
    lines: dict[tuple[str | int, ...], int] = {}

    def walk(node: yaml.Node, path: tuple[str | int, ...]) -> None:
        lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            names: set[str] = set()
            for key, value in node.value:
                if key.value in names:
                    raise yaml.YAMLError(f"line {key.start_mark.line + 1}: the key {key.value!r} stands twice")
                names.add(key.value)
                lines[(*path, key.value)] = key.start_mark.line + 1
                walk(value, (*path, key.value))
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                walk(item, (*path, index))

    root = yaml.compose(text, Loader=_Loader)
    if root is not None:
        walk(root, ())
    return yaml.load(text, Loader=_Loader), lines


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `4e-4` as a string; people write it as a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _place(source: str, lines: Mapping[tuple[str | int, ...], int], location: Sequence[str | int]) -> str:
    for length in range(len(location), -1, -1):
        if tuple(location[:length]) in lines:
            return f"{source}, line {lines[tuple(location[:length])]}"
    return source


def _describe(problem: Mapping[str, Any], lines: Mapping[tuple[str | int, ...], int], source: str) -> str:
    location = problem["loc"]
    field = ".".join(str(part) for part in location) or "spec"
    place = _place(source, lines, location)
    if problem["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"did you mean `{near[0]}`? " if near else ""
        return f"{place}: unknown key `{field}`; {hint}accepted here: {', '.join(known)}"
    message = problem["msg"].removeprefix("Value error, ")
    value = problem.get("input")
    if problem["type"] == "missing":
        return f"{place}: `{field}` is missing"
    if isinstance(value, dict):  # a rule over several fields names them itself
        return f"{place}: {field}: {message}" if location else f"{place}: {message}"
    return f"{place}: `{field}` is {value!r}: {message}"


def _known_keys(location: Sequence[str | int]) -> list[str]:
    section: type[BaseModel] = SweepSpec
    for part in location:
        annotation = section.model_fields[str(part)].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        section = annotation
    return list(section.model_fields)
