"""What a sweep decides while it runs, by figures of the `search` split: which SAEs to stop on the way (pruning), and
which more to train (filling the front). Pure: no clock, no Ray, no I/O.

Pruning. At rungs, a sixteenth, an eighth, a quarter and half of the run, every SAE is measured on the same search
activations. One is stopped there when another of its hook point and width needs no more latents a token and leaves
less unexplained by a margin, when it explains nothing and others do, or when it is dead; see `stops`. Successive
halving (Jamieson and Talwalkar, arXiv 1502.07943) stops a fixed share at a rung; a front has no ranking to take a
share of, so here who stops is decided by dominance, and nobody need stop. The margin is for what SAEs still gain on
each other after a rung: replayed on a grid of 66 SAEs of the demo, 0.1 stopped 19, one of which was on the front in
the end, and 0.15 stopped 15, none of which was.

Filling. Where two neighbours on the front lie far apart, or the front ends inside the L0 band, hypervolume is lost: one
more SAE each goes where most is to be won; see `propose`.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from penstock.sites import Site

RUNGS = (16, 8, 4, 2)  # the parts of a run after which SAEs are compared
DEAD_L0 = 0.1  # latents a token: an SAE below is dead
DEAD_FRACTION = 0.99
INSIDE = 1.1  # of the band's lower end: where an SAE is aimed that is to lie inside the band, if its L0 turns out lower


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
    goes on, and the undominated SAEs of a group always stay. One that explains nothing is beaten by the mean
    activation, at an L0 of 0; yet where no other variant of the group explains anything either, it is early days.
    """
    found = {}
    for peer, own in figures.items():
        rivals = [other for rival, other in figures.items()
                  if rival.group == peer.group and rival.variant != peer.variant]  # fmt: skip
        late = math.isnan(own.explained_variance) or any(_useless(other) is None for other in rivals)
        reason = _dead(own) or (_useless(own) if late else None) or _beaten(peer, own, figures, margin)
        if reason:
            found[peer.sae_id] = reason
    return found


def _dead(own: Figures) -> str | None:
    if own.l0 < DEAD_L0 or own.dead_fraction > DEAD_FRACTION:
        return f"dead: L0 {own.l0:.2g}, {own.dead_fraction:.0%} of its latents silent"
    return None


def _useless(own: Figures) -> str | None:
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
        and not (_dead(other) or _useless(other))
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
    that passed the rung before them, too. What has no end that counts (it was stopped at an earlier rung, it failed)
    beats nobody, how far ever it got: the front would be left with neither.
    """

    peers: Mapping[str, Peer]
    margin: float
    live: dict[str, int] = field(default_factory=dict)  # the step at which each began, or was resumed
    stopped: dict[str, int] = field(default_factory=dict)  # the rung
    failed: set[str] = field(default_factory=set)
    _figures: dict[int, dict[Peer, Figures]] = field(default_factory=dict)  # by rung
    _undecided: set[tuple[int, str]] = field(default_factory=set)  # (rung, hook point)

    def begin(self, sae_id: str, step: int = 0) -> None:
        """From now on the SAE is waited for, at the rungs beyond a step: those before it has passed, measured or not.
        Where it was measured, and others have been decided on already, it is decided on as well."""
        if sae_id not in self.peers or sae_id in self.stopped:
            return
        self.live[sae_id] = step
        peer = self.peers[sae_id]
        self._undecided |= {(rung, peer.hook_point) for rung, here in self._figures.items()
                            if peer in here and rung >= peer.settled_after}  # fmt: skip

    def end(self, sae_id: str) -> None:
        """The SAE has finished: nobody waits for it."""
        self.live.pop(sae_id, None)

    def fail(self, sae_id: str) -> None:
        """The SAE has failed or diverged: nobody waits for it, nor is compared with it."""
        self.failed.add(sae_id)
        self.end(sae_id)

    def stop(self, sae_id: str, rung: int) -> None:
        """The SAE was stopped, now or before this driver began; its figures up to the rung still count."""
        self.stopped[sae_id] = rung
        self.end(sae_id)

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
            on_their_way = {sae_id for sae_id, step in self.live.items() if step < rung}
            if any(self.peers[sae_id].hook_point == hook_point for sae_id in on_their_way - there):
                continue
            self._undecided.discard((rung, hook_point))
            counting = {peer: own for peer, own in here.items() if self._counts(peer, rung)}
            for sae_id, reason in sorted(stops(counting, self.margin).items()):
                if sae_id in self.live:
                    self.stop(sae_id, rung)
                    found.append(Stop(sae_id, rung, reason))
        return found

    def _counts(self, peer: Peer, rung: int) -> bool:
        if peer.sae_id in self.failed or self.stopped.get(peer.sae_id, rung) < rung:
            return False
        return rung >= peer.settled_after


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
class _Node:
    """A place on a front: an SAE's, or one that is proposed, with the CE recovered that is expected there."""

    log_l0: float
    ce_recovered: float
    point: Point  # whose settings it has, but for the sparsity


@dataclass(frozen=True)
class _Gap:
    """A place for one more SAE: `gain` is what the hypervolume is expected to win, CE recovered being linear in log L0
    between the neighbours and beyond them."""

    log_l0: float
    ce_recovered: float
    gain: float
    neighbours: tuple[_Node, ...]
    reason: str


