"""What is kept for each open page, and no more than so many of them."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from PIL import Image

from flashsloth.chat import Conversation


@dataclass
class Session:
    """One picture and the conversation about it.

    Attributes:
        picture: a small copy to show; the conversation holds what the model made of the whole one.
        turns: questions and answers so far, the last answer perhaps unfinished.
        stop: set to end the answer that is being written.
    """

    picture: Image.Image
    conversation: Conversation
    turns: list[tuple[str, str]] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)


class Sessions:
    """At most ``limit`` sessions, the longest unused making room; one unused for ``idle`` seconds is dropped too."""

    def __init__(self, limit: int = 16, idle: float = 1800, clock: Callable[[], float] = time.monotonic) -> None:
        if limit < 1:
            raise ValueError(f"limit: expected at least one session, got {limit}")
        self.limit, self.idle, self._clock = limit, idle, clock
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, tuple[float, Session]] = OrderedDict()  # longest unused first

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: str) -> Session | None:
        with self._lock:
            self._drop_idle()
            if key not in self._kept:
                return None
            _, session = self._kept.pop(key)
            self._kept[key] = self._clock(), session
            return session

    def put(self, key: str, session: Session) -> None:
        with self._lock:
            self._end(key)
            self._drop_idle()
            while len(self._kept) >= self.limit:
                self._end(next(iter(self._kept)))
            self._kept[key] = self._clock(), session

    def drop(self, key: str) -> None:
        with self._lock:
            self._end(key)

    def _drop_idle(self) -> None:
        latest = self._clock() - self.idle
        for key in [key for key, (used, _) in self._kept.items() if used < latest]:
            self._end(key)

    def _end(self, key: str) -> None:
        """An answer still being written for a session that is gone would be written for nobody."""
        found = self._kept.pop(key, None)
        if found is not None:
            found[1].stop.set()
