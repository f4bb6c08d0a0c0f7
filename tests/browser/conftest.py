"""Chromium with a fake microphone that plays a recording. Skips, with the reason, where there is no browser to drive."""

import importlib.util
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = "no Chromium on PATH" if CHROMIUM is None else ""
    if importlib.util.find_spec("playwright") is None:
        missing = "playwright is not installed"
    if missing:
        for item in items:
            if item.path.parent == Path(__file__).parent:
                item.add_marker(pytest.mark.skip(reason=f"{missing}: the page is not run in a browser"))


class Browsers:
    """Starts Chromium; every page's errors and console messages are kept in `problems`."""

    def __init__(self, playwright: Any) -> None:
        self._playwright = playwright
        self._open: list[Any] = []
        self.problems: list[str] = []

    async def page(self, *, microphone: Path | None = None, grant: bool = True, **context: Any) -> Any:
        """A new page in a browser of its own. microphone: a WAV file that the fake microphone plays once."""
        arguments = [*QUIET, "--use-fake-device-for-media-stream", "--autoplay-policy=no-user-gesture-required"]
        if grant:
            arguments.append("--use-fake-ui-for-media-stream")
        if microphone is not None:
            arguments.append(f"--use-file-for-fake-audio-capture={microphone}%noloop")
        browser = await self._playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        self._open.append(browser)
        page = await (await browser.new_context(accept_downloads=True, **context)).new_page()
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("console", lambda message: message.type == "error" and self.problems.append(message.text))
        return page

    async def close(self) -> None:
        for browser in self._open:
            await browser.close()


@pytest.fixture
async def browsers() -> AsyncIterator[Browsers]:
    from playwright.async_api import async_playwright

    async with async_playwright() as playwright:
        browsers = Browsers(playwright)
        yield browsers
        await browsers.close()
