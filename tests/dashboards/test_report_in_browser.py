"""The report in a real browser: Chromium, driven over its DevTools pipe (JSON messages, each ended by a zero byte)."""

import fcntl
import json
import math
import os
import select
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from penstock.pareto import mark_front
from penstock_dashboards.pareto import write_html

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH to open the report in")

_SWITCHES = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--disable-extensions",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-breakpad",
    "--disable-default-apps", "--no-first-run", "--no-default-browser-check", "--no-proxy-server",
    "--window-size=1400,1000", "--remote-debugging-pipe",
)  # fmt: skip
_ANSWER_SECONDS, _END_SECONDS = 20.0, 5.0
_SPEC = """
model: {name: tiny, dtype: float32, processing: none}
data: {dataset: letters, context_size: 64, bos: true, exclude: {special_tokens: true, first_positions: 1}}
train: {tokens: 500000, batch_tokens: 512}
"""


class Browser:
    """One page of a Chromium of our own, and what it logged and asked for."""

    def __init__(self, profile: Path, log: Path) -> None:
        to_browser, from_browser = os.pipe(), os.pipe()
        # Above 10, so that putting the browser's ends at 3 and 4 writes over neither.
        reads, writes = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (to_browser[0], from_browser[1]))
        self._to, self._from = to_browser[1], from_browser[0]
        actions = [
            (os.POSIX_SPAWN_OPEN, 1, os.fspath(log), os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2), (os.POSIX_SPAWN_DUP2, reads, 3), (os.POSIX_SPAWN_DUP2, writes, 4),
        ]  # fmt: skip
        command = [CHROMIUM, *_SWITCHES, f"--user-data-dir={profile}", "about:blank"]
        self._pid = os.posix_spawn(CHROMIUM, command, os.environ, file_actions=actions, setpgroup=0)
        for end in (to_browser[0], from_browser[1], reads, writes):
            os.close(end)
        self._buffer, self._sent, self._session = b"", 0, ""
        self.events: list[dict[str, Any]] = []

    def open(self, address: str) -> None:
        """Load a page into a new tab, from here on the one that is asked, and wait until it has loaded."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.events.clear()
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Page.navigate", url=address)
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._receive()

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": params}
        session = {"sessionId": self._session} if self._session else {}
        os.write(self._to, json.dumps(message | session).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._sent:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def ask(self, expression: str) -> Any:
        """What a JavaScript expression is worth in the page, a promise awaited."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, expression: str) -> Any:
        """The first true value that an expression takes, looked at every few milliseconds."""
        look = f"const value = {expression}; value ? done(value) : setTimeout(look, 10)"
        return self.ask(f"new Promise(done => {{ const look = () => {{ {look}; }}; look(); }})")

    def mouse(self, kind: str, at: dict[str, float]) -> None:
        button = {"button": "left", "clickCount": 1} if kind != "mouseMoved" else {}
        self.call("Input.dispatchMouseEvent", type=kind, x=at["x"], y=at["y"], **button)

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + _ANSWER_SECONDS
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._from], [], [], max(deadline - time.monotonic(), 0))
            part = os.read(self._from, 1 << 16) if ready else b""
            assert part, "the browser ended" if ready else f"no answer from the browser for {_ANSWER_SECONDS:g} s"
            self._buffer += part
        text, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(text)
        if "method" in message:
            self.events.append(message)
        return message

    def close(self) -> None:
        """End the browser and everything it started, and wait for its end."""
        os.close(self._to)  # which it takes as the order to quit
        deadline = time.monotonic() + _END_SECONDS
        ended = 0
        while not ended and time.monotonic() < deadline:
            ended, _ = os.waitpid(self._pid, os.WNOHANG)
            time.sleep(0.02)
        try:
            os.killpg(self._pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        if not ended:
            os.waitpid(self._pid, 0)
        os.close(self._from)


def sae(sae_id: str, hook_point: str, architecture: str, l0: float, recovered: float, **more: Any) -> dict[str, Any]:
    return {"sae_id": sae_id, "hook_point": hook_point, "architecture": architecture, "d_sae": 64, **more,
            "l0": l0, "ce_recovered": recovered, "kl_recovered": recovered, "explained_variance": 0.5,
            "dead_fraction": 0.1, "ce_ablated": 9.0, "ce_clean": 3.0, "n_tokens": 1000.0,
            "status": "finished"}  # fmt: skip


def table() -> pd.DataFrame:
    return mark_front(pd.DataFrame([
        sae("late-topk", "blocks.10", "topk", 8, 0.9, k=8),
        sae("late-gated", "blocks.10", "gated", 9, 0.8, l1_coefficient=0.5),
        sae("early-topk", "blocks.2", "topk", 16, 0.95, k=16),
        sae("early-dense", "blocks.2", "topk", 32, 0.99, k=32),
        {**sae("lost", "blocks.2", "topk", math.nan, math.nan, k=4), "status": "diverged"},
    ]))  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    """A browser with the report open, at an address that asks for an order and an SAE."""
    folder = tmp_path_factory.mktemp("browser")
    baselines = pd.DataFrame([
        {"kind": kind, "hook_point": hook_point, "k": k, "l0": float(k), "ce_recovered": k / 64}
        for kind in ("neurons", "pca", "frozen_decoder") for hook_point in ("blocks.2", "blocks.10") for k in (8, 32)
    ])  # fmt: skip
    written = write_html(table(), baselines, folder / "r.html", title="demo", l0_band=(5.0, 20.0), spec=_SPEC)
    opened = Browser(folder / "profile", folder / "log")
    try:
        opened.open(f"{written.as_uri()}#sort=-l0&sae=early-topk")
        yield opened
    finally:
        opened.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Browser]:
    """The report as it was opened; by the end of a test nothing may have gone wrong in it."""
    yield browser
    assert _complaints(browser.events) == []
    browser.call("Emulation.clearDeviceMetricsOverride")
    browser.call("Emulation.setEmulatedMedia", features=[])
    browser.ask("document.getElementById('show-all').click(); pick(''); location.hash = '#sort=-l0&sae=early-topk'")
    browser.ask("new Promise(done => setTimeout(done, 0))")


