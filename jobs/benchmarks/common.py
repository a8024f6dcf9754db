"""What every benchmark shares: its options, the order of its runs, the machine it ran on, the table and the JSON.

    rows = [Comparison("wall", "s", ours=100.0, opponent=200.0, goal=1.5)]
    report("a title", rows, arguments, described=machine(), versions_of=["torch"])

A ratio is "how many times better ours is", whichever way the figure points; with `at_most`, where ours may be worse
and the question is by how much, it is ours / opponent.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [str(ROOT / "platform"), str(ROOT / "dashboards"), str(ROOT)]
# What is measured is this checkout, whatever is installed.
sys.path[:0] = [path for path in SOURCES if path not in sys.path]

# Anything here would make a benchmark measure another set-up than the one it describes.
_FOREIGN_SETTINGS = ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "PENSTOCK_HOME", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
_LOG_LINES = 40
_BUSY = 0.5  # of a core, on average over the minute before

Result = TypeVar("Result")


# ---- options and runs -----------------------------------------------------------------------------------------------


def parser(description: str | None, *, repeats: bool = True) -> argparse.ArgumentParser:
    """The options that every benchmark has; `repeats` where it is run time that is measured."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="seconds, on next to no data; its figures mean nothing")
    made.add_argument("--json", metavar="FILE", type=Path, help="write machine, versions and figures here")
    if repeats:
        made.add_argument("--repeats", metavar="N", type=count, default=1, help="runs of each side; medians are shown")
    return made


def parse_rows(options: argparse.ArgumentParser, names: Sequence[str], repeats: int) -> argparse.Namespace:
    """The arguments, with `--only` as a list of rows and `--repeats`, which is `repeats` unless given, 1 in a quick
    run."""
    options.set_defaults(repeats=None)
    options.add_argument("--only", metavar="NAME,...", default=",".join(names), help="these rows alone")
    arguments = options.parse_args()
    arguments.only = arguments.only.split(",")
    if unknown := set(arguments.only) - set(names):
        options.error(f"--only: {', '.join(sorted(unknown))} is unknown; accepted: {', '.join(names)}")
    if arguments.repeats is None:
        arguments.repeats = 1 if arguments.quick else repeats
    return arguments


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def interleaved(
    sides: Mapping[str, Callable[[], Result]], repeats: int, *, announce: bool = True
) -> dict[str, list[Result]]:
    """Run every side `repeats` times, one after the other, each round in the opposite order of the one before."""
    results: dict[str, list[Result]] = {name: [] for name in sides}
    for index in range(repeats):
        for name in list(sides) if index % 2 == 0 else reversed(list(sides)):
            if announce:
                print(f"[{time.strftime('%H:%M:%S')}] run {index + 1} of {repeats}: {name} "
                      f"(load average {os.getloadavg()[0]:.1f})", flush=True)  # fmt: skip
            results[name].append(sides[name]())
    return results


def environment(**extra: str) -> dict[str, str]:
    """The environment of a child process that imports this checkout and carries no settings of the caller's."""
    kept = {name: value for name, value in os.environ.items() if name not in _FOREIGN_SETTINGS}
    return kept | {"PYTHONPATH": os.pathsep.join(SOURCES)} | extra


def timed(command: Sequence[str], log: Path, **extra: str) -> tuple[float, float]:
    """Run a command to its end: (when it was started, in seconds since the epoch; wall seconds).

    Its output goes to `log`; a command that fails ends the benchmark with the last lines of it.
    """
    with log.open("w", encoding="utf-8") as stream:
        started, clock = time.time(), time.perf_counter()
        status = subprocess.run(
            command, cwd=ROOT, env=environment(**extra), stdout=stream, stderr=subprocess.STDOUT, check=False
        ).returncode
        seconds = time.perf_counter() - clock
    if status != 0:
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
        raise SystemExit("\n".join([*tail, f"the command above ended with status {status}: {' '.join(command)}"]))
    return started, seconds


