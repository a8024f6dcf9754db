"""What a sweep decides while it runs, by figures of the `search` split: which SAEs to stop on the way (pruning), and
which more to train (filling the front). Pure: no clock, no Ray, no I/O.

Pruning. At rungs, a sixteenth, an eighth, a quarter and half of the run, every SAE is measured on the same search
activations. One is stopped there when another of its hook point and width needs no more latents a token and leaves
less unexplained by a margin, when it explains nothing, or when it is dead; see `stops`. Successive halving (Jamieson
and Talwalkar, arXiv 1502.07943) stops a fixed share at a rung; a front has no ranking to take a share of, so here who
stops is decided by dominance, and nobody need stop.

Filling. Where two neighbours on the front lie far apart, up to the box between them is lost of the hypervolume: the
largest boxes get one more SAE each; see `propose`.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from penstock.sites import Site

RUNGS = (16, 8, 4, 2)  # the parts of a run after which SAEs are compared
DEAD_L0 = 0.1  # latents a token: an SAE below is dead
DEAD_FRACTION = 0.99


def rung_steps(steps: int) -> tuple[int, ...]:
    """The steps of a run after which SAEs are compared, in order."""
    return tuple(sorted({steps // part for part in RUNGS} - {0}))


# ---- pruning --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """An SAE among those it is compared with.

    group: what SAEs have to share to be compared (hook point, width, prefixes). variant: its settings but for the seed;
    seeds of one variant never stop each other. settled_after: the step from which its figures can be compared, its
    warm-ups being over.
    """

    sae_id: str
    hook_point: str
    group: tuple[Any, ...]
    variant: str
    settled_after: int = 0


@dataclass(frozen=True)
class Figures:
    """An SAE at a rung, on search activations. dead_fraction: of its latents, by the training tokens so far."""

    l0: float
    explained_variance: float
    dead_fraction: float


def stops(figures: Mapping[Peer, Figures], margin: float) -> dict[str, str]:
    """The SAEs to stop, and why, of those that stand at one rung (the same tokens for all).

    `a` is beaten by `b` of its group, of another variant, when L0(b) <= L0(a) and
    (1 - EV(b)) * (1 + margin) < 1 - EV(a). Seeds left aside that is transitive: what is beaten is beaten by one that
    goes on, and the undominated SAEs of a group always stay.
    """
    found = {}
    for peer, own in figures.items():
        reason = _hopeless(own) or _beaten(peer, own, figures, margin)
        if reason:
            found[peer.sae_id] = reason
    return found


def _hopeless(own: Figures) -> str | None:
    if own.l0 < DEAD_L0 or own.dead_fraction > DEAD_FRACTION:
        return f"dead: L0 {own.l0:.2g}, {own.dead_fraction:.0%} of its latents silent"
    if not own.explained_variance > 0:
        return f"it explains nothing: explained variance {own.explained_variance:.3f}"
    return None


def _beaten(peer: Peer, own: Figures, figures: Mapping[Peer, Figures], margin: float) -> str | None:
    rivals = [
        (other.explained_variance, rival.sae_id, other)
        for rival, other in figures.items()
        if rival.group == peer.group
        and rival.variant != peer.variant
        and other.l0 <= own.l0
        and (1 - other.explained_variance) * (1 + margin) < 1 - own.explained_variance
        and _hopeless(other) is None
    ]
    if not rivals:
        return None
    _, sae_id, best = max(rivals, key=lambda rival: rival[:2])
    return (
        f"SAE {sae_id} beats it at equal tokens: L0 {best.l0:.1f}, explained variance {best.explained_variance:.4f} "
        f"against L0 {own.l0:.1f}, {own.explained_variance:.4f}"
    )


@dataclass(frozen=True)
class Stop:
    """The decision to stop an SAE at a rung (a step of the run)."""

    sae_id: str
    rung: int
    reason: str


@dataclass
class Pruning:
    """Who has reached which rung, and the decisions that follow.

    A rung of a hook point is decided when every live SAE there has reached it, so that the order in which reports
    arrive decides nothing. SAEs of later waves are live from their start on: what they are compared with then are those
    that passed the rung before them, too.
    """

    peers: Mapping[str, Peer]
    margin: float
    live: set[str] = field(default_factory=set)
    stopped: set[str] = field(default_factory=set)
    _figures: dict[int, dict[Peer, Figures]] = field(default_factory=dict)  # by rung
    _undecided: set[tuple[int, str]] = field(default_factory=set)  # (rung, hook point)

    def begin(self, sae_ids: Iterable[str]) -> None:
        """From now on these are waited for at the rungs."""
        self.live |= (set(sae_ids) & self.peers.keys()) - self.stopped

    def end(self, sae_id: str) -> None:
        """The SAE has finished or failed: nobody waits for it."""
        self.live.discard(sae_id)

    def stop(self, sae_id: str) -> None:
        """The SAE was stopped, now or before this driver began; its figures still count."""
        self.stopped.add(sae_id)
        self.live.discard(sae_id)

    def reach(self, sae_id: str, rung: int, figures: Figures) -> None:
        """An SAE stands at a rung. Saying it again changes nothing."""
        peer = self.peers.get(sae_id)
        if peer is None or peer in self._figures.setdefault(rung, {}):
            return
        self._figures[rung][peer] = figures
        if rung >= peer.settled_after:
            self._undecided.add((rung, peer.hook_point))

    def decide(self) -> list[Stop]:
        """The SAEs to stop at the rungs that all live SAEs of their hook point have reached since the last call."""
        found: list[Stop] = []
        for rung, hook_point in sorted(self._undecided):
            here = {peer: own for peer, own in self._figures[rung].items() if peer.hook_point == hook_point}
            there = {peer.sae_id for peer in here}
            if any(self.peers[sae_id].hook_point == hook_point for sae_id in self.live - there):
                continue
            self._undecided.discard((rung, hook_point))
            settled = {peer: own for peer, own in here.items() if rung >= peer.settled_after}
            for sae_id, reason in sorted(stops(settled, self.margin).items()):
                if sae_id in self.live:
                    self.stop(sae_id)
                    found.append(Stop(sae_id, rung, reason))
        return found


# ---- filling the front ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A finished SAE as filling sees it: where it sits, its settings, and its figures on the search split."""

    sae_id: str
    site: Site
    settings: Mapping[str, Any]
    l0: float
    ce_recovered: float


