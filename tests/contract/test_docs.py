"""What the pages say can be typed, and what they point to is there."""

import re
from pathlib import Path

import pytest

from penstock.cli import main

ROOT = Path(__file__).parents[2]
PAGES = [
    "README.md", "CONTRIBUTING.md", "cluster/README.md", "cluster/SECURITY.md", "cluster/kuberay/README.md",
    "cluster/slurm/README.md", "cluster/mlflow/README.md", "platform/STREAM.md", "platform/SCALE.md",
    "dashboards/grafana/README.md",
]  # fmt: skip
README = (ROOT / "README.md").read_text().splitlines()
LISTED = [line.split("#")[0] for line in README if line.startswith("    penstock ")]


def help_of(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    shown = capsys.readouterr()
    assert ended.value.code == 0, shown.err
    return shown.out


def words_of(line):
    """The command of a line, and its action: the words before its first argument."""
    return re.match(r"    penstock((?: +[a-z]+)+)", line)[1].split()


@pytest.mark.parametrize("line", LISTED)
def test_every_command_of_the_list_has_the_options_that_it_is_shown_with(line, capsys):
    shown = help_of(words_of(line), capsys)
    for option in re.findall(r"--[a-z0-9-]+", line):
        assert re.search(rf"{option}\b", shown), f"{option}: {shown}"


def test_the_list_has_every_command(capsys):
    commands = re.findall(r"^    ([a-z]+)\b", help_of([], capsys), flags=re.MULTILINE)
    assert len(commands) > 5 and {words_of(line)[0] for line in LISTED} == set(commands)


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_somewhere(page):
    text = (ROOT / page).read_text()
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    for target in targets:
        assert ((ROOT / page).parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_source_files_that_a_page_names_are_there(page):
    files = {path.name for folder in ("sae_core", "platform", "dashboards", "jobs", "cluster", "tests")
             for path in (ROOT / folder).rglob("*.py")}  # fmt: skip
    for name in re.findall(r"[\w./]+\.py\b", (ROOT / page).read_text()):
        assert (ROOT / name).exists() if name.startswith(("jobs/", "tests/")) else Path(name).name in files, name
