"""What a sweep will do, before it does it: SAEs, packs, waves, memory, tokens, forward passes, cost. Runs nothing."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from penstock.batches import Schedule
from penstock.errors import ConfigError, SpecError, SweepError, UserError
from penstock.given import open_given
from penstock.identity import FORMAT, content_id
from penstock.models import (
    ModelDescription,
    check_context_size,
    check_sites,
    check_weight_files,
    describe_model,
)
from penstock.pack import PackMember
from penstock.search import Peer, rung_steps
from penstock.sites import Site, parse_array
from penstock.spec import DataSpec, SweepSpec, TrainSpec, expand_axes, load_spec, place
from penstock.spool import SpooledStream
from penstock.tokens import check_data
from sae_core import SAESettings, TrainingSettings, parse_settings
from sae_core.architectures import ARCHITECTURES
from sae_core.normalization import PER_TOKEN

DEFAULT_DEAD_AFTER_TOKENS = 10_000_000
DEFAULT_PACK_MEMORY_GB = 8.0
LOW_L1_COEFFICIENT = 0.01
FROZEN_DECODER = "frozen_decoder"

# What an SAE's identity held in the first release. Settings that came later are in it where they are not at their
# default, so that SAEs of older sweeps are found again: a default that changes asks for a new FORMAT.
_FIRST_SETTINGS = {
    *("architecture", "d_sae", "seed", "lr", "frozen_decoder", "l1_coefficient", "l1_warm_up_steps", "k"),
    *("aux_coefficient", "steps", "batch_tokens", "lr_warm_up_steps", "lr_decay_steps", "max_grad_norm", "adam_betas"),
    "dead_after_tokens",
}

# Sustained fp32 rates that the time estimate assumes; stated beside it, since only a run can measure them.
ASSUMED_FLOPS = {"CPU core": 5e10, "GPU": 2e13}


@dataclass(frozen=True)
class PlannedSAE:
    """One SAE of the sweep. `baseline` is set where it is only there to be beaten."""

    sae_id: str
    site: Site
    d_in: int
    d_out: int
    settings: SAESettings
    baseline: str | None = None

    @property
    def reads(self) -> str:
        return self.site.reads

    @property
    def writes(self) -> str:
        return self.site.writes

    @property
    def hook_point(self) -> str:
        """What tables call the place: a hook point, or `READS -> WRITES` of a transcoder."""
        return self.site.label

    @property
    def prefix_widths(self) -> tuple[int, ...]:
        """The widths at which the SAE, cut off, is evaluated as one of its own beside the whole."""
        return tuple(getattr(self.settings, "prefix_widths", ()))

    @property
    def n_products(self) -> int:
        """Weights that are multiplied with activations: encoder, decoder, skip connection."""
        skip = self.d_in * self.d_out if getattr(self.settings, "skip", False) else 0
        return (self.d_in + self.d_out) * self.settings.d_sae + skip

    @property
    def memory_bytes(self) -> int:
        """Weights, gradients and both Adam moments, in fp32."""
        return 16 * (self.n_products + 3 * self.settings.d_sae + self.d_out)

    def activation_bytes(self, micro_batch_tokens: int) -> int:
        """Pre-activations, activations (and a transcoder's target) and their gradients of one micro-batch, in fp32."""
        width = self.settings.d_sae + self.d_in + (self.d_out if self.site.is_transcoder else 0)
        return 16 * micro_batch_tokens * width

    def as_peer(self, train: TrainSpec) -> Peer:
        """What it is compared with while it trains."""
        settings = self.settings.model_dump(exclude={"seed"})
        return Peer(
            self.sae_id,
            self.hook_point,
            (self.hook_point, self.settings.d_sae, self.prefix_widths),
            json.dumps(settings, sort_keys=True),
            max(self.settings.settled_after(train.steps), train.lr_warm_up_steps),
        )

    @property
    def params(self) -> dict[str, Any]:
        """Every axis of the sweep for this SAE, and where it reads."""
        widths = {"d_in": self.d_in} | ({"d_out": self.d_out} if self.site.is_transcoder else {})
        return {"hook_point": self.hook_point, **widths, **self.settings.model_dump(exclude_none=True)}


@dataclass(frozen=True)
class PlannedPack:
    """SAEs of one site that train together on one worker. `reads` and `writes` name arrays of the stream: the site's
    hook points, where outliers do not make them other ones (see `Site.array`)."""

    site: Site
    reads: str
    writes: str
    saes: tuple[PlannedSAE, ...]
    memory_bytes: int

    @property
    def pack_id(self) -> str:
        return content_id([sae.sae_id for sae in self.saes])

    @property
    def hook_point(self) -> str:
        return self.site.label

    @property
    def hook_points(self) -> tuple[str, ...]:
        """The arrays of the stream that the pack is fed."""
        return tuple(dict.fromkeys((self.reads, self.writes)))


def read_sweep(spec_path: str | Path) -> tuple[SweepSpec, ModelDescription]:
    """The spec of a file and its model, checked by `check_sweep`. Raises a `UserError` that begins with the file and
    the line."""
    spec = load_spec(spec_path)
    try:
        return check_sweep(spec)
    except UserError as error:
        raise type(error)(f"{place(spec_path, str(error))}: {error}") from None


def check_sweep(spec: SweepSpec) -> tuple[SweepSpec, ModelDescription]:
    """A spec and its model, checked as far as that can be done before anything is started; local paths in it are made
    absolute. Raises a `UserError`."""
    model, data = spec.model, spec.data
    model = model.model_copy(update={"name": absolute(model.name)})
    if data.mixture is not None:
        entries = [source.model_copy(update={"dataset": absolute(source.dataset)}) for source in data.mixture]
        data = data.model_copy(update={"mixture": entries})
    else:
        data = data.model_copy(update={"dataset": absolute(data.dataset)})
    if data.activations is not None:
        data = data.model_copy(update={"activations": absolute(data.activations)})
    if data.spool not in (None, "off") and "://" not in data.spool:
        data = data.model_copy(update={"spool": os.path.abspath(os.path.expanduser(data.spool))})
    spec = spec.model_copy(update={"model": model, "data": data})
    description = describe_model(model)
    check_weight_files(model)
    check_sites(description, spec.sites)
    check_context_size(description, data.context_size)
    check_context_size(description, spec.evaluate.context_size or 0, "evaluate.context_size")
    packs = plan_packs(spec, plan_saes(spec, description, train_id=""))
    if data.activations is not None:
        arrays = sorted(arrays_of(packs))
        widths = {name: description.hook_points[parse_array(name)[0]] for name in arrays}
        open_given(data).check(spec, widths)
    check_data(data, model, spec.train, description.vocab_size)
    return spec, description


def absolute(name: str) -> str:
    """A path that is there as other working directories read it; any other name, `demo` too, as it is."""
    if name == "demo":
        return name
    return os.path.abspath(os.path.expanduser(name)) if os.path.exists(os.path.expanduser(name)) else name


def training_settings(train: TrainSpec) -> TrainingSettings:
    """The part of the spec that every SAE of the sweep shares."""
    dead_after = train.dead_after_tokens or max(1, min(DEFAULT_DEAD_AFTER_TOKENS, train.tokens // 4))
    return TrainingSettings(
        steps=train.steps,
        batch_tokens=train.batch_tokens,
        lr=train.lr,
        lr_warm_up_steps=train.lr_warm_up_steps,
        lr_decay=train.lr_decay,
        lr_decay_steps=train.lr_decay_steps,
        adam_betas=train.adam_betas,
        encoder_dtype=train.encoder_dtype,
        dead_after_tokens=dead_after,
    )


def plan_saes(spec: SweepSpec, model: ModelDescription, train_id: str) -> list[PlannedSAE]:
    """Every SAE of the sweep, baselines with a frozen decoder included, with its id by content."""
    planned = [
        plan_sae(spec, model, train_id, site, settings, baseline)
        for site in spec.sites
        for settings, baseline in _settings_at(spec, site, model.hook_points[site.reads])
    ]
    return list({sae.sae_id: sae for sae in planned}.values())


def plan_sae(
    spec: SweepSpec,
    model: ModelDescription,
    train_id: str,
    site: Site,
    settings: SAESettings,
    baseline: str | None = None,
) -> PlannedSAE:
    """One SAE of the sweep's model, tokens and training, with its id by content."""
    identity = {
        "format": FORMAT,
        "model": [model.fingerprint, spec.model.dtype, spec.model.processing],
        "data": stream_identity(spec.data, train_id),
        "hook_point": site.reads,
        "training": _of_identity(training_settings(spec.train)),
        "settings": _of_identity(settings),
    } | ({"writes": site.writes} if site.is_transcoder else {})
    d_in, d_out = model.hook_points[site.reads], model.hook_points[site.writes]
    return PlannedSAE(content_id(identity), site, d_in, d_out, settings, baseline)


def _of_identity(settings: BaseModel) -> dict[str, Any]:
    defaults = {name: field.default for name, field in type(settings).model_fields.items()}
    return {
        name: value
        for name, value in settings.model_dump().items()
        if name in _FIRST_SETTINGS or value != defaults[name]
    }


def _settings_at(spec: SweepSpec, site: Site, d_in: int) -> list[tuple[SAESettings, str | None]]:
    """The settings of every SAE of a site, baselines last. Raises `SpecError` for one that stands twice, or that cannot
    be trained there."""
    found: dict[SAESettings, tuple[str, str | None]] = {}

    def add(field: str, mapping: Mapping[str, Any], baseline: str | None = None) -> None:
        try:
            settings = parse_settings(mapping)
        except ConfigError as error:
            raise SpecError(f"{field}: {error}") from None
        _check_site(field, settings, site)
        if settings in found:
            shown = ", ".join(f"{name}: {value}" for name, value in settings.model_dump(exclude_defaults=True).items())
            raise SpecError(f"{field}: {{{shown}}} is in {found[settings][0]} already; every SAE of a sweep is another "
                            "one")  # fmt: skip
        found[settings] = (field, baseline)

    for index, entry in enumerate(spec.saes):
        for mapping in expand_axes(entry, d_in):
            add(f"saes[{index}]", mapping)
    widest = max(settings.d_sae for settings in found)
    for k in spec.baselines.k:
        mapping = {"architecture": "topk", "d_sae": widest, "k": k, "frozen_decoder": True}
        add("baselines.k", mapping, FROZEN_DECODER)
    return [(settings, baseline) for settings, (_, baseline) in found.items()]


def _check_site(field: str, settings: SAESettings, site: Site) -> None:
    """Raise `SpecError` for an SAE that cannot be trained at a site."""
    name = settings.architecture
    if not site.is_transcoder:
        if getattr(settings, "skip", False):
            raise SpecError(f"{field}: skip: true at {site.label}: what is read and written is the same there, and a "
                            "skip connection would hand it on; accepted: skip at sites {reads: A, writes: B}"
                            )  # fmt: skip
        return
    if not ARCHITECTURES[name].can_transcode:
        known = [other for other, kind in ARCHITECTURES.items() if kind.can_transcode]
        raise SpecError(f"{field}: architecture: {name} cannot be a transcoder, and every SAE is trained at every hook "
                        f"point, here at {site.label}; accepted there: {', '.join(known)}")  # fmt: skip
    if settings.normalize_activations in PER_TOKEN:
        raise SpecError(f"{field}: normalize_activations: {settings.normalize_activations} at {site.label}: how long "
                        "a token's input is says nothing of its output; accepted there: none, "
                        "expected_average_only_in, covariance_whitening")  # fmt: skip


def stream_identity(data: DataSpec, train_id: str) -> dict[str, Any]:
    """What fixes the bytes of every batch, beside the model."""
    return {
        "tokens": train_id,
        "block_rows": data.block_rows,
        "exclude": data.exclude.model_dump(),
        "seed": data.seed,
    }


def plan_packs(spec: SweepSpec, saes: Sequence[PlannedSAE]) -> list[PlannedPack]:
    """Pack the SAEs: all of a site together, in as few packs as memory (and the spec) allows.

    Raises `SweepError` for an SAE that no single worker can hold.
    """
    limit = (spec.resources.pack_memory_gb or DEFAULT_PACK_MEMORY_GB) * 1e9
    micro_batch = spec.train.micro_batch_tokens or spec.train.batch_tokens
    at_once = spec.resources.saes_at_once
    packs = []
    for site in spec.sites:
        here = [sae for sae in saes if sae.site == site]
        reads, writes = (site.array(name, spec.data.exclude.norm_over_median) for name in (site.reads, site.writes))
        for sae in here:
            need = sae.memory_bytes + at_once * sae.activation_bytes(micro_batch)
            if need > limit:
                raise SweepError(
                    f"saes: d_sae {sae.settings.d_sae} at {site.label} needs {need / 1e9:.1f} GB on one worker, and "
                    f"resources.pack_memory_gb is {limit / 1e9:g}; accepted: a smaller d_sae, a smaller "
                    "train.micro_batch_tokens, or workers with more memory"
                )
        total = sum(sae.memory_bytes for sae in here)
        room = limit - at_once * max((sae.activation_bytes(micro_batch) for sae in here), default=0)
        count = min(len(here), max(spec.resources.packs_per_hook_point, math.ceil(total / room)))
        while count:
            groups = [here[index::count] for index in range(count)]
            if all(sum(sae.memory_bytes for sae in group) <= room for group in groups):
                break
            count += 1
        for group in groups if count else []:
            in_steps = at_once * max(sae.activation_bytes(micro_batch) for sae in group)
            memory = sum(sae.memory_bytes for sae in group) + in_steps
            packs.append(PlannedPack(site, reads, writes, tuple(group), memory))
    return packs


def members(pack: PlannedPack, metadata: Mapping[str, Any]) -> list[PackMember]:
    """The pack as its worker takes it; `metadata` goes into every `cfg.json`."""
    site = pack.site
    hooks = {"hook_name": site.reads} | ({"hook_name_out": site.writes} if site.is_transcoder else {})
    # As SAELens has it: activations of all heads come as [..., n_heads, d_head], and are handed back so.
    reshape = "hook_z" if site.reads.endswith(".hook_z") and not site.is_transcoder else "none"
    return [
        PackMember(sae.sae_id, pack.reads, pack.writes, sae.settings, {**metadata, **hooks}, reshape)
        for sae in pack.saes
    ]


def waves(packs: Sequence[PlannedPack], slots: int) -> list[list[PlannedPack]]:
    """The packs in the order they run, `slots` at a time."""
    return [list(packs[start : start + slots]) for start in range(0, len(packs), slots)]


def memory_of_block(spec: SweepSpec, model: ModelDescription, packs: Sequence[PlannedPack]) -> int:
    """Bytes of one block as it lies in the object store, with all arrays that the packs are fed."""
    width = 4 if spec.model.dtype == "float32" else 2
    tokens = spec.data.block_rows * (spec.data.context_size - spec.data.exclude.first_positions)
    return sum(tokens * model.hook_points[parse_array(name)[0]] * width for name in arrays_of(packs))


def arrays_of(packs: Sequence[PlannedPack]) -> tuple[str, ...]:
    """The arrays of the stream that the packs are fed, each once."""
    return tuple(dict.fromkeys(name for pack in packs for name in pack.hook_points))


def warnings(spec: SweepSpec, saes: Sequence[PlannedSAE]) -> list[str]:
    """What is allowed and probably not meant."""
    coefficients = {getattr(sae.settings, "l1_coefficient", 1.0) for sae in saes}
    low = sorted(value for value in coefficients if value is not None and value < LOW_L1_COEFFICIENT)
    found = []
    if spec.model.trust_remote_code:
        found.append(
            f"model.trust_remote_code is true: Python code that comes with {spec.model.name} runs here and on every "
            "model host, with all that their processes may do"
        )
    if low:
        d_in = saes[0].d_in
        found.append(
            f"l1_coefficient {', '.join(f'{value:g}' for value in low)} is below {LOW_L1_COEFFICIENT}: values like "
            "these belong to an older loss averaged over d_in; here the same penalty is about value * d_in**1.5 "
            f"({low[0] * d_in**1.5:.3g} for {low[0]:g} at d_in {d_in})"
        )
    across = [site.label for site in spec.sites if _layer(site.reads) != _layer(site.writes)]
    if across:
        found.append(f"hook_points: {', '.join(across)} reads one layer and writes another")
    if spec.train.encoder_dtype == "float16" and not spec.resources.gpus_per_pack:
        found.append(
            "train.encoder_dtype float16: packs train on CPUs (resources.gpus_per_pack 0), where its products are many "
            "times slower than those of float32; bfloat16 is made for them where a CPU has it"
        )
    if spec.data.activations is not None:
        found += open_given(spec.data).warnings(spec)
    return found


def _layer(hook_point: str) -> str:
    return ".".join(hook_point.split(".")[:2])


def describe(
    spec: SweepSpec,
    model: ModelDescription,
    saes: Sequence[PlannedSAE],
    packs: Sequence[PlannedPack],
    slots: int,
    schedule: Schedule,
    n_done: int,
    spool: SpooledStream | None = None,
    epochs: float = 1.0,
) -> str:
    """The plan as text. `epochs`: how often the rows are used of the source that is used most."""
    trained = [sae for pack in packs for sae in pack.saes]
    rounds = waves(packs, slots)
    block_bytes = memory_of_block(spec, model, packs)
    blocks = len(rounds) * schedule.n_blocks
    spooling = [f"spool      off: {len(rounds)} waves make every block {len(rounds)} times"] if len(rounds) > 1 else []
    if spool is not None:
        there = spool.count_whole(arrays_of(packs), schedule.n_blocks)
        blocks = schedule.n_blocks - there
        spooling = [f"spool      {spool.spool.place}: {there} of {schedule.n_blocks} blocks are there, the "
                    f"others take {blocks * block_bytes / 1e9:.2f} GB of at most {spec.data.spool_gb:g}"]  # fmt: skip
    if spec.data.activations is not None:
        blocks = 0
        spooling = [f"given      {spec.data.activations}: {open_given(spec.data).about}; the model is run only to "
                    "evaluate"]  # fmt: skip
    passes = blocks * spec.data.block_rows
    harvest_flops = 2.0 * model.n_parameters * passes * spec.data.context_size
    sae_flops = sum(6.0 * sae.n_products * spec.train.tokens for sae in trained)
    unit = "GPU" if spec.resources.gpus_per_pack else "CPU core"
    threads = spec.resources.pack_threads * spec.resources.saes_at_once
    workers = max(1.0, slots * (spec.resources.gpus_per_pack or threads))
    hours = (harvest_flops / max(1, spec.resources.model_hosts) + sae_flops / workers) / ASSUMED_FLOPS[unit] / 3600
    baselines = sum(sae.baseline is not None for sae in saes)
    lines = [
        f"sweep      {spec.name}: {len(saes)} SAEs at {len(spec.hook_points)} hook points"
        + (f", {baselines} of them baselines with a frozen decoder" if baselines else "")
        + (f"; {n_done} done already" if n_done else ""),
        f"model      {model.name}: {model.n_layers} layers, d_model {model.d_model}, "
        f"{model.n_parameters / 1e6:.1f}M parameters, {spec.model.dtype}, processing {spec.model.processing}",
        f"tokens     {spec.train.tokens:,} in {spec.train.steps:,} batches of {spec.train.batch_tokens:,}; "
        f"{schedule.n_blocks} blocks of {spec.data.block_rows} rows x {spec.data.context_size}"
        + (f"; rows are used up to {epochs:.3g} times" if epochs > 1 else ""),
        f"packs      {len(packs)}, {slots} at a time, in {len(rounds)} wave{'s' if len(rounds) != 1 else ''}",
    ]
    for number, wave in enumerate(rounds, 1):
        for pack in wave:
            lines.append(
                f"  wave {number}   {pack.hook_point}: {len(pack.saes)} SAEs, {pack.memory_bytes / 1e9:.2f} GB "
                "(weights, gradients, optimiser, activations of a micro-batch)"
            )
    lines += [
        f"stream     {block_bytes / 1e6:.0f} MB a block at all hook points together",
        *spooling,
        *_searching(spec),
        f"forward    {passes:,} rows ({passes * spec.data.context_size:,} tokens) through the model for training; "
        f"report split {spec.data.report_tokens:,} tokens: one clean and one ablated pass a hook point, one an SAE",
        f"compute    {harvest_flops / 1e12:.2f} TFLOP harvesting, {sae_flops / 1e12:.2f} TFLOP training; about "
        f"{hours:.2g} hours at an assumed {ASSUMED_FLOPS[unit] / 1e9:,.0f} GFLOP/s a {unit}",
    ]
    if spec.resources.gpu_hour_cost and spec.resources.gpus_per_pack:
        gpus = slots * spec.resources.gpus_per_pack + spec.resources.model_hosts * spec.resources.gpus_per_host
        lines.append(f"cost       about {hours * gpus * spec.resources.gpu_hour_cost:,.2f} at {gpus:g} GPUs")
    return "\n".join([*lines, *(f"warning    {text}" for text in warnings(spec, saes))])


def _searching(spec: SweepSpec) -> list[str]:
    search, parts = spec.search, []
    if search.prune:
        rungs = ", ".join(f"{step * spec.train.batch_tokens:,}" for step in rung_steps(spec.train.steps))
        parts.append(f"SAEs that others beat by {search.margin:.0%} of the unexplained variance stop at {rungs} tokens")
    if search.fill:
        parts.append(f"then up to {search.fill} more where the front has gaps, {spec.train.tokens:,} tokens each")
    return [f"search     {'; '.join(parts)}"] if parts else []