# ---- figures --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """One line of the table. `goal` is the least ratio; None where nothing is promised.

    `lower_is_better` None: the figure is shown for context and has no ratio.
    `at_most`: the ratio is ours / opponent, and `goal` the greatest that holds.
    """

    name: str
    unit: str
    ours: float
    opponent: float | None = None
    goal: float | None = None
    lower_is_better: bool | None = True
    at_most: bool = False

    @property
    def ratio(self) -> float | None:
        if self.opponent is None or self.lower_is_better is None:
            return None
        ours_below = self.lower_is_better and not self.at_most
        better, worse = (self.ours, self.opponent) if ours_below else (self.opponent, self.ours)
        return worse / better if better else math.nan

    @property
    def holds(self) -> bool | None:
        if self.goal is None or self.ratio is None:
            return None
        return self.ratio <= self.goal if self.at_most else self.ratio >= self.goal

    def figures(self) -> list[dict[str, Any]]:
        """This line as entries of the JSON's `figures`."""
        values = {"ours": (self.ours, self.unit), "opponent": (self.opponent, self.unit), "ratio": (self.ratio, "x")}
        return [
            {
                "name": f"{self.name}, {side}",
                "value": value,
                "unit": unit,
                "goal": self.goal if side == "ratio" else None,
                "holds": self.holds if side == "ratio" else None,
            }
            for side, (value, unit) in values.items()
            if value is not None
        ]


def medians(runs: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The median of every key over several runs."""
    listed = list(runs)
    return {name: statistics.median(run[name] for run in listed) for name in listed[0]}


def report(
    title: str, rows: Sequence[Comparison], arguments: argparse.Namespace, described: Mapping[str, Any],
    versions_of: Sequence[str], notes: Sequence[str] = (),
) -> None:  # fmt: skip
    """Print the machine (as `machine()` described it before the runs) and the table; write the JSON if asked to."""
    print(f"\n{title}")
    print_machine(described, versions_of)
    print("\n" + table(rows))
    for note in notes:
        print(note)
    if described["load_average"] > _BUSY:
        print(f"Something else was running (load average {described['load_average']}): not figures to quote.")
    if arguments.json:
        figures = [figure for row in rows for figure in row.figures()]
        write_result(arguments, described, versions_of, repeats=arguments.repeats, figures=figures)


def print_machine(described: Mapping[str, Any], versions_of: Sequence[str]) -> None:
    print(f"{described['cpu']}, {described['cores']} cores, {described['memory_gb']} GB; Python {described['python']}, "
          + ", ".join(f"{name} {version(name)}" for name in versions_of))  # fmt: skip


def write_result(
    arguments: argparse.Namespace, described: Mapping[str, Any], versions_of: Sequence[str], **found: Any
) -> None:
    """The file of `--json`: machine, versions, whether it was a quick run, and what was found, `figures` among it."""
    versions = {name: version(name) for name in versions_of}
    result = {"machine": dict(described), "versions": versions, "quick": arguments.quick, **found}
    arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def table(rows: Sequence[Comparison]) -> str:
    """Figure, ours, opponent, ratio, goal."""
    cells = [["figure", "ours", "opponent", "ratio", "goal"]]
    for row in rows:
        name = f"{row.name} ({row.unit})" if row.unit else row.name
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        limit = "at most " if row.at_most else ""
        goal = "" if row.goal is None else f"{limit}{row.goal:g} {'holds' if row.holds else 'MISSED'}"
        cells.append([name, _number(row.ours), _number(row.opponent), ratio, goal])
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = [
        "  ".join(cell.ljust(width) if column in (0, 4) else cell.rjust(width)
                  for column, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip()
        for line in cells
    ]  # fmt: skip
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


# ---- the machine ----------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What the figures are measured on. Asked before the runs, `load_average` (one minute) tells what else runs."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "gpus": _gpu_names(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _gpu_names() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
