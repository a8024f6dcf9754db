"""Pages in a real browser, and what goes wrong in them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def watched_page(chromium: Any, address: str, allowed: tuple[str, ...], **options: Any) -> Iterator[Any]:
    """A page; by the end nothing may have gone wrong in it, and nothing may have been asked for but what begins as
    `allowed` says."""
    context = chromium.new_context(**{"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce"} | options)
    complaints: list[str] = []
    page = context.new_page()
    page.set_default_timeout(10_000)
    page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda asked: None if asked.url.startswith(allowed) else complaints.append(asked.url))
    page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
    page.add_init_script("window.hacked = () => console.error('hacked')")
    try:
        page.goto(address)
        yield page
        assert complaints == []
    finally:
        context.close()
