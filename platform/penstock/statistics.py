"""How sure the evaluation's figures are: a cluster bootstrap over documents.

The documents of a split are the independent units: tokens and sequences of one document are not, so resampling those
would make intervals too narrow. A replicate draws as many documents as there are, with replacement; as a draw is only
how often each document counts, all replicates of all SAEs are one product of counts [replicates, documents] with sums
[documents, SAEs x sums], and a replicate's figures come from its totals by the evaluation's own formulas
(`sae_core.evaluation.metrics_of`). Every SAE gets the same draws, so differences are paired: what makes a document hard
for every SAE cancels.

Intervals are percentile intervals (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13; clusters
as units: Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 3.8), with the tails widened for
few documents as Hesterberg (What Teachers Should Know About the Bootstrap, The American Statistician 2015) advises: as
far as Student's t is wider than the normal distribution. They say how the figures would differ on other documents like
these; not how they would with another seed of training, which is another question (`pareto.seed_groups`). The mean
activation in explained variance is held fixed.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from penstock.errors import SweepError

HEADLINE = ("l0", "ce_recovered", "kl_recovered", "explained_variance", "ce_increase", "mse")
LEVEL = 0.95
LEAST_DOCUMENTS = 6
"""Fewer documents cannot back a verdict: chance alone puts n differences on one side in 2 of 2**n cases, and more
than 5% of the time where n < 6, whatever the bootstrap says."""
_COUNTS_AT_ONCE = 4_000_000


class Bootstrap:
    """The resampled figures of all SAEs that were evaluated on the same rows.

    `rows`: one row a sequence and an SAE, with columns `sae`, `row`, `document` and the sums
    `sae_core.evaluation.ROW_SUMS`. Nothing depends on the order of its rows, and the draws not on which SAEs it has.
    `documents` is how many there are; with one there is nothing to resample, and all intervals are NaN. Raises
    `SweepError` where an SAE lacks rows that another one has, or has them twice.
    """

    def __init__(self, rows: pd.DataFrame, replicates: int = 1000, seed: int = 0):
        from sae_core.evaluation import ROW_SUMS

        rows = rows.sort_values(["sae", "row"], kind="stable")
        sums, (n_saes, n_rows), documents = _aligned(rows, ROW_SUMS)
        self.names = list(rows["sae"].unique())
        self._sums = ROW_SUMS
        self.documents = int(documents.max(initial=-1)) + 1
        of_document = np.zeros((self.documents, n_saes, len(ROW_SUMS)))
        for row in range(n_rows):
            of_document[documents[row]] += sums[:, row]
        self._totals = of_document.sum(0)
        flat = of_document.reshape(self.documents, n_saes * len(ROW_SUMS))
        generator = np.random.default_rng(seed)
        at_once = max(1, _COUNTS_AT_ONCE // max(self.documents, 1))
        drawn = [
            _counts(generator, self.documents, min(at_once, replicates - done)) @ flat
            for done in range(0, replicates, at_once)
        ]
        self._drawn = np.concatenate(drawn).reshape(replicates, n_saes, len(ROW_SUMS))
        self._replicates: dict[str, dict[str, np.ndarray]] = {}
        self._tail = _tail(self.documents)

    def figures(self, sae: str) -> dict[str, float]:
        """An SAE's metrics on the documents as they are."""
        return {name: float(value) for name, value in self._metrics(self._totals[self._position(sae)]).items()}

    def replicates(self, sae: str) -> dict[str, np.ndarray]:
        """An SAE's metrics in each replicate, [replicates] each; replicate i is of the same documents for every SAE."""
        if sae not in self._replicates:
            self._replicates[sae] = self._metrics(self._drawn[:, self._position(sae)])
        return self._replicates[sae]

    def intervals(self, sae: str) -> dict[str, float]:
        """The 95% intervals of the `HEADLINE` metrics, flat: `l0_low`, `l0_high`, ..."""
        replicates, found = self.replicates(sae), {}
        for metric in HEADLINE:
            found[f"{metric}_low"], found[f"{metric}_high"] = self._interval(replicates[metric])
        return found

    def difference(self, a: str, b: str, metric: str) -> tuple[float, float]:
        """The 95% interval of `metric` of SAE `a` less that of `b`, paired: (low, high)."""
        return self._interval(self.replicates(a)[metric] - self.replicates(b)[metric])

    def differences(self, names: Sequence[str], base: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """The same for several SAEs less one `base`: the lower and the upper ends, [names] each."""
        base_values = self.replicates(base)[metric]
        values = np.stack([self.replicates(name)[metric] - base_values for name in names])
        finite = np.isfinite(values).all(axis=1)
        if self.documents < 2:
            finite[:] = False
        low, high = (np.full(len(names), float("nan")) for _ in range(2))
        if finite.any():
            low[finite], high[finite] = np.quantile(values[finite], [self._tail, 1 - self._tail], axis=1)
        return low, high

    def _position(self, sae: str) -> int:
        if sae not in self.names:
            raise SweepError(f"there are no evaluation rows of SAE {sae!r}; there are those of {', '.join(self.names)}")
        return self.names.index(sae)

    def _metrics(self, totals: np.ndarray) -> dict[str, np.ndarray]:
        """Of totals [..., sums] the metrics [...]."""
        from sae_core.evaluation import metrics_of

        # A draw may leave a ratio nothing to divide by; its figure is then NaN, and so is the interval.
        with np.errstate(divide="ignore", invalid="ignore"):
            metrics = metrics_of({name: totals[..., i] for i, name in enumerate(self._sums)})
        return {name: np.asarray(value) for name, value in metrics.items()}

    def _interval(self, values: np.ndarray) -> tuple[float, float]:
        if self.documents < 2 or not np.isfinite(values).all():
            return float("nan"), float("nan")
        low, high = np.quantile(values, [self._tail, 1 - self._tail])
        return float(low), float(high)


def add_intervals(table: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """A copy of a sweep's table with the columns `<headline>_low` and `<headline>_high`, from its evaluation rows; NaN
    for what has none."""
    from penstock.pareto import key_of

    found: dict[str, dict[str, float]] = {}
    for _, group in rows.groupby("hook_point", sort=False):
        bootstrap = Bootstrap(group)
        found |= {name: bootstrap.intervals(name) for name in bootstrap.names}
    keys = [key_of(record) for record in table.to_dict("records")]
    columns = [f"{metric}_{end}" for metric in HEADLINE for end in ("low", "high")]
    return table.assign(**{name: [found.get(key, {}).get(name, float("nan")) for key in keys] for name in columns})


def _aligned(rows: pd.DataFrame, names: Sequence[str]) -> tuple[np.ndarray, tuple[int, int], np.ndarray]:
    """Sums [saes, rows, sums] of sorted rows, how many SAEs and rows, and each row's document as a number from 0."""
    sizes = rows.groupby("sae", sort=False).size()
    if sizes.empty:
        return np.zeros((0, 0, len(names))), (0, 0), np.zeros(0, dtype=int)
    n_saes, n_rows = len(sizes), int(sizes.iloc[0])
    of_sae = rows["row"].to_numpy()
    if (sizes != n_rows).any() or (of_sae.reshape(n_saes, n_rows) != of_sae[:n_rows]).any():
        other = next((name for name, size in sizes.items() if size != n_rows), sizes.index[-1])
        raise SweepError(
            f"the evaluation rows of {sizes.index[0]!r} ({n_rows}) and of {other!r} ({sizes[other]}) are not the same: "
            "only SAEs that were evaluated on the same rows can be compared"
        )
    if len(set(of_sae[:n_rows])) != n_rows:
        raise SweepError(f"the evaluation rows of {sizes.index[0]!r} are there more than once")
    documents = np.unique(rows["document"].to_numpy()[:n_rows], return_inverse=True)[1]
    return rows[list(names)].to_numpy(dtype=float).reshape(n_saes, n_rows, len(names)), (n_saes, n_rows), documents


def _counts(generator: np.random.Generator, documents: int, replicates: int) -> np.ndarray:
    """How often each document is drawn: [replicates, documents] float64, each row summing to `documents`."""
    if not documents:
        return np.zeros((replicates, 0))
    return generator.multinomial(documents, np.full(documents, 1 / documents), size=replicates).astype(float)


def _tail(documents: int) -> float:
    """The share of replicates left out at each end: 2.5%, less with few documents. A bootstrap's spread is too small by
    sqrt((n - 1) / n), and its tails are the normal distribution's where Student's t are meant."""
    from scipy.special import ndtr, stdtrit

    if documents < 2:
        return float("nan")
    wanted = stdtrit(documents - 1, (1 - LEVEL) / 2)
    return float(ndtr(wanted * np.sqrt(documents / (documents - 1))))
