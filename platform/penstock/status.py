"""How sweeps stand, from the reports that their drivers rewrite every few seconds.

Reads files of the sweep's storage alone: it needs neither Ray nor MLflow, and no way to the cluster. With an address it
is the other way round (`remote.py`).
"""

import contextlib
import json
import math
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from penstock.errors import SweepError
from penstock.fence import BEAT_SECONDS, SILENT_SECONDS
from penstock.home import Home, recall
from penstock.storage import Storage
from penstock.sweep_files import result_file, status_file, submitted_file
from penstock.text import text_table

BAR = 24  # characters
HOOK_POINT = 26  # characters of one in a table
REMEMBERED = 16  # reports of the past, over which `--watch` measures who waits
FAILURES_SHOWN = 5
RECENT = 20  # sweeps in the table of all
GIVEN_UP_SECONDS = 120.0  # of silence, after which `--watch` waits for a driver no longer
ENDS = ("ended", "stopped")  # phases after which nothing comes
JOB_SECONDS = 600.0  # after which `--watch` waits no longer for the first report of a job that was submitted
LOST_STATUS = 1
_SAID = {"waiting": "not begun"}  # of SAEs, where it is not packs that wait for blocks


@dataclass(frozen=True)
class Standing:
    """A sweep as somebody finds it at `seen` (Unix time). `report` is the driver's latest, None where there is none;
    `published` says whether the results of a sweep that reports nothing more are there; `submitted` is of a job that is
    to go on with it and has not reported yet, with its `time` and the cluster's `address`."""

    sweep: str  # as the user calls it
    sweep_id: str
    seen: float
    report: dict[str, Any] | None
    published: bool = False
    submitted: dict[str, Any] | None = None

    @property
    def age(self) -> float:
        """Seconds since the report, by the clocks of the driver's machine and of this one."""
        return max(0.0, self.seen - self.report["time"]) if self.report else 0.0

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will come, unless the sweep is started again."""
        return self.published if self.report is None else self.report["phase"] in ENDS

    @property
    def outcome(self) -> dict[str, Any]:
        """What an ended sweep has come to: `status` (finished, failed, stopped), `exit_status`, `reason`, `left`; empty
        while it runs, and where its driver died."""
        found = (self.report or {}).get("outcome") or {}
        return found or ({"status": "finished", "exit_status": 0} if self.has_ended and self.published else {})

    @property
    def is_silent(self) -> bool:
        """Whether a driver that has not ended is not heard of."""
        return self.report is not None and not self.has_ended and self.age > SILENT_SECONDS

    @property
    def driver(self) -> str:
        """The driver of the report, for a sentence."""
        assert self.report is not None
        return f"process {self.report['pid']} on {self.report['machine']}"

    @property
    def about_silence(self) -> str:
        return f"its driver ({self.driver}) has not been heard of for {_duration(self.age)}"

    @property
    def about_job(self) -> str:
        assert self.submitted is not None
        since = _duration(max(0.0, self.seen - self.submitted["time"]))
        return f"a job that goes on with it was submitted {since} ago and has not reported yet"


def look(home: Home, sweep: str) -> Standing:
    """How a sweep, named by its name or id, stands now.

    Raises `SweepError` when none of that name was started from this home, or its storage cannot be read.
    """
    return _look(*recall(home, sweep), sweep)


def _look(storage: Storage, sweep_id: str, sweep: str) -> Standing:
    try:
        file = status_file(sweep_id)
        report = storage.read_json(file) if storage.exists(file) else None
        over = report is None or report["phase"] in ENDS
        published = over and storage.exists(result_file(sweep_id))
        submitted = _submitted(storage, sweep_id, report)
    except OSError as error:
        raise SweepError(f"storage {storage.uri!r} of sweep {sweep!r} cannot be read: {error}") from None
    return Standing(sweep, sweep_id, time.time(), report, published, submitted)


def _submitted(storage: Storage, sweep_id: str, report: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The job that was submitted after this report; None where there was none, or the report is its own."""
    file = submitted_file(sweep_id)
    if report is None or (report["phase"] not in ENDS and time.time() - report["time"] <= SILENT_SECONDS):
        return None
    job: dict[str, Any] | None = storage.read_json(file) if storage.exists(file) else None
    return job if job and job["after"] == report["time"] else None


