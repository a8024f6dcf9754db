"""How a sweep stands, from the report that its driver rewrites every few seconds, and asking that driver for something.

Reads and writes files of the sweep's storage alone: it needs neither Ray nor MLflow, and no way to the cluster.
"""

import json
import shutil
import sys
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, TextIO

from penstock.cli import text_table
from penstock.errors import SweepError
from penstock.fence import BEAT_SECONDS, SILENT_SECONDS
from penstock.home import Home, recall
from penstock.storage import Storage

BAR = 24  # characters
REMEMBERED = 16  # reports of the past, over which `--follow` measures who waits
ENDED, EVALUATE = "ended", "evaluate"


@dataclass(frozen=True)
class Standing:
    """A sweep as somebody finds it at `seen` (Unix time). `report` is the driver's latest, None where there is none;
    `published` says whether the results of a sweep that reports nothing more are there."""

    sweep: str  # as the user calls it
    sweep_id: str
    seen: float
    report: dict[str, Any] | None
    published: bool = False

    @property
    def age(self) -> float:
        """Seconds since the report, by the clocks of the driver's machine and of this one."""
        return max(0.0, self.seen - self.report["time"]) if self.report else 0.0

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will come, unless the sweep is started again."""
        return self.published if self.report is None else self.report["phase"] == ENDED

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


def look(home: Home, sweep: str) -> Standing:
    """How a sweep, named by its name or id, stands now.

    Raises `SweepError` when none of that name was started from this home, or its storage cannot be read.
    """
    return _look(*recall(home, sweep), sweep)


def _look(storage: Storage, sweep_id: str, sweep: str) -> Standing:
    try:
        file = status_file(sweep_id)
        report = storage.read_json(file) if storage.exists(file) else None
        over = report is None or report["phase"] == ENDED
        published = over and storage.exists(f"sweeps/{sweep_id}/result.json")
    except OSError as error:
        raise SweepError(f"storage {storage.uri!r} of sweep {sweep!r} cannot be read: {error}") from None
    return Standing(sweep, sweep_id, time.time(), report, published)


def status_file(sweep_id: str) -> str:
    """See `ResolvedSweep.status_file`, which needs the sweep's tokens."""
    return f"sweeps/{sweep_id}/status.json"


def control_file(sweep_id: str) -> str:
    """See `ResolvedSweep.control_file`."""
    return f"sweeps/{sweep_id}/control.json"


# ---- asking for something -------------------------------------------------------------------------------------------


def ask_for_hosts(home: Home, sweep: str, n_hosts: int) -> str:
    """Ask the driver of a running sweep for so many model hosts; what happens next, in words.

    Raises `SweepError` when no driver is there to heed it, or the sweep harvests nothing more.
    """
    storage, sweep_id = recall(home, sweep)
    standing = _look(storage, sweep_id, sweep)
    reason = _why_not_scaled(standing)
    if reason:
        raise SweepError(f"sweep {sweep!r} cannot be scaled: {reason}; accepted: a sweep that is training")
    try:
        storage.write_json(control_file(sweep_id), {"model_hosts": n_hosts})
    except OSError as error:
        raise SweepError(f"storage {storage.uri!r} of sweep {sweep!r} cannot be written to: {error}") from None
    assert standing.report is not None
    now = len(standing.report["stream"].get("hosts", {}))
    return (
        f"sweep {sweep}: {n_hosts} model host(s) asked for, {now} there now; its driver takes note within seconds\n"
        "new hosts join when the cluster has room for them and they have loaded the model; others leave after the "
        f"block at hand\nwatch it: penstock status {sweep} --follow"
    )


def _why_not_scaled(standing: Standing) -> str | None:
    if standing.report is None:
        return "it has finished" if standing.published else "it has not reported yet"
    if standing.has_ended:
        return "it has ended"
    if standing.is_silent:
        return standing.about_silence
    if standing.report["phase"] == EVALUATE:
        return "it is evaluating already, and makes no more blocks"
    return None


# ---- showing --------------------------------------------------------------------------------------------------------


def show(home: Home, sweep: str, *, follow: bool = False, as_json: bool = False, out: TextIO | None = None) -> None:
    """Print how a sweep stands; with `follow` again every few seconds until it has ended.

    On a terminal the text is redrawn in place; elsewhere a blank line separates one from the next. JSON is one object,
    with `follow` one on a line each time.
    """
    out = out or sys.stdout
    storage, sweep_id = recall(home, sweep)
    past: deque[Standing] = deque(maxlen=REMEMBERED)
    in_place = follow and not as_json and out.isatty()
    first = True
    while True:
        standing = _look(storage, sweep_id, sweep)
        if as_json:
            print(to_json(standing, indent=None if follow else 1), file=out, flush=True)
        else:
            text = describe(standing, past[0] if past else None)
            last = not follow or standing.has_ended
            out.write(_redraw(text, first, last) if in_place else text + "\n" if first else f"\n{text}\n")
            out.flush()
        if not follow or standing.has_ended:
            return
        if standing.report is not None and (not past or past[-1].report["time"] != standing.report["time"]):
            past.append(standing)
        first = False
        time.sleep(BEAT_SECONDS)


