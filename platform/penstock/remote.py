"""The sweeps of a cluster, seen through its dashboard: from any machine that has the address and the token.

Every driver leaves its report and its log in the log folder of the Ray session on its node (`chronicle.py`), which the
dashboard serves. They are there as long as the cluster's Ray is, also when the sweep has ended.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from penstock.chronicle import report_name
from penstock.dashboard import Dashboard
from penstock.errors import SweepError
from penstock.logs import Line, parse_lines, session_file

NODES_AT_ONCE = 16
RUNNING = ("PENDING", "RUNNING")  # jobs, as Ray calls them
_SUFFIX = ".json"
_LOOK_SECONDS = 2.0


@dataclass(frozen=True)
class Place:
    """Where the report of a sweep lies: a node of the cluster."""

    sweep_id: str
    node_id: str


class Cluster:
    """The sweeps whose drivers run, or ran, on a cluster."""

    def __init__(self, address: str) -> None:
        self.dashboard = Dashboard(address)

    def jobs(self) -> list[dict[str, Any]]:
        """What Ray knows of the jobs that were submitted and of the drivers that joined, latest first."""
        found = self.dashboard.get("/api/v0/jobs", detail="true", limit=10_000)["data"]["result"]["result"]
        return sorted(found, key=lambda job: job.get("start_time") or 0, reverse=True)

    def job_of(self, sweep: str) -> dict[str, Any] | None:
        """The latest job that `penstock submit` has made of a sweep of this name."""
        named = (job for job in self.jobs() if (job.get("metadata") or {}).get("sweep") == sweep)
        return next((job for job in named if job.get("submission_id")), None)

    @cached_property
    def nodes(self) -> list[str]:
        """The nodes where drivers are, or all where Ray does not say."""
        alive, drivers = self.dashboard.nodes(), set()
        for job in self.jobs():
            info = job.get("driver_info") or {}
            drivers |= {job.get("driver_node_id"), info.get("node_ip_address")}
        found = [node["node_id"] for node in alive if drivers & {node["node_id"], node["node_ip"]}]
        head = [node["node_id"] for node in alive if node.get("is_head_node")]
        return list(dict.fromkeys([*head, *found])) or [node["node_id"] for node in alive]

    def places(self) -> list[Place]:
        """Where the reports of all sweeps are."""
        found, answers = [], _over(self._files, self.nodes)
        refused = [files for _, files in answers if isinstance(files, SweepError)]
        if refused and len(refused) == len(answers):
            raise refused[0]
        for node_id, files in answers:
            listed = [] if isinstance(files, SweepError) else files
            names = (name for name in listed if name.startswith("penstock-") and name.endswith(_SUFFIX))
            found += [Place(name.removeprefix("penstock-").removesuffix(_SUFFIX), node_id) for name in names]
        return found

    def _files(self, node_id: str) -> list[str] | SweepError:
        """What there is on a node, or why it does not say: one that dies must not hide the sweeps of the others."""
        try:
            found = self.dashboard.get("/api/v0/logs", node_id=node_id, glob=f"penstock-*{_SUFFIX}")["data"]["result"]
        except SweepError as error:
            return error
        return [name for names in found.values() for name in names]

    def report(self, place: Place) -> dict[str, Any] | None:
        """The driver's latest report; None where it cannot be read just now."""
        try:
            found = json.loads(self._text(place, report_name(place.sweep_id)))
        except (ValueError, SweepError):
            return None
        return found if isinstance(found, dict) and "phase" in found else None

    def log(self, place: Place) -> list[Line]:
        return parse_lines(self._text(place, session_file(place.sweep_id)))

    def _text(self, place: Place, file: str) -> str:
        return self.dashboard.text("/api/v0/logs/file", node_id=place.node_id, filename=file, lines=-1)

    def reports(self) -> list[tuple[Place, dict[str, Any]]]:
        """The latest report of every sweep."""
        latest: dict[str, tuple[Place, dict[str, Any]]] = {}
        for place, report in _over(self.report, self.places()):
            if report is not None and report["time"] > latest.get(place.sweep_id, (place, {"time": 0}))[1]["time"]:
                latest[place.sweep_id] = place, report
        return list(latest.values())

    def find(self, sweep: str, *, wait: bool = False) -> tuple[Place, dict[str, Any]]:
        """The sweep of an id, or the latest of a name. With `wait` a job of that name that still reads its tokens is
        waited for. Raises `SweepError` when none has reported on this cluster, with what its job has said."""
        said = False
        while True:
            latest, reports = self.job_of(sweep), self.reports()  # in this order: a job reports, and then it ends
            named = [one for one in reports if sweep in (one[1]["sweep_id"], one[1]["name"])]
            job = latest if latest is not None and _is_unheard(latest, [report for _, report in named]) else None
            if job is None or not wait or job["status"] not in RUNNING:
                break
            if not said:
                print(f"waiting for job {job['submission_id']} of sweep {sweep} to report", file=sys.stderr, flush=True)
            said = True
            time.sleep(_LOOK_SECONDS)
            del self.nodes  # the job's driver may come to be on one that had none
        if job is not None and job["status"] != "SUCCEEDED":  # which it does where nothing is left to train
            about = f"sweep {sweep!r}: its latest job {job['submission_id']} {self._became(job)}"
            if wait or not named:
                raise SweepError(about)
            print(f"{about}; what follows is of the one before", file=sys.stderr, flush=True)
        if named:
            return max(named, key=lambda one: one[1]["started"])
        known = sorted({report["name"] for _, report in reports})
        raise SweepError(
            f"no sweep {sweep!r} has reported on the cluster at {self.dashboard.address}; there is: "
            f"{', '.join(known) or 'none'}. A driver does so once its tokens are read"
        )

    def _became(self, job: dict[str, Any]) -> str:
        """What has become of a job whose driver has not reported."""
        if job["status"] in RUNNING:
            return (f"is {job['status']} and has not reported yet, which it does once its tokens are read; accepted: "
                    "again in a while, or --watch or --follow, which wait for it")  # fmt: skip
        lines = [line for line in self.dashboard.jobs.get_job_logs(job["submission_id"]).splitlines() if line.strip()]
        last = next((line for line in reversed(lines) if line.startswith("penstock: ")), "".join(lines[-1:]))
        return f"has {job['status']} before it could report: {last.removeprefix('penstock: ') or job['message']}"


def _is_unheard(job: Mapping[str, Any], reports: Iterable[Mapping[str, Any]]) -> bool:
    """Whether a job's driver has made none of these reports, nor was anything heard of the sweep since it started."""
    return all(
        report["job"] != job["submission_id"] and 1000 * report["started"] < job["start_time"] for report in reports
    )


def _over(call: Callable[[Any], Any], items: Iterable[Any]) -> list[tuple[Any, Any]]:
    items = list(items)
    if not items:
        return []
    with ThreadPoolExecutor(min(NODES_AT_ONCE, len(items))) as pool:
        return list(zip(items, pool.map(call, items), strict=True))
