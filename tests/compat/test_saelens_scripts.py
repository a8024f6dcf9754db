"""The scripts in jobs/examples are ones that SAELens' users have: with SAELens' import line they print the same."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import hub_cache
import pytest

from penstock import demo

pytestmark = pytest.mark.compat
EXAMPLES = Path(__file__).parents[2] / "jobs" / "examples"
RUN_ALL = """\
import runpy, sys
for script in sys.argv[3:]:
    sys.argv[:] = [script, *FOLDER_AND_MODEL]
    print("##", script)
    try:
        runpy.run_path(script, run_name="__main__")
    except AssertionError as error:
        print("AssertionError:", error)
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """A cache of the hub in which `gpt2`, a name that both libraries know, is the demo model."""
    cache = tmp_path_factory.mktemp("hub")
    config = json.loads((demo.MODEL_FOLDER / "config.json").read_text())
    # SAELens' model reads what the gpt2 of the hub has and newer versions of transformers no longer write.
    files = {"config.json": json.dumps({**config, "n_ctx": config["n_positions"]}).encode()}
    for name in ("generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        files[name] = (demo.MODEL_FOLDER / name).read_bytes()
    for repo in ("gpt2", "openai-community/gpt2"):
        hub_cache.add_repository(cache, repo, files)
    return cache


def run_scripts(folder: Path, cache: Path, sae: Path, library: str) -> dict[str, str]:
    """What each of the scripts prints, by its name."""
    scripts = []
    for path in sorted(EXAMPLES.glob("[1-4]_*.py")):
        text = path.read_text()
        assert text.count("from penstock.compat import") == 1
        scripts.append(folder / path.name)
        scripts[-1].write_text(text.replace("from penstock.compat import", f"from {library} import"))
    code = RUN_ALL.replace("FOLDER_AND_MODEL", repr([str(sae), "gpt2"])).replace("sys.argv[3:]", "sys.argv[1:]")
    environment = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, *map(str, scripts)], env=environment, cwd=folder, text=True,
                          capture_output=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    parts = re.split(r"^## (.*)$", done.stdout, flags=re.M)[1:]
    return {Path(name).name: text for name, text in zip(parts[::2], parts[1::2], strict=True)}


NUMBER = re.compile(r"-?\d+\.\d+")


def test_with_saelens_import_line_the_scripts_print_the_same(demo_saes, cache, tmp_path):
    sae = demo_saes["blocks.4.hook_resid_post"]
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
    ours = run_scripts(tmp_path / "ours", cache, sae, "penstock.compat")
    theirs = run_scripts(tmp_path / "theirs", cache, sae, "sae_lens")
    steered = ours.pop("3_steer.py"), theirs.pop("3_steer.py")
    assert ours.keys() == theirs.keys() and len(ours) == 3
    for name, text in ours.items():
        lines = [line for line in theirs[name].splitlines() if not line.startswith("Loaded pretrained model")]
        assert [NUMBER.sub("0", line) for line in text.splitlines()] == [NUMBER.sub("0", line) for line in lines], name
        mine = [float(number) for number in NUMBER.findall(text)]
        their = [float(number) for line in lines for number in NUMBER.findall(line)]
        assert mine == pytest.approx(their, abs=0.011), name  # as printed: the last digit may round the other way

    # The one that they cannot: hooks handed to `generate`.
    assert "was called 20 times" in steered[0] and "AssertionError" not in steered[0]
    assert "was called 0 times" in steered[1] and "was not steered" in steered[1]
