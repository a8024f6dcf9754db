"""The driver's side of search: it takes in what the packs report at the rungs, has SAEs stopped, and adds SAEs where
the front has gaps. `search.py` decides; every decision is in the journal before it takes effect."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from penstock.errors import SweepError, UserError
from penstock.evaluation import evaluate_on_hosts, figures_of, of_sae
from penstock.fleet import Fleet
from penstock.plan import PlannedPack, PlannedSAE, arrays_of
from penstock.resolved import ResolvedSweep
from penstock.search import Figures, Point, Proposal, Pruning, propose, rung_steps
from sae_core.errors import ConfigError

PROBE_TRIES = 5


class Pruner:
    """Stops SAEs on the way, where the spec asks for it.

    On start it takes over from storage what an earlier driver knew: figures at rungs, and SAEs that were stopped.
    """

    def __init__(self, sweep: ResolvedSweep, fleet: Fleet, say: Callable[[str], None]) -> None:
        self._sweep, self._fleet, self._say = sweep, fleet, say
        self._probe_arrays: tuple[str, ...] = ()
        self._probe_request: Any = None
        self._probe_tries = 0
        self._stops: dict[str, str] = {}
        self._told: tuple[int | None, int] = (None, 0)  # incarnation of the stream, stops it knows of
        train, probe = sweep.spec.train, sweep.probe
        self.rungs = rung_steps(train.steps) if probe is not None else ()
        self._candidates = [sae for sae in sweep.saes if sae.baseline is None] if self.rungs else []
        self._pruning = Pruning({sae.sae_id: sae.as_peer(train) for sae in self._candidates}, sweep.spec.search.margin)
        self._incarnation = fleet.incarnation
        self._take_over()

    def begin(self, packs: Sequence[PlannedPack], slots: int) -> None:
        """The packs start now, `slots` at a time: those of the first wave are waited for at the rungs at once."""
        if self.rungs:
            self._probe_arrays = arrays_of(packs)
            self._begin(sae.sae_id for pack in packs[:slots] for sae in pack.saes)

    def heed(self, event: Mapping[str, Any]) -> None:
        """Something a pack reports."""
        if event["kind"] == "rung":
            self._reach(event["sae_id"], event)
        elif event["kind"] == "started":
            self._begin(event["sae_ids"])
        elif event["kind"] == "finished" or event.get("status") == "pruned":
            self._pruning.end(event["sae_id"])
        elif event["kind"] == "stopped":
            self._pruning.fail(event["sae_id"])

    def decide(self) -> None:
        """Stop what is to be stopped, and see to it that the packs hear of it and that there is a probe."""
        if not self.rungs:
            return
        self._see_to_probe()
        if self._incarnation != self._fleet.incarnation:
            if self._incarnation is not None:  # what had been reported to the stream before is lost
                self._take_over()
            self._incarnation = self._fleet.incarnation
        for stop in self._pruning.decide():
            self._sweep.journal.write_stop(stop, stop.rung * self._sweep.spec.train.batch_tokens)
            self._stops[stop.sae_id] = stop.reason
        news = self._fleet.incarnation, len(self._stops)
        if self._stops and news != self._told and self._fleet.stop_saes(self._stops):
            self._told = news

    def _take_over(self) -> None:
        """What storage tells: figures at rungs, and what has become of SAEs."""
        probe, storage = self._sweep.probe, self._sweep.storage
        for sae in self._candidates:
            for step in self.rungs:
                file = probe.rung_file(sae.sae_id, step) if probe is not None else ""
                if storage.exists(file):
                    self._reach(sae.sae_id, storage.read_json(file))
            if self._sweep.is_finished(sae):
                self._pruning.end(sae.sae_id)
            elif stopped := self._sweep.stopped(sae):
                if stopped["status"] == "pruned":
                    self._pruning.stop(sae.sae_id, stopped["rung"])
                else:
                    self._pruning.fail(sae.sae_id)

    def _begin(self, sae_ids: Iterable[str]) -> None:
        from penstock.trial import steps_reached

        sweep = self._sweep
        for sae_id in sae_ids:
            step = steps_reached(sweep.storage, sae_id, sweep.spec.train.steps, sweep.journal)
            self._pruning.begin(sae_id, step)

    def _reach(self, sae_id: str, record: Mapping[str, Any]) -> None:
        figures = Figures(record["l0"], record["explained_variance"], record["dead_fraction"])
        self._pruning.reach(sae_id, record["step"], figures)

    def _see_to_probe(self) -> None:
        """Have a host make the search activations; another one, or the same again, where it failed."""
        import ray

        probe = self._sweep.probe
        if probe is None or not self._probe_arrays:
            return
        if self._probe_request is None:
            if probe.is_there(self._sweep.storage, self._probe_arrays):
                self._probe_arrays = ()
                return
            if self._probe_tries == PROBE_TRIES:
                raise SweepError("the search activations could not be made: the model hosts die of it; Ray's logs say "
                                 "of what")  # fmt: skip
            hosts = self._fleet.hosts_up
            if not hosts:
                return
            self._probe_tries += 1
            host = hosts[self._probe_tries % len(hosts)]
            self._probe_request = host.make_probe.remote(self._sweep.store.id, probe, self._probe_arrays)
        if ray.wait([self._probe_request], timeout=0)[0]:
            request, self._probe_request = self._probe_request, None
            try:
                ray.get(request)
            except ray.exceptions.RayActorError as error:
                self._say(f"a model host died while making the search activations ({error}); another one makes them")
            except UserError as error:  # it comes with the host's traceback around it
                raise getattr(error, "cause", error) from None


def add_saes(
    sweep: ResolvedSweep,
    hosts: Sequence[Any],
    say: Callable[[str], None],
    check: Callable[[float], None] = lambda share: None,
) -> None:
    """Decide which SAEs are to be added where the front has gaps, by figures of the search split, and write it into the
    journal. `check` ends it by raising."""
    trained = [sae for sae in sweep.saes if sae.baseline is None and sweep.is_finished(sae)]
    evaluate_on_hosts(sweep, hosts, say, split="search", saes=trained, check=check)
    known = {sae.sae_id for sae in sweep.saes}

    def refused(proposal: Proposal) -> bool:
        try:
            return sweep.planned(proposal).sae_id in known
        except ConfigError:  # a k above d_sae, say
            return True

    proposals = propose(list(_points(sweep, trained)), sweep.spec.select.l0_band, sweep.spec.search.fill, refused)
    sweep.journal.write_proposals(proposals)
    say(f"filling the front: {len(proposals)} more SAEs" if proposals else "filling the front: it has no gaps to fill")
    for proposal in proposals:
        sparsity = proposal.settings.get("k", proposal.settings.get("target_l0"))
        say(f"  {proposal.settings['architecture']} at L0 {sparsity}: {proposal.reason}")


def _points(sweep: ResolvedSweep, saes: Iterable[PlannedSAE]) -> Iterable[Point]:
    for sae in saes:
        figures = figures_of(sweep, of_sae(sae), sae.site, "search")
        settings = sae.settings.model_dump(mode="json", exclude_none=True)
        yield Point(sae.sae_id, sae.site, settings, figures["l0"], figures["ce_recovered"])
