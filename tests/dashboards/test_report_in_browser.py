"""The report in a real browser: the Chromium of the machine, driven by Playwright, which downloads none of its own."""

import json
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from browsing import watched_page
from penstock.pareto import mark_front
from penstock_dashboards.details import CURVES, details
from penstock_dashboards.report import Source, write_report
from sample_sweep import BAND, CHROMIUM, HOOK_POINTS, sample_sweep, source, take_screenshots

pytest.importorskip("playwright.sync_api", reason="no Playwright to drive a browser with")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH to open the report in")

NO_BASELINES = pd.DataFrame(columns=["kind", "hook_point", "k", "l0", "ce_recovered"])
SAMPLE = sample_sweep()
EVALUATED = int(SAMPLE.table["l0"].notna().sum())
NASTY = "</script><img src=x onerror=hacked()><!--\u2028'\"`${hacked()}&amp;"
LONG = "layer_" + "x" * 500


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    return write_report(SAMPLE.table, SAMPLE.baselines, path, source(SAMPLE))


def opened(chromium: Any, path: Path, *, hash: str = "", **options: Any) -> AbstractContextManager[Any]:
    return watched_page(chromium, path.as_uri() + hash, ("file:", "data:"), **options)


@pytest.fixture
def page(chromium, written) -> Iterator[Any]:
    with opened(chromium, written) as found:
        yield found


def rows(page: Any) -> list[str]:
    return page.evaluate("[...document.querySelectorAll('#saes tbody tr')].map(row => row.dataset.key)")


def points(page: Any) -> list[str]:
    return page.evaluate("[...document.querySelectorAll('.panel:not([hidden]) .point')].map(one => one.dataset.key)")


def called(page: Any) -> list[str]:
    return page.locator("#saes tbody th").all_inner_texts()


def key_of(architecture: str, **settings: Any) -> str:
    found = SAMPLE.table.query("architecture == @architecture and hook_point == @HOOK_POINTS[0]")
    for name, value in settings.items():
        found = found[found[name] == value]
    return str(found["sae_id"].iloc[0])


# ---- the answer and the plots ---------------------------------------------------------------------------------------


def test_the_answer_stands_first_with_its_command(page):
    cards = page.locator("#answers article")
    assert cards.locator(".where").all_inner_texts() == list(HOOK_POINTS)
    for card in cards.all():
        text = card.inner_text()
        assert "SAEs with L0 8 to 64" in text and "penstock pull 63e4b5064e54 --sae " in text and "Knee instead" in text
    assert page.evaluate("document.querySelector('#answers').getBoundingClientRect().top") < 200


def test_every_panel_is_drawn_with_points_intervals_front_knee_band_and_baselines(page):
    assert page.locator(".panel h3").all_inner_texts() == list(HOOK_POINTS)
    assert len(points(page)) == EVALUATED
    assert page.locator(".plot .error").count() == EVALUATED
    counts = {".front": 2, ".band": 2, ".ring:not(.knee)": 2, ".ring.knee": 2, ".baseline": 6, ".seeds": 4}
    for kind, count in counts.items():
        assert page.locator(f".plot {kind}").count() == count, kind
    inside = """[...document.querySelectorAll('.plot .point')].every(point => {
      const a = point.closest('.plot').getBoundingClientRect(), b = point.getBoundingClientRect();
      return b.left >= a.left && b.right <= a.right && b.top >= a.top && b.bottom <= a.bottom; })"""
    assert page.evaluate(inside)


def test_every_y_axis_draws_up_as_better(page):
    best, worst = key_of("batch_topk", k=64), key_of("standard", l1_coefficient=4)
    height = "key => document.querySelector(`.point[data-key='${key}']`).getBoundingClientRect().top"
    fronts = {"lost": 2, "ce_recovered": 2, "ce_increase": 2, "explained_variance": 0, "kl_recovered": 0}
    for axis, count in fronts.items():
        page.locator("#y").select_option(axis)
        assert page.evaluate(height, best) + 60 < page.evaluate(height, worst)
        assert page.locator(".plot .front").count() == count


def test_pointing_at_an_sae_shows_its_figures_and_a_click_opens_it(page):
    key = key_of("jumprelu", target_l0=45)
    point = page.locator(f".point[data-key='{key}']")
    point.scroll_into_view_if_needed()
    point.hover(force=True)
    tip = page.locator("#tip").inner_text()
    for text in ("jumprelu target_l0=45", "CE recovered", "CE increase, nats", "Dead", "Explained variance", "["):
        assert text in tip
    point.click(force=True)
    assert page.locator("#detail-title").inner_text().strip() == "jumprelu target_l0=45"
    assert "Proposed by search in round 1" in page.locator("#detail").inner_text()


