"""The image: locked, nobody's root, and what KubeRay needs of it. No container engine is asked: every instruction is
read, what it copies is looked for, and what it installs is compared with what is installed here."""

import fnmatch
import functools
import importlib.metadata
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
KNOWN = {"ARG", "FROM", "SHELL", "RUN", "ENV", "COPY", "LABEL", "USER", "WORKDIR", "EXPOSE", "CMD"}
Instruction = tuple[str, str]


@functools.cache
def instructions() -> tuple[Instruction, ...]:
    """(keyword, arguments) of every instruction, lines that go on joined and comments left out."""
    text = (ROOT / "cluster/Dockerfile").read_text()
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return tuple(re.fullmatch(r"([A-Z]+)\s+(.+)", line).groups() for line in joined.splitlines())


@functools.cache
def stage(name: str) -> tuple[Instruction, ...]:
    """The instructions that make a target, those of the stages under it first."""
    stages: dict[str, list[Instruction]] = {}
    for keyword, arguments in instructions():
        if keyword == "FROM":
            parent, here = re.fullmatch(r"(\S+) AS (\S+)", arguments).groups()
            current = stages[here] = list(stages.get(parent, []))
        elif stages:
            current.append((keyword, arguments))
    return tuple(stages[name])


def arguments_of(keyword: str, target: str) -> list[str]:
    return [arguments for word, arguments in stage(target) if word == keyword]


def environment(target: str) -> dict[str, str]:
    return dict(pair.split("=", 1) for arguments in arguments_of("ENV", target) for pair in arguments.split())


def copies(target: str) -> Iterator[tuple[str, str]]:
    for arguments in arguments_of("COPY", target):
        *sources, to = [word for word in arguments.split() if not word.startswith("--")]
        for source in sources:
            yield source, to


def installs(target: str) -> list[str]:
    """Every `pip install` of a target, as it stands."""
    return [part.strip() for run in arguments_of("RUN", target) for part in run.split("&&") if "pip install" in part]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in found}


