"""The feature browser in a real browser: the Chromium of the machine, driven by Playwright, which downloads none."""

import ast
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from browsing import watched_page
from penstock.feature_server import serve
from penstock_dashboards.features import write_page
from sample_features import BEFORE, DEAD, HOSTILE, WORDS, take_screenshots, write_features
from sample_sweep import CHROMIUM

pytest.importorskip("playwright.sync_api", reason="no Playwright to drive a browser with")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH to open the page in")

LATENTS = 200
ALIVE = [latent for latent in range(LATENTS) if latent % DEAD != DEAD - 1]
RETURN = WORDS.index(" return")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("features") / "made"
    return write_features(made, LATENTS, neuronpedia_id="gpt2-small/4-res-jb")


@pytest.fixture(scope="module")
def written(folder, tmp_path_factory) -> str:
    return write_page(folder, tmp_path_factory.mktemp("page") / "features.html").as_uri()


@contextmanager
def opened(chromium: Any, address: str, *, hash: str = "", **options: Any) -> Iterator[Any]:
    """A page that has read its data; nothing but the page is asked for, and its server where it has one."""
    allowed = ("data:", address) if address.startswith("http") else ("file:", "data:", "blob:")
    with watched_page(chromium, address + hash, allowed, **options) as page:
        page.locator("body[data-ready]").wait_for()
        yield page


@pytest.fixture
def page(chromium, written) -> Iterator[Any]:
    with opened(chromium, written) as found:
        yield found


def listed(page: Any) -> list[int]:
    """The latents of the list's rows that are drawn, from the top."""
    return [int(number) for number in drawn(page, "b")]


def drawn(page: Any, part: str) -> list[str]:
    """The text of a part of each of those rows."""
    return page.evaluate(
        """part => [...document.querySelectorAll('.option')]
          .sort((a, b) => parseFloat(a.style.top) - parseFloat(b.style.top))
          .map(one => one.querySelector(part).textContent)""",
        part,
    )


def count(page: Any) -> int:
    return int(page.locator("#count").inner_text().split()[0].replace(",", "").replace("No", "0"))


def shown(page: Any) -> str:
    """The panel's title, when it has what it is to show."""
    page.locator("#panel:not([aria-busy=true])").wait_for()
    return page.locator("#panel h2").inner_text()


def search(page: Any, words: str, where: str = "all") -> None:
    page.locator("#where").select_option(where)
    page.locator("#search").fill(words)


def focused(page: Any) -> str:
    return page.evaluate("document.activeElement.id")


# ---- searching, sorting ---------------------------------------------------------------------------------------------


def test_the_list_has_the_latents_that_fired_and_the_dead_ones_when_asked(page):
    assert listed(page)[:5] == [0, 1, 2, 3, 4] and count(page) == len(ALIVE)
    page.locator("#show").select_option("dead")
    assert listed(page) == list(range(DEAD - 1, LATENTS, DEAD))
    assert "never fired" in page.locator(".option").first.inner_text()
    page.locator("#show").select_option("all")
    assert count(page) == LATENTS


def test_a_word_finds_what_fires_on_it_first_and_what_promotes_it(page):
    search(page, "RETURN")
    on_it = [latent for latent in ALIVE if latent % len(WORDS) == RETURN]
    half = [latent for latent in ALIVE if latent % 2 and latent not in on_it]
    found = listed(page)
    assert found[: len(on_it)] == on_it and set(found[len(on_it) :]) <= set(half) and count(page) >= len(on_it + half)
    assert "peak in 20 of 20" in page.locator(f"#option-{on_it[0]}").inner_text()
    assert page.locator(f"#option-{on_it[0]} mark").inner_text() == " return"
    assert "peak in 10 of 20" in page.locator(f"#option-{half[0]}").inner_text()
    search(page, "return", "top")
    assert set(listed(page)) == {latent for latent in ALIVE if latent % len(WORDS) == RETURN}
    assert "promotes" in page.locator(".option").first.inner_text()
    search(page, "no such text anywhere")
    assert count(page) == 0 and "No latent is found" in page.locator("#count").inner_text()
    page.locator("#search").fill("")
    assert count(page) == len(ALIVE)