def test_pointing_at_a_baseline_says_what_it_is(page):
    page.locator(".baseline-point").nth(1).scroll_into_view_if_needed()
    page.locator(".baseline-point").nth(1).hover(force=True)
    assert "A baseline: what an SAE has to beat." in page.locator("#tip").inner_text()


# ---- filters, the table, the address --------------------------------------------------------------------------------


def test_filters_apply_to_plots_and_table_alike_and_stay_in_the_address(chromium, written, page):
    everything = rows(page)
    page.locator("input[value=topk]").uncheck(force=True)
    assert len(rows(page)) == len(everything) - 16 and not any(name.startswith("topk") for name in called(page))
    page.locator("#hook").select_option(HOOK_POINTS[1])
    page.locator("#band").click()
    left = rows(page)
    wanted = SAMPLE.table.query("architecture != 'topk' and hook_point == @HOOK_POINTS[1]")
    wanted = wanted[wanted["l0"].between(*BAND)]
    assert len(left) == len(wanted) and sorted(points(page)) == sorted(left)
    assert page.locator(".panel:visible").count() == 1
    assert page.locator("#count").inner_text().startswith(f"{len(left)} of {len(everything)} shown")
    page.locator("thead button", has_text="L0").click()
    with opened(chromium, written, hash=page.evaluate("location.hash")) as again:
        assert rows(again) == rows(page) and points(again) == points(page)
        again.locator("#show-all").click()
        assert len(rows(again)) == len(everything)
    page.locator("#show-all").click()
    page.locator("input[value=finished]").uncheck(force=True)
    assert len(rows(page)) == 4 and points(page) == []
    page.locator("#show-all").click()
    page.locator("#search").fill("k=32 seed=1")
    assert sorted(called(page)) == ["topk k=32 seed=1"] * 2
    page.locator("#search").fill("no such thing")
    assert "No SAE passes the filters." in page.locator("#saes").inner_text()


def test_the_table_sorts_by_every_column(page):
    names = page.evaluate("[...document.querySelectorAll('thead button[data-column]')].map(one => one.dataset.column)")
    assert {"called", "hook_point", "l0", "ce_recovered", "ce_increase", "dead_fraction", "front"} <= set(names)
    page.locator("#all-columns").check()
    wide = page.evaluate("[...document.querySelectorAll('thead button[data-column]')].map(one => one.dataset.column)")
    assert len(wide) > len(names) and {"mse", "lr", "d_sae"} <= set(wide)
    for name in wide:
        button = page.locator(f"#saes thead button[data-column='{name}']")
        button.click()
        assert button.evaluate("one => one.parentElement.ariaSort") in ("ascending", "descending")
        assert page.locator("#saes th[aria-sort=ascending], #saes th[aria-sort=descending]").count() == 1
        assert button.evaluate("one => one === document.activeElement")
    button = page.locator("#saes thead button[data-column=ce_recovered]")
    recovered = SAMPLE.table.set_index("sae_id")["ce_recovered"].dropna()
    button.click()
    found = [key for key in rows(page) if key in recovered.index and "[" not in key]
    whole = SAMPLE.table[SAMPLE.table["prefix"].isna() & SAMPLE.table["l0"].notna()]
    assert found[: len(whole)] == list(whole.sort_values("ce_recovered", ascending=False)["sae_id"])
    button.click()
    assert rows(page)[-1] not in recovered.index  # what has no figure stays last


def test_the_view_over_hook_points_is_in_nats(page):
    between = page.locator("#between").inner_text()
    assert "CE increase (nats)" in between and all(name in between for name in HOOK_POINTS)
    page.locator("#between summary").click()
    overall = int(SAMPLE.table["on_overall_front"].sum())
    assert page.locator("#between details tbody tr").count() == overall > 1


# ---- one SAE --------------------------------------------------------------------------------------------------------