def propose(
    points: Sequence[Point],
    l0_band: tuple[float, float] | None,
    count: int,
    refused: Callable[[Proposal], bool] = lambda proposal: False,
) -> list[Proposal]:
    """Up to `count` more SAEs, one after the other where the front has its widest gap at that time.

    A front is that of a hook point and a width, inside the band. A gap lies between two neighbours on it, or between
    its end and the band's; the widest is the one from which the hypervolume (of log L0 and CE recovered) is expected to
    win most. The proposal stands in the middle of the gap by log L0, below the front at the band's end, and takes over
    the settings of the neighbour whose architecture is on the front more often; one with a coefficient is given a
    `target_l0` in its place. What is `refused` (it is there already) leaves its gap as it is.
    """
    fronts = _fronts(points, l0_band)
    counts = [Counter(node.point.settings["architecture"] for node in front) for front in fronts]
    found: list[Proposal] = []
    passed_over: set[tuple[int, float]] = set()
    while len(found) < count:
        gaps = [
            (number, gap)
            for number, front in enumerate(fronts)
            for gap in _gaps(front, l0_band)
            if gap.gain > 0 and (number, gap.log_l0) not in passed_over
        ]
        if not gaps:
            break
        number, gap = max(gaps, key=lambda one: (one[1].gain, -one[0], -one[1].log_l0))
        base = max(gap.neighbours, key=lambda node: counts[number][node.point.settings["architecture"]]).point
        settings = with_l0(base.settings, math.exp(gap.log_l0))
        proposal = Proposal(base.site, settings, f"{gap.reason} at {base.site.label}, d_sae {settings['d_sae']}")
        if (base.site, settings) in [(one.site, one.settings) for one in found] or refused(proposal):
            passed_over.add((number, gap.log_l0))
            continue
        found.append(proposal)
        fronts[number].append(_Node(gap.log_l0, gap.ce_recovered, base))
        fronts[number].sort(key=lambda node: node.log_l0)
    return found


def with_l0(settings: Mapping[str, Any], l0: float) -> dict[str, Any]:
    """The settings, for an L0: another `k`, or a `target_l0` in place of a coefficient and its warm-up."""
    if "k" in settings:
        return {**settings, "k": max(1, round(l0))}
    kept = {name: value for name, value in settings.items() if not name.startswith(("l1_", "l0_"))}
    return {**kept, "target_l0": float(f"{l0:.3g}")}


def _fronts(points: Sequence[Point], l0_band: tuple[float, float] | None) -> list[list[_Node]]:
    """The front of each hook point and width inside the band, by L0."""
    low, high = l0_band or (0.0, math.inf)
    groups: dict[tuple[Any, ...], list[Point]] = {}
    for point in points:
        if low <= point.l0 <= high and point.l0 > 0 and point.ce_recovered > 0:
            groups.setdefault((point.site.label, point.settings["d_sae"]), []).append(point)
    fronts = []
    for group in sorted(groups):
        front: list[_Node] = []
        for point in sorted(groups[group], key=lambda one: (one.l0, -one.ce_recovered, one.sae_id)):
            if not front or point.ce_recovered > front[-1].ce_recovered:
                front.append(_Node(math.log(point.l0), point.ce_recovered, point))
        fronts.append(front)
    return fronts


def _gaps(front: Sequence[_Node], l0_band: tuple[float, float] | None) -> list[_Gap]:
    gaps = []
    for left, right in pairwise(front):
        # A front is a staircase: a step in the middle of another one wins a quarter of the box around it.
        middle, ce = (left.log_l0 + right.log_l0) / 2, (left.ce_recovered + right.ce_recovered) / 2
        gain = (right.log_l0 - middle) * (ce - left.ce_recovered)
        reason = f"between L0 {math.exp(left.log_l0):.3g} and {math.exp(right.log_l0):.3g} of the front"
        gaps.append(_Gap(middle, ce, gain, (right, left), reason))
    low, high = l0_band or (0.0, math.inf)
    first, last = front[0], front[-1]
    if 0 < low < math.exp(first.log_l0):
        at = math.log(min(low * INSIDE, math.exp(first.log_l0)))
        ce = min(max(_extended(front[:2], at), 0.0), first.ce_recovered)
        gaps.append(_Gap(at, ce, (first.log_l0 - at) * ce, (first,), f"at the band's lower end, L0 {low:g}"))
    if math.exp(last.log_l0) < high < math.inf:
        at = (last.log_l0 + math.log(high)) / 2
        ce = min(_extended(front[-2:], at), 1.0)
        reason = f"between the front's end, L0 {math.exp(last.log_l0):.3g}, and the band's, {high:g}"
        gaps.append(_Gap(at, ce, (math.log(high) - at) * (ce - last.ce_recovered), (last,), reason))
    return gaps


def _extended(nodes: Sequence[_Node], log_l0: float) -> float:
    """CE recovered on the line through the first and the last of some nodes."""
    first, last = nodes[0], nodes[-1]
    if last.log_l0 == first.log_l0:
        return first.ce_recovered
    slope = (last.ce_recovered - first.ce_recovered) / (last.log_l0 - first.log_l0)
    return first.ce_recovered + slope * (log_l0 - first.log_l0)