def test_a_number_finds_that_latent_dead_or_alive(page):
    search(page, str(DEAD - 1))
    assert listed(page)[0] == DEAD - 1 and "this number" in page.locator(".option").first.inner_text()
    search(page, "#150")
    assert listed(page)[0] == 150


def test_quotes_find_a_whole_token_and_escapes_a_newline(page):
    search(page, '"init"', "peak")
    assert set(listed(page)) == {latent for latent in ALIVE if latent % len(WORDS) == WORDS.index("init")}
    search(page, '"Init"', "peak")
    assert count(page) == 0
    search(page, '"\\n"', "peak")
    assert set(listed(page)) == {latent for latent in ALIVE if latent % len(WORDS) == WORDS.index("\n")}
    search(page, '"\\t"', "peak")
    assert set(listed(page)) == {latent for latent in ALIVE if latent % len(WORDS) == WORDS.index("\t")}


def test_text_that_spans_tokens_is_found_around_the_peak(page):
    page.locator("#option-4").click()
    shown(page)
    line = page.locator(".example").first
    tokens = line.locator(".t").all_inner_texts()
    assert tokens[BEFORE] == "("
    around = "".join(tokens[BEFORE - 1 : BEFORE + 1])
    search(page, around.replace("·", " "), "around")
    assert 4 in listed(page)


def test_the_list_sorts_by_every_figure_both_ways(page):
    for place, name in enumerate(("rate", "max")):
        page.locator("#sort").select_option(name)
        falling = [float(said.split("% · max ")[place]) for said in drawn(page, ".figures-of")]
        assert falling == sorted(falling, reverse=True) and len(set(falling)) > 5
        page.locator("#direction").click()
        rising = [float(said.split("% · max ")[place]) for said in drawn(page, ".figures-of")]
        assert rising == sorted(rising) and rising[-1] < falling[0]
    page.locator("#sort").select_option("agreement")
    assert all(latent % 2 == 0 or latent % len(WORDS) == RETURN for latent in listed(page))
    page.locator("#show").select_option("all")
    page.locator("#sort").select_option("mean")
    page.locator("#list").press("End")
    assert shown(page) in {f"Latent {latent}" for latent in range(DEAD - 1, LATENTS, DEAD)}  # without a figure: last


# ---- a latent -------------------------------------------------------------------------------------------------------


def test_a_latent_has_examples_histogram_logits_neighbours_and_links(page):
    page.locator("#option-4").click()
    shown(page)
    panel = page.locator("#panel")
    assert shown(page) == "Latent 4"
    text = panel.inner_text()
    parts = ("Fires on", "Max activation", "Promoted tokens", "Suppressed tokens", "Nearest latents", "Top examples",
             "Strongest fifth of its firings", "Weakest fifth of its firings", "Add(4, ")  # fmt: skip
    for part in parts:
        assert part in text, part
    assert panel.locator(".example").count() == 40 and panel.locator(".group").count() == 6
    assert panel.locator(".logits tr").count() == 20 and panel.locator(".histogram rect").count() > 5
    peaks = panel.locator(".example mark").all_inner_texts()
    assert len(peaks) == 40 and set(peaks) == {"("}
    assert "h8" in panel.locator(".example mark").first.get_attribute("class")
    href = panel.get_by_role("link", name="Neuronpedia").get_attribute("href")
    assert href == "https://www.neuronpedia.org/gpt2-small/4-res-jb/4"
    panel.locator(".neighbour").first.click()
    assert shown(page) == "Latent 5"


def test_tokens_tell_their_activation_to_the_pointer_and_the_keyboard(page):
    page.locator("#option-4").click()
    shown(page)
    mark = page.locator(".example mark").first
    mark.hover()
    most = page.locator("#panel .keys dd").nth(1).inner_text()
    tip = page.locator("#tip").inner_text()
    assert '"("' in tip and "the peak" in tip and most[:3] in tip and "row" in tip
    page.mouse.move(5, 5)
    assert not page.locator("#tip").is_visible()
    page.locator(".views input:checked").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowDown")
    assert "Tokens that fire" in page.locator("#tip").inner_text()
    assert page.evaluate("document.activeElement === document.querySelectorAll('.example')[1]")


