"""The embedded default: a small language model and the corpus that it was trained on.

The model (a GPT-2 of 6 layers, d_model 128) lies beside this file in Hugging Face format; it was made by
`jobs/build_demo_model.py`. Its corpus is the source of the Python standard library of the running interpreter,
so a first run needs no network.
"""

import sysconfig
from collections.abc import Iterator
from pathlib import Path

MODEL_FOLDER = Path(__file__).parent

# Mapping tables and parser fixtures: thousands of near-identical lines that are neither prose nor code.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "encodings", "cjkencodings", "data"}


def documents() -> Iterator[str]:
    """The source files of the running interpreter's standard library, each one once, ordered by path."""
    root = Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    for path in sorted(root.rglob("*.py")):
        if _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):  # tests of the parser are broken on purpose
            continue
        if text.strip() and text not in seen:
            seen.add(text)
            yield text
