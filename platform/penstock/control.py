"""`penstock stop`, `resume`, `scale` and `logs`: for a sweep of this home by its storage, all but `scale` for any other
by the address of its cluster's dashboard."""

import contextlib
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from penstock.errors import SweepError
from penstock.fence import BEAT_SECONDS, SILENT_SECONDS
from penstock.home import Home, recall
from penstock.logs import about_sae, as_text, find_sae, read_log
from penstock.redaction import without_user
from penstock.status import ENDS, Far, Near, Standing, look, note_submitted, status_of, watched
from penstock.stopping import LEAVE_SECONDS, SAVE_SECONDS, ask_to_stop
from penstock.storage import Storage
from penstock.sweep_files import control_file, spec_file, submitted_file

SILENT_WAIT_SECONDS = 2 * SILENT_SECONDS  # of a driver that was asked to stop: it reports while its packs save

# ---- stop -----------------------------------------------------------------------------------------------------------


def stop(home: Home, sweep: str, address: str | None = None, *, now: bool = False, wait: bool = True) -> int:
    """Ask the driver of a sweep to stop, and say what was saved. Returns 0 once it has ended, or has been asked without
    `wait`; 1 when it did not end in time, or is heard of no more.

    now: it saves nothing. Raises `SweepError` for a sweep that nobody knows, or whose driver is not there.
    """
    if address is not None:
        from penstock.remote import Cluster

        cluster = Cluster(address)
        if not any(sweep in (report["name"], report["sweep_id"]) and report["phase"] not in ENDS
                   for _, report in cluster.reports()) and _stop_before_it_reports(cluster, sweep):  # fmt: skip
            return 0
    where = watched(home, sweep, address)
    standing = where.look()
    if standing.submitted is not None:
        raise SweepError(f"sweep {sweep!r} cannot be asked to stop: {standing.about_job}; accepted: penstock stop "
                         f"{sweep} --address {standing.submitted['address']}")  # fmt: skip
    if standing.has_ended:
        print(f"sweep {sweep} ({standing.sweep_id}) has ended already: {standing.outcome.get('status', 'ended')}")
        return 0
    if standing.report is None:
        raise SweepError(f"sweep {sweep!r} has not reported yet, and cannot be asked; accepted: a sweep whose driver "
                         "reports (penstock status), or ending its process")  # fmt: skip
    if standing.is_silent:
        raise SweepError(f"sweep {sweep!r} cannot be asked to stop: {standing.about_silence}; if it is dead, nothing "
                         f"is left to stop, and penstock resume {sweep} goes on")  # fmt: skip
    _ask(where, standing, now)
    saving = "it ends without saving" if now else "every pack saves and ends"
    print(f"sweep {sweep} ({standing.sweep_id}) is asked to stop: {saving}", flush=True)
    return _wait(where, sweep) if wait else 0


def _ask(where: Near | Far, standing: Standing, now: bool) -> None:
    report = standing.report
    assert report is not None
    if isinstance(where, Near):
        assert where.storage is not None
        try:
            ask_to_stop(where.storage, standing.sweep_id, now=now)
        except OSError as error:
            raise SweepError(f"storage {where.storage.uri!r} of sweep {standing.sweep!r} cannot be written to: "
                             f"{error}") from None  # fmt: skip
        return
    from penstock.submit import run_there

    dashboard = where.cluster.dashboard
    if report["job"] and report["job_stop_seconds"] >= SAVE_SECONDS and not now:
        # Ray sends SIGTERM, and waits as long as the job has asked it to.
        dashboard.jobs.stop_job(report["job"])
        return
    # A job of somebody else's making would be killed in 3 s, and a driver that is no job is not Ray's to stop: word is
    # left in the sweep's storage, by a process on the cluster, which can reach it.
    words = ["python", "-m", "penstock.stopping", report["storage"], standing.sweep_id, *(["--now"] if now else [])]
    done, printed = run_there(dashboard, shlex.join(words))
    if not done:
        raise SweepError(f"the cluster could not leave word in storage {report['storage']!r}: {printed.strip()[-500:]}")