def test_whitespace_and_what_has_no_shape_is_given_one(page):
    for token, shape in (("\n", "↵"), ("\t", "⇥"), ("\n    ", "↵····"), ("        ", "·×8")):
        page.evaluate("latent => { location.hash = `latent=${latent}`; }", WORDS.index(token))
        page.locator(f"h2:text-is('Latent {WORDS.index(token)}')").wait_for()
        assert page.locator(".example mark").first.inner_text() == shape
    page.locator(".views input[value=lines]").check(force=True)
    page.locator("#panel[data-view=lines]").wait_for()
    assert page.locator(".example mark").first.inner_text() == "········"


def test_a_dead_latent_says_so(chromium, written):
    with opened(chromium, written, hash=f"#latent={DEAD - 1}") as page:
        assert shown(page) == f"Latent {DEAD - 1}"
        text = page.locator("#panel").inner_text()
        assert "never fired" in text and "Promoted tokens" in text and "Top examples" not in text
        assert DEAD - 1 in listed(page)  # though the list has only those that fired unless asked


def test_copying_puts_the_code_and_the_link_on_the_clipboard(chromium, written):
    rights = ["clipboard-read", "clipboard-write"]
    with opened(chromium, written, hash="#latent=7", permissions=rights) as page:
        page.locator(".copy-button").click()
        page.get_by_text("Copied").first.wait_for()
        code = page.evaluate("navigator.clipboard.readText()")
        steer = ast.parse(code).body[-1].value.args[0].func.value
        assert steer.func.id == "steer" and "Add(7, " in code and 'SAE.load("best-sae")' in code
        prompt = steer.args[2].value  # a place where it is about to fire: the beginning of its strongest example
        before = page.locator(".example .before").first.inner_text()
        assert 10 < len(prompt) <= 60 and re.findall(r"[a-z]+\d*", before)[-2:] == re.findall(r"[a-z]+\d*", prompt)[-2:]
        page.get_by_role("button", name="Copy link").click()
        page.get_by_role("button", name="Copied").wait_for()
        assert page.evaluate("navigator.clipboard.readText()").endswith("#latent=7")


# ---- the address and the keyboard -----------------------------------------------------------------------------------


def test_a_link_shows_the_same_and_back_goes_back(chromium, written, page):
    search(page, "return")
    page.locator("#sort").select_option("max")
    page.locator(".option").nth(2).click()
    first, hash = shown(page), page.evaluate("location.hash")
    with opened(chromium, written, hash=hash) as again:
        assert shown(again) == first and listed(again) == listed(page)
        assert again.locator("#search").input_value() == "return"
    page.locator(".neighbour").first.click()
    second = shown(page)
    assert second != first
    page.go_back()
    page.locator(f"h2:text-is('{first}')").wait_for()
    page.go_back()
    page.locator("h2:text-is('Overview')").wait_for()
    page.go_forward()
    page.locator(f"h2:text-is('{first}')").wait_for()
    assert page.title().startswith(first)


@pytest.mark.parametrize(
    "hash", ["#latent=999999", "#latent=x", "#sort=__proto__&in=constructor&show=toString", "#q=%"]
)
def test_a_link_to_what_is_not_there_shows_the_overview(chromium, written, hash):
    with opened(chromium, written, hash=hash) as page:
        assert shown(page) == "Overview"


def test_the_keyboard_walks_searches_reads_and_returns(page):
    page.keyboard.press("/")
    assert focused(page) == "search"
    page.keyboard.type("return")
    page.keyboard.press("Enter")
    first = listed(page)[0]
    assert shown(page) == f"Latent {first}" and focused(page) == "list"
    page.keyboard.press("ArrowDown")
    second = listed(page)[1]
    assert shown(page) == f"Latent {second}"
    assert page.locator("#list").get_attribute("aria-activedescendant") == f"option-{second}"
    assert page.locator(f"#option-{second}").get_attribute("aria-selected") == "true"
    page.keyboard.press("k")
    assert shown(page) == f"Latent {first}"
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    assert focused(page) == "panel"
    page.keyboard.press("j")
    page.keyboard.press("Escape")
    assert focused(page) == "list"
    page.keyboard.press("Home")
    assert shown(page) == f"Latent {first}"
    page.keyboard.press("PageDown")
    assert page.evaluate("document.querySelector('.option[aria-selected=true]').getBoundingClientRect().bottom") <= 900
    page.keyboard.press("/")
    page.keyboard.press("Escape")
    assert page.locator("#search").input_value() == "" and count(page) == len(ALIVE)
    page.keyboard.press("Escape")
    assert focused(page) == "list"


