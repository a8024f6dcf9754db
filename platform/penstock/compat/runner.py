"""SAELens' training runner: one SAE, trained as a sweep of one."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.compat.config import LanguageModelSAERunnerConfig, resolve
from penstock.errors import ConfigError, SweepError
from penstock.home import Home
from penstock.pull import pull
from penstock.tracking import find_sweep, kept_tokens
from penstock.train_one import Trained, run_spec

if TYPE_CHECKING:
    from sae_core import SAE


class SAETrainingRunner:
    """Trains the SAE of a configuration, on a local Ray or on the cluster at `address`.

    What is asked for in another way than it is done here is said when the runner is made, in one `CompatibilityNotice`.
    After `run`: `sae`, `metrics` (l0, ce_loss_score, explained_variance, dead_fraction, ..., see
    `penstock.train_one.Trained.metrics`; they are `sae.metrics`, too), `checkpoints` (the folders that were written)
    and `trained`, all the rest. `home` is where the run is kept (else `PENSTOCK_HOME`, else ./penstock-home): the same
    script again trains nothing, and one that was interrupted goes on.

    Raises a `UserError` for what does not fit the model or cannot be done here, and for an SAE that was not trained to
    its end.
    """

    def __init__(
        self,
        cfg: LanguageModelSAERunnerConfig,
        override_dataset: Any = None,
        override_model: Any = None,
        override_sae: Any = None,
        resume_from_checkpoint: Any = None,
        *,
        home: str | Path | Home | None = None,
        address: str | None = None,
    ) -> None:
        if not isinstance(cfg, LanguageModelSAERunnerConfig):
            kind = type(cfg).__name__
            raise ConfigError(f"cfg is a {kind}; accepted: LanguageModelSAERunnerConfig of penstock.compat")
        for name, value, instead in (
            ("override_dataset", override_dataset, "a file of it (dataset.to_parquet(FILE)) as dataset_path"),
            ("override_model", override_model, "its folder (model.save_pretrained(DIR)) as model_name"),
            ("override_sae", override_sae, "None: training always begins anew"),
            ("resume_from_checkpoint", resume_from_checkpoint, "None: the same script goes on where it was stopped"),
        ):
            if value is not None:
                raise ConfigError(f"{name} is a {type(value).__name__}: workers load what a configuration names; "
                                  f"accepted: {instead}")  # fmt: skip
        self.cfg = cfg
        self.home = home if isinstance(home, Home) else Home.resolve(home)
        self.address = address
        self.resolved = resolve(cfg)
        self.resolved.say()
        self.checkpoints: list[Path] = []

    def run(self) -> "SAE":
        """Train, evaluate, save, and hand the SAE over."""
        self.trained: Trained = run_spec(self.resolved.spec, self.home, self.address)
        self.metrics = self.trained.metrics
        self.sae = self.trained.sae
        self.sae.metrics = self.metrics
        self._save()
        return self.sae

    def _save(self) -> None:
        """The SAEs below `checkpoint_path`, and the last in `output_path`."""
        sweep, home = self.trained.sweep, self.home
        row = self.trained.front.iloc[0]
        sae_id, spec = row["sae_id"], self.resolved.spec
        assert find_sweep(home, sweep).sweep_id == sweep
        self.checkpoints = []
        if self.cfg.checkpoint_path:
            folder = Path(self.cfg.checkpoint_path).expanduser() / sae_id
            for tokens in kept_tokens(home, row["run_id"]):
                self.checkpoints.append(pull(sweep, sae=sae_id, at=tokens, to=folder / str(tokens), home=home))
            tokens = spec.train.steps * spec.train.batch_tokens
            self.checkpoints.append(pull(sweep, sae=sae_id, to=folder / f"final_{tokens}", home=home))
        if self.cfg.output_path:
            try:
                self.checkpoints.append(pull(sweep, sae=sae_id, to=Path(self.cfg.output_path).expanduser(), home=home))
            except SweepError as error:
                raise SweepError(f"output_path: {error}; the SAE itself is trained and kept") from None

LanguageModelSAETrainingRunner = SAETrainingRunner
