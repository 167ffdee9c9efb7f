"""What happens on the page, without the page: a picture comes in, a question is asked, an answer is written."""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import NamedTuple

from flashsloth.chat import Conversation
from flashsloth.modeling import FlashSlothForConditionalGeneration
from flashsloth.processing import FlashSlothProcessor
from flashsloth.prompt import IMAGE_TOKEN, QUERY_TOKEN
from flashsloth.tokenization import special_tokens
from flashsloth.web.sessions import Session, Sessions
from flashsloth.web.uploads import Limits, PictureError, read_picture
from flashsloth.web.views import (
    NO_MAPS,
    maps_view,
    message_view,
    picture_view,
    small_copy,
    talk_view,
    times_view,
)

QUESTION_TOKENS, QUESTION_LETTERS = 256, 8000
ANSWER_TOKENS = 256
NO_PICTURE = "Please choose a picture first."
UNEXPECTED = "Something went wrong here; it is written to the log. Please try again."

logger = logging.getLogger(__name__)


class View(NamedTuple):
    """What to show, as HTML; None leaves a part as it is. ``done``: what was sent was taken; clear its field."""

    message: str | None = None
    picture: str | None = None
    talk: str | None = None
    maps: str | None = None
    times: str | None = None
    done: bool = False


class Desk:
    """One model and everybody's conversations with it. One call of :meth:`ask` at a time.

    Nothing raises: what cannot be done is a message in the view that comes back.
    """

    def __init__(
        self,
        model: FlashSlothForConditionalGeneration,
        processor: FlashSlothProcessor,
        limits: Limits,
        sessions: Sessions | None = None,
        *,
        image_hd: bool | None = None,
        answer_tokens: int = ANSWER_TOKENS,
    ) -> None:
        self.model, self.processor, self.limits = model, processor, limits
        self.image_hd, self.answer_tokens = image_hd, answer_tokens
        self.sessions = Sessions() if sessions is None else sessions
        self._reserved = [IMAGE_TOKEN, QUERY_TOKEN, *special_tokens(processor.tokenizer)]

    def open(self, key: str, path: str | os.PathLike[str]) -> View:
        """Begin a conversation about the picture in ``path``, which is deleted, whatever it holds."""
        try:
            picture = read_picture(Path(path), self.limits)
            conversation = Conversation(self.model, self.processor, image_hd=self.image_hd)
            conversation.set_image(picture)
            small = small_copy(picture)
        except PictureError as error:
            return _refused(str(error))
        except Exception:
            logger.exception("a picture could not be used")
            return _refused(UNEXPECTED)
        finally:
            Path(path).unlink(missing_ok=True)
        self.sessions.put(key, Session(small, conversation))
        return View(message="", picture=picture_view(small), talk="", maps=NO_MAPS, times="", done=True)

    def ask(self, key: str, question: str) -> Generator[View, None, None]:
        """The views while an answer is written. Closing the iterator, or :meth:`stop`, ends the answer."""
        session = self.sessions.get(key)
        if session is None:
            yield _refused(NO_PICTURE)
            return
        problem = self._problem(question)
        if problem:
            yield _refused(problem)
            return
        session.stop.clear()
        try:
            yield from self._answer(session, question.strip())
        except ValueError as error:  # too long a conversation
            yield _refused(_for_people(str(error)))._replace(talk=talk_view(session.turns))
        except Exception:
            logger.exception("a question could not be answered")
            yield _refused(UNEXPECTED)._replace(talk=talk_view(session.turns))

    def stop(self, key: str) -> None:
        """End the answer that is being written for ``key``, if one is."""
        session = self.sessions.get(key)
        if session is not None:
            session.stop.set()

    def close(self, key: str) -> None:
        """The page was closed: its conversation is forgotten."""
        self.sessions.drop(key)

    def _answer(self, session: Session, question: str) -> Iterator[View]:
        conversation, turns = session.conversation, session.turns
        pieces = conversation.ask(question, max_new_tokens=self.answer_tokens)
        turns.append((question, ""))
        mapped = False
        try:
            yield View(message="", talk=talk_view(turns, writing=True), done=True)
            for piece in pieces:
                turns[-1] = (question, turns[-1][1] + piece)
                # The maps belong to the question, and are there before the answer is.
                maps = None if mapped else maps_view(session.picture, conversation, question)
                mapped = True
                yield View(talk=talk_view(turns, writing=True), maps=maps)
                if session.stop.is_set():
                    break
        finally:
            conversation.stop()  # also where the one who reads has gone
            del turns[len(conversation.messages) // 2 :]  # a question of which no answer was begun
        maps = None if mapped else maps_view(session.picture, conversation, question)
        times = times_view(conversation.last, self._visual_tokens(conversation))
        stopped = "The answer was stopped." if session.stop.is_set() else ""
        yield View(message=message_view(stopped), talk=talk_view(turns), maps=maps, times=times)

    def _visual_tokens(self, conversation: Conversation) -> tuple[int, int] | None:
        context = conversation.image_context
        return None if context is None else (context.features.shape[1], context.tokens.shape[1])

    def _problem(self, question: str) -> str:
        """Why a question cannot be asked; empty where it can."""
        if not isinstance(question, str) or not question.strip():
            return "Please write a question."
        too_long = f"The question is too long; {QUESTION_TOKENS} tokens is the most"
        if len(question) > QUESTION_LETTERS:
            return f"{too_long}."
        reserved = next((token for token in self._reserved if token in question), None)
        if reserved is not None:
            return f"The question holds {reserved}, which means something else to the model. Please leave it out."
        try:
            tokens = len(self.processor.tokenizer(question, add_special_tokens=False)["input_ids"])
        except Exception:  # half of a surrogate pair
            return "The question has letters that cannot be read."
        return f"{too_long}, this one has {tokens}." if tokens > QUESTION_TOKENS else ""


def _refused(text: str) -> View:
    return View(message=message_view(text, error=True))


def _for_people(error: str) -> str:
    """The conversation's error without the name of the argument in front."""
    _, found, rest = error.partition(": ")
    text = rest if found else error
    return text[:1].upper() + text[1:] + "."