def test_tab_reaches_everything_shows_where_it_is_and_comes_round(chromium, written):
    with opened(chromium, written, hash="#latent=4") as page:
        seen = []
        for _ in range(60):
            page.keyboard.press("Tab")
            at = page.evaluate("""(() => { const at = document.activeElement, style = getComputedStyle(at);
              const name = at.id || at.className || at.name || at.tagName;
              const ring = at.closest('.views label') ?? at;
              return [name, style.outlineStyle !== 'none' || getComputedStyle(ring).outlineStyle !== 'none'
                || at.id === 'skip' || at === document.body]; })()""")
            if seen and at[0] == seen[0][0]:
                break
            seen.append(at)
        else:
            pytest.fail("Tab never came round")
        names = [name for name, _ in seen]
        for name in ("skip", "home", "theme", "search", "where", "show", "sort", "direction", "list", "panel"):
            assert name in names, name
        assert "neighbour" in names and "example" in names and names.count("example") == 1
        assert [name for name, visible in seen if not visible] == []


def test_everything_that_can_be_used_has_a_name(chromium, written):
    with opened(chromium, written, hash="#latent=4") as page:
        nameless = page.evaluate("""
          [...document.querySelectorAll('button, select, input, a, svg, main, section, figure, form, [role=listbox]')]
          .filter(one => !one.textContent.trim() && !one.ariaLabel && !one.labels?.length)
          .map(one => one.outerHTML.slice(0, 90))""")
        ids = page.evaluate("[...document.querySelectorAll('[id]')].map(one => one.id)")
        assert nameless == [] and len(ids) == len(set(ids))
        sizes = page.locator(".option").evaluate_all("all => all.map(one => one.ariaSetSize + '/' + one.ariaPosInSet)")
        assert f"{len(ALIVE)}/1" in sizes


# ---- widths, colours ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
@pytest.mark.parametrize("latent", [None, 1])  # latent 1 has the hostile tokens
def test_nothing_sticks_out_at_any_width(chromium, written, width, latent):
    hash = "" if latent is None else f"#latent={latent}"
    with opened(chromium, written, hash=hash, viewport={"width": width, "height": 844}) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for view in () if latent is None else ("aligned", "flowing", "lines"):
            page.locator(f".views input[value={view}]").check(force=True)
            page.locator(f"#panel[data-view={view}] .views input[value={view}]:checked").wait_for()
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate("(one => one.scrollWidth <= one.clientWidth)(document.getElementById('panel'))")


def test_on_a_phone_the_list_and_a_latent_take_turns(chromium, written):
    with opened(chromium, written, viewport={"width": 390, "height": 844}, has_touch=True) as page:
        assert not page.locator("#panel").is_visible()
        page.locator("#option-3").tap()
        assert shown(page) == "Latent 3" and not page.locator("#list").is_visible()
        page.get_by_role("button", name="Back to the list").tap()
        page.locator("#list").wait_for()
        assert not page.locator("#panel").is_visible() and "latent" not in page.evaluate("location.hash")
        page.locator("#option-3").tap()
        page.go_back()
        page.locator("#list").wait_for()
        page.locator("#list").evaluate("list => { list.scrollTop = 3000; }")
        page.locator("#option-53").tap()
        page.locator(".neighbour").first.tap()
        assert shown(page) == "Latent 54"
        page.get_by_role("button", name="Back to the list").tap()
        assert page.locator("#list").evaluate("list => list.scrollTop") == 3000 and {53, 54} <= set(listed(page))
    with opened(chromium, written, hash="#latent=3", viewport={"width": 390, "height": 844}) as page:
        page.get_by_role("button", name="Back to the list").click()
        assert page.locator("#list").is_visible()
        page.keyboard.press("Enter")
        page.keyboard.press("Escape")
        assert page.locator("#list").is_visible()


