"""A browser that opens pages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from ..helpers.pages import CHROMIUM

GONE = "net::ERR_CONNECTION_REFUSED"
"""The end of a test's dashboard, which a page that is still open may ask once more."""
OWN = ("http://127.0.0.1", "file:", "data:")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser) -> Iterator[Any]:
    """Opens a page; what it complains of fails the test, and no other server is asked."""
    contexts, complaints = [], []

    def complain(text: str) -> None:
        if GONE not in text:
            complaints.append(text)

    def visit(address: str, **options: Any) -> Any:
        size = {"width": 1200, "height": 900}
        contexts.append(browser.new_context(**{"viewport": size, **options}))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: said.type == "error" and complain(said.text))
        page.on("request", lambda asked: asked.url.startswith(OWN) or complaints.append(asked.url))
        page.goto(address)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert complaints == []
