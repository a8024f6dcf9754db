"""The command line: `penstock COMMAND`; the commands stand in `_parser`.

What a user can cause ends in one message on stderr and exit status 2; Ctrl-C in 130. Nothing heavy (MLflow, torch, Ray)
is imported before the command that needs it runs.
"""

import argparse
import contextlib
import datetime
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.errors import SweepError, UserError
from penstock.front_table import JSON_KEYS, format_front, format_over_all, front_json
from penstock.home import Home
from penstock.redaction import redacted, without_user
from penstock.text import figure, text_table

if TYPE_CHECKING:
    from penstock.spool import Spool, StreamInfo

__all__ = ["JSON_KEYS", "format_front", "front_json", "main", "text_table"]
_ADDRESS_SECONDS = 10
_UI_START_SECONDS = 90
_UI_STOP_SECONDS = 5
_UI_VIEWS = 5
# What a request's Host may be, whatever the environment says: any other is a page's that points a name of its own here.
_LOOPBACK_HOSTS = "127.0.0.1,127.0.0.1:*,localhost,localhost:*"
# By which a folder of an SAE is known from a sweep's name, in any format.
_SAE_FILES = ("cfg.json", "config.json", "params.npz", "hyperparams.json")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status (argparse itself exits for `--help` and for a wrong option)."""
    arguments = _parser().parse_args(argv)
    # A sweep that is ended at once leaves Tune's thread behind, whose next call would start a Ray of its own.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    try:
        status = arguments.command(arguments, Home.resolve(getattr(arguments, "home", None)))
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"penstock: {redacted(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `penstock front | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception:  # a fault of ours, and libraries put addresses with passwords into their messages
        print(redacted(traceback.format_exc()), end="", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--home", metavar="DIR", default=argparse.SUPPRESS,
        help="where sweeps are kept (else PENSTOCK_HOME, else ./penstock-home)",
    )  # fmt: skip
    parser = argparse.ArgumentParser(
        prog="penstock", parents=[common], description="Train sweeps of sparse autoencoders and hand back the best."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")

    def command(
        name: str, run: Callable[[argparse.Namespace, Home], int], summary: str, under: Any = commands
    ) -> argparse.ArgumentParser:
        sentence = f"{summary[0].upper()}{summary[1:]}."
        added: argparse.ArgumentParser = under.add_parser(name, parents=[common], help=summary, description=sentence)
        added.set_defaults(command=run)
        return added

    plan = command("plan", _plan, "say what a sweep would take, and run nothing")
    plan.add_argument("spec", metavar="SPEC", help="the sweep's YAML file")
    plan.add_argument(
        "--address", metavar="A",
        help="hold it against a running Ray cluster: http://HOST:8265 from anywhere, HOST:PORT or auto on a node",
    )  # fmt: skip
    plan.add_argument(
        "--cluster", metavar="FILE", help="what its autoscaler may add: the YAML of ray up, or a RayCluster manifest"
    )

    run = command("run", _run, "run a sweep from this terminal, on a local Ray or attached to a cluster")
    run.add_argument("spec", metavar="SPEC", help="the sweep's YAML file")
    run.add_argument("--address", metavar="A", help="a running Ray cluster (auto, HOST:PORT); a local Ray unless given")

    _add_code_change(run)

    submit = command("submit", _submit, "submit a sweep as a job to a Ray cluster")
    submit.add_argument("spec", metavar="SPEC", help="the sweep's YAML file")
    submit.add_argument("--address", metavar="URL", required=True, help="the cluster's job server, http://HOST:8265")
    submit.add_argument("--follow", action="store_true", help="show the job's log and end with its exit status")
    _add_code_change(submit)

    harvest = command("harvest", _harvest, "fill the spool with a spec's activations ahead of time, and train nothing")
    harvest.add_argument("spec", metavar="SPEC", help="the sweep's YAML file")
    harvest.add_argument("--address", metavar="A", help="a running Ray cluster; a local Ray unless given")

    status = command("status", _status, "say how a sweep stands, or all of them where none is named")
    status.add_argument("sweep", metavar="SWEEP", nargs="?", help="a sweep's name (its latest run) or id")
    status.add_argument(
        "--watch", "--follow", dest="follow", action="store_true",
        help="show it again every 2 s until the sweep has ended, and end with its exit status",
    )  # fmt: skip
    _add_dashboard(status)
    status.add_argument("--json", action="store_true", help="print one object; with --watch one on a line each time")

    logs = command("logs", _logs, "show what the driver of a sweep has said, also when it is gone")
    logs.add_argument("sweep", metavar="SWEEP", help="a sweep's name (its latest run) or id")
    logs.add_argument("--sae", metavar="ID", help="only what concerns this SAE: an id or the beginning of one")
    logs.add_argument("--follow", action="store_true", help="go on until the sweep has ended")
    _add_dashboard(logs)

    stop = command("stop", _stop, "have a running sweep save every SAE and end; `resume` goes on with it")
    stop.add_argument("sweep", metavar="SWEEP", help="a sweep's name (its latest run) or id")
    stop.add_argument("--now", action="store_true", help="do not save: it goes on from the checkpoints that are there")
    stop.add_argument("--no-wait", dest="wait", action="store_false", help="do not wait until it has ended")
    _add_dashboard(stop)

    resume = command("resume", _resume, "go on with a sweep that was stopped or killed or has failed, without its spec")
    resume.add_argument("sweep", metavar="SWEEP", help="a sweep's name (its latest run) or id")
    resume.add_argument(
        "--address", metavar="A",
        help="on a running Ray cluster (auto, HOST:PORT), or as a job of one (http://HOST:8265); else on a local Ray",
    )  # fmt: skip
    resume.add_argument("--follow", action="store_true", help="as a job: show its log and end with its exit status")
    _add_code_change(resume)

    scale = command("scale", _scale, "have a running sweep use more or fewer model hosts")
    scale.add_argument("sweep", metavar="SWEEP", help="a sweep's name (its latest run) or id")
    scale.add_argument("--model-hosts", metavar="N", type=_count, required=True, help="so many model hosts, 1 or more")

    cost = command("cost", _cost, "say what a sweep has held of the cluster, by phase, by SAE, and to no use")
    cost.add_argument("sweep", metavar="SWEEP", help="a sweep's name (its latest run) or id")
    cost.add_argument("--gpu-hour", metavar="PRICE", type=_amount, help="of a GPU (else resources.gpu_hour_cost)")
    cost.add_argument("--cpu-hour", metavar="PRICE", type=_amount, help="of a CPU core")
    cost.add_argument("--json", action="store_true", help="print one object, with every SAE")

    command("list", _list, "list the sweeps there are")

    front = command("front", _front, "show a sweep's SAEs and its Pareto front")
    front.add_argument("sweep", metavar="SWEEP", help="a sweep's name (its latest run) or id")
    front.add_argument("--hook-point", metavar="H", help="only this hook point")
    _add_band(front, "only SAEs with an L0 in this band, and the front among them")
    front.add_argument("--architecture", metavar="A", help="only this architecture, and the front among its SAEs")
    shape = front.add_mutually_exclusive_group()
    shape.add_argument("--by", choices=["architecture"], help="a front for each architecture, not one for all")
    shape.add_argument(
        "--over-all", action="store_true", help="all hook points in one table, by the CE increase in nats, least first"
    )
    front.add_argument("--json", action="store_true", help="print a list with one object an SAE")

    compare = command("compare", _compare, "say which features SAEs share, across seeds, widths and architectures")
    compare.add_argument(
        "saes", metavar="SAE", nargs="+", help="a folder, SWEEP:SAE_ID or models:/NAME@ALIAS; with --sweep an id"
    )
    compare.add_argument("--sweep", metavar="SWEEP", help="the sweep that the ids are of: its name or id")
    compare.add_argument(
        "--threshold", metavar="C", type=_cosine, help="the decoder cosine above which a feature is shared (0.7)"
    )
    compare.add_argument("--to", metavar="FILE.parquet", help="write in how many of the others each latent is found")
    compare.add_argument("--json", action="store_true", help="print one object")

    evaluate = command("evaluate", _evaluate, "evaluate a sweep's SAEs by another protocol, or any SAE folders")
    evaluate.add_argument(
        "what", metavar="WHAT", nargs="+", help="a sweep's name or id; or folders of SAEs, one or more"
    )
    evaluate.add_argument("--dataset", metavar="D", help="on documents of this dataset (demo, a path, a hub name)")
    evaluate.add_argument("--text-column", metavar="C", help="its column of texts, where it is not `text`")
    evaluate.add_argument("--tokens", metavar="N", type=_tokens, help="on so many tokens of its report split (50k, 1M)")
    evaluate.add_argument("--context", metavar="N", type=_count, help="in rows of so many tokens")
    evaluate.add_argument(
        "--ablation", choices=("zero", "mean"), help="CE recovered is against activations of 0, or against their mean"
    )
    evaluate.add_argument("--address", metavar="A", help="a sweep: a running Ray cluster; a local Ray unless given")
    evaluate.add_argument("--model", metavar="M", help="folders: this model, and not what their cfg.json says")
    evaluate.add_argument(
        "--processing", choices=("none", "fold_ln", "center", "fold_ln_center"), help="folders: of the model's weights"
    )
    evaluate.add_argument("--hook-point", metavar="H", help="folders: at this one (READS -> WRITES for transcoders)")
    evaluate.add_argument("--beside", metavar="SWEEP", help="folders: by this sweep's protocol, on one front with it")
    evaluate.add_argument("--json", action="store_true", help="print one object: the protocol, SAEs and baselines")

    features = command("features", _features, "make dashboards of what an SAE's latents fire on and write")
    features.add_argument(
        "what", metavar="WHAT", help="a sweep's name or id; or a folder: of an SAE, or of features made earlier"
    )
    which = features.add_mutually_exclusive_group()
    which.add_argument("--sae", metavar="ID", help="a sweep: this SAE, an id or its beginning, ID[WIDTH] for a prefix")
    which.add_argument(
        "--hook-point", metavar="H",
        help="a sweep: the best SAE of this hook point, and not of each; an SAE folder: at this one",
    )  # fmt: skip
    features.add_argument("--architecture", metavar="A", help="a sweep: only this architecture")
    _add_band(features, "a sweep: pick from this band of L0 (else the spec's)")
    features.add_argument(
        "--tokens", metavar="N", type=_tokens, help="look at so many tokens of the report split (50k, 10M); 500k"
    )
    features.add_argument("--dataset", metavar="D", help="of documents of this dataset (demo, a path, a hub name)")
    features.add_argument("--text-column", metavar="C", help="its column of texts, where it is not `text`")
    features.add_argument("--context", metavar="N", type=_count, help="in rows of so many tokens")
    features.add_argument("--model", metavar="M", help="an SAE folder: this model, and not what its cfg.json says")
    features.add_argument(
        "--processing", choices=("none", "fold_ln", "center", "fold_ln_center"),
        help="an SAE folder: of the model's weights",
    )  # fmt: skip
    features.add_argument("--workers", metavar="N", type=_count, help="so many model hosts; 1: in this process, no Ray")
    features.add_argument("--gpus-per-worker", metavar="G", type=_amount, help="of each (else the spec's; a share is)")
    features.add_argument("--address", metavar="A", help="a running Ray cluster (auto, HOST:PORT)")
    features.add_argument("--memory", metavar="GB", type=_amount, help="keep at most this much at once, in passes; 2")
    features.add_argument("--to", metavar="DIR", help="a new or empty folder (else one in the home)")
    features.add_argument("--page", metavar="FILE.html", help="write a self-contained page to look at them")
    features.add_argument("--serve", action="store_true", help="show them on this machine until Ctrl-C")
    features.add_argument("--port", metavar="N", type=int, help="the port of --serve; a free one unless given")
    features.add_argument("--neuronpedia", metavar="DIR", help="export them in the JSON that Neuronpedia imports")

    pull = command("pull", _pull, "fetch the SAE with the highest CE recovered at a hook point, or one by its id")
    pull.add_argument(
        "sweep", metavar="SWEEP", help="a sweep's name (its latest run) or id; or a registered model, models:/NAME@best"
    )
    which = pull.add_mutually_exclusive_group()
    which.add_argument("--hook-point", metavar="H", help="the best of this hook point")
    which.add_argument("--sae", metavar="ID", help="this one: an id or the beginning of one, ID[WIDTH] for a prefix")
    pull.add_argument("--architecture", metavar="A", help="only this architecture")
    _add_band(pull, "pick from this band of L0 (else the spec's)")
    pull.add_argument(
        "--at", metavar="TOKENS", type=_tokens, help="as it was after so many tokens (50M), where train.keep kept it"
    )
    pull.add_argument("--to", metavar="DIR", required=True, help="a new or empty folder")

    report = command("report", _report, "write a sweep's report as one self-contained HTML file")
    report.add_argument("sweep", metavar="SWEEP", help="a sweep's name (its latest run) or id")
    report.add_argument("--to", metavar="FILE.html", required=True, help="the file to write")

    ui = command("ui", _ui, "serve the MLflow UI on this machine until Ctrl-C")
    ui.add_argument("--port", metavar="N", type=int, help="the port; a free one unless given")

    spool = commands.add_parser(
        "spool", parents=[common], help="list or remove the activations kept on disk",
        description="List or remove the activations kept on disk, which spare a second sweep the forward passes.",
    )  # fmt: skip
    actions = spool.add_subparsers(required=True, metavar="ACTION", title="actions")
    spooled = command("list", _spool_list, "list the streams of activations in a spool", actions)
    prune = command("prune", _spool_prune, "remove streams of activations, the least recently used first", actions)
    for action in (spooled, prune):
        action.add_argument("folder", metavar="DIR", nargs="?", help="the spool; the home's unless given")
    which = prune.add_mutually_exclusive_group()
    which.add_argument("--keep", metavar="GB", type=_amount, default=0.0, help="remove no more once this much is left")
    which.add_argument("--stream", metavar="ID", help="remove only this stream: an id or the beginning of one")
    prune.add_argument(
        "--older-than", metavar="DAYS", type=_amount, default=0.0, help="remove only what was not used for this long"
    )
    prune.add_argument("--yes", action="store_true", help="remove; without it, only say what would go")
    return parser


def _add_dashboard(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address", metavar="URL",
        help="of a sweep on this cluster, from anywhere: its dashboard's address, http://HOST:8265",
    )  # fmt: skip


def _add_code_change(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-code-change", action="store_true", help="resume from checkpoints that other source code has written"
    )


def _add_band(parser: argparse.ArgumentParser, summary: str) -> None:
    parser.add_argument("--l0", metavar="LO:HI", type=_band, help=f"{summary}; an end may be left out")


def _band(text: str) -> tuple[float, float]:
    from penstock.spec import parse_band

    try:
        return parse_band(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _count(text: str) -> int:
    if text.isascii() and text.isdigit() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"accepted is a whole number of 1 or more, not {text!r}")


def _tokens(text: str) -> int:
    from penstock.spec import parse_count

    try:
        count = parse_count(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if not isinstance(count, int) or count < 1:
        raise argparse.ArgumentTypeError(f"accepted is a number of tokens of 1 or more, like 50k, not {text!r}")
    return count


def _cosine(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"accepted is a cosine above 0 and below 1, not {text!r}")


def _amount(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"accepted is a number of 0 or more, not {text!r}")


# ---- commands -------------------------------------------------------------------------------------------------------


def _plan(arguments: argparse.Namespace, home: Home) -> int:
    from penstock.sweep import plan_command

    _check_storage(arguments.spec, home)
    if arguments.cluster is not None and arguments.address is None:
        raise SweepError("--cluster is given without --address: it says what the autoscaler of a running cluster may "
                         "add; accepted: both")  # fmt: skip
    if arguments.address is not None and not arguments.address.startswith(("http://", "https://")):
        _check_address(arguments.address)
    text, status = plan_command(arguments.spec, home, arguments.address, arguments.cluster)
    print(text)
    return status


def _check_storage(spec_path: str, home: Home) -> None:
    """Whether the sweep's tokens and checkpoints can be written, before anything is read or started."""
    from penstock.spec import load_spec
    from penstock.storage import Storage

    storage = load_spec(spec_path).storage
    if storage is None:
        home.check_writable()
    else:
        Storage(home.storage_uri(storage)).check_writable()