def note_submitted(storage: Storage, standing: Standing, address: str) -> None:
    """Leave word that a job was submitted which goes on with a sweep that stands so. Raises `OSError`."""
    after = standing.report["time"] if standing.report else None
    storage.write_json(submitted_file(standing.sweep_id), {"time": time.time(), "address": address, "after": after})


# ---- showing --------------------------------------------------------------------------------------------------------


class Near:
    """The sweeps of a home; `sweep` is the one that `look` is about."""

    def __init__(self, home: Home, sweep: str | None) -> None:
        self._home, self._sweep = home, sweep
        self.storage, self.sweep_id = recall(home, sweep) if sweep else (None, "")

    def look(self) -> Standing:
        assert self.storage is not None and self._sweep is not None
        return _look(self.storage, self.sweep_id, self._sweep)

    def all(self) -> list[Standing]:
        names = {}
        for path in (self._home.path / "sweeps").glob("*.json"):
            with contextlib.suppress(OSError, ValueError, KeyError):
                record = json.loads(path.read_text())
                names[record["sweep_id"]] = record["name"]
        found = []
        for sweep_id, name in names.items():
            with contextlib.suppress(SweepError):  # one storage that is away hides no other sweep
                found.append(_look(*recall(self._home, sweep_id), name))
        return found


class Far:
    """The sweeps of a cluster, by the address of its dashboard."""

    def __init__(self, address: str, sweep: str | None, *, wait: bool = False) -> None:
        from penstock.remote import Cluster

        self.cluster, self._sweep = Cluster(address), sweep
        self._latest: dict[str, Any] | None = None
        if sweep is not None:
            self.place, self._latest = self.cluster.find(sweep, wait=wait)
            self.sweep_id = self.place.sweep_id

    def look(self) -> Standing:
        self._latest = self.cluster.report(self.place) or self._latest
        assert self._sweep is not None and self._latest is not None
        return _from_afar(self._sweep, self._latest)

    def all(self) -> list[Standing]:
        return [_from_afar(report["name"], report) for _, report in self.cluster.reports()]


def _from_afar(sweep: str, report: dict[str, Any]) -> Standing:
    finished = (report.get("outcome") or {}).get("status") == "finished"
    return Standing(sweep, report["sweep_id"], time.time(), report, report["phase"] in ENDS and finished)


def watched(home: Home, sweep: str | None, address: str | None, *, wait: bool = False) -> Near | Far:
    """Where to look; with `wait`, on a cluster, once its job has begun to report. Raises `SweepError` for an unknown
    sweep, and when no cluster answers."""
    return Near(home, sweep) if address is None else Far(address, sweep, wait=wait)


def show(
    home: Home, sweep: str | None, *, address: str | None = None, follow: bool = False, as_json: bool = False,
    out: TextIO | None = None,
) -> int:  # fmt: skip
    """Print how a sweep stands, or all of them where none is named; with `follow` again every few seconds until it has
    ended. Returns 0, with `follow` the exit status of the sweep.

    On a terminal the text is redrawn in place; elsewhere a blank line separates one from the next. JSON is one object,
    with `follow` one on a line each time.
    """
    out = out or sys.stdout
    where = watched(home, sweep, address, wait=follow)
    screen = _Screen(out, follow and not as_json and out.isatty())
    past: deque[Standing] = deque(maxlen=REMEMBERED)
    while True:
        if sweep is None:
            found = in_order(where.all())
            status = None if follow else 0
            text = all_json(found, None if follow else 1) if as_json else describe_all(found)
        else:
            standing = where.look()
            status = status_of(standing) if follow else 0
            if as_json:
                text = to_json(standing, indent=None if follow else 1)
            else:
                text = describe(standing, past[0] if past else None)
            if standing.report is not None and (not past or past[-1].report["time"] != standing.report["time"]):
                past.append(standing)
        screen.show(text, last=status is not None, apart=not as_json)
        if status is not None:
            return status
        time.sleep(BEAT_SECONDS)