def _stop_before_it_reports(cluster: Any, sweep: str) -> bool:
    """A job that reads its tokens still has nothing to save. Whether there was one."""
    from penstock.remote import RUNNING

    job = cluster.job_of(sweep)
    if job is None or job["status"] not in RUNNING:
        return False
    cluster.dashboard.jobs.stop_job(job["submission_id"])
    print(f"sweep {sweep}: its job {job['submission_id']} was stopped before it had begun to train")
    return True


def _wait(where: Near | Far, sweep: str) -> int:
    began = time.monotonic()
    while True:
        standing = where.look()
        if standing.has_ended:
            outcome = standing.outcome
            if outcome.get("status") == "stopped":
                print(f"stopped: {outcome.get('left', '')}\ngo on with: penstock resume {sweep}")
            else:
                print(f"it has ended: {outcome.get('status', 'ended')}")
            return 0
        if standing.age > SILENT_WAIT_SECONDS:
            print(f"{standing.about_silence}; if it is dead: penstock resume {sweep}", file=sys.stderr)
            return 1
        if time.monotonic() - began > SAVE_SECONDS + LEAVE_SECONDS:
            print(f"it has not ended yet; watch it: penstock status {sweep} --watch", file=sys.stderr)
            return 1
        time.sleep(BEAT_SECONDS / 2)


# ---- resume ---------------------------------------------------------------------------------------------------------


def resume(
    home: Home, sweep: str, address: str | None = None, follow: bool = False, *, allow_code_change: bool = False
) -> int:
    """Go on with a sweep that has been started before, by the spec that is kept with it. Returns what `penstock run`
    does; as a job (`address` is a URL) what `penstock submit` does.

    Raises `SweepError` for a sweep that nobody knows, for one that runs, and where its checkpoints are of other source
    code, unless that is allowed.
    """
    as_job = address is not None and "://" in address
    where: Near | Far = Near(home, sweep) if not as_job or knows(home, sweep) else Far(str(address), sweep)
    standing = where.look()
    _refuse_live(standing)
    if standing.published and standing.outcome.get("status") == "finished":
        print(f"sweep {sweep} ({standing.sweep_id}) has finished; what came out: penstock front {sweep}")
        return 0
    name = sweep if standing.report is None else standing.report["name"]
    print(f"sweep {name} ({standing.sweep_id}) {_about(standing)}", flush=True)
    if not as_job:
        assert isinstance(where, Near) and where.storage is not None
        from penstock.sweep import run

        spec = kept_spec(where.storage, where.sweep_id, sweep)
        _go_where_it_ran(standing)
        return run(spec, home, address, allow_code_change=allow_code_change)
    from penstock.dashboard import Dashboard
    from penstock.submit import submit_again

    if isinstance(where, Far):
        assert standing.report is not None
        home = Home(Path(standing.report["home"]))
    dashboard = Dashboard(str(address))
    with _noted(where, standing, str(address)):
        return submit_again(home, dashboard, standing.sweep_id, name, follow, allow_code_change=allow_code_change)


@contextlib.contextmanager
def _noted(where: Near | Far, standing: Standing, address: str) -> Iterator[None]:
    """Have `status` and `stop` without an address know of a job that has not reported yet; not of one that the cluster
    does not take."""
    storage = where.storage if isinstance(where, Near) else None
    if storage is None:
        yield
        return
    with contextlib.suppress(OSError):  # it is the job that has to write there
        note_submitted(storage, standing, without_user(address))
    try:
        yield
    except SweepError:
        with contextlib.suppress(OSError):
            storage.remove(submitted_file(standing.sweep_id))
        raise


def knows(home: Home, sweep: str) -> bool:
    """Whether a sweep of that name or id was started from this home."""
    return (home.path / "sweeps" / f"{sweep}.json").is_file()