_CONTRASTS = """(() => {  // WCAG 2.2, 1.4.3
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = colour => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const light = colour => colour.slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ratio = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);
  const ground = one => { for (; one; one = one.parentElement) {
    const colour = rgba(getComputedStyle(one).backgroundColor); if (colour[3] === 255) return colour; } };
  const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const one = walker.currentNode.parentElement, said = walker.currentNode.data.trim();
    if (!said || !one.getClientRects().length || one.closest('script, style, noscript, .unseen, .skip')) continue;
    const value = ratio(rgba(getComputedStyle(one).color), ground(one));
    if (value < 4.5) found.push([said.slice(0, 30), one.className, value]);
  }
  return found;
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_it_stands_on(chromium, written, scheme):
    with opened(chromium, written, hash="#q=return", color_scheme=scheme) as page:
        assert page.evaluate(_CONTRASTS) == []
        page.locator(".option").first.click()
        shown(page)
        hues = page.evaluate("new Set([...document.querySelectorAll('.example mark')].map(one => one.className)).size")
        assert hues > 4  # many strengths are on the page
        assert page.evaluate(_CONTRASTS) == []


# ---- what a corpus may hold -----------------------------------------------------------------------------------------


def test_text_of_the_corpus_is_text_and_never_markup(chromium, written, page):
    for text in HOSTILE:
        search(page, text)
    page.locator("#search").fill("")
    page.locator("#option-1").click()
    shown(page)
    for view in ("aligned", "flowing", "lines"):
        page.locator(f".views input[value={view}]").check(force=True)
        page.locator(f"#panel[data-view={view}] .views input[value={view}]:checked").wait_for()
    text = page.locator("#panel").inner_text()
    parts = ("</script>", "<img src=x onerror=hacked()>", "U+2028", "U+202Egnp.exe", "U+200B", "U+0000U+001B[31m",
             "&amp;", "${hacked()}")  # fmt: skip
    for part in parts:
        assert part in text, part
    page.locator(".example .t").first.hover()
    assert "</script>" in page.locator("#tip").inner_text()
    assert page.locator("img, iframe, object, embed").count() == 0
    assert page.evaluate("[...document.scripts].filter(one => !one.type).length") == 1
    assert not set("\u202e\u200b\u2028\x1b") & set(page.evaluate("document.body.innerText"))
    with opened(chromium, written, hash="#q=%3C%2Fscript%3E%3Cimg%20src%3Dx%20onerror%3Dhacked()%3E") as again:
        assert again.locator("#search").input_value().startswith("</script>")


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (844, 390), (390, 844)])
def test_a_long_name_or_a_low_screen_leaves_room_for_the_list(chromium, tmp_path, width, height):
    long = "layer_" + "x" * 500
    sae = {"architecture": long, "id": long, "metadata": {"hook_name": long, "model_name": long}}
    written = write_page(write_features(tmp_path / "f", 40, sae=sae), tmp_path / "p.html").as_uri()
    with opened(chromium, written, viewport={"width": width, "height": height}) as page:
        assert page.locator("#list").evaluate("list => list.clientHeight") > 200
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.locator("#option-0").click()
        assert page.locator("#panel").evaluate("panel => panel.clientHeight") > 300 and shown(page) == "Latent 0"
        assert page.evaluate("(one => one.scrollWidth <= one.clientWidth)(document.getElementById('panel'))")


def test_names_of_an_sae_are_text(chromium, tmp_path):
    nasty = "</script><img src=x onerror=hacked()><!--\u2028'\"`${hacked()}&amp;"
    metadata = {"hook_name": nasty, "model_name": nasty, "neuronpedia_id": "javascript:hacked()//"}
    sae = {"id": nasty, "folder": nasty, "architecture": nasty, "sweep": nasty, "metadata": metadata}
    written = write_page(write_features(tmp_path / "f", 4, sae=sae), tmp_path / "p.html").as_uri()
    with opened(chromium, written) as page:
        assert page.locator("h1").inner_text() == nasty and nasty in page.locator("#panel").inner_text()
        page.locator("#option-0").click()
        shown(page)
        assert page.get_by_role("link", name="Neuronpedia").count() == 0
        assert page.locator("img").count() == 0


# ---- size, and other ways to have it --------------------------------------------------------------------------------


def test_sixteen_thousand_latents_cost_no_more_to_scroll_than_a_hundred(chromium, tmp_path, written):
    """Counted in elements, which is what a browser lays out: as many whatever the list's length."""
    n = 16_384
    many = write_features(tmp_path / "f", n, top=2, per_quantile=0)
    with opened(chromium, write_page(many, tmp_path / "p.html").as_uri()) as page:
        page.locator("#show").select_option("all")
        assert count(page) == n
        added = """async () => { let added = 0; const list = document.getElementById('list');
          const watch = new MutationObserver(seen => { for (const one of seen) added += one.addedNodes.length; });
          watch.observe(document.getElementById('rows'), { childList: true });
          for (const part of [0.1, 0.5, 0.9, 1]) { list.scrollTop = part * list.scrollHeight;
            await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done))); }
          watch.disconnect(); return [added, document.querySelectorAll('.option').length]; }"""
        in_all, at_once = page.evaluate(added)
        assert at_once < 40 and in_all < 160
        assert listed(page)[-1] == n - 1
        spent = page.evaluate("""() => { const box = document.getElementById('search');
          const times = ['r', 're', 'ret', 'retu', 'return'].map(words => { const begun = performance.now();
            box.value = words; box.dispatchEvent(new Event('input')); return performance.now() - begun; });
          return times.slice(1).sort((a, b) => a - b)[2]; }""")
        assert spent < 1000, "milliseconds of the third of four searches"
        assert listed(page)[0] % len(WORDS) == RETURN
        page.locator("#search").fill("16383")
        page.keyboard.press("Enter")
        assert shown(page) == "Latent 16383"


