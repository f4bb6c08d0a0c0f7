"""The page in Chromium: what a reader sees, what a keyboard and a screen reader meet, and ten hours of text."""

import asyncio
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.browser.conftest import Browsers
from tests.support.scripted_page_server import Talker, page_server

SIZES = {"desktop": {"width": 1200, "height": 760}, "phone": {"width": 390, "height": 780}}


async def text_of(page: Any, selector: str) -> str:
    return str(await page.inner_text(selector))


async def wait_for(page: Any, script: str) -> None:
    """Until the expression is true. Asked from outside: the page's policy forbids the `eval` of `wait_for_function`."""
    async with asyncio.timeout(120):
        for pause in itertools.chain((0.0,), itertools.repeat(0.02)):
            await asyncio.sleep(pause)
            if await page.evaluate(script):
                return


async def hold_until_marker(talker: Talker) -> None:
    await talker.answer_markers()


async def test_grey_text_turns_black_and_the_lag_is_shown(browsers: Browsers) -> None:
    """An Interim is grey, the Word that settles it is not; EndWord tells the lag, Step the pause meter."""
    settle = asyncio.Event()

    async def talk(talker: Talker) -> None:
        await talker.say("Ready")
        while talker.samples < 24_000:
            await talker.hear()
        await talker.say("Interim", text="good mor", start_time=0.1)
        await settle.wait()
        await talker.say("Step", step_idx=12, prs=[0.1, 0.2, 0.75, 0.9], buffered_pcm=0)
        await talker.say("Word", text="Good", start_time=0.1)
        await talker.say("EndWord", stop_time=0.3)
        await talker.say("Word", text="old", start_time=0.3, confidence=0.2)
        await talker.say("EndWord", stop_time=0.3)
        await talker.say("Interim", text="morning", start_time=0.3)
        await talker.say("Warning", code="language", message="This sounds like French; this model knows English only.")
        await talker.answer_markers()

    async with page_server(talk) as address:
        page = await browsers.page()
        await page.goto(address)
        await page.click("#record")
        await wait_for(page, "document.querySelector('.interim')?.textContent === 'good mor'")
        assert "Good" not in await text_of(page, "#transcript")
        settle.set()
        await wait_for(page, "document.querySelector('.interim')?.textContent === 'morning'")
        assert re.fullmatch(r"0:00\s*Good old morning", (await text_of(page, "#transcript")).strip())
        assert (await text_of(page, ".doubtful")).strip() == "old"
        grey, black = await page.evaluate(
            "['.interim', '.transcript p'].map((each) => getComputedStyle(document.querySelector(each)).color)"
        )
        assert grey != black
        assert re.fullmatch(r"\d+\.\d s behind", await text_of(page, "#lag"))
        assert await page.get_attribute("#pause", "aria-valuenow") == "75"
        assert "French" in await text_of(page, "#warning")
        await page.click("#record")
        await wait_for(page, "document.getElementById('state').textContent === 'Done.'")
        assert await page.evaluate("document.querySelector('.interim').textContent") == ""
        assert await page.evaluate("document.activeElement.id") == "record"
    assert browsers.problems == []


async def test_a_broken_connection_costs_no_word_and_repeats_none(browsers: Browsers) -> None:
    """The socket breaks twice. With a token the page resumes where the server's Ack left off, with the events it has."""
    queries: list[dict[str, str]] = []
    heard: list[int] = []

    async def talk(talker: Talker) -> None:
        queries.append(talker.query)
        first = int(talker.query.get("samples", 0))
        number = len(queries)
        await talker.say("Ready", token="T")
        await talker.say("Word", text=f"word{number}", start_time=number / 2)
        await talker.say("EndWord", stop_time=number / 2 + 0.3)
        while talker.samples < 24_000:
            await talker.hear()
        await talker.say("Ack", samples=first + talker.samples)
        heard.append(first + talker.samples)
        if number < 3:
            await asyncio.sleep(0)
            while talker.samples < 30_000:
                await talker.hear()
            talker.cut()
        else:
            await talker.answer_markers()

    async with page_server(talk) as address:
        page = await browsers.page()
        await page.goto(address)
        await page.click("#record")
        await wait_for(page, "document.getElementById('transcript').textContent.includes('word3')")
        await page.click("#record")
        await wait_for(page, "document.getElementById('state').textContent === 'Done.'")
        assert re.findall(r"word\d", await text_of(page, "#transcript")) == ["word1", "word2", "word3"]
    assert queries[0]["resume"] == "1"
    assert [query["resume"] for query in queries[1:]] == ["T", "T"]
    assert [int(query["samples"]) for query in queries[1:]] == heard[:2]
    assert [int(query["events"]) for query in queries[1:]] == [2, 4]