def kept_spec(storage: Storage, sweep_id: str, sweep: str) -> Any:
    """The spec of a sweep as it is kept with it, with its storage where it is found now."""
    from penstock.spec import parse_spec

    try:
        text = storage.read(spec_file(sweep_id)).decode("utf-8")
    except FileNotFoundError:
        raise SweepError(
            f"sweep {sweep!r} keeps no spec in storage {storage.uri!r}: an older Penstock has started it; accepted: "
            "penstock run SPEC, which goes on where it stands"
        ) from None
    except OSError as error:
        raise SweepError(f"storage {storage.uri!r} of sweep {sweep!r} cannot be read: {error}") from None
    spec = parse_spec(text, source=f"the spec of sweep {sweep}, {storage.path(spec_file(sweep_id))}")
    return spec.model_copy(update={"storage": storage.uri})


def _refuse_live(standing: Standing) -> None:
    if standing.report is not None and not standing.has_ended and not standing.is_silent:
        raise SweepError(
            f"sweep {standing.sweep!r} is running: {standing.driver} is at it; accepted: penstock stop "
            f"{standing.sweep} first, or waiting for it"
        )


def _about(standing: Standing) -> str:
    """What has become of it, in words."""
    if standing.report is None:
        return "has left no report; it goes on where its checkpoints are"
    outcome = standing.outcome
    if outcome.get("status") == "stopped":
        return f"was stopped; {outcome.get('left', 'it goes on where its checkpoints are')}"
    if outcome.get("exit_status") == 1:
        return "has ended, and some of its SAEs failed: they are tried again"
    if outcome.get("reason"):
        return f"has failed ({outcome['reason']}); it goes on where its checkpoints are"
    return f"has lost its driver ({standing.driver}); it goes on where its checkpoints are"


def _go_where_it_ran(standing: Standing) -> None:
    """Relative paths in a spec (of a dataset, a model) are of the folder that the sweep was started in."""
    folder = (standing.report or {}).get("folder")
    if folder and os.path.isdir(folder) and "runtime_resources" not in Path(folder).parts:
        os.chdir(folder)


# ---- scale ----------------------------------------------------------------------------------------------------------


def ask_for_hosts(home: Home, sweep: str, n_hosts: int) -> str:
    """Ask the driver of a running sweep for so many model hosts; what happens next, in words.

    Raises `SweepError` when no driver is there to heed it, or the sweep harvests nothing more.
    """
    storage, sweep_id = recall(home, sweep)
    standing = look(home, sweep)
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
        f"block at hand\nwatch it: penstock status {sweep} --watch"
    )


def _why_not_scaled(standing: Standing) -> str | None:
    if standing.report is None:
        return "it has finished" if standing.published else "it has not reported yet"
    if standing.has_ended:
        return "it has ended"
    if standing.is_silent:
        return standing.about_silence
    if standing.report["phase"] == "evaluate":
        return "it is evaluating already, and makes no more blocks"
    return None


# ---- logs -----------------------------------------------------------------------------------------------------------


def show_log(
    home: Home, sweep: str, address: str | None = None, *, sae: str | None = None, follow: bool = False,
    out: TextIO | None = None,
) -> int:  # fmt: skip
    """Print what a sweep's drivers have said, oldest first, all of it or what concerns one SAE. Returns 0, with
    `follow` the exit status of the sweep."""
    out = out or sys.stdout
    where = watched(home, sweep, address, wait=follow)
    read = _reader(where)
    shown, sae_id = 0, None
    while True:
        standing = where.look()  # first: what is said until it has ended is read after
        status = status_of(standing) if follow else 0
        lines = read()
        if sae is not None and lines:
            sae_id = sae_id or find_sae(lines, sae)
            lines = about_sae(lines, sae_id)
        for line in lines[shown:]:
            out.write(as_text(line) + "\n")
        if not lines and not follow:
            out.write(f"sweep {sweep} ({where.sweep_id}) has no log yet\n")
        out.flush()
        shown = max(shown, len(lines))
        if status is not None:
            return status if follow else 0
        time.sleep(BEAT_SECONDS)


def _reader(where: Near | Far) -> Callable[[], list[Any]]:
    if isinstance(where, Near):
        storage, sweep_id = where.storage, where.sweep_id
        assert storage is not None
        known: dict[str, list[Any]] = {}
        return lambda: read_log(storage, sweep_id, known)
    cluster, place = where.cluster, where.place
    return lambda: cluster.log(place)