def status_of(standing: Standing) -> int | None:
    """The exit status of a sweep that has ended, or whose driver is given up; None while it is waited for."""
    if standing.submitted is not None:
        return None if standing.seen - standing.submitted["time"] < JOB_SECONDS else LOST_STATUS
    if standing.has_ended:
        return int(standing.outcome.get("exit_status", LOST_STATUS))
    return LOST_STATUS if standing.is_silent and standing.age > GIVEN_UP_SECONDS else None


def to_json(standing: Standing, indent: int | None = None) -> str:
    """The driver's report as it stands, and what is known beside it."""
    return json.dumps(_as_object(standing), indent=indent)


def all_json(standings: Sequence[Standing], indent: int | None = None) -> str:
    return json.dumps({"sweeps": [_as_object(one) for one in standings]}, indent=indent)


def _as_object(standing: Standing) -> dict[str, Any]:
    known = {"sweep_id": standing.sweep_id, "phase": None, "published": standing.published,
             "age_seconds": round(standing.age, 1), "silent": standing.is_silent}  # fmt: skip
    return known | (standing.report or {})


# ---- all of them ----------------------------------------------------------------------------------------------------


def in_order(standings: Iterable[Standing]) -> list[Standing]:
    """Those that run first, then the latest; of the others no more than the most recent."""

    def key(one: Standing) -> tuple[bool, float]:
        live = one.report is not None and not one.has_ended and not one.is_silent
        return not live, one.age if one.report else math.inf

    found = sorted(standings, key=key)
    live = [one for one in found if not key(one)[0]]
    return live + found[len(live) :][:RECENT]


def describe_all(standings: Sequence[Standing]) -> str:
    """A row a sweep."""
    if not standings:
        return "no sweeps yet"
    rows = []
    for one in standings:
        report = one.report
        if report is None:
            state = "finished" if one.published else "not reported"
            rows.append([_cut(one.sweep, 20), one.sweep_id, state, "-", "-", "-", "-", "-"])
            continue
        at = [tokens for of_site in report["tokens_at"].values() for tokens in of_site]
        trained = f"{100 * sum(at) / len(at) / max(1, report['tokens']):.0f}%" if at else "-"
        live = not one.has_ended and not one.is_silent
        rate = _rate(report) if live else None
        eta = report.get("eta_seconds") if live else None
        rows.append([
            _cut(report["name"], 20), one.sweep_id, _state(one), str(report["saes"]), trained,
            "-" if rate is None else f"{rate:,.0f}", "-" if eta is None else _duration(eta), _duration(one.age),
        ])  # fmt: skip
    header = ["sweep", "id", "state", "SAEs", "trained", "SAE-tok/s", "left", "heard of"]
    return text_table(header, rows, right={"SAEs", "trained", "SAE-tok/s", "left", "heard of"})


def _state(standing: Standing) -> str:
    report = standing.report
    assert report is not None
    if standing.submitted is not None:
        return "submitted"
    if standing.is_silent:
        return "lost"
    if standing.has_ended:
        return standing.outcome.get("status", "ended")
    return "stopping" if report.get("stopping") else report["phase"]


# ---- one of them ----------------------------------------------------------------------------------------------------


