"""Training one SAE: weights, optimiser, schedules and dead-latent counters, one step at a time.

The trainer knows nothing of where batches come from, and shares nothing with any other trainer: its weights depend on
its settings, the calibration and the batches alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sae_core.architectures import ARCHITECTURES
from sae_core.dead import draw_inputs, resampled_rows
from sae_core.errors import CheckpointError, ConfigError
from sae_core.normalization import PER_TOKEN, Calibration, Normalizer
from sae_core.sae import SAE, Gradients, SAEConfig, StepContext, StepTerms, TrainableSAE
from sae_core.schedules import lr_factor
from sae_core.settings import SAESettings, TrainingSettings

# A reconstruction this many times worse than that of a vector of zeros will not come back.
DIVERGED_AT = 1000.0
MOMENTS = ("exp_avg", "exp_avg_sq")


class SAETrainer:
    """Trains one SAE on raw activations [batch, d_in], which it normalises as its settings say.

    With `target_calibration` it is a transcoder: a batch has a target [batch, d_out] of another hook point as well.
    micro_batch_tokens bounds what a step holds: gradients are summed over micro-batches before the one optimiser
    step, the same maths as the whole batch at once. It may be changed between steps.
    """

    def __init__(
        self,
        settings: SAESettings,
        training: TrainingSettings,
        calibration: Calibration,
        *,
        target_calibration: Calibration | None = None,
        device: str | torch.device = "cpu",
        micro_batch_tokens: int | None = None,
    ):
        self.settings = settings
        self.training = training
        self.calibration = calibration
        self.device = torch.device(device)
        self.micro_batch_tokens = micro_batch_tokens
        self.d_in = calibration.d_in
        self.is_transcoder = target_calibration is not None
        architecture = ARCHITECTURES[settings.architecture]
        _check_site(settings, architecture, self.is_transcoder)
        _check_resampling(settings, training)
        mode = settings.normalize_activations
        self._normalize = Normalizer(mode, calibration, self.device)
        self._normalize_target = (
            Normalizer(mode, target_calibration, self.device) if target_calibration else self._normalize
        )
        config = SAEConfig(
            architecture=settings.architecture,
            d_in=self.d_in,
            d_sae=settings.d_sae,
            d_out=target_calibration.d_in if target_calibration else None,
            apply_b_dec_to_input=not self.is_transcoder,
            **settings.config_fields(),
        )
        self._spread = _spread(self._normalize, centred=config.apply_b_dec_to_input)
        start = _initial_weights(settings, architecture, config, self._normalize_target.mean, self._spread)
        self._build(architecture, config, start)

    def _build(self, architecture: type[TrainableSAE], config: SAEConfig, start: dict[str, Tensor]) -> None:
        # W_enc lies as rows [d_sae, d_in], as its gradient is made
        own = {
            name: _as_made(name, tensor).to(self.device).clone(memory_format=torch.contiguous_format)
            for name, tensor in start.items()
        }
        self.sae = architecture(config, {name: _as_made(name, tensor) for name, tensor in own.items()})
        trained = [name for name in own if not (name == "W_dec" and self.settings.frozen_decoder)]
        self._parameters = {name: torch.nn.Parameter(own[name]) for name in trained}
        self._adam = torch.optim.Adam(self._parameters.values(), betas=self.training.adam_betas, fused=True)
        for parameter in self._parameters.values():
            self._adam.state[parameter] = {
                "step": torch.zeros((), device=self.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        self._gradients = Gradients(frozenset(trained))
        self._state = architecture.state_at_start(self.settings)
        self._state = {name: tensor.to(self.device) for name, tensor in self._state.items()}
        counts = [torch.zeros(self.settings.d_sae, dtype=torch.int64, device=self.device) for _ in range(3)]
        self._counters = _Counters(*counts, diverged=torch.zeros((), dtype=torch.bool, device=self.device))
        self._worst_square = DIVERGED_AT * self._normalize_target.mean_square_norm

    @property
    def steps_done(self) -> int:
        return self._counters.progress[0]

    @property
    def tokens_since_fired(self) -> Tensor:
        """[d_sae] int64, on the trainer's device: tokens since each latent was last active. Not to be changed."""
        return self._counters.tokens_since_fired

    @property
    def tokens_seen(self) -> int:
        return self._counters.progress[1]

    @property
    def diverged(self) -> bool:
        """True once a loss was not finite, or a reconstruction error above 1000 E||x||^2. Waits for the device."""
        return bool(self._counters.diverged)

    @torch.no_grad()
    def train_step(
        self, x: Tensor, target: Tensor | None = None, *, want_metrics: bool = False
    ) -> dict[str, float] | None:
        """One optimiser step on raw activations [batch, d_in] (and, for a transcoder, the target [batch, d_out] of the
        same tokens), which are only read.

        If anything raises before the optimiser step (out of memory, say), the state is as before the call.
        Metrics, on request: loss (normalised units), mse (raw units, summed over d_out), l0, explained_variance,
        dead_fraction, grad_norm (before clipping), lr, and what the settings call their coefficient.
        """
        self._check_batch(x, target)
        n_tokens = x.shape[0]
        size = self.micro_batch_tokens or n_tokens
        raw = list(zip(x.split(size), (x if target is None else target).split(size), strict=True))
        context = self._context(n_tokens)
        if len(raw) > 1 and type(self.sae).whole_batch is not TrainableSAE.whole_batch:
            whole = self.sae.whole_batch([self._normalize(part) for part, _ in raw], context)
            context = replace(context, state={**context.state, **whole})
        self._gradients.clear()
        total = _Totals()
        resample, squared_errors = self._resamples_now(), []
        for x_raw, target_raw in raw:
            x_in = self._normalize(x_raw)
            wanted = x_in if target is None else self._normalize_target(target_raw)
            terms = self.sae.accumulate_gradients(x_in, wanted, self._gradients, context)
            total.add(terms)
            if resample:
                squared_errors.append(terms.error.square().sum(1))
            if want_metrics:
                total.add_raw(target_raw.to(self.device), self._normalize_target.raw_error(terms.error, target_raw))
        norm = torch.stack(torch._foreach_norm(list(self._gradients.values()))).norm()
        lr = (self.settings.lr or self.training.lr) * lr_factor(self.steps_done, self.training)
        # All that takes memory comes before the optimiser step: what raises there can be repeated.
        state = self.sae.next_state(self._state, total.extra, total.fired, context)
        counters = self._counters_after(total, n_tokens)
        metrics = self._metrics(total, counters, n_tokens, norm, lr, context.coefficient) if want_metrics else None
        new = self._resampled(counters, torch.cat(squared_errors), x, target) if resample else None
        self._update_weights(norm, lr)
        self._counters, self._state = counters, state
        if new is not None:
            self._start_anew(*new)
        return metrics

    def _check_batch(self, x: Tensor, target: Tensor | None) -> None:
        if x.ndim != 2 or x.shape[1] != self.d_in or x.shape[0] == 0:
            raise ConfigError(f"a batch has shape {list(x.shape)}; accepted: [tokens, d_in] with d_in {self.d_in}")
        if self.is_transcoder != (target is not None):
            raise ConfigError("a transcoder's batch has a target" if self.is_transcoder else "an SAE has no target")
        if target is not None and target.shape != (len(x), self.sae.d_out):
            raise ConfigError(
                f"a target has shape {list(target.shape)}; accepted: [tokens, d_out], here {[len(x), self.sae.d_out]}"
            )

    def _context(self, n_tokens: int) -> StepContext:
        return StepContext(
            batch_tokens=n_tokens,
            coefficient=self._coefficient(),
            dead=self._dead(),
            encoder_dtype=getattr(torch, self.training.encoder_dtype),
            state=self._state,
            progress=self.steps_done / self.training.steps,
            settings=self.settings,
        )

    def _coefficient(self) -> float | Tensor:
        set_by_state = self._state.get("coefficient")
        return self.settings.coefficient_at(self.steps_done) if set_by_state is None else set_by_state

    def _dead(self) -> Tensor | None:
        """[d_sae] bool for architectures that treat dead latents apart, or None if there are none."""
        if not self.sae.revives_dead or self.tokens_seen < self.training.dead_after_tokens:
            return None
        dead = self._counters.tokens_since_fired >= self.training.dead_after_tokens
        return dead if bool(dead.any()) else None

    def _update_weights(self, norm: Tensor, lr: float) -> None:
        for name, parameter in self._parameters.items():
            parameter.grad = self._gradients.get(name)
        # Clipping costs no pass over memory of its own: fused Adam divides gradients by a scale as it reads them.
        self._adam.grad_scale = None
        if self.training.max_grad_norm is not None:
            self._adam.grad_scale = (norm / self.training.max_grad_norm).clamp_min(1.0)
        self._adam.found_inf = None
        self._adam.param_groups[0]["lr"] = lr
        self._adam.step()
        self._gradients.clear()
        for parameter in self._parameters.values():
            parameter.grad = None

    def _resamples_now(self) -> bool:
        every, step = self.settings.resample_every_steps, self.steps_done + 1
        return every is not None and step % every == 0 and 2 * step <= self.training.steps

    def _resampled(
        self, counters: "_Counters", squared_errors: Tensor, x: Tensor, target: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(latents [n], their new rows by weight): dead ones, as many as tokens can be drawn for."""
        dead = counters.tokens_since_fired >= self.training.dead_after_tokens
        latents = dead.nonzero().squeeze(1)
        drawn = draw_inputs(squared_errors, len(latents), (self.settings.seed, self.steps_done))
        x_raw, target_raw = (None if part is None else part[drawn.to(part.device)] for part in (x, target))
        x_in = self._normalize(x_raw)
        wanted = x_in if target_raw is None else self._normalize_target(target_raw)
        return latents[: len(drawn)], resampled_rows(self.sae, dead, x_in, wanted)

    def _start_anew(self, latents: Tensor, rows: dict[str, Tensor]) -> None:
        """Latents as at the start of a run, but with given rows: biases, Adam's moments, tokens since they fired."""
        at_start = self.sae.biases_at_start(self.settings, self._spread)
        for name in ("W_enc", "W_dec", *self.sae.encoder_biases):
            parameter = self._parameters[name]
            parameter[latents] = rows.get(name, at_start.get(name, 0.0))
            for key in MOMENTS:
                self._adam.state[parameter][key][latents] = 0.0
        self._counters.tokens_since_fired[latents] = 0

    def _counters_after(self, total: "_Totals", n_tokens: int) -> "_Counters":
        now = self._counters
        fired = total.fired.to(torch.int64)
        recently, before, in_recently, in_before = now.fired_recently + fired, now.fired_before, *now.window_tokens
        in_recently += n_tokens
        if in_recently >= self.training.dead_after_tokens:
            recently, before, in_recently, in_before = torch.zeros_like(recently), recently, 0, in_recently
        diverged = now.diverged | ~torch.isfinite(total.loss)
        return _Counters(
            tokens_since_fired=torch.where(fired > 0, 0, now.tokens_since_fired + n_tokens),
            fired_recently=recently,
            fired_before=before,
            diverged=diverged | (total.squared_error > self._worst_square * n_tokens),
            window_tokens=(in_recently, in_before),
            progress=(self.steps_done + 1, self.tokens_seen + n_tokens),
        )

    def _metrics(
        self,
        total: "_Totals",
        counters: "_Counters",
        n_tokens: int,
        norm: Tensor,
        lr: float,
        coefficient: float | Tensor,
    ) -> dict[str, float]:
        variance = total.square_x / n_tokens - (total.sum_x / n_tokens).square().sum()
        mse = total.raw_squared_error / n_tokens
        metrics = {
            "loss": float(total.loss),
            "mse": float(mse),
            "l0": float(total.fired.sum()) / n_tokens,
            "explained_variance": float(1 - mse / variance),
            "dead_fraction": float((counters.tokens_since_fired >= self.training.dead_after_tokens).double().mean()),
            "grad_norm": float(norm),
            "lr": lr,
        }
        return metrics | self.settings.named_coefficient(float(coefficient))

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, as copies with flat names."""
        tensors = {f"weights.{name}": tensor for name, tensor in self.sae.named_parameters()}
        for key in MOMENTS:
            tensors |= {f"adam.{key}.{name}": moment for name, moment in self._moments(key).items()}
        tensors |= {f"state.{name}": tensor for name, tensor in self._state.items()}
        tensors |= {f"counters.{name}": torch.as_tensor(value) for name, value in vars(self._counters).items()}
        # clone, too: .cpu() and .contiguous() return the tensor itself where nothing is to do
        return {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }

    def _moments(self, key: str) -> dict[str, Tensor]:
        """Adam's moments by weight, in the weights' shapes."""
        return {
            name: _as_made(name, self._adam.state[parameter][key]) for name, parameter in self._parameters.items()
        }

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from `state()`; on CPU the next steps are those of a trainer that never stopped, bit for bit.

        Raises CheckpointError, and changes nothing, if a tensor is missing, unknown or of the wrong shape or type.
        """
        for name, own in (expected := self.state()).items():
            if name not in tensors:
                raise CheckpointError(f"training state lacks the tensor {name!r}; it has {sorted(tensors)}")
            given = tensors[name]
            if given.shape != own.shape or given.dtype != own.dtype:
                raise CheckpointError(
                    f"training state has {name} of shape {list(given.shape)} and type {given.dtype}; "
                    f"expected are {list(own.shape)} and {own.dtype}"
                )
        if unknown := sorted(set(tensors) - set(expected)):
            raise CheckpointError(f"training state has unknown tensors {unknown}; expected are {sorted(expected)}")
        for name, parameter in self.sae.named_parameters():
            parameter.copy_(tensors[f"weights.{name}"])
        for key in MOMENTS:
            for name, moment in self._moments(key).items():
                moment.copy_(tensors[f"adam.{key}.{name}"])
        self._state = {name: tensors[f"state.{name}"].to(self.device).clone() for name in self._state}
        given = {name: tensors[f"counters.{name}"].to(self.device).clone() for name in vars(self._counters)}
        for name in ("window_tokens", "progress"):
            given[name] = tuple(given[name].tolist())
        self._counters = _Counters(**given)
        for parameter in self._parameters.values():
            self._adam.state[parameter]["step"].fill_(self.steps_done)

    @torch.no_grad()
    def export(
        self,
        metadata: Mapping[str, Any] = {},
        *,
        tokens: Tensor | None = None,
        reshape_activations: str = "none",
    ) -> SAE:
        """The SAE as it is used: on raw activations, with unit decoder rows where that does not change the function.

        metadata: added to what the trainer knows (settings, tokens seen, normalisation scale). tokens: raw training
        activations [n, d_in] on which thresholds are calibrated, where the architecture has such; without them it
        takes what it remembers of its latest steps.
        """
        known = {
            "sae_settings": self.settings.model_dump(mode="json"),
            "training_settings": self.training.model_dump(mode="json"),
            "normalization": self.settings.normalize_activations,
            "normalization_scale": self._normalize.scale,
            "training_tokens": self.tokens_seen,
        }
        reads, writes = self._normalize, self._normalize_target
        sae = self.sae.for_use(self._state, None if tokens is None else self._normalize(tokens))
        if reads.whitening is not None and writes.whitening is not None:
            ranked = sae.cfg.rescale_acts_by_decoder_norm
            sae = sae.unit_rows().replaced(rescale_acts_by_decoder_norm=False) if ranked else sae
            sae = sae.unwhitened(reads.whitening, writes.whitening)
            known["decoder_rows"] = "of unit length where whitened" if ranked else "unit"
            sae = sae if ranked else sae.unit_rows()
        else:
            sae = sae.folded(reads.scale, writes.scale).unit_rows()
        mode = reads.mode if reads.mode in PER_TOKEN else "none"
        return sae.replaced(
            normalize_activations=mode,
            reshape_activations=reshape_activations,
            metadata={**sae.cfg.metadata, **known, **metadata},
        )

    def sparsity(self) -> Tensor:
        """log10(firing rate + 1e-10) [d_sae], float32 on CPU, over the last one to two dead_after_tokens tokens."""
        counts = (self._counters.fired_recently + self._counters.fired_before).double().cpu()
        return torch.log10(counts / max(sum(self._counters.window_tokens), 1) + 1e-10).float()


@dataclass(frozen=True)
class _Counters:
    """What a trainer counts; a step replaces it whole. Firing is counted in two adjoining windows of
    dead_after_tokens tokens, so that rates are over one to two of them."""

    tokens_since_fired: Tensor  # [d_sae] int64, as the next two
    fired_recently: Tensor
    fired_before: Tensor
    diverged: Tensor  # bool
    window_tokens: tuple[int, int] = (0, 0)  # in fired_recently, in fired_before
    progress: tuple[int, int] = (0, 0)  # steps, tokens


class _Totals:
    """Sums over the micro-batches of a step; those in raw units only where metrics want them."""

    def __init__(self) -> None:
        self.loss = self.squared_error = self.fired = self.raw_squared_error = self.sum_x = self.square_x = 0.0
        self.extra: dict[str, Tensor] = {}

    def add(self, terms: StepTerms) -> None:
        self.loss = self.loss + terms.loss
        self.squared_error = self.squared_error + terms.error.square().sum()
        self.fired = self.fired + terms.fired
        self.extra = {name: self.extra.get(name, 0.0) + value for name, value in terms.extra.items()}

    def add_raw(self, target: Tensor, error: Tensor) -> None:
        target = target.double()
        self.sum_x = self.sum_x + target.sum(0)
        self.square_x = self.square_x + target.square().sum()
        self.raw_squared_error = self.raw_squared_error + error.square().sum(dtype=torch.float64)


def _check_site(settings: SAESettings, architecture: type[TrainableSAE], is_transcoder: bool) -> None:
    name = settings.architecture
    if is_transcoder and not architecture.can_transcode:
        known = ", ".join(other for other, cls in ARCHITECTURES.items() if cls.can_transcode)
        raise ConfigError(f"architecture {name!r} cannot be a transcoder; accepted: {known}")
    if is_transcoder and settings.normalize_activations in PER_TOKEN:
        raise ConfigError(
            f"normalize_activations {settings.normalize_activations!r} scales each token by itself, which says nothing "
            "of a transcoder's output; accepted: none, expected_average_only_in, covariance_whitening"
        )
    if not is_transcoder and getattr(settings, "skip", False):
        raise ConfigError("skip is true: a skip connection is a transcoder's; an SAE would copy its input through it")


def _check_resampling(settings: SAESettings, training: TrainingSettings) -> None:
    every, half = settings.resample_every_steps, training.steps // 2
    if every is not None and (every > half or training.dead_after_tokens > half * training.batch_tokens):
        raise ConfigError(
            f"resample_every_steps is {every}, and dead_after_tokens {training.dead_after_tokens}: latents are "
            f"resampled in the first half of the run only; accepted are at most {half} steps and "
            f"{half * training.batch_tokens} tokens"
        )


def _initial_weights(
    settings: SAESettings, architecture: type[TrainableSAE], config: SAEConfig, b_dec: Tensor, spread: float
) -> dict[str, Tensor]:
    """W_dec kaiming uniform with rows rescaled, W_enc its transpose, b_dec the mean, all else 0 but for biases that the
    architecture starts elsewhere; on CPU and from a generator of its own, so that the start depends on `settings.seed`
    alone. A transcoder's W_enc is drawn like W_dec, not tied to it: it reads another space."""
    generator = torch.Generator().manual_seed(settings.seed)
    norm = 1.0 if settings.frozen_decoder else architecture.decoder_norm_at_start
    weights = {name: torch.zeros(shape) for name, shape in architecture.shapes(config).items()}
    for name, value in architecture.biases_at_start(settings, spread).items():
        weights[name].fill_(value)
    W_dec = _rows(*weights["W_dec"].shape, norm, generator)
    W_enc = _rows(settings.d_sae, config.d_in, norm, generator).T if config.is_transcoder else W_dec.T
    return weights | {"W_dec": W_dec, "W_enc": W_enc, "b_dec": b_dec.clone()}


def _spread(normalize: Normalizer, *, centred: bool) -> float:
    """Standard deviation of normalised activations along a random direction; from 0 where they are not centred."""
    of_mean = float(normalize.mean.square().sum()) if centred else 0.0
    return (max(normalize.mean_square_norm - of_mean, 0.0) / len(normalize.mean)) ** 0.5


def _rows(n: int, width: int, norm: float, generator: torch.Generator) -> Tensor:
    rows = torch.empty(n, width)
    torch.nn.init.kaiming_uniform_(rows, generator=generator)
    return rows / rows.norm(dim=1, keepdim=True) * norm


def _as_made(name: str, tensor: Tensor) -> Tensor:
    """W_enc [d_in, d_sae] as its rows [d_sae, d_in], and back; any other tensor as it is."""
    return tensor.T if name == "W_enc" else tensor