def _complaints(events: list[dict[str, Any]]) -> list[Any]:
    """Script errors, warnings, and requests for anything but the file itself."""
    found: list[Any] = []
    for event in events:
        params = event.get("params", {})
        if event["method"] == "Runtime.exceptionThrown":
            found.append(params["exceptionDetails"])
        elif event["method"] == "Log.entryAdded" and params["entry"]["level"] in ("warning", "error"):
            found.append(params["entry"])
        elif event["method"] == "Runtime.consoleAPICalled" and params["type"] in ("warning", "error", "assert"):
            found.append(params["args"])
        elif event["method"] == "Network.requestWillBeSent":
            found.append(params["request"]["url"])
    return [item for item in found if not str(item).startswith(("file:", "data:", "blob:"))]


_SHOWN = "[...document.querySelectorAll('#saes tbody tr')].filter(row => row.offsetHeight).map(row => row.dataset.sae)"
_POINT = """(() => {
  const plot = document.querySelectorAll('.plot')[%d], trace = plot._fullData.findIndex(t => t.name === 'topk');
  const points = plot.querySelectorAll('.scatterlayer .trace')[trace].querySelectorAll('.point');
  plot.scrollIntoView({block: 'center'});
  const box = points[0].getBoundingClientRect();
  return {x: box.x + box.width / 2, y: box.y + box.height / 2};
})()"""


def test_every_panel_is_drawn_with_its_points_its_front_and_its_baselines(page):
    titles = page.ask("[...document.querySelectorAll('.panel h3')].map(title => title.textContent)")
    assert titles == ["blocks.2", "blocks.10"]
    points = page.ask("[...document.querySelectorAll('.plot')].map(p => p.querySelectorAll('path.point').length)")
    assert points == [2 + 6 + 1, 2 + 6]  # SAEs that have figures, baselines, the ring
    lines = page.ask("[...document.querySelectorAll('.plot')].map(p => p.querySelectorAll('path.js-line').length)")
    assert lines == [1 + 3, 1 + 3]
    assert page.ask("panels.map(({data, layout}) => Plotly.validate(themed(data), themed(layout)) ?? [])") == [[], []]