def describe(standing: Standing, before: Standing | None = None) -> str:
    """How a sweep stands, as text. Who waits is measured since an earlier standing, else since the sweep's start."""
    report = standing.report
    if report is None:
        return _without_report(standing)
    stream = report["stream"]
    parts = [_title(standing), _progress(standing)]
    if stream:
        parts += [_hosts(stream), _packs(standing, before.report if before else None)]
    if report.get("failures"):
        parts.append(_failures(report))
    if report["cost"]:
        parts.append(_cost(report["cost"]))
    return "\n\n".join(parts)


def _without_report(standing: Standing) -> str:
    title = f"sweep {standing.sweep} ({standing.sweep_id})"
    if standing.published:
        return f"{title} has finished and left no report of how it went; what came out: penstock front {standing.sweep}"
    return f"{title} has not reported yet; its driver does so within seconds of its start"


def _title(standing: Standing) -> str:
    report = standing.report
    assert report is not None
    done = sae_counts(report)["done before"]
    saes = f"{report['saes']} SAEs" + (f", {done} of them done before" if done else "")
    lines = [f"sweep {report['name']} ({standing.sweep_id}): {saes}"]
    ran = _duration(report["time"] - report["started"])
    if standing.has_ended:
        lines.append(f"ended {_duration(standing.age)} ago, after {ran}, in {standing.driver}")
        lines += _outcome(standing)
    else:
        lines.append(f"phase {report['phase']}, {ran} after its start; reported {_duration(standing.age)} ago")
        if report.get("stopping"):
            lines.append("stopping: every pack saves and ends")
        elif not standing.is_silent and report.get("eta_seconds") is not None:
            lines.append(f"about {_duration(report['eta_seconds'])} left, evaluation included")
    if standing.is_silent:
        lines.append(f"{standing.about_silence}; what follows is its last report")
        if standing.submitted is None:
            lines.append(f"if it is dead: penstock resume {standing.sweep}")
    if standing.submitted is not None:
        lines += [standing.about_job, f"ask its cluster: penstock status {standing.sweep} --watch --address "
                                      f"{standing.submitted['address']}"]  # fmt: skip
    return "\n".join(lines)


def _outcome(standing: Standing) -> list[str]:
    outcome = standing.outcome
    if standing.submitted is not None:
        return [f"{outcome.get('status', 'ended')}: {outcome.get('reason', '')}".removesuffix(": ")]
    if outcome.get("status") == "stopped":
        return [
            f"stopped: {outcome.get('reason', '')}".removesuffix(": "),
            f"{outcome.get('left', '')}; go on with: penstock resume {standing.sweep}".removeprefix("; "),
        ]
    if standing.published:
        return [f"what came out: penstock front {standing.sweep}"]
    if outcome.get("exit_status") == 1:
        return [f"some SAEs failed: penstock front {standing.sweep}; penstock resume {standing.sweep} tries them again"]
    failed = [f"{outcome['status']}: {outcome['reason']}"] if outcome.get("reason") else []
    return [*failed, f"it has no results yet: penstock resume {standing.sweep} goes on where it stands"]


def _progress(standing: Standing) -> str:
    report = standing.report
    assert report is not None
    width = max((len(label) for label in report["tokens_at"]), default=0)
    lines = []
    for label, at in report["tokens_at"].items():
        if at:
            share = min(1.0, sum(at) / len(at) / max(1, report["tokens"]))
            filled = int(share * BAR)
            bar = "#" * filled + "." * (BAR - filled)
            lines.append(f"{label.ljust(width)}  [{bar}] {int(100 * share):3d}%  {len(at)} SAEs")
        else:
            lines.append(f"{label.ljust(width)}  nothing left to train")
    said = {**_SAID, "training": "begun"} if standing.has_ended or standing.is_silent else _SAID
    counted = ", ".join(f"{count} {said.get(name, name)}" for name, count in sae_counts(report).items() if count)
    lines.append(f"SAEs   {counted}")
    lines.append(f"tokens {report['tokens']:,} an SAE; {_rates(report)}")
    share = report.get("share") or {}
    if share.get("slots"):
        others = len(share["sweeps"])
        lines.append(f"share  {_count(share['slots'], 'pack')} at once, beside {_count(others, 'other sweep')} on the "
                     "cluster")  # fmt: skip
    return "\n".join(lines)