def test_an_sae_opened_has_curves_firing_rates_figures_settings_and_commands(page):
    key = key_of("topk", k=32, seed=1)
    page.locator(f"tr[data-key='{key}'] button").click()
    detail = page.locator("#detail")
    assert detail.locator(".curve").count() == 4 and detail.locator(".other").count() == 4
    assert detail.locator(".small rect.never").count() == 1
    text = detail.inner_text()
    for part in ("Why not this one", "dominated by", "95% interval", "How often its latents fire", "lr\n0.0004",
                 f"penstock pull 63e4b5064e54 --sae {key}", f'SAE.load("sae-{key}")'):  # fmt: skip
        assert part in text, part
    detail.get_by_role("button", name="Open it").click()
    assert page.locator("#detail-title").inner_text() != "topk k=32 seed=1"
    page.locator("#close").click()
    assert not detail.is_visible()
    prefix = page.locator("#saes tbody button", has_text="matryoshka[1024]").first
    prefix.click()
    assert "of the whole SAE" in detail.inner_text() and "--sae '" in detail.inner_text()


def test_what_was_pruned_or_diverged_says_why_and_has_no_command(page):
    reasons = {"standard l1_coefficient=8": "at 12.5M tokens", "gated l1_coefficient=16": "the loss was nan"}
    for name, why in reasons.items():
        page.locator("#saes tbody button", has_text=name).first.click()
        text = page.locator("#detail").inner_text()
        assert why in text and "penstock pull" not in text and page.locator("#detail .curve").count() == 4
        page.keyboard.press("Escape")


def test_copying_puts_the_command_on_the_clipboard(chromium, written):
    with opened(chromium, written, permissions=["clipboard-read", "clipboard-write"]) as page:
        card = page.locator("#answers article").first
        card.locator(".copy-button").click()
        card.get_by_text("Copied").wait_for()
        assert page.evaluate("navigator.clipboard.readText()") == card.locator("pre").inner_text()


# ---- the keyboard alone ---------------------------------------------------------------------------------------------


def test_the_keyboard_alone_reaches_everything_and_is_never_trapped(page):
    seen = []
    for _ in range(300):
        page.keyboard.press("Tab")
        what = page.evaluate("""(() => { const at = document.activeElement, style = getComputedStyle(at);
          const name = at.id || at.dataset.column || at.dataset.key || at.value || at.textContent.slice(0, 30);
          return [at === document.body ? 'body' : name, at.matches('.point'),
                  at.matches('.point, .chip input') || style.outlineStyle !== 'none']; })()""")
        if seen and what[0] == seen[0][0]:
            break
        seen.append(what)
    else:
        pytest.fail("Tab never came round")
    names = [name for name, _, _ in seen]
    assert {"skip", "theme", "hook", "topk", "l0-low", "search", "y", "saes", "ce_recovered"} <= set(names)
    assert sum(is_point for _, is_point, _ in seen) == 2  # one stop a plot
    assert [name for name, _, visible in seen if not visible and name != "body"] == []


def test_points_are_walked_by_arrows_opened_by_enter_and_closed_by_escape(page):
    page.locator("#y").focus()
    page.keyboard.press("Tab")
    first = page.evaluate("document.activeElement.dataset.key")
    assert page.locator("#tip").is_visible()  # focus shows what pointing does
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    there = page.evaluate("document.activeElement.dataset.key")
    label = page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert there != first and "CE recovered" in label and label.split(",")[0] in page.locator("#tip").inner_text()
    page.keyboard.press("End")
    page.keyboard.press("Home")
    assert page.evaluate("document.activeElement.dataset.key") == first
    page.keyboard.press("Enter")
    assert page.locator("#detail").is_visible() and f"sae={first}" in page.evaluate("location.hash")
    for _ in range(30):  # a dialog keeps the focus while it is open
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.matches('body, #detail *, #detail')")
    page.keyboard.press("Escape")
    assert not page.locator("#detail").is_visible() and "sae=" not in page.evaluate("location.hash")
    assert page.evaluate("document.activeElement.dataset.key") == first
    page.keyboard.press("Escape")
    assert not page.locator("#tip").is_visible()
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.classList.contains('point')") is False


def test_everything_that_can_be_used_has_a_name(page):
    page.locator("#saes tbody button").first.click()
    nameless = page.evaluate("""
      [...document.querySelectorAll('button, select, input, summary, dialog, [role=button], [role=img], [role=group]')]
      .filter(one => !(one.textContent.trim() || one.ariaLabel || one.labels?.length || one.ariaLabelledByElements))
      .map(one => one.outerHTML.slice(0, 80))""")
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(one => one.id)")
    assert nameless == [] and len(ids) == len(set(ids))


# ---- widths, colours, print -----------------------------------------------------------------------------------------