def closure(requirements: list[str]) -> set[str]:
    """The names of all installed packages that requirements lead to, on this machine."""
    waiting, seen = [Requirement(each) for each in requirements], {}
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        extras = wanted.extras | {""}
        if extras <= seen.get(name, set()):
            continue
        seen[name] = seen.get(name, set()) | extras
        for text in importlib.metadata.requires(name) or []:
            further = Requirement(text)
            if further.marker is None or any(further.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(further)
    return set(seen)


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


# ---- locked


def test_every_package_that_penstock_leads_to_is_pinned_at_the_version_installed_here() -> None:
    needed = closure(project()["dependencies"])
    assert {"ray", "torch", "mlflow", "pydantic-core", "grpcio"} <= needed, "the walk reaches packages of packages"
    locked = pins()
    here = {name: importlib.metadata.version(name).split("+")[0] for name in needed}  # +cpu: a build, not a version
    wrong = {name: (version, locked.get(name)) for name, version in here.items() if locked.get(name) != version}
    assert not wrong, "(installed, constraints.txt)"


def test_every_requirement_of_the_project_allows_its_pin() -> None:
    extras = project()["optional-dependencies"]
    for text in [*project()["dependencies"], *extras["server"], *extras["test"], *extras["compat"], *extras["wandb"]]:
        wanted = Requirement(text)
        if wanted.name != "penstock":
            assert pins()[canonicalize_name(wanted.name)] in wanted.specifier, text


def test_cudas_packages_are_pinned_beside_torch() -> None:
    """PyPI's torch asks for them by exact versions; which, only a resolution there can say."""
    cuda = {name for name in pins() if name.startswith(("nvidia-", "cuda-"))} | {"triton"}
    assert len(cuda) >= 19 and cuda <= pins().keys()


@pytest.mark.parametrize("target", ["penstock", "mlflow"])
def test_pip_installs_by_the_constraints_and_checks_that_nothing_else_came(target: str) -> None:
    place = environment(target)["PIP_CONSTRAINT"]
    order = stage(target)
    copied = next(i for i, (word, text) in enumerate(order) if word == "COPY" and "constraints.txt" in text.split())
    assert ("constraints.txt", place.removesuffix("constraints.txt")) in copies(target)
    installing = [i for i, (word, text) in enumerate(order) if word == "RUN" and "pip install" in text]
    assert copied < min(installing)
    other_sources = r"--(extra-)?index-url|--find-links|--pre\b|git\+"
    assert not [text for text in installs(target) if re.search(other_sources, text)]
    last = order[max(installing)][1]
    assert "pip check" in last and "pip freeze" in last
    for text in installs(target):
        assert "--only-binary :all:" in text or "--no-deps" in text, text


def test_the_check_at_the_end_of_a_build_finds_a_package_that_is_not_pinned(tmp_path: Path) -> None:
    (last,) = [run for run in arguments_of("RUN", "penstock") if "pip install --no-deps" in run]
    check = re.sub(r"pip freeze[^|]*", 'printf "%s\\\\n" $FROZEN ', last[last.index("! pip freeze") :])
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("ray==2.60.0\nFlask-WTF==1.3.0\n")
    for frozen, holds in (
        ("ray==2.60.0 flask-wtf==1.3.0", True),
        ("ray==2.60.1", False),
        ("ray==2.60.0 left-pad==1.0", False),
        ("ray==2.60.0.1", False),
    ):
        script = f"set -euo pipefail\n{check}"
        settings = {"FROZEN": frozen, "PIP_CONSTRAINT": str(constraints), "PATH": "/usr/bin:/bin"}
        ended = subprocess.run(["bash", "-c", script], env=settings, capture_output=True, text=True)
        assert (ended.returncode == 0) is holds, (frozen, ended)


def test_the_server_image_installs_the_server_extra_and_no_more() -> None:
    (text,) = installs("mlflow")
    assert sorted(re.findall(r'"([^"]+)"', text)) == sorted(project()["optional-dependencies"]["server"])
    needed = closure(project()["optional-dependencies"]["server"])
    assert "torch" not in needed and "ray" not in needed
    assert needed <= pins().keys()


def test_penstocks_dependencies_are_read_from_the_project(tmp_path: Path) -> None:
    """The command that the image runs, run here."""
    (run,) = [run for run in arguments_of("RUN", "penstock") if "tomllib" in run]
    command = run.split(" && ")[0].replace("/opt/penstock/pyproject.toml", str(ROOT / "pyproject.toml"))
    command = command.replace("/tmp/requirements.txt", str(tmp_path / "requirements.txt"))
    subprocess.run(["bash", "-euo", "pipefail", "-c", command.replace("python ", "python3 ", 1)], check=True)
    assert (tmp_path / "requirements.txt").read_text().splitlines() == project()["dependencies"]


# ---- built


def test_every_instruction_is_known_and_every_run_line_is_shell() -> None:
    assert {keyword for keyword, _ in instructions()} <= KNOWN
    assert ("SHELL", '["/bin/bash", "-euo", "pipefail", "-c"]') in stage("base"), "a failing part of a line fails it"
    for keyword, arguments in instructions():
        if keyword != "RUN":
            continue
        checked = subprocess.run(["bash", "-n", "-c", arguments], capture_output=True, text=True)
        assert checked.returncode == 0, f"{arguments}: {checked.stderr}"
        if shutil.which("shellcheck"):
            command = ["shellcheck", "--shell=bash", "-"]
            linted = subprocess.run(command, input=arguments, capture_output=True, text=True)
            assert linted.returncode == 0, f"{arguments}: {linted.stdout}"


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path out of the build: of the patterns that match it, or a folder above it, the
    last decides."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    parts, out = path.split("/"), False
    for pattern in [line.strip() for line in lines if line.strip() and not line.startswith("#")]:
        keeps, wanted = pattern.startswith("!"), pattern.removeprefix("!").split("/")
        if any(_matches(parts[:length], wanted) for length in range(1, len(parts) + 1)):
            out = not keeps
    return out


def _matches(parts: list[str], wanted: list[str]) -> bool:
    if not wanted or not parts:
        return not wanted and not parts
    if wanted[0] == "**":
        return any(_matches(parts[skipped:], wanted[1:]) for skipped in range(len(parts)))
    return fnmatch.fnmatchcase(parts[0], wanted[0]) and _matches(parts[1:], wanted[1:])


@pytest.mark.parametrize("target", ["penstock", "mlflow"])
def test_what_is_copied_is_there_and_not_ignored(target: str) -> None:
    for source, _ in copies(target):
        assert (ROOT / source).exists(), source
        assert not ignored(source), source
        files = [path for path in (ROOT / source).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        assert not [str(path) for path in files if ignored(str(path.relative_to(ROOT)))]


def test_nothing_else_reaches_the_build() -> None:
    at_the_top = (".git/config", ".venv/bin/python", "penstock-home/mlflow.db", "tests/conftest.py", ".env", "x.pem")
    below = ("cluster/mlflow/.env", "cluster/kuberay/base/raycluster.yaml", "sae_core/__pycache__/sae.pyc")
    assert [path for path in (*at_the_top, *below) if not ignored(path)] == []


def test_what_is_copied_is_what_the_wheel_is_made_of() -> None:
    copied = {source for source, _ in copies("penstock")}
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert {package.split("/")[0] for package in tool["packages"]} <= copied
    assert {"pyproject.toml", project()["readme"], "LICENSE"} <= copied


# ---- run


@pytest.mark.parametrize("target", ["penstock", "mlflow"])
def test_it_runs_as_nobodys_root_in_a_home_of_its_own(target: str) -> None:
    order = stage(target)
    user = max(i for i, (word, _) in enumerate(order) if word == "USER")
    assert order[user][1] == "1000:1000", "a number: Kubernetes cannot tell whether a name is root"
    assert not [text for word, text in order[user:] if word in ("RUN", "COPY")], "nothing is installed after it"
    (adding,) = [run for run in arguments_of("RUN", target) if "useradd" in run]
    assert "--uid 1000" in adding and "--gid 1000" in adding and "--create-home" in adding
    assert arguments_of("WORKDIR", target) == ["/home/penstock"]


def test_kuberay_finds_what_it_calls() -> None:
    """bash and ray on the path, wget for older operators' probes, a writable /tmp/ray, and its own command run as it
    stands."""
    assert not [word for word, _ in instructions() if word == "ENTRYPOINT"]
    (packages,) = [run for run in arguments_of("RUN", "penstock") if "apt-get install" in run]
    assert "wget" in packages.split() and "rm -rf /var/lib/apt/lists/*" in packages
    assert "ray" in closure(project()["dependencies"])
    (adding,) = [run for run in arguments_of("RUN", "penstock") if "useradd" in run]
    assert re.search(r"install --directory --owner=1000 --group=1000 .*/tmp/ray", adding)
    assert environment("penstock")["RAY_AUTH_MODE"] == "token"
    assert arguments_of("CMD", "penstock")[-1].startswith('["penstock"') and "penstock" in project()["scripts"]


def test_no_secret_is_built_in() -> None:
    for keyword, arguments in instructions():
        if keyword in ("ARG", "ENV"):
            assert not re.search(r"TOKEN=|PASSWORD=|SECRET|ACCESS_KEY", arguments), arguments


def test_both_images_have_the_projects_version() -> None:
    for target, title in (("penstock", "penstock"), ("mlflow", "penstock-mlflow")):
        (label,) = arguments_of("LABEL", target)
        assert f'title="{title}"' in label and f'version="{project()["version"]}"' in label
    default = [arguments for keyword, arguments in instructions() if keyword == "FROM"][-1]
    assert default == "base AS penstock", "what `docker build` makes without --target"