def sae_counts(report: Mapping[str, Any]) -> dict[str, int]:
    """How many SAEs stand where, from a driver's report; every status is there, if only with 0. Those `done before`
    were so in an earlier round, attempt or sweep."""
    at = [tokens for of_site in report["tokens_at"].values() for tokens in of_site]
    stopped = report.get("stopped") or {}
    waiting, trained = sum(tokens == 0 for tokens in at), sum(tokens >= report["tokens"] for tokens in at)
    return {
        "training": len(at) - waiting - trained, "waiting": waiting, "trained": trained,
        "done before": report["saes"] - len(at) - sum(stopped.values()),
        **dict.fromkeys(("pruned", "diverged", "failed"), 0), **stopped,
    }  # fmt: skip


def _rate(report: Mapping[str, Any]) -> float | None:
    """SAE-tokens a second in the last minute, else since the first step."""
    recent = (report.get("rates") or {}).get("sae_tokens_per_second")
    return recent if recent is not None else report["sae_tokens_per_second"] or None


def _rates(report: Mapping[str, Any]) -> str:
    rates, average = report.get("rates") or {}, report["sae_tokens_per_second"]
    recent, harvested = rates.get("sae_tokens_per_second"), rates.get("harvested_tokens_per_second")
    if recent is None:
        return f"{average:,.0f} SAE-tokens/s"
    text = f"{recent:,.0f} SAE-tokens/s lately ({average:,.0f} on average)"
    return text if harvested is None else f"{text}, {harvested:,.0f} harvested"


def _hosts(stream: dict[str, Any]) -> str:
    names = {name: _host_state(state) for name, state in stream["hosts"].items()}
    width = max(map(len, names), default=0)
    lines = [f"{'hosts' if not number else '':7}{name.ljust(width)}  {state}"
             for number, (name, state) in enumerate(names.items())]  # fmt: skip
    window = f"{'window':7}{stream['blocks_in_store']} of {stream['window']} blocks in the object store"
    return "\n".join([*(lines or ["hosts  none"]), f"{window} ({stream['arrays_in_store']} arrays)"])


def _host_state(state: str) -> str:
    """Of a host that could not be built, `state` is the reason."""
    if state in ("idle", "starting"):
        return state
    return f"working on {state}" if state.startswith("block ") else f"broken: {state}"


def _pack_status(standing: Standing, pack_id: str) -> str:
    """The stream calls a pack done that needs no more blocks from it, also one that was told to end and goes on
    another time; and of those that were left behind it does not hear."""
    report = standing.report
    assert report is not None
    status = str(report["stream"]["packs"][pack_id]["status"])
    halted = status == "done" and pack_id in report.get("halted", ())
    if standing.has_ended:
        return "stopped" if halted or status != "done" else status
    if halted:
        return "stopped" if report.get("stopping") else "yielded"
    return status


def _packs(standing: Standing, before: dict[str, Any] | None) -> str:
    report = standing.report
    assert report is not None
    since = report["started"] if before is None else before["time"]
    seconds = report["time"] - since
    earlier = {} if before is None else before["stream"].get("packs", {})
    rates = (report.get("rates") or {}).get("packs") or {}
    rows = []
    for pack_id, pack in report["stream"]["packs"].items():
        hook_point, n_saes = report["packs"].get(pack_id, ("half of a pack", "-"))
        waited = pack.get("wait_seconds", 0.0)
        waited_before = earlier.get(pack_id, {}).get("wait_seconds", 0.0)
        waited -= waited_before if waited_before <= waited else 0.0  # a pack that starts again counts from zero
        share = f"{100 * min(1.0, waited / seconds):.0f}%" if pack["status"] == "live" and seconds > 0 else "-"
        rate = rates.get(pack_id)
        rows.append([
            pack_id, _cut(hook_point, HOOK_POINT), str(n_saes), _pack_status(standing, pack_id),
            f"{pack['block']}/{report['stream']['blocks']}", str(pack["lag"]), share,
            "-" if rate is None else f"{rate:,.0f}",
        ])  # fmt: skip
    header = ["pack", "hook point", "SAEs", "status", "block", "lag", "waits", "tok/s"]
    return text_table(header, rows, right={"SAEs", "block", "lag", "waits", "tok/s"}) if rows else "no packs yet"