async def test_two_recordings_are_saved_with_cues_in_order(browsers: Browsers, tmp_path: Path) -> None:
    async def talk(talker: Talker) -> None:
        await talker.say("Ready")
        while talker.samples < 12_000:
            await talker.hear()
        for i, word in enumerate(("This", "is", "a", "sentence.")):
            await talker.say("Word", text=word, start_time=i / 10)
            await talker.say("EndWord", stop_time=i / 10 + 0.08)
        await talker.answer_markers()

    async with page_server(talk) as address:
        page = await browsers.page()
        await page.goto(address)
        for count in (1, 2):
            await page.click("#record")
            await wait_for(
                page, f"(document.getElementById('transcript').textContent.match(/sentence/g) || []).length === {count}"
            )
            await page.click("#record")
            await wait_for(page, "document.getElementById('record-label').textContent === 'Start'")
        saved: dict[str, str] = {}
        for kind in ("srt", "vtt", "txt", "json"):
            await page.click("#save-button")
            async with page.expect_download() as download:
                await page.click(f"#save-menu [data-kind={kind}]")
            file = tmp_path / f"saved.{kind}"
            await (await download.value).save_as(file)
            saved[kind] = file.read_text()
        stamps = [stamp for pair in re.findall(r"(\S+) --> (\S+)", saved["srt"]) for stamp in pair]
        assert len(stamps) == 4
        assert stamps == sorted(stamps)
        assert saved["vtt"].startswith("WEBVTT\n")
        assert saved["txt"].count("This is a sentence.") == 2
        starts = [word["start"] for word in json.loads(saved["json"])["words"]]
        assert starts == sorted(starts)


async def test_two_sources_are_two_labelled_speakers(browsers: Browsers) -> None:
    """Microphone and tab each have a stream; the tab's picker is played by a stand-in, as headless Chromium has none."""

    async def talk(talker: Talker) -> None:
        await talker.say("Ready")
        while talker.samples < 9_600:
            await talker.hear()
        await talker.say("Word", text="Hello.", start_time=0.1)
        await talker.say("EndWord", stop_time=0.3)
        await talker.answer_markers()

    async with page_server(talk) as address:
        page = await browsers.page()
        await page.add_init_script(
            "navigator.mediaDevices.getDisplayMedia = () => navigator.mediaDevices.getUserMedia({ audio: true });"
        )
        await page.goto(address)
        await page.select_option("#source", "both")
        await page.click("#record")
        await wait_for(page, "(document.getElementById('transcript').textContent.match(/Hello/g) || []).length === 2")
        assert sorted(await page.eval_on_selector_all(".transcript b", "all => all.map((each) => each.textContent)")) == [
            "Tab",
            "You",
        ]
        await page.click("#record")
        await wait_for(page, "document.getElementById('state').textContent === 'Done.'")
    assert browsers.problems == []


async def test_a_refused_microphone_is_explained(browsers: Browsers) -> None:
    async with page_server(hold_until_marker) as address:
        page = await browsers.page(grant=False, permissions=[])
        await page.goto(address)
        await page.click("#record")
        await page.wait_for_selector("#error:not([hidden])")
        assert "not allowed to use the microphone" in await text_of(page, "#error")
        assert await page.evaluate("document.activeElement.id") == "record"
        assert await text_of(page, "#record-label") == "Start"


async def test_a_warning_of_another_language_is_shown(browsers: Browsers) -> None:
    async def talk(talker: Talker) -> None:
        assert talker.query["warnings"] == "1"
        await talker.say("Ready")
        await talker.hear()
        await talker.say("Warning", code="foreign_speech", message="this does not sound like English. For French: COMMAND")
        await talker.answer_markers()

    async with page_server(talk) as address:
        page = await browsers.page()
        await page.goto(address)
        await page.click("#record")
        await page.wait_for_selector("#warning:not([hidden])")
        assert await text_of(page, "#warning") == "this does not sound like English. For French: COMMAND"


