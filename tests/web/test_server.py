"""The server, asked over HTTP: answers, everything that is no picture or no question, and what must not get out."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from flashsloth.chat import Conversation
from flashsloth.web.desk import NO_PICTURE, Desk
from flashsloth.web.sessions import Sessions
from flashsloth.web.uploads import Limits
from tests.support import ROOT
from tests.web.client import Client, Refused
from tests.web.pictures import bomb, photo

pytest.importorskip("gradio", reason="needs flashsloth[serve]")

from tests.web.support import served, tiny_desk

MEGABYTES = 0.2


class Served(NamedTuple):
    url: str
    desk: Desk
    uploads: Path

    def client(self) -> Client:
        return Client(self.url)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    uploads = tmp_path_factory.mktemp("uploads")
    desk = tiny_desk(Limits(megabytes=MEGABYTES, megapixels=1), Sessions(limit=3))
    with served(desk, uploads) as url:
        yield Served(url, desk, uploads)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.png"
    photo().save(path)
    return path


def wait_for(true: Callable[[], bool], what: str, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, what
        time.sleep(0.02)


def left_on_disk(server: Served) -> list[Path]:
    return [path for path in server.uploads.rglob("*") if not path.is_dir()]


def test_two_questions_on_a_picture_are_answered_as_in_a_conversation(server: Served, good: Path) -> None:
    client = server.client()
    assert client.picture(good) == ""
    assert client.shown["picture"].startswith('<img class="picture" src="data:image/jpeg;base64,')
    conversation = Conversation(server.desk.model, server.desk.processor)
    conversation.set_image(Image.open(good))
    expected = []
    for question in ("What is <b>this</b> & that?", "And where?"):
        expected.append("".join(conversation.ask(question, max_new_tokens=server.desk.answer_tokens)))
        assert client.ask(question) == ""
        assert client.answers() == expected
        assert client.shown["maps"].count("<figure>") == 2
        assert client.shown["maps"].count("<img") == 2 + 9
    assert "What is &lt;b&gt;this&lt;/b&gt; &amp; that?" in client.shown["talk"]
    assert "before, kept" in client.text("times")
    assert not left_on_disk(server)


def test_the_answer_comes_in_pieces(server: Served, good: Path) -> None:
    client = server.client()
    client.picture(good)
    seen = []
    for kind in client.events("ask", ["What is it?"]):
        seen.append((kind, "writing" in client.shown["talk"], len((client.answers() or [""])[-1])))
    assert len([kind for kind, writing, _ in seen if kind == "generating" and writing]) > 3
    assert len({length for _, _, length in seen}) > 3
    assert not seen[-1][1]


def test_files_that_are_no_picture_get_a_message_and_the_server_goes_on(
    server: Served, good: Path, tmp_path: Path
) -> None:
    photo().save(tmp_path / "whole.jpg")
    frames = [photo(seed=seed) for seed in range(3)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    sent = {
        "text.png": (b"I am a text. " * 20, "not a picture that can be read"),
        "bomb.png": (bomb(9_000, 9_000), "81 megapixels; 1 is the most"),
        "larger bomb.png": (bomb(60_000, 60_000), "too large; 1 megapixels"),
        "cut.jpg": ((tmp_path / "whole.jpg").read_bytes()[:700], "damaged or incomplete"),
        "empty.png": (b"", "is empty"),
        "page.html": (b"<script>alert(1)</script>", "Please send PNG, JPEG"),
        "drawing.svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "Please send PNG, JPEG"),
    }
    client = server.client()
    for name, (data, message) in sent.items():
        (tmp_path / "sent").write_bytes(data)
        assert message in client.picture(tmp_path / "sent", name), name
        assert 'role="alert"' in client.shown["message"]
        assert client.ask("What is it?") == NO_PICTURE
        other = server.client()
        assert other.picture(good) == ""
        assert other.ask("What is it?") == ""
        assert other.answers()[0]
    assert client.picture(tmp_path / "moving.gif") == ""
    assert client.ask("What is it?") == ""
    assert not left_on_disk(server)


def test_too_many_bytes_are_refused_while_they_come(server: Served, good: Path) -> None:
    client = server.client()
    for size in (int(MEGABYTES * 1e6) + 100, int(MEGABYTES * 1e6) + 100_000, 30_000_000):
        # The server answers and closes before a large body is sent; that too is an end to it.
        with pytest.raises((Refused, OSError)) as refused:
            client.upload(bytes(size), "large.png")
        if isinstance(refused.value, Refused):
            assert refused.value.status == 413
            assert "large" in refused.value.text or "exceeded" in refused.value.text
    assert not left_on_disk(server)
    assert client.picture(good) == ""


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("", "Please write a question."),
        (" \n\t ", "Please write a question."),
        ("why " * 65, "too long; 256 tokens is the most, this one has 260"),
        ("w" * 50_000, "too long; 256 tokens is the most."),
        ("What is <image> here?", "holds <image>, which means something else"),
        ("What <learnable></s>?", "holds <learnable>, which means"),
        ("half a letter \ud800", "letters that cannot be read"),
    ],
)
def test_questions_that_are_none_get_a_message(server: Served, good: Path, question: str, message: str) -> None:
    client = server.client()
    client.picture(good)
    assert message in client.ask(question)
    assert client.answers() == []
    assert client.ask("What is it?") == ""
    assert len(client.answers()) == 1


def test_a_conversation_may_be_too_long(server: Served, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.desk.model.config.text_config, "max_position_embeddings", 250)
    client = server.client()
    client.picture(good)
    assert client.ask("What is it?") == ""
    answers = client.answers()
    assert "Expected a conversation of less than 250 tokens" in client.ask("And what is that? " * 8)
    assert client.answers() == answers
    client.picture(good)  # a new conversation
    assert client.ask("What is it?") == ""


def test_a_fault_is_a_message_too(server: Served, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise RuntimeError("secret")

    client = server.client()
    client.picture(good)
    with monkeypatch.context() as patched:
        patched.setattr(Conversation, "_prefill", fail)
        assert "Something went wrong here" in client.ask("What is it?")
    assert "secret" not in str(client.shown)
    assert client.ask("What is it?") == ""
    assert len(client.answers()) == 1


def test_two_people_do_not_see_each_other(server: Served, tmp_path: Path) -> None:
    clients = [server.client(), server.client()]
    for number, client in enumerate(clients):
        photo(seed=number).save(tmp_path / f"{number}.png")
        client.picture(tmp_path / f"{number}.png")
    asked = [threading.Thread(target=client.ask, args=(f"Question {n}",)) for n, client in enumerate(clients)]
    for thread in asked:
        thread.start()
    for thread in asked:
        thread.join(120)
    for number, client in enumerate(clients):
        assert f"Question {number}" in client.shown["talk"]
        assert f"Question {1 - number}" not in client.shown["talk"]
        assert client.answers()[0]


def test_only_so_many_conversations_are_kept(server: Served, good: Path) -> None:
    clients = [server.client() for _ in range(4)]
    for client in clients:
        client.picture(good)
    assert len(server.desk.sessions) == 3
    assert clients[0].ask("What is it?") == NO_PICTURE
    assert clients[3].ask("What is it?") == ""


# ---- an answer that nobody wants any more


@pytest.fixture
def slow(server: Served, monkeypatch: pytest.MonkeyPatch) -> Served:
    """Each token takes a while, and there would be very many."""
    step = Conversation._step

    def slowly(conversation: Conversation, token: int) -> int:
        time.sleep(0.05)
        return step(conversation, token)

    monkeypatch.setattr(Conversation, "_step", slowly)
    monkeypatch.setattr(server.desk, "answer_tokens", 1900)
    return server


def under_way(server: Served, good: Path) -> tuple[Client, Conversation, Iterator[str]]:
    """A client whose answer is being written."""
    client = server.client()
    client.picture(good)
    session = server.desk.sessions.get(client.key)
    assert session is not None
    events = client.events("ask", ["What is it?"])
    while not (client.answers() and client.answers()[0]):
        next(events)
    return client, session.conversation, events


def ended(conversation: Conversation) -> bool:
    return conversation.last is not None and conversation.last.ended == "interrupted"


def test_stop_ends_an_answer_and_keeps_what_was_said(slow: Served, good: Path) -> None:
    client, conversation, events = under_way(slow, good)
    client.begin("stop", [])
    for _ in events:
        pass
    assert ended(conversation)
    assert client.text("message") == "The answer was stopped."
    assert client.answers() == [conversation.last.text if conversation.last else ""]
    assert len(conversation.messages) == 2


def test_a_cancelled_request_stops_generating(slow: Served, good: Path) -> None:
    client = slow.client()
    client.picture(good)
    session = slow.desk.sessions.get(client.key)
    assert session is not None
    event = client.begin("ask", ["What is it?"])
    wait_for(lambda: session.conversation.last is not None and bool(session.conversation.last.text), "no answer begins")
    client.cancel("ask", event)
    wait_for(lambda: ended(session.conversation), "generation goes on")
    assert len(session.conversation.last.ids if session.conversation.last else ()) < 1000


def test_a_client_that_goes_away_stops_generating(slow: Served, good: Path) -> None:
    _, conversation, events = under_way(slow, good)
    events.close()  # type: ignore[attr-defined]
    wait_for(lambda: ended(conversation), "generation goes on")


def test_after_all_that_the_next_one_is_answered(server: Served, good: Path) -> None:
    client = server.client()
    client.picture(good)
    assert client.ask("What is it?") == ""
    assert client.answers()[0]


# ---- what must not get out


@pytest.mark.parametrize(
    "path",
    [
        "gradio_api/file=/etc/passwd",
        "gradio_api/file=pyproject.toml",
        "file=/etc/passwd",
        "assets/../../../../../../../../etc/passwd",
        "assets/%2e%2e/%2e%2e/%2e%2e/gradio/__init__.py",
        "static/..%2f..%2f..%2froutes.py",
        "static//etc/passwd",
        "assets//etc/passwd",
        "gradio_api/proxy=http://127.0.0.1:1/",
    ],
)
def test_no_file_of_the_machine_is_served(server: Served, path: str) -> None:
    with pytest.raises(Refused) as refused:
        server.client().get(path)
    assert refused.value.status in (403, 404)
    assert "root:" not in refused.value.text


def test_an_upload_is_not_served_either(server: Served, good: Path) -> None:
    client = server.client()
    uploaded = client.upload(good.read_bytes(), "good.png")
    assert Path(uploaded).is_file()
    with pytest.raises(Refused):
        client.get(f"gradio_api/file={uploaded}")
    assert client.open(uploaded) == ""
    assert not Path(uploaded).exists()
    assert "no longer there" in client.open(uploaded)


@pytest.mark.parametrize("path", ["/etc/passwd", "pyproject.toml", "http://127.0.0.1:1/a.png", "../../etc/passwd"])
def test_no_other_file_can_be_opened(server: Served, path: str) -> None:
    with pytest.raises(Refused) as refused:
        server.client().open(path)
    assert refused.value.status == 403


def test_the_page_names_no_other_machine(server: Served) -> None:
    page = server.client().get("")
    assert "fonts.googleapis" not in page
    assert "cdnjs" not in page
    assert str(server.uploads) not in page
    assert str(ROOT) not in page
    assert 'analytics_enabled":true' not in page.replace(" ", "")