def test_the_table_has_a_row_an_sae_and_sorts_by_a_click_on_its_head(page):
    assert sorted(page.ask(_SHOWN)) == sorted(table()["sae_id"])
    click = "document.querySelector('th[data-column={}] button').click()"
    page.ask(click.format("ce_recovered"))
    assert page.ask(_SHOWN) == ["late-gated", "late-topk", "early-topk", "early-dense", "lost"]
    page.ask(click.format("ce_recovered"))  # what has no value stays last
    assert page.ask(_SHOWN) == ["early-dense", "early-topk", "late-topk", "late-gated", "lost"]
    assert page.ask("document.querySelector('th[aria-sort]').ariaSort") == "descending"
    page.ask(click.format("hook_point"))
    assert page.ask(_SHOWN)[-2:] == ["late-topk", "late-gated"]  # blocks.10 comes after blocks.2


def test_a_filter_hides_rows_and_fades_points(page):
    page.ask("document.querySelector('input[value=topk]').click()")
    assert page.ask(_SHOWN) == ["late-gated"]
    assert page.ask("document.getElementById('count').textContent") == "1 of 5 SAEs"
    faded = (
        "[...document.querySelectorAll('.plot')]"
        ".map(plot => plot._fullData.filter(trace => trace.selectedpoints?.length === 0).length)"
    )
    assert page.ask(faded) == [1, 1]
    page.ask("document.getElementById('show-all').click()")
    assert len(page.ask(_SHOWN)) == 5 and page.ask(faded) == [0, 0]
    fill = (
        "Object.assign(document.getElementById('{}'), {{value: '{}'}})"
        ".dispatchEvent(new Event('input', {{bubbles: true}}))"
    )
    page.ask(fill.format("l0-low", "9"))
    assert page.ask(_SHOWN) == ["early-dense", "early-topk", "late-gated"]
    page.ask(fill.format("search", "k=16"))
    assert page.ask(_SHOWN) == ["early-topk"]


def test_hovering_over_a_point_shows_its_settings_and_figures_and_a_click_how_to_fetch_it(page):
    at = page.ask(_POINT % 1)
    page.mouse("mouseMoved", {"x": at["x"] - 3, "y": at["y"]})
    page.mouse("mouseMoved", at)
    tip = page.until("!document.getElementById('tip').hidden && document.getElementById('tip').innerText")
    for text in ("late-topk", "blocks.10", "on the front", "CE recovered\n0.9000", "k\n8", "ce_ablated\n9"):
        assert text in tip
    for kind in ("mousePressed", "mouseReleased"):
        page.mouse(kind, at)
    command = "penstock pull demo --sae late-topk --to sae-late-topk"
    assert page.until("document.querySelector('tr.picked')?.dataset.sae === 'late-topk'")
    assert page.ask("document.querySelector('#drawer .command pre').innerText") == command
    assert "sae=late-topk" in page.ask("location.hash")
    page.ask("document.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape'}))")
    assert page.ask("document.getElementById('drawer').hidden") is True


def test_the_address_says_what_is_sorted_and_picked(page):
    assert page.ask(_SHOWN)[0] == "early-dense"
    assert page.ask("document.querySelector('#drawer .mark-head').innerText").startswith("topk")
    assert page.ask("document.querySelector('tr.picked').dataset.sae") == "early-topk"


def test_the_copy_button_copies_the_command(page):
    page.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    page.ask("document.querySelector('#drawer .command button').click()")
    assert page.until("document.querySelector('#drawer .command button').textContent === 'copied'")


@pytest.mark.parametrize("width", [360, 768, 1400])
def test_nothing_sticks_out_at_any_width(page, width):
    page.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
    page.ask("pick('late-topk')")
    assert page.ask("document.documentElement.scrollWidth") <= width
    edges = "[...document.querySelectorAll('.plot')].map(plot => plot.getBoundingClientRect().right)"
    assert max(page.ask(edges)) <= width


def test_the_dark_scheme_reaches_the_page_and_the_plot(page):
    seen = (
        "(([body, line]) => body + line)([getComputedStyle(document.body).backgroundColor,"
        " document.querySelector('.plot')._fullData.find(trace => trace.name === 'front').line.color])"
    )
    assert page.ask(seen) == "rgb(255, 255, 255)#1f2430"
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert page.until(f"{seen} === 'rgb(18, 21, 27)#e8ebf1'")


def test_the_protocol_says_what_the_figures_were_measured_on(page):
    facts = page.ask("document.querySelector('dl.facts').innerText")
    for text in ("1,000 tokens", "letters", "64 tokens; each begins with BOS", "special tokens, the first position"):
        assert text in facts