async def test_a_wrong_path_is_named(browsers: Browsers) -> None:
    """It used to be answered with a question about the key."""
    async with page_server(hold_until_marker) as address:
        page = await browsers.page()
        await page.goto(address)
        await page.evaluate("document.getElementById('path').value = '/api/asr-steaming'")
        await page.click("#record")
        await page.wait_for_selector("#error:not([hidden])")
        assert "The server has no path /api/asr-steaming. It serves /api/asr-streaming" in await text_of(page, "#error")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", sorted(SIZES))
async def test_axe_finds_nothing_serious(browsers: Browsers, scheme: str, size: str) -> None:
    """Empty, with a transcript, with settings open, with a menu open, and in captions."""
    pytest.importorskip("axe_playwright_python", reason="axe-playwright-python is not installed")
    from axe_playwright_python.async_playwright import Axe

    async def talk(talker: Talker) -> None:
        await talker.say("Ready")
        await talker.say("Word", text="Hello", start_time=0.1)
        await talker.say("EndWord", stop_time=0.3)
        await talker.say("Interim", text="there", start_time=0.4)
        await talker.answer_markers()

    async def check(what: str) -> None:
        found = await Axe().run(page)
        serious = [each["id"] for each in found.response["violations"] if each["impact"] in ("serious", "critical")]
        assert serious == [], f"{what}: {found.generate_report()}"

    async with page_server(talk) as address:
        page = await browsers.page(viewport=SIZES[size], color_scheme=scheme, bypass_csp=True)
        await page.goto(address)
        await wait_for(page, "document.getElementById('server').textContent.includes('scripted')")
        await check("empty")
        await page.click("#record")
        await wait_for(page, "document.querySelector('.interim')?.textContent === 'there'")
        await check("recording")
        await page.click("#save-button")
        await check("menu")
        await page.keyboard.press("Escape")
        await page.click("#settings-button")
        await check("settings")
        await page.keyboard.press("Escape")
        await page.click("#caption-button")
        await page.click("#caption-full")
        await check("captions")
        assert "Hello there" in await text_of(page, "#caption-text")
        assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")


async def test_ten_hours_of_text_stay_smooth(browsers: Browsers) -> None:
    """90,000 words: memory and the time of an update at the last hour stay near those of the first. Both are printed."""
    words_an_hour = 9_000
    go = asyncio.Queue[int]()

    async def talk(talker: Talker) -> None:
        await talker.say("Ready")
        rng = np.random.default_rng(1)
        at = 0.0
        while True:
            hour = await go.get()
            if hour < 0:
                break
            for i in range(words_an_hour):
                end = "." if i % 12 == 11 else ""
                await talker.say("Word", text=f"word{int(rng.integers(1_000))}{end}", start_time=at)
                await talker.say("EndWord", stop_time=at + 0.25)
                at += 2.0 if i % 60 == 59 else 0.4
        await talker.answer_markers()

    async with page_server(talk) as address:
        page = await browsers.page()
        client = await page.context.new_cdp_session(page)
        await page.goto(address)
        await page.click("#record")
        figures = []
        for hour in range(10):
            go.put_nowait(hour)
            words = "import('./page.js').then(({ transcript }) => transcript.recordings[0]?.words.length)"
            await wait_for(page, f"{words}.then((count) => count === {(hour + 1) * words_an_hour})")
            if hour in (0, 9):
                await client.send("HeapProfiler.collectGarbage")
                heap = (await client.send("Runtime.getHeapUsage"))["usedSize"]
                update = await page.evaluate(
                    """async () => {
                      const { transcript } = await import("./page.js");
                      const frame = () => new Promise((done) => requestAnimationFrame(done));
                      const times = [];
                      for (let i = 0; i < 40; i++) {
                        await frame();
                        const begin = performance.now();
                        transcript.recordings[0].interim(`so many words ${i}`);
                        document.querySelector("main").scrollHeight;
                        times.push(performance.now() - begin);
                      }
                      return times.sort((a, b) => a - b)[20];
                    }"""
                )
                figures.append((heap / 1e6, update))
        go.put_nowait(-1)
        (first_heap, first_update), (last_heap, last_update) = figures
        print(
            f"first hour: {first_heap:.1f} MB, {first_update:.2f} ms an update; tenth: {last_heap:.1f} MB, {last_update:.2f} ms"
        )
        assert last_heap - first_heap < 90
