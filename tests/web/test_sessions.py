"""How many conversations are kept, and which go first."""

from __future__ import annotations

import pytest

from flashsloth import tiny
from flashsloth.chat import Conversation
from flashsloth.web.sessions import Session, Sessions
from tests.web.pictures import photo


@pytest.fixture(scope="module")
def conversation() -> Conversation:
    config = tiny.tiny_config()
    return Conversation(tiny.random_model(config), tiny.processor_for(config))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_longest_unused_makes_room(conversation: Conversation) -> None:
    kept = Sessions(limit=2)
    first, second, third = (Session(photo(), conversation) for _ in range(3))
    kept.put("first", first)
    kept.put("second", second)
    assert kept.get("first") is first  # now the second is the longest unused
    kept.put("third", third)
    assert len(kept) == 2
    assert kept.get("second") is None
    assert second.stop.is_set()  # what is being written for it ends
    assert (kept.get("first"), kept.get("third")) == (first, third)
    assert not first.stop.is_set()


def test_a_new_picture_takes_the_place_of_the_old_one(conversation: Conversation) -> None:
    kept = Sessions(limit=2)
    sessions = [Session(photo(), conversation) for _ in range(3)]
    kept.put("other", sessions[0])
    kept.put("same", sessions[1])
    kept.put("same", sessions[2])
    assert kept.get("other") is sessions[0]
    assert kept.get("same") is sessions[2]
    assert sessions[1].stop.is_set()


def test_what_is_not_used_is_dropped(conversation: Conversation) -> None:
    clock = Clock()
    kept = Sessions(limit=5, idle=100, clock=clock)
    kept.put("a", Session(photo(), conversation))
    clock.now = 60
    kept.put("b", Session(photo(), conversation))
    clock.now = 110
    assert kept.get("b") is not None
    assert len(kept) == 1
    clock.now = 211
    assert kept.get("b") is None


def test_dropping_twice_and_no_room_at_all(conversation: Conversation) -> None:
    kept = Sessions()
    kept.put("a", Session(photo(), conversation))
    kept.drop("a")
    kept.drop("a")
    assert kept.get("a") is None
    with pytest.raises(ValueError, match="limit: expected at least one session, got 0"):
        Sessions(limit=0)
