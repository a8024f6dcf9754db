"""Training one SAE: weights, optimiser, schedules and dead-latent counters, one step at a time.

The trainer knows nothing of where batches come from, and shares nothing with any other trainer: its weights depend on
its settings, the calibration and the batches alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sae_core.architectures import ARCHITECTURES
from sae_core.errors import CheckpointError, ConfigError
from sae_core.normalization import Calibration
from sae_core.sae import SAE, SAEConfig, StepContext, StepTerms, TrainableSAE
from sae_core.schedules import lr_factor
from sae_core.settings import SAESettings, TrainingSettings

# A reconstruction this many times worse than that of a vector of zeros will not come back.
DIVERGED_AT = 1000.0


class SAETrainer:
    """Trains one SAE on raw activations [batch, d_in], in normalised units (x * calibration.scale).

    micro_batch_tokens bounds what a step holds: gradients are summed over micro-batches before the one optimiser
    step, the same maths as the whole batch at once. It may be changed between steps.
    """

    def __init__(
        self,
        settings: SAESettings,
        training: TrainingSettings,
        calibration: Calibration,
        *,
        device: str | torch.device = "cpu",
        micro_batch_tokens: int | None = None,
    ):
        self.settings = settings
        self.training = training
        self.calibration = calibration
        self.device = torch.device(device)
        self.micro_batch_tokens = micro_batch_tokens
        self.d_in = calibration.d_in
        self._build(_initial_weights(settings, calibration))

    def _build(self, start: dict[str, Tensor]) -> None:
        """Lay all trainable weights in one flat tensor (gradients and Adam's moments likewise), so that clearing,
        clipping and Adam are one kernel each, whatever the number of weights."""
        architecture = ARCHITECTURES[self.settings.architecture]
        trainable = [name for name in start if not (name == "W_dec" and self.settings.frozen_decoder)]
        size = sum(start[name].numel() for name in trainable)
        self._flat = torch.zeros(size, device=self.device)
        self._gradient = torch.zeros_like(self._flat)
        self._moments = {"exp_avg": torch.zeros_like(self._flat), "exp_avg_sq": torch.zeros_like(self._flat)}
        weights = _views(self._flat, {name: start[name] for name in trainable})
        if self.settings.frozen_decoder:
            weights["W_dec"] = torch.empty_like(start["W_dec"], device=self.device)
        for name, tensor in start.items():
            weights[name].copy_(tensor)
        self._gradients = _views(self._gradient, {name: start[name] for name in trainable})
        self._moment_views = {key: _views(flat, self._gradients) for key, flat in self._moments.items()}
        config = SAEConfig(
            architecture=self.settings.architecture,
            d_in=self.d_in,
            d_sae=self.settings.d_sae,
            **self.settings.config_fields(),
        )
        self.sae: TrainableSAE = architecture(config, weights)

        parameter = torch.nn.Parameter(self._flat)
        parameter.grad = self._gradient
        self._adam = torch.optim.Adam([parameter], betas=self.training.adam_betas, fused=True)
        self._adam_step = torch.zeros((), device=self.device)
        self._adam.state[parameter] = {"step": self._adam_step, **self._moments}

        counts = [torch.zeros(self.settings.d_sae, dtype=torch.int64, device=self.device) for _ in range(3)]
        self._counters = _Counters(*counts, diverged=torch.zeros((), dtype=torch.bool, device=self.device))
        self._worst_square = DIVERGED_AT * self.calibration.mean_square_norm * self.calibration.scale**2

    @property
    def steps_done(self) -> int:
        return self._counters.progress[0]

    @property
    def tokens_seen(self) -> int:
        return self._counters.progress[1]

    @property
    def diverged(self) -> bool:
        """True once a loss was not finite, or a reconstruction error above 1000 E||x||^2. Waits for the device."""
        return bool(self._counters.diverged)

    @torch.no_grad()
    def train_step(self, x: Tensor, *, want_metrics: bool = False) -> dict[str, float] | None:
        """One optimiser step on raw activations [batch, d_in], which are only read.

        If anything raises before the optimiser step (out of memory, say), the state is as before the call.
        Metrics, on request: loss (normalised units), mse (raw units, summed over d_in), l0, explained_variance,
        dead_fraction, grad_norm (before clipping), lr, and l1_coefficient where there is one.
        """
        if x.ndim != 2 or x.shape[1] != self.d_in or x.shape[0] == 0:
            raise ConfigError(f"a batch has shape {list(x.shape)}; accepted: [tokens, d_in] with d_in {self.d_in}")
        n_tokens = x.shape[0]
        context = StepContext(n_tokens, self.settings.coefficient_at(self.steps_done), self._dead())
        self._gradient.zero_()
        total = _Totals(want_metrics)
        for micro_batch in x.split(self.micro_batch_tokens or n_tokens):
            x_normalised = micro_batch.to(self.device, torch.float32) * self.calibration.scale
            total.add(x_normalised, self.sae.accumulate_gradients(x_normalised, self._gradients, context))
        norm = self._clip()
        lr = (self.settings.lr or self.training.lr) * lr_factor(self.steps_done, self.training)
        # All that takes memory comes before the optimiser step: what raises there can be repeated.
        counters = self._counters_after(total, n_tokens)
        metrics = self._metrics(total, counters, n_tokens, norm, lr, context.coefficient) if want_metrics else None
        self._adam.param_groups[0]["lr"] = lr
        self._adam.step()
        self._counters = counters
        return metrics

    def _dead(self) -> Tensor | None:
        """[d_sae] bool for architectures that treat dead latents apart, or None if there are none."""
        if not self.sae.revives_dead or self.tokens_seen < self.training.dead_after_tokens:
            return None
        dead = self._counters.tokens_since_fired >= self.training.dead_after_tokens
        return dead if bool(dead.any()) else None

    def _clip(self) -> Tensor:
        norm = self._gradient.norm()
        if self.training.max_grad_norm is not None:
            self._gradient.mul_((self.training.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

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
        coefficient: float,
    ) -> dict[str, float]:
        mean_square = total.square_x / n_tokens - (total.sum_x / n_tokens).square().sum()
        metrics = {
            "loss": float(total.loss),
            "mse": float(total.squared_error) / n_tokens / self.calibration.scale**2,
            "l0": float(total.active) / n_tokens,
            "explained_variance": float(1 - total.squared_error.double() / n_tokens / mean_square),
            "dead_fraction": float((counters.tokens_since_fired >= self.training.dead_after_tokens).double().mean()),
            "grad_norm": float(norm),
            "lr": lr,
        }
        if hasattr(self.settings, "l1_coefficient"):
            metrics["l1_coefficient"] = coefficient
        return metrics

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, as copies with flat names."""
        tensors = {f"weights.{name}": tensor for name, tensor in self.sae.named_parameters()}
        for key, views in self._moment_views.items():
            tensors |= {f"adam.{key}.{name}": tensor for name, tensor in views.items()}
        tensors |= {f"counters.{name}": torch.as_tensor(value) for name, value in vars(self._counters).items()}
        # clone, too: .cpu() and .contiguous() return the tensor itself where nothing is to do
        return {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
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
        for key, views in self._moment_views.items():
            for name, view in views.items():
                view.copy_(tensors[f"adam.{key}.{name}"])
        given = {name: tensors[f"counters.{name}"].to(self.device).clone() for name in vars(self._counters)}
        for name in ("window_tokens", "progress"):
            given[name] = tuple(given[name].tolist())
        self._counters = _Counters(**given)
        self._adam_step.fill_(self.steps_done)

    def export(self, metadata: Mapping[str, Any] = {}) -> SAE:
        """The SAE as it is used: on raw activations, with unit decoder rows. `metadata` is added to what the
        trainer knows (settings, tokens seen, normalisation scale)."""
        known = {
            "sae_settings": self.settings.model_dump(mode="json"),
            "training_settings": self.training.model_dump(mode="json"),
            "normalization_scale": self.calibration.scale,
            "training_tokens": self.tokens_seen,
        }
        return self.sae.folded(self.calibration.scale, {**known, **metadata})

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
    """Sums over the micro-batches of a step; those over x itself only where metrics want them."""

    def __init__(self, want_metrics: bool):
        self.want_metrics = want_metrics
        self.loss = self.squared_error = self.active = self.fired = self.sum_x = self.square_x = 0.0

    def add(self, x: Tensor, terms: StepTerms) -> None:
        self.loss = self.loss + terms.loss
        self.squared_error = self.squared_error + terms.squared_error
        self.active = self.active + terms.active
        self.fired = self.fired + terms.fired
        if self.want_metrics:
            x = x.double()
            self.sum_x = self.sum_x + x.sum(0)
            self.square_x = self.square_x + x.square().sum()


def _initial_weights(settings: SAESettings, calibration: Calibration) -> dict[str, Tensor]:
    """W_dec kaiming uniform with rows rescaled, W_enc its transpose, b_dec the mean, all else 0; on CPU and from a
    generator of its own, so that the start depends on `settings.seed` alone."""
    architecture = ARCHITECTURES[settings.architecture]
    generator = torch.Generator().manual_seed(settings.seed)
    W_dec = torch.empty(settings.d_sae, calibration.d_in)
    torch.nn.init.kaiming_uniform_(W_dec, generator=generator)
    norm = 1.0 if settings.frozen_decoder else architecture.decoder_norm_at_start
    W_dec = W_dec / W_dec.norm(dim=1, keepdim=True) * norm
    shapes = architecture.shapes(calibration.d_in, settings.d_sae)
    weights = {name: torch.zeros(shape) for name, shape in shapes.items()}
    # W_enc stays a transposed view: its gradient is made of rows [d_sae, d_in]
    weights |= {"W_dec": W_dec, "W_enc": W_dec.T, "b_dec": calibration.mean.float() * calibration.scale}
    return weights


def _views(flat: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Consecutive parts of `flat` in the shapes of `like`; W_enc lies transposed, as [d_sae, d_in]."""
    parts = flat.split([tensor.numel() for tensor in like.values()])
    return {
        name: part.view(tensor.shape[::-1]).T if name == "W_enc" else part.view(tensor.shape)
        for (name, tensor), part in zip(like.items(), parts, strict=True)
    }