def to_json(standing: Standing, indent: int | None = None) -> str:
    """The driver's report as it stands, and what is known beside it."""
    known = {"sweep_id": standing.sweep_id, "phase": None, "published": standing.published,
             "age_seconds": round(standing.age, 1), "silent": standing.is_silent}  # fmt: skip
    return json.dumps(known | (standing.report or {}), indent=indent)


def describe(standing: Standing, before: Standing | None = None) -> str:
    """How a sweep stands, as text. Who waits is measured since an earlier standing, else since the sweep's start."""
    report = standing.report
    if report is None:
        return _without_report(standing)
    stream = report["stream"]
    parts = [_title(standing), _progress(report)]
    if stream:
        parts += [_hosts(stream), _packs(report, before.report if before else None)]
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
    done = report["saes"] - report["left"]
    saes = f"{report['saes']} SAEs" + (f", {done} of them done before" if done else "")
    lines = [f"sweep {report['name']} ({standing.sweep_id}): {saes}"]
    ran = _duration(report["time"] - report["started"])
    if standing.has_ended:
        lines.append(f"ended {_duration(standing.age)} ago, after {ran}, in {standing.driver}")
        lines.append(
            f"what came out: penstock front {standing.sweep}" if standing.published
            else "it has no results yet: the command that started it goes on where it stands"
        )  # fmt: skip
    else:
        lines.append(f"phase {report['phase']}, {ran} after its start; reported {_duration(standing.age)} ago")
    if standing.is_silent:
        lines.append(f"{standing.about_silence}; what follows is its last report")
    return "\n".join(lines)


def _progress(report: dict[str, Any]) -> str:
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
    lines.append(f"{report['tokens']:,} tokens an SAE, {report['sae_tokens_per_second']:,.0f} SAE-tokens/s")
    if report.get("stopped"):
        lines.append("stopped on the way: " + ", ".join(f"{n} {status}" for status, n in report["stopped"].items()))
    return "\n".join(lines)


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


def _packs(report: dict[str, Any], before: dict[str, Any] | None) -> str:
    since = report["started"] if before is None else before["time"]
    seconds = report["time"] - since
    earlier = {} if before is None else before["stream"].get("packs", {})
    rows = []
    for pack_id, pack in report["stream"]["packs"].items():
        hook_point, n_saes = report["packs"].get(pack_id, ("part of a pack that was split", "-"))
        waited = pack.get("wait_seconds", 0.0)
        waited_before = earlier.get(pack_id, {}).get("wait_seconds", 0.0)
        waited -= waited_before if waited_before <= waited else 0.0  # a pack that starts again counts from zero
        share = f"{100 * min(1.0, waited / seconds):.0f}%" if pack["status"] == "live" and seconds > 0 else "-"
        rows.append([
            pack_id, hook_point, str(n_saes), pack["status"], f"{pack['block']} of {report['stream']['blocks']}",
            str(pack["lag"]), share, str(pack.get("spool_reads", "-")),
        ])  # fmt: skip
    waiting = "waited so far" if before is None else f"waited in {seconds:.0f} s"
    header = ["pack", "hook point", "SAEs", "status", "block", "lag", waiting, "spool reads"]
    return text_table(header, rows, right={"SAEs", "block", "lag", waiting, "spool reads"}) if rows else "no packs yet"


def _cost(cost: dict[str, float]) -> str:
    def of(name: str) -> str:
        return f"{cost.get(name, 0):,.0f}"

    return (
        f"cost   {of('blocks_made')} blocks made, {of('blocks_remade')} made again, {of('blocks_lost')} lost; "
        f"{of('spool_hits')} spool hits\n"
        f"       {of('forward_passes')} forward passes, {of('harvested_tokens')} tokens harvested"
    )


def _duration(seconds: float) -> str:
    whole = int(seconds)
    if whole < 120:
        return f"{whole} s"
    minutes, hours = whole // 60, whole // 3600
    return f"{minutes} min {whole % 60} s" if hours < 2 else f"{hours} h {minutes % 60} min"


def _redraw(text: str, first: bool, last: bool) -> str:
    """What draws the text over a terminal's screen. It is cut to the screen, but for the last time."""
    size = shutil.get_terminal_size()
    lines = text.splitlines()
    if not last:
        lines = [line[: size.columns] for line in lines[: size.lines - 1]]
    clear = "\x1b[2J" if first else ""
    return clear + "\x1b[H" + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J"