_FITS = "(one => one.scrollWidth <= one.clientWidth)(document.getElementById('detail'))"


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_nothing_sticks_out_at_any_width(chromium, written, width):
    with opened(chromium, written, viewport={"width": width, "height": 844}) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        rights = "[...document.querySelectorAll('.plot, .card')].map(one => one.getBoundingClientRect().right)"
        assert max(page.evaluate(rights)) <= width
        page.locator("#saes tbody button").first.click()
        assert page.evaluate(_FITS)


_CONTRASTS = """(() => {  // WCAG 2.2, 1.4.3 and 1.4.11
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = colour => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const light = colour => colour.slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ratio = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);
  const ground = one => { for (; one; one = one.parentElement) {
    const colour = rgba(getComputedStyle(one).backgroundColor); if (colour[3] === 255) return colour; } };
  const band = rgba(getComputedStyle(document.querySelector('.plot .band')).fill);
  const under = one => one.closest('.plot') ? [ground(one), band] : [ground(one)];
  const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const one = walker.currentNode.parentElement, style = getComputedStyle(one), said = walker.currentNode.data.trim();
    if (!said || !one.getClientRects().length || one.closest('script, style, noscript, .unseen, .skip')) continue;
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    const colour = rgba(one instanceof SVGElement ? style.fill : style.color);
    for (const other of under(one))
      if (ratio(colour, other) < (large ? 3 : 4.5)) found.push([said.slice(0, 30), ratio(colour, other)]);
  }
  for (const mark of document.querySelectorAll('.plot .point path, .plot .front, .plot .baseline, .chip .glyph path'))
    for (const other of under(mark))
      if (ratio(rgba(getComputedStyle(mark).stroke), other) < 3) found.push([mark.outerHTML, other]);
  return found;
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_marks_stand_out_from_what_they_stand_on(chromium, written, scheme):
    with opened(chromium, written, color_scheme=scheme) as page:
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 23, 29)")
        assert page.evaluate(_CONTRASTS) == []
        page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
        page.locator("input[value=standard]").uncheck(force=True)
        page.locator("#saes tbody button", has_text="topk k=32 seed=1").first.click()
        assert page.evaluate(_CONTRASTS) == []


def test_the_theme_is_the_systems_until_it_is_chosen(chromium, written):
    with opened(chromium, written, color_scheme="dark") as page:
        colour = "getComputedStyle(document.body).backgroundColor"
        assert page.evaluate(colour) == "rgb(20, 23, 29)"
        page.locator("#theme").click()
        assert page.locator("#theme").inner_text() == "Theme: light" and page.evaluate(colour) == "rgb(255, 255, 255)"
        page.reload()
        assert page.evaluate(colour) == "rgb(255, 255, 255)"


def test_print_has_the_whole_table_on_white_and_nothing_to_press(chromium, written):
    with opened(chromium, written, color_scheme="dark") as page:
        page.emulate_media(media="print")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert not page.locator("#filters").is_visible() and not page.locator(".copy-button").first.is_visible()
        assert page.evaluate("(one => one.scrollHeight <= one.clientHeight + 1)(document.getElementById('saes'))")


def test_nothing_moves_for_those_who_ask_for_that(chromium, written):
    for motion, moves in (("reduce", False), ("no-preference", True)):
        with opened(chromium, written, reduced_motion=motion) as page:
            page.locator("#saes tbody button").first.click()
            name = page.evaluate("getComputedStyle(document.getElementById('detail')).animationName")
            assert (name != "none") is moves


# ---- what a sweep may be --------------------------------------------------------------------------------------------


def sae(sae_id: str, hook_point: str, architecture: str, l0: float, recovered: float, **more: Any) -> dict[str, Any]:
    return {"sae_id": sae_id, "hook_point": hook_point, "architecture": architecture, "d_sae": 64, **more,
            "l0": l0, "ce_recovered": recovered, "explained_variance": 0.5, "dead_fraction": 0.1,
            "ce_increase": 1 - recovered, "status": "finished"}  # fmt: skip


def test_names_are_text_and_never_markup(chromium, tmp_path):
    table = mark_front(pd.DataFrame([
        sae(NASTY, NASTY, NASTY, 8, 0.9, k=NASTY, note=LONG, reason=NASTY, missed=NASTY, remedy=NASTY),
        sae(LONG, LONG, LONG, 9, 0.95, k=LONG), sae("__proto__", "constructor", "__proto__", 9, 0.95, k="toString"),
    ]))  # fmt: skip
    baselines = pd.DataFrame([{"kind": "pca", "hook_point": NASTY, "k": 8, "l0": 8.0, "ce_recovered": 0.5}])
    known = details({NASTY: [{"tokens": 5, "metrics": dict.fromkeys(CURVES, 1.0)}]})
    spec = f"name: {json.dumps(NASTY)}\ntargets: {{ce_recovered: 0.99}}\n"
    about = Source(NASTY, NASTY, spec=spec, facts={NASTY: NASTY}, provenance={NASTY: NASTY}, cost={NASTY: 1.0},
                   options=("--home", NASTY), details=known)  # fmt: skip
    written = write_report(table, baselines, tmp_path / "r.html", about)
    for width in (390, 1280):
        with opened(chromium, written, viewport={"width": width, "height": 844}) as page:
            assert page.locator("h1").inner_text() == NASTY
            assert page.locator(".panel h3").count() == 3 and len(points(page)) == 3
            for index in range(3):
                page.locator("#saes tbody button").nth(index).click()
                assert page.evaluate(_FITS)
                page.keyboard.press("Escape")
            page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
            page.locator("#hook").select_option(NASTY)
            assert rows(page) == [NASTY]
            assert page.locator("img, iframe, object, embed").count() == 0 and page.locator("script").count() == 2
            assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("count", [0, 1])
def test_a_sweep_with_none_or_one_evaluated_has_a_page(chromium, tmp_path, count):
    lost = {**sae("lost", "blocks.2", "topk", math.nan, math.nan, k=4), "ce_increase": math.nan, "status": "failed"}
    table = mark_front(pd.DataFrame([lost, *[sae("one", "blocks.1", "topk", 8, 0.9, k=8)] * count]))
    with opened(chromium, write_report(table, NO_BASELINES, tmp_path / "r.html", Source("x", "x"))) as page:
        assert len(points(page)) == count and len(rows(page)) == count + 1
        assert "None to take yet" in page.locator("#answers").inner_text()
        assert "no SAE of this hook point has been evaluated" in page.locator("#panels").text_content()
        page.locator("#saes tbody button").last.click()
        assert "Failed." in page.locator("#detail").inner_text()


def test_five_hundred_saes_stay_quick(chromium, tmp_path):
    names = ("standard", "gated", "topk", "batch_topk", "jumprelu", "another")
    many = pd.DataFrame([
        sae(f"s{i}", f"blocks.{i % 12}", names[i % 6], 4 + i % 97, 0.8 + i % 89 / 500, k=i, l0_low=4 + i % 97 - 0.5,
            l0_high=5 + i % 97, ce_recovered_low=0.79 + i % 89 / 500, ce_recovered_high=0.81 + i % 89 / 500)
        for i in range(500)
    ])  # fmt: skip
    history = [{"tokens": 1000 * step, "metrics": dict.fromkeys(CURVES, 1 / step)} for step in range(1, 200)]
    known = details({f"s{i}": history for i in range(500)})
    path = write_report(mark_front(many), NO_BASELINES, tmp_path / "r.html", Source("x", "x", details=known))
    with opened(chromium, path) as page:
        assert len(points(page)) == 500 and page.locator(".panel").count() == 12
        spent = page.evaluate("""async () => { const begun = performance.now();
          const box = document.querySelector('input[value=topk]'); box.click();
          await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
          return performance.now() - begun; }""")
        assert spent < 3000 and len(rows(page)) == 500 - 83


def test_the_page_works_in_a_frame_without_rights_as_mlflow_shows_it(chromium, written, tmp_path):
    frame = tmp_path / "frame.html"
    frame.write_text(f'<iframe sandbox="allow-scripts" src="{written.as_uri()}" width="1200" height="900"></iframe>')
    with opened(chromium, frame) as page:
        inner = page.frames[1]
        inner.locator("#theme").click()
        inner.locator("input[value=topk]").uncheck(force=True)
        assert inner.locator("#saes tbody tr").count() == len(SAMPLE.table) - 16
        button = inner.locator("#answers .copy-button").first
        button.click()
        button.get_by_text("Cop").or_(button.get_by_text("Selected")).wait_for()
        inner.locator("#saes tbody button").first.click()
        assert inner.locator("#detail .curve").count() == 4


def test_without_scripts_the_answer_is_still_said(chromium, written):
    with opened(chromium, written, java_script_enabled=False) as page:
        text = page.locator("noscript").inner_text()
        assert all(name in text for name in HOOK_POINTS) and "CE recovered" in text


def test_screenshots_can_be_taken(written, chromium, tmp_path):
    take_screenshots(written, tmp_path, names=("desktop-light", "phone"), browser=chromium)
    assert {path.name for path in tmp_path.iterdir()} == {"desktop-light.png", "phone.png"}