def _check_address(given: str | None) -> None:
    """Whether anything listens at the HOST:PORT of a cluster that is to be joined, given or in RAY_ADDRESS. Ray itself
    would try for minutes."""
    address = os.environ.get("RAY_ADDRESS") or None if given is None else given
    source = "RAY_ADDRESS" if given is None else "--address"
    accepted = "accepted: auto, or the HOST:PORT of a running head, like 127.0.0.1:6379"
    if address is None:
        return
    if address.startswith(("http://", "https://")):
        raise SweepError(f"{source} {without_user(address)!r} is the address of a dashboard, to which `penstock "
                         f"submit` sends jobs; {accepted}")  # fmt: skip
    if address.startswith("ray://"):
        raise SweepError(f"{source} {address!r} is the address of a Ray client, and a sweep's driver has to be on a "
                         f"node of the cluster; {accepted}, or `penstock submit`")  # fmt: skip
    if address in ("auto", "local"):
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise SweepError(f"{source} {address!r} is no address; {accepted}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ADDRESS_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise SweepError(f"{source} {address!r}: no Ray cluster answers there ({error}); {accepted}") from None


def _run(arguments: argparse.Namespace, home: Home) -> int:
    from penstock.sweep import run

    _check_storage(arguments.spec, home)
    home.check_writable()
    home.check_tracking()
    _check_address(arguments.address)
    return run(arguments.spec, home, arguments.address, allow_code_change=arguments.allow_code_change)


def _harvest(arguments: argparse.Namespace, home: Home) -> int:
    from penstock.harvest import harvest

    _check_storage(arguments.spec, home)
    _check_address(arguments.address)
    return harvest(arguments.spec, home, arguments.address)


def _submit(arguments: argparse.Namespace, home: Home) -> int:
    from penstock.submit import submit

    change = arguments.allow_code_change
    return submit(arguments.spec, home, arguments.address, arguments.follow, allow_code_change=change)


def _status(arguments: argparse.Namespace, home: Home) -> int:
    from penstock.status import show

    where = {"address": arguments.address, "follow": arguments.follow, "as_json": arguments.json}
    return show(home, arguments.sweep, **where)


def _logs(arguments: argparse.Namespace, home: Home) -> int:
    from penstock.control import show_log

    return show_log(home, arguments.sweep, arguments.address, sae=arguments.sae, follow=arguments.follow)


def _stop(arguments: argparse.Namespace, home: Home) -> int:
    from penstock.control import stop

    return stop(home, arguments.sweep, arguments.address, now=arguments.now, wait=arguments.wait)


def _resume(arguments: argparse.Namespace, home: Home) -> int:
    from penstock.control import resume

    change = arguments.allow_code_change
    if arguments.address is None or "://" not in arguments.address:
        home.check_tracking()
        _check_address(arguments.address)
    return resume(home, arguments.sweep, arguments.address, arguments.follow, allow_code_change=change)


def _scale(arguments: argparse.Namespace, home: Home) -> int:
    from penstock.control import ask_for_hosts

    print(ask_for_hosts(home, arguments.sweep, arguments.model_hosts))
    return 0


def _cost(arguments: argparse.Namespace, home: Home) -> int:
    from penstock.cost import cost

    found = cost(home, arguments.sweep, arguments.gpu_hour, arguments.cpu_hour)
    print(found.as_json() if arguments.json else found.as_text())
    return 0


def _list(arguments: argparse.Namespace, home: Home) -> int:
    from penstock.tracking import list_sweeps

    home.check_tracking()
    sweeps = list_sweeps(home)
    rows = [[row.name, row.sweep_id, row.status, str(row.saes), f"{row.started.tz_convert(None):%Y-%m-%d %H:%M} UTC"]
            for row in sweeps.itertuples(index=False)]  # fmt: skip
    print(text_table(["sweep", "id", "status", "SAEs", "started"], rows, right={"SAEs"}) if rows else "no sweeps yet")
    return 0


def _front(arguments: argparse.Namespace, home: Home) -> int:
    from penstock.pull import front
    from penstock.tracking import find_sweep

    which = {"hook_point": arguments.hook_point, "architecture": arguments.architecture, "home": home}
    table = front(arguments.sweep, l0=arguments.l0, by=arguments.by, **which)
    band = arguments.l0 or find_sweep(home, arguments.sweep).l0_band
    if arguments.json:
        print(front_json(table, band))
    elif table.empty and arguments.l0 is not None:
        l0s = front(arguments.sweep, **which)["l0"].dropna()
        there = f"there are {len(l0s)}, from {l0s.min():.3g} to {l0s.max():.3g}" if len(l0s) else "none has one"
        print(f"no SAE has an L0 in {band[0]:g}:{band[1]:g}; {there}")
    elif arguments.over_all:
        print(format_over_all(table))
    else:
        print(format_front(table, band, by_architecture=arguments.by is not None))
    return 0


def _evaluate(arguments: argparse.Namespace, home: Home) -> int:
    from penstock.evaluate import Asked, evaluate_sweep

    home.check_writable()
    names = arguments.what
    if is_folders := len(names) > 1 or _is_sae_folder(names[0]):
        _refuse(arguments, "folders of SAEs", "a sweep", ["address"])
        if arguments.beside is not None:
            others = ["dataset", "text_column", "tokens", "context", "ablation", "model", "processing"]
            _refuse(arguments, "--beside, which takes the sweep's protocol", "what stands alone", others)
    else:
        only = ["model", "processing", "hook_point", "beside"]
        _refuse(arguments, f"sweep {names[0]!r}", "folders of SAEs", only)
    asked = Asked(arguments.dataset, arguments.text_column, arguments.tokens, arguments.context, arguments.ablation)
    if is_folders:
        from penstock.sae_folders import evaluate_folders

        found = evaluate_folders(
            home, names, asked, model=arguments.model, processing=arguments.processing,
            hook_point=arguments.hook_point, beside=arguments.beside,
        )  # fmt: skip
    else:
        home.check_tracking()
        _check_address(arguments.address)
        found = evaluate_sweep(home, names[0], asked, arguments.address)
    print(found.as_json() if arguments.json else found.as_text())
    return 0


def _features(arguments: argparse.Namespace, home: Home) -> int:
    from sae_core.analysis.feature_files import is_features, read_features

    name = arguments.what
    _check_shown(arguments)
    ours = ["sae", "architecture", "l0"]
    making = ["hook_point", "tokens", "dataset", "text_column", "context", "model", "processing", "workers",
              "gpus_per_worker", "address", "memory", "to"]  # fmt: skip
    if is_features(name) and not (Path(name) / "cfg.json").exists():
        _refuse(arguments, f"features {name!r}, which are made already", "a sweep or an SAE folder", [*ours, *making])
        read_features(name)
        folders = [Path(name)]
    else:
        with _terminated_as_interrupt():  # or what has been written so far would be left beside the folder
            folders = _make_features(arguments, home, ours)
    return _show_features(arguments, folders)


def _check_shown(arguments: argparse.Namespace) -> None:
    """Refuse, before anything is computed, what could not be written or served afterwards."""
    page, to = arguments.page, arguments.neuronpedia
    if page is not None and (not page.endswith(".html") or Path(page).is_dir()
                             or not Path(page).absolute().parent.is_dir()):  # fmt: skip
        raise SweepError(f"--page {page!r}: accepted is an .html file in a folder that is there")
    if to is not None and (Path(to).is_file() or (Path(to).is_dir() and any(Path(to).iterdir()))):
        raise SweepError(f"--neuronpedia {to!r} is there already; accepted: a new or empty folder")
    if arguments.port is not None and not arguments.serve:
        raise SweepError(f"--port {arguments.port}: accepted with --serve alone")
    if arguments.port is not None:
        _free_port(arguments.port)


def _make_features(arguments: argparse.Namespace, home: Home, ours: Sequence[str]) -> list[Path]:
    from penstock.evaluate import Asked
    from penstock.features import BUDGET_GB, Which, Workers, features_of_folder, features_of_sweep

    name, to = arguments.what, None if arguments.to is None else Path(arguments.to)
    home.check_writable()
    if is_folder := _is_sae_folder(name):
        _refuse(arguments, "an SAE folder", "a sweep", ours)
    else:
        home.check_tracking()
        _refuse(arguments, f"sweep {name!r}", "an SAE folder", ["model", "processing"])
        if arguments.sae is not None:
            _refuse(arguments, f"--sae {arguments.sae!r}, which is one SAE", "a hook point", ["architecture", "l0"])
    _check_address(arguments.address)
    asked = Asked(arguments.dataset, arguments.text_column, arguments.tokens, arguments.context)
    how = {
        "workers": Workers(arguments.workers, arguments.address, arguments.gpus_per_worker),
        "to": to,
        "budget_gb": BUDGET_GB if arguments.memory is None else arguments.memory,
    }
    if is_folder:
        given = {"model": arguments.model, "processing": arguments.processing, "hook_point": arguments.hook_point}
        return [features_of_folder(home, name, asked, **given, **how)]
    which = Which(arguments.sae, arguments.hook_point, arguments.architecture, arguments.l0)
    several = [f"--{option}" for option in ("page", "serve", "neuronpedia") if getattr(arguments, option)]
    if several and which.sae is None and which.hook_point is None:
        raise SweepError(f"{', '.join(several)} is of one SAE, and sweep {name!r} has the best of each hook point; "
                         "accepted: with --hook-point or --sae, or afterwards with one of the folders")  # fmt: skip
    return features_of_sweep(home, name, which, asked, **how)


def _show_features(arguments: argparse.Namespace, folders: Sequence[Path]) -> int:
    """Write, export and serve what is asked for; say how to, where nothing is."""
    from sae_core.analysis.feature_files import read_features

    for folder in folders:
        print(f"{folder}: {read_features(folder).summary}", flush=True)
    if arguments.page is not None:
        from penstock_dashboards.features import write_page

        print(f"page: {write_page(folders[0], Path(arguments.page))}", flush=True)
    if arguments.neuronpedia is not None:
        from penstock_dashboards.neuronpedia import export

        print(f"for Neuronpedia: {export(folders[0], Path(arguments.neuronpedia))}", flush=True)
    if arguments.serve:
        from penstock.feature_server import serve_until_interrupted

        serve_until_interrupted(folders[0], arguments.port)
    elif arguments.page is None and arguments.neuronpedia is None:
        for folder in folders:
            print(f"look at them: penstock features {folder} --serve\n"
                  f"or as a file: penstock features {folder} --page {folder.name}.html")  # fmt: skip
    return 0


def _is_sae_folder(name: str) -> bool:
    """Whether a path is meant, and not a sweep's name."""
    path = Path(name)
    return "/" in name or name in (".", "..") or path.is_file() or any((path / file).exists() for file in _SAE_FILES)


def _refuse(arguments: argparse.Namespace, here: str, there: str, options: Sequence[str]) -> None:
    given = [f"--{name.replace('_', '-')}" for name in options if getattr(arguments, name) is not None]
    if given:
        raise SweepError(f"{', '.join(given)} cannot be given for {here}; accepted: for {there}")


def _compare(arguments: argparse.Namespace, home: Home) -> int:
    from penstock.compare import compare, format_comparison, write_latents

    target = None if arguments.to is None else Path(arguments.to)
    if target is not None and (target.suffix != ".parquet" or target.is_dir() or not target.absolute().parent.is_dir()):
        raise SweepError(f"--to {str(target)!r}: accepted is a .parquet file in a folder that is there")
    comparison = compare(arguments.saes, sweep=arguments.sweep, threshold=arguments.threshold, home=home)
    if target is not None:
        write_latents(comparison, target)
    print(json.dumps(comparison.as_json(), indent=1) if arguments.json else format_comparison(comparison))
    return 0


def _pull(arguments: argparse.Namespace, home: Home) -> int:
    from penstock.pareto import key_of, kind_of
    from penstock.pull import PROVENANCE, pull

    folder = pull(
        arguments.sweep,
        hook_point=arguments.hook_point,
        sae=arguments.sae,
        architecture=arguments.architecture,
        l0=arguments.l0,
        at=arguments.at,
        to=arguments.to,
        home=home,
    )
    picked = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    if "model" in picked:
        what = f"{picked['model']}, version {picked['version']}"
    elif "at_tokens" in picked:
        after = f"{picked['at_tokens']:,} tokens"
        what = f"{kind_of(picked)} at {picked['hook_point']} after {after} (SAE {key_of(picked)})"
    else:
        what = (
            f"{kind_of(picked)} at {picked['hook_point']}, L0 {picked['l0']:.3g}, "
            f"CE recovered {figure(picked.get('ce_recovered'), 4)} (SAE {key_of(picked)})"
        )
    print(
        f"{folder}: {what}\n"
        f"load it with: from sae_core import SAE; sae = SAE.load({str(folder)!r})"
    )
    return 0


def _report(arguments: argparse.Namespace, home: Home) -> int:
    from penstock_dashboards.report import report

    home.check_tracking()
    print(report(home, arguments.sweep, Path(arguments.to)))
    return 0


def _ui(arguments: argparse.Namespace, home: Home) -> int:
    from penstock.notes import views
    from penstock.tracking import has_database

    if home.tracking_uri.startswith(("http://", "https://")):
        print(f"MLflow already runs at {without_user(home.tracking_uri)}")
        return 0
    if not has_database(home):
        raise SweepError(f"{home.path} holds no sweeps yet; `penstock run SPEC` makes one, --home looks elsewhere")
    port = _free_port(arguments.port or 0)
    with tempfile.TemporaryFile() as log, _terminated_as_interrupt(), _mlflow_server(home, port, log) as server:
        _wait_until_served(server, port, log)
        address = f"http://127.0.0.1:{port}"
        print(f"MLflow UI: {address}  (Ctrl-C ends it)", flush=True)
        for name, view in list(views(home).items())[:_UI_VIEWS]:
            print(f"the SAEs of {name}: {address}{view}", flush=True)
        status = server.wait()
        raise SweepError(f"the MLflow server ended by itself with status {status}: {_tail(log)}")


# ---- the spool ------------------------------------------------------------------------------------------------------


def _open_spool(folder: str | None, home: Home) -> "Spool":
    """The spool of DIR, which has to be there."""
    from penstock.spool import Spool, SpoolError
    from penstock.storage import Storage

    spool = Spool(Storage(home.storage_uri(folder) if folder else f"{home.storage_uri(None)}/spool"))
    try:
        if spool.storage.exists(""):
            return spool
    except OSError as error:
        raise SpoolError(f"spool {spool.place!r} cannot be looked at: {error}") from None
    hint = "" if folder else "; no sweep of this home has kept activations"
    raise SpoolError(f"spool {spool.place!r} is no such folder{hint}; accepted: the folder or URI of a spool")


def _spool_list(arguments: argparse.Namespace, home: Home) -> int:
    spool = _open_spool(arguments.folder, home)
    streams = spool.streams()
    if streams:
        print(_stream_table(streams) + "\n")
    print(f"{_stream_total(streams)} in {spool.place}")
    return 0


def _spool_prune(arguments: argparse.Namespace, home: Home) -> int:
    spool = _open_spool(arguments.folder, home)
    keep = []
    if arguments.stream is not None:
        found = [info.id for info in spool.streams()]
        named = [stream_id for stream_id in found if arguments.stream and stream_id.startswith(arguments.stream)]
        if len(named) != 1:
            kept = ", ".join(found) or "no streams"
            raise SweepError(f"--stream {arguments.stream!r} names {len(named)} streams of {spool.place!r}; "
                             f"accepted: the beginning of one; it holds {kept}")  # fmt: skip
        keep = [stream_id for stream_id in found if stream_id not in named]
    remove = spool.prune if arguments.yes else spool.removable
    doomed = remove(int(arguments.keep * 1e9), keep=keep, unused_seconds=arguments.older_than * 86400)
    if doomed:
        print(_stream_table(doomed) + "\n")
    print(f"{_stream_total(doomed)} {'removed' if arguments.yes else 'would be removed'} from {spool.place}")
    if doomed and not arguments.yes:
        print("nothing is removed yet: the same command with --yes removes them")
    return 0


def _stream_table(streams: Sequence["StreamInfo"]) -> str:
    header = ["stream", "model", "dataset", "hook points", "blocks", "size", "last used"]
    rows = [
        [info.id, str(info.about.get("model", "-")), str(info.about.get("dataset", "-")), ", ".join(info.arrays),
         str(info.blocks), _size(info.bytes),
         f"{datetime.datetime.fromtimestamp(info.used, datetime.UTC):%Y-%m-%d %H:%M} UTC"]
        for info in streams
    ]  # fmt: skip
    return text_table(header, rows, right={"blocks", "size"})


def _stream_total(streams: Sequence["StreamInfo"]) -> str:
    count = len(streams)
    return f"{count} stream{'s' * (count != 1)}, {_size(sum(info.bytes for info in streams))}"


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


# ---- the MLflow server ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _mlflow_server(home: Home, port: int, log: Any) -> Iterator[subprocess.Popen[bytes]]:
    """`mlflow server` on this machine only, in a process group of its own that ends with the block."""
    environment = {
        **os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_BACKEND_STORE_URI": home.tracking_uri,  # it may hold a password, and a command line is for all to see
    }  # fmt: skip
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--artifacts-destination", str(home.path / "artifacts"), "--allowed-hosts", _LOOPBACK_HOSTS,
    ]  # fmt: skip
    server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        yield server
    finally:
        for stop in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, stop)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(_UI_STOP_SECONDS)


def _wait_until_served(server: subprocess.Popen[bytes], port: int, log: Any) -> None:
    deadline = time.monotonic() + _UI_START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise SweepError(f"the MLflow server on port {port} did not start: {_tail(log)}")
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
            return
        time.sleep(0.2)
    raise SweepError(f"the MLflow server on port {port} did not answer within {_UI_START_SECONDS} s: {_tail(log)}")


def _tail(log: Any) -> str:
    log.seek(0)
    lines = log.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def _free_port(wanted: int) -> int:
    """`wanted`, or any free port for 0. Raises `SweepError` when it cannot be had."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", wanted))
        except (OSError, OverflowError) as error:
            raise SweepError(f"port {wanted} cannot be used: {error}; leave --port out for a free one") from None
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def _terminated_as_interrupt() -> Iterator[None]:
    """SIGTERM as Ctrl-C, so that nothing is left behind, no server and no half of a folder; and Ctrl-C itself, which a
    shell makes a process in the background ignore."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
