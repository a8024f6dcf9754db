from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """The Chromium of the machine, driven by Playwright, which downloads none of its own."""
    from playwright.sync_api import sync_playwright

    from sample_sweep import CHROMIUM, CHROMIUM_SWITCHES

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(CHROMIUM_SWITCHES))
        yield browser
        browser.close()
