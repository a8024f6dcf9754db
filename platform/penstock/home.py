"""Where a user's sweeps are kept: one local folder with the MLflow database, its artifacts and, unless the spec says
otherwise, the token stores and checkpoints."""

import json
import os
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from penstock.errors import SweepError
from penstock.redaction import redacted, without_user

if TYPE_CHECKING:
    from penstock.storage import Storage

DEFAULT_HOME = "penstock-home"
_DATABASES = ("postgresql", "mysql", "mssql")
_ANSWER_SECONDS = 5
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # of a sweep, and its id
_RAY_CACHES = ("working_dir_files", "py_modules_files")


@dataclass(frozen=True)
class Home:
    """An absolute folder. Nothing is created until something is written to it."""

    path: Path

    @staticmethod
    def resolve(argument: str | Path | None = None) -> "Home":
        """`argument` (the `--home` option), else `PENSTOCK_HOME`, else `./penstock-home`, made absolute.

        Raises `SweepError` for what cannot be a home: a URI, a file, or a folder inside one that Ray unpacked a job
        into, which Ray deletes after the job.
        """
        given = os.fspath(argument or os.environ.get("PENSTOCK_HOME") or DEFAULT_HOME)
        source = "--home" if argument else "PENSTOCK_HOME" if os.environ.get("PENSTOCK_HOME") else "the default home"
        if "://" in given:
            raise SweepError(
                f"{source} {given!r} is a URI; a home is a local folder (`storage:` in the spec and "
                "MLFLOW_TRACKING_URI take URIs)"
            )
        path = Path(os.path.abspath(os.path.expanduser(given)))
        if any(outer == "runtime_resources" and inner in _RAY_CACHES for outer, inner in pairwise(path.parts)):
            raise SweepError(
                f"{source} {str(path)!r} lies in the folder that Ray unpacked this job into and deletes after it; "
                "name a lasting folder with --home or PENSTOCK_HOME"
            )
        if set("?#%") & set(str(path)):
            raise SweepError(f"{source} {str(path)!r} holds one of ? # %, which the address of a database cannot")
        if path.exists() and not path.is_dir():
            raise SweepError(f"{source} {str(path)!r} is a file; a home is a folder")
        return Home(path)

    @property
    def tracking_uri(self) -> str:
        """`MLFLOW_TRACKING_URI` where it is set, else the SQLite database in this home."""
        return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self.path}/mlflow.db"

    @property
    def artifact_location(self) -> str | None:
        """The artifact folder as a URI; None where `MLFLOW_TRACKING_URI` is set, since that server has its own."""
        return None if os.environ.get("MLFLOW_TRACKING_URI") else (self.path / "artifacts").as_uri()

    def storage_uri(self, spec_storage: str | None) -> str:
        """Where token stores and checkpoints go: the spec's `storage` (a path made absolute), else this home."""
        if spec_storage is None:
            return str(self.path)
        return spec_storage if "://" in spec_storage else os.path.abspath(os.path.expanduser(spec_storage))

    def check_writable(self) -> None:
        """Raise `SweepError` when a sweep could not be kept here. Leaves nothing behind."""
        from penstock.storage import Storage

        Storage(self.path).check_writable("the home (--home, PENSTOCK_HOME)")

    def check_tracking(self) -> None:
        """Raise `SweepError` when no MLflow answers where sweeps are tracked, for which MLflow itself would try for
        minutes, or when it does not let this user in."""
        uri = self.tracking_uri
        problem = None
        if uri.startswith(("http://", "https://")):
            from penstock.mlflow_access import not_admitted

            problem = _unanswered(uri) or not_admitted(uri)
        elif uri.startswith("sqlite:///"):
            path = Path(uri.removeprefix("sqlite:///"))
            problem = "it is a folder; a database is a file" if path.is_dir() else None
        elif uri.split("+")[0].split(":")[0] in _DATABASES:
            problem = _refused(uri)
        if problem:
            source = "MLFLOW_TRACKING_URI" if os.environ.get("MLFLOW_TRACKING_URI") else "the tracking database"
            raise SweepError(f"{source} {redacted(uri)!r}: {redacted(problem)}")


def remember(home: Home, name: str, sweep_id: str, storage: "Storage") -> None:
    """Note where the latest sweep of a name keeps its state, for `penstock status` and `penstock scale`."""
    from penstock.storage import Storage

    record = {"name": name, "sweep_id": sweep_id, "storage": storage.uri}
    for key in (name, sweep_id):
        Storage(home.path).write_json(f"sweeps/{key}.json", record)


def recall(home: Home, sweep: str) -> tuple["Storage", str]:
    """(storage, sweep id) of the latest sweep of a name, or of an id. Raises `SweepError` when none was ever started
    here."""
    from penstock.storage import Storage

    file = home.path / "sweeps" / f"{sweep}.json"
    if not _NAME.fullmatch(sweep) or not file.is_file():
        known = sorted({json.loads(path.read_text())["name"] for path in (home.path / "sweeps").glob("*.json")})
        raise SweepError(
            f"no sweep {sweep!r} was started from home {str(home.path)!r}; there is: {', '.join(known) or 'none'}"
        )
    record = json.loads(file.read_text())
    if not _NAME.fullmatch(record["sweep_id"]):
        raise SweepError(f"{file} is damaged: its sweep_id is {record['sweep_id']!r}")
    return Storage(record["storage"]), record["sweep_id"]


def _unanswered(uri: str) -> str | None:
    import http.client
    import ssl
    import urllib.error
    import urllib.request

    try:
        urllib.request.urlopen(f"{without_user(uri).rstrip('/')}/health", timeout=_ANSWER_SECONDS).close()
    except urllib.error.HTTPError:  # something answers
        return None
    except urllib.error.URLError as error:  # MLflow may know certificates that Python does not
        return None if isinstance(error.reason, ssl.SSLError) else f"no MLflow server answers there ({error.reason})"
    except (OSError, ValueError, http.client.HTTPException) as error:
        return f"no MLflow server answers there ({error})"
    return None


def _refused(uri: str) -> str | None:
    import sqlalchemy

    try:
        sqlalchemy.create_engine(uri).connect().close()
    except ModuleNotFoundError as error:
        return f"it needs the Python package {error.name}, which is not installed"
    except sqlalchemy.exc.SQLAlchemyError as error:
        return f"the database does not answer ({str(error).splitlines()[0]})"
    return None
