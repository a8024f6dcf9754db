"""One HTML file out of a template, style sheets, scripts and data: it needs nothing else, and can fetch nothing.

The content security policy names the style sheet and the script by their hashes, so that nothing else runs, whatever
the data says. The data is JSON in a block that no browser executes, with every character escaped that could end it.
"""

import base64
import contextlib
import hashlib
import html
import importlib.resources
import json
import os
import string
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.errors import SweepError


@dataclass(frozen=True)
class Parts:
    """Which files of `templates/` make a kind of page."""

    template: str
    styles: Sequence[str]
    scripts: Sequence[str]


REPORT = Parts(
    "report.html",
    ("base.css", "report.css"),
    ("elements.js", "base.js", "plot.js", "detail.js", "table.js", "report.js"),
)
_ESCAPES = {character: f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}


def write_page(path: Path, title: str, in_short: Sequence[str], data: Mapping[str, Any]) -> Path:
    """Write a report, whole or not at all, and return its path. `in_short` is what it says without its script.

    Raises `SweepError` when the file cannot be written.
    """
    return write_whole(path, page_text(title, in_short, data))


def write_whole(path: Path, text: str) -> Path:
    """Write a file, whole or not at all, and return its path. Raises `SweepError` when it cannot be written."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise SweepError(f"{str(path)!r} cannot be written: {error}") from None
    return path


def page_text(title: str, in_short: Sequence[str], data: Mapping[str, Any], parts: Parts = REPORT, **more: str) -> str:
    """The page as text. `more` fills further places of the template, as they are: it has to be safe there."""
    style = "".join(map(_template, parts.styles))
    script = '"use strict";\n(() => {\n' + "\n".join(map(_template, parts.scripts)) + "})();\n"
    return string.Template(_template(parts.template)).substitute(
        more,
        title=html.escape(title),
        style_hash=_hash(style),
        script_hash=_hash(script),
        style=style,
        script=script,
        in_short="".join(f"<p>{html.escape(sentence)}</p>" for sentence in in_short),
        data=json_in_html(data),
    )


def json_in_html(data: Any) -> str:
    """JSON that is the same inside a script element: nothing in it ends the element or opens a comment."""
    text = json.dumps(data, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return text.translate(str.maketrans(_ESCAPES)).encode("utf-8", "replace").decode("utf-8")


def _template(name: str) -> str:
    return importlib.resources.files(__package__).joinpath(f"templates/{name}").read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """A source hash of Content Security Policy Level 3, section 2.3.1, of an element's text."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode()}"