@dataclass(frozen=True)
class Proposal:
    """One more SAE: its settings, and why."""

    site: Site
    settings: Mapping[str, Any]
    reason: str


@dataclass(frozen=True)
class _Gap:
    """Between two L0s of a front; `lost` is at most what an SAE between them can add to the hypervolume."""

    low: float
    high: float
    ce_low: float
    ce_high: float
    left: Point
    right: Point

    @property
    def lost(self) -> float:
        return math.log(self.high / self.low) * (self.ce_high - self.ce_low)

    @property
    def middle(self) -> float:
        return math.sqrt(self.low * self.high)


def propose(
    points: Sequence[Point],
    l0_band: tuple[float, float] | None,
    count: int,
    refused: Callable[[Proposal], bool] = lambda proposal: False,
) -> list[Proposal]:
    """Up to `count` more SAEs, one after the other where the front has its widest gap at that time.

    A front is that of a hook point and a width, inside the band. A gap is a box in (log L0, CE recovered) between two
    neighbours of the front, or between its end and the band's, and the widest is the largest. The proposal stands in
    the middle of the gap by log L0 and takes over the settings of the neighbour whose architecture is on the front more
    often; one with a coefficient is given a `target_l0` in its place. What is `refused` (it is there already) leaves
    its gap as it is.
    """
    gaps = [gap for front in _fronts(points, l0_band) for gap in _gaps(front, l0_band)]
    counts = _counts(points, l0_band)
    found: list[Proposal] = []
    while gaps and len(found) < count:
        gap = max(gaps, key=lambda one: (one.lost, -one.low, one.left.sae_id))
        gaps.remove(gap)
        if gap.lost <= 0:
            break
        base = max((gap.right, gap.left), key=lambda point: counts[_kind(point)])
        settings = with_l0(base.settings, gap.middle)
        proposal = Proposal(
            base.site,
            settings,
            f"the front at {base.site.label}, d_sae {settings['d_sae']}, has a gap between L0 {gap.low:.3g} and "
            f"{gap.high:.3g}, with CE recovered from {gap.ce_low:.4f} to {gap.ce_high:.4f}",
        )
        if settings in [one.settings for one in found if one.site == base.site] or refused(proposal):
            continue
        found.append(proposal)
        between = gap.ce_low + (gap.ce_high - gap.ce_low) / 2
        gaps += [
            _Gap(gap.low, gap.middle, gap.ce_low, between, gap.left, gap.right),
            _Gap(gap.middle, gap.high, between, gap.ce_high, gap.left, gap.right),
        ]
    return found


def with_l0(settings: Mapping[str, Any], l0: float) -> dict[str, Any]:
    """The settings, for an L0: another `k`, or a `target_l0` in place of a coefficient and its warm-up."""
    if "k" in settings:
        return {**settings, "k": max(1, round(l0))}
    kept = {name: value for name, value in settings.items() if not name.startswith(("l1_", "l0_"))}
    return {**kept, "target_l0": float(f"{l0:.3g}")}


def _kind(point: Point) -> tuple[Any, ...]:
    return (*_group(point), point.settings["architecture"])


def _group(point: Point) -> tuple[Any, ...]:
    return point.site.label, point.settings["d_sae"]


def _fronts(points: Sequence[Point], l0_band: tuple[float, float] | None) -> list[list[Point]]:
    """The points on the front of each hook point and width inside the band, by L0."""
    low, high = l0_band or (0.0, math.inf)
    groups: dict[tuple[Any, ...], list[Point]] = {}
    for point in points:
        if max(low, 1e-9) <= point.l0 <= high and point.ce_recovered > 0:
            groups.setdefault(_group(point), []).append(point)
    fronts = []
    for group in sorted(groups):
        front: list[Point] = []
        for point in sorted(groups[group], key=lambda one: (one.l0, -one.ce_recovered, one.sae_id)):
            if not front or point.ce_recovered > front[-1].ce_recovered:
                front.append(point)
        fronts.append(front)
    return fronts


def _counts(points: Sequence[Point], l0_band: tuple[float, float] | None) -> dict[tuple[Any, ...], int]:
    """How often an architecture stands on the front of a hook point and width."""
    kinds: list[tuple[Any, ...]] = [_kind(point) for front in _fronts(points, l0_band) for point in front]
    return {kind: kinds.count(kind) for kind in kinds}


def _gaps(front: Sequence[Point], l0_band: tuple[float, float] | None) -> list[_Gap]:
    gaps = [
        _Gap(left.l0, right.l0, left.ce_recovered, right.ce_recovered, left, right)
        for left, right in pairwise(front)
    ]
    low, high = l0_band or (0.0, math.inf)
    first, last = front[0], front[-1]
    if 0 < low < first.l0:
        gaps.append(_Gap(low, first.l0, 0.0, first.ce_recovered, first, first))
    if last.l0 < high < math.inf:
        gaps.append(_Gap(last.l0, high, last.ce_recovered, 1.0, last, last))
    return gaps