def _failures(report: Mapping[str, Any]) -> str:
    """The latest, and what was done about them."""
    latest, total = report["failures"], report.get("failures_total", len(report["failures"]))
    lines = [f"failures  {total} so far" + (", the latest:" if total > FAILURES_SHOWN else ":")]
    for one in latest[-FAILURES_SHOWN:]:
        stamp = time.strftime("%H:%M:%SZ", time.gmtime(one["time"]))
        lines += [f"  {stamp}  {' '.join(one['what'].split())}", f"             -> {one['done']}"]
    return "\n".join(lines)


def _cost(cost: dict[str, float]) -> str:
    def of(name: str) -> str:
        return f"{cost.get(name, 0):,.0f}"

    return (
        f"cost   {of('blocks_made')} blocks made, {of('blocks_remade')} made again, {of('blocks_lost')} lost; "
        f"{of('spool_hits')} spool hits\n"
        f"       {of('forward_passes')} forward passes, {of('harvested_tokens')} tokens harvested"
    )


def _cut(text: str, width: int) -> str:
    """Short enough for a column: of a hook point, both ends tell it from others."""
    if len(text) <= width:
        return text
    tail = (width - 2) // 2
    return f"{text[: width - 2 - tail]}..{text[-tail:]}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _duration(seconds: float) -> str:
    whole = int(seconds)
    if whole < 120:
        return f"{whole} s"
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if hours < 2:
        return f"{minutes} min {whole % 60} s"
    return f"{hours} h {minutes % 60} min" if days < 2 else f"{days} days {hours % 24} h"


# ---- the terminal ---------------------------------------------------------------------------------------------------


class _Screen:
    """Where a text is shown that changes: drawn over itself on a terminal, one after the other elsewhere."""

    def __init__(self, out: TextIO, in_place: bool) -> None:
        self._out, self._in_place, self._first = out, in_place, True
        self._colour = out.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"

    def show(self, text: str, *, last: bool, apart: bool) -> None:
        if self._in_place:
            self._out.write(self._redraw(text, last))
        else:
            lines = [self._painted(line) for line in text.splitlines()]
            self._out.write(("\n" if apart and not self._first else "") + "".join(f"{line}\n" for line in lines))
        self._out.flush()
        self._first = False

    def _redraw(self, text: str, last: bool) -> str:
        """What draws the text over a terminal's screen. It is cut to the screen, but for the last time."""
        size = shutil.get_terminal_size()
        lines = text.splitlines()
        if not last:
            lines = [line[: size.columns] for line in lines[: size.lines - 1]]
        clear = "\x1b[2J" if self._first else ""
        return clear + "\x1b[H" + "".join(f"{self._painted(line)}\x1b[K\n" for line in lines) + "\x1b[J"

    def _painted(self, line: str) -> str:
        if not self._colour:
            return line
        for start, colour in _COLOURS.items():
            if line.startswith(start):
                return f"\x1b[{colour}m{line}\x1b[0m"
        return f"\x1b[31m{line}\x1b[0m" if _SILENCE in line else line


_SILENCE = "has not been heard of for"
_COLOURS = {
    "sweep ": "1", "stopping": "33", "stopped": "33", "failures": "33", "failed": "31", "some SAEs failed": "31",
    "what came out": "32",
}  # fmt: skip