def test_a_page_that_keeps_fewer_examples_says_so(chromium, folder, tmp_path):
    with opened(chromium, write_page(folder, tmp_path / "p.html", limit=1).as_uri(), hash="#latent=4") as page:
        assert shown(page) == "Latent 4"
        assert "keeps 1 of 20 top examples and 0 of 4 of each quantile" in page.locator("#panel").inner_text()
        assert page.locator(".example").count() == 1


def test_the_served_page_asks_for_the_examples_of_what_is_shown(chromium, folder):
    with serve(folder) as address, opened(chromium, address, hash="#latent=4") as page:
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.locator("h2:text-is('Latent 4')").wait_for()
        assert page.locator(".example").count() == 40
        page.keyboard.press("j")
        page.locator("h2:text-is('Latent 5')").wait_for()
        page.keyboard.press("k")
        page.locator("h2:text-is('Latent 4')").wait_for()
        assert asked == [f"{address}examples/5"]
        search(page, "return")
        assert listed(page)[0] % len(WORDS) == RETURN and len(asked) == 1


def test_a_server_that_is_gone_is_told_and_tried_again(chromium, folder):
    with serve(folder) as address:
        context = chromium.new_context()
        page = context.new_page()
        page.goto(address)
        page.locator("body[data-ready]").wait_for()
        page.route("**/examples/*", lambda route: route.abort())
        page.locator("#option-4").click()
        page.locator(".trouble").wait_for()
        assert "still running?" in page.locator(".trouble").inner_text()
        page.unroute("**/examples/*")
        page.get_by_role("button", name="Try again").click()
        page.locator(".example").first.wait_for()
        context.close()


def test_a_browser_that_cannot_unpack_it_is_told_what_could(chromium, written):
    page = chromium.new_page()
    page.add_init_script("delete window.DecompressionStream")
    page.goto(written)
    page.locator("#state", has_text="DecompressionStream").wait_for()
    assert "Firefox 113" in page.locator("#state").inner_text() and not page.locator("#browser").is_visible()
    page.close()


def test_the_page_works_in_a_frame_without_rights(chromium, written, tmp_path):
    frame = tmp_path / "frame.html"
    frame.write_text(f'<iframe sandbox="allow-scripts" src="{written}" width="1200" height="900"></iframe>')
    page = chromium.new_page(viewport={"width": 1280, "height": 960})
    page.goto(frame.as_uri())
    inner = page.frames[1]
    inner.locator("body[data-ready]").wait_for()
    inner.locator("#option-4").click()
    shown(inner)
    assert inner.locator(".example").count() == 40
    inner.locator("#theme").click()
    page.close()


def test_without_scripts_it_says_what_it_is(chromium, written):
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(written)
    assert "200 latents" in page.locator("noscript").inner_text()
    context.close()


def test_screenshots_can_be_taken(chromium, written, tmp_path):
    take_screenshots(Path(written.removeprefix("file://")), tmp_path, 4, ("desktop-light",), chromium)
    assert [path.name for path in tmp_path.iterdir()] == ["desktop-light.png"]
