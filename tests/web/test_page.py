"""The page in a browser without a window: a picture, questions, two maps, messages, and how it lies on a telephone."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from flashsloth.chat import Conversation
from flashsloth.web.desk import Desk
from flashsloth.web.uploads import Limits
from tests.web.browser import Browser, find_browser
from tests.web.pictures import photo

pytest.importorskip("gradio", reason="needs flashsloth[serve]")

from tests.web.support import served, tiny_desk

PROGRAM = find_browser()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="needs Chromium or Chrome on PATH")
# What a person reads as the name of a control, from the browser's own accessibility tree.
CONTROLS = ("button", "textbox", "log", "DisclosureTriangle", "image")


@pytest.fixture(scope="module")
def desk() -> Desk:
    return tiny_desk(Limits(megabytes=0.5, megapixels=1), answer_tokens=8)


@pytest.fixture(scope="module")
def url(desk: Desk, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(desk, tmp_path_factory.mktemp("uploads")) as url:
        yield url


@pytest.fixture
def opened(url: str, tmp_path: Path) -> Iterator[Callable[..., Browser]]:
    """Opens the page in a browser of its own."""
    browsers = []

    def open_page(**view: object) -> Browser:
        assert PROGRAM is not None
        browser = Browser(PROGRAM, tmp_path / f"profile{len(browsers)}", **view)  # type: ignore[arg-type]
        browsers.append(browser)
        browser.open(url)
        browser.wait("document.querySelector('#drop input[type=file]')")
        return browser

    yield open_page
    for browser in browsers:
        browser.close()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    photo(120, 80).save(path)
    return path


@pytest.fixture
def slow(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """Each token takes a while, and there would be very many."""
    take = Conversation._step

    def slowly(conversation: Conversation, token: int) -> int:
        time.sleep(0.05)
        return take(conversation, token)

    monkeypatch.setattr(Conversation, "_step", slowly)
    monkeypatch.setattr(desk, "answer_tokens", 1900)
    return desk


def ask(browser: Browser, question: str, number: int) -> None:
    """Ask the question of this number, and wait for the end of the answer."""
    browser.type("#question textarea", question)
    browser.click("#ask")
    browser.wait(f"document.querySelectorAll('#talk .answer').length == {number}")
    browser.wait("!document.querySelector('#talk .writing') && document.querySelector('#times dl')")


def test_picture_question_answer_and_two_maps(opened: Callable[..., Browser], url: str, picture: Path) -> None:
    browser = opened()
    browser.upload("#drop input[type=file]", picture)
    browser.wait("document.querySelector('#picture img')?.naturalWidth == 640")
    ask(browser, "What is <i>in</i> the picture?", 1)
    browser.wait("document.querySelectorAll('#maps figure img').length == 2")
    first = browser.evaluate("[...document.querySelectorAll('#maps figure img')].map(one => one.src)")
    assert len(set(first)) == 2
    assert browser.evaluate("[...document.querySelectorAll('#maps img')].every(one => one.naturalWidth > 0)")
    assert browser.evaluate("document.querySelectorAll('#maps details img').length") == 9
    assert browser.evaluate("document.querySelector('#talk .answer').innerText.length > 'FlashSloth '.length")
    assert browser.evaluate("document.querySelector('#talk .question').innerText").endswith("<i>in</i> the picture?")
    assert browser.evaluate("document.querySelector('#question textarea').value") == ""

    ask(browser, "And what colour has it?", 2)
    second = browser.evaluate("[...document.querySelectorAll('#maps figure img')].map(one => one.src)")
    assert second[0] == first[0]  # pooling does not depend on the question
    assert second[1] != first[1]
    assert "before, kept" in browser.evaluate("document.querySelector('#times').innerText")

    shown = browser.evaluate("document.querySelector('#picture img').src")
    photo(90, 90, seed=1).save(picture)
    browser.upload("#buttons input[type=file]", picture)  # another picture, a new conversation
    browser.wait(f"document.querySelector('#picture img').src != {json.dumps(shown)}")
    assert not browser.evaluate("Boolean(document.querySelector('#talk p, #maps figure, #times dl'))")
    ask(browser, "What is in this one?", 1)
    browser.wait("document.querySelectorAll('#maps figure img').length == 2")

    assert browser.unnamed(CONTROLS) == []
    assert browser.errors == []
    hosts = {urlsplit(one).netloc for one in browser.requested if not one.startswith(("data:", "blob:", "about:"))}
    assert hosts == {urlsplit(url).netloc}  # no font, no script, no count of visits from anywhere else


def test_stop_is_there_while_an_answer_is_written(opened: Callable[..., Browser], picture: Path, slow: Desk) -> None:
    browser = opened()
    browser.upload("#drop input[type=file]", picture)
    browser.wait("document.querySelector('#picture img')")
    assert browser.evaluate("document.querySelector('#stop').disabled")
    browser.type("#question textarea", "What is it?")
    browser.press_enter()
    browser.wait("document.querySelector('#talk .writing') && !document.querySelector('#stop').disabled")
    browser.wait("document.querySelectorAll('#maps figure').length == 2")  # they do not wait for the end
    browser.click("#stop")
    browser.wait("document.querySelector('#message')?.innerText == 'The answer was stopped.'")
    browser.wait("document.querySelector('#stop').disabled && !document.querySelector('#talk .writing')")


def test_a_closed_page_ends_its_answer_and_its_conversation(
    opened: Callable[..., Browser], picture: Path, slow: Desk
) -> None:
    kept = len(slow.sessions)
    browser = opened()
    browser.upload("#drop input[type=file]", picture)
    browser.wait("document.querySelector('#picture img')")
    browser.type("#question textarea", "What is it?")
    browser.press_enter()
    browser.wait("document.querySelector('#talk .writing')")
    assert len(slow.sessions) == kept + 1
    session = next(reversed(slow.sessions._kept.values()))[1]
    browser.open("about:blank")
    until = time.monotonic() + 120
    while session.conversation.last is None or session.conversation.last.ended is None or len(slow.sessions) > kept:
        assert time.monotonic() < until, "it goes on"
        time.sleep(0.05)
    assert session.conversation.last.ended == "interrupted"


def test_what_cannot_be_used_gets_a_message_on_the_page(
    opened: Callable[..., Browser], picture: Path, tmp_path: Path
) -> None:
    browser = opened()
    browser.type("#question textarea", "What is it?")
    browser.click("#ask")
    browser.wait("document.querySelector('#message [role=alert]')?.innerText == 'Please choose a picture first.'")
    text = tmp_path / "text.png"
    text.write_text("no picture")
    browser.upload("#drop input[type=file]", text)
    browser.wait("document.querySelector('#message')?.innerText.includes('not a picture that can be read')")
    before, large = len(browser.requested), tmp_path / "large.bmp"
    large.write_bytes(bytes(600_000))
    browser.upload("#drop input[type=file]", large)
    browser.wait("document.querySelector('#refused')?.innerText == 'The file has 0.6 MB; 0.5 MB is the most.'")
    assert not any("/upload?" in one for one in browser.requested[before:])

    browser.upload("#drop input[type=file]", picture)
    browser.wait("document.querySelector('#picture img')")
    assert not browser.evaluate("Boolean(document.querySelector('#message p'))")
    assert browser.evaluate("document.querySelector('#refused').hidden")
    assert browser.evaluate("document.querySelector('#question textarea').value") == "What is it?"
    browser.click("#ask")
    browser.wait("document.querySelector('#talk .answer:not(.writing)')")
    assert not browser.evaluate("Boolean(document.querySelector('#message p'))")


@pytest.mark.parametrize("dark", [False, True])
def test_on_a_telephone_in_light_and_dark(opened: Callable[..., Browser], picture: Path, dark: bool) -> None:
    browser = opened(width=390, height=800, dark=dark)
    browser.upload("#drop input[type=file]", picture)
    browser.wait("document.querySelector('#picture img')")
    ask(browser, "W" * 80, 1)  # nothing to break the line at
    browser.wait("document.querySelectorAll('#maps figure').length == 2")
    assert browser.evaluate("document.documentElement.scrollWidth") <= 390
    body = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, body.strip("rgba()").split(",")[:3])) < 200) is dark
    for selector in ("#heading p.quiet", "#maps figcaption", "#times dt", "#talk .answer", "#ask"):
        assert browser.contrast(selector) >= 4.5, selector
