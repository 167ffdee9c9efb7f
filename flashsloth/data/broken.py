"""Records that cannot be used: why, how many of how many, and when there are too many to go on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# Why a record is left out. A report counts by these names.
REASONS = {
    "malformed_json": "the entry is no JSON",
    "malformed_record": "the entry is no object with a list of conversations, or a turn is no object of two strings",
    "empty_conversation": "there is no turn",
    "unknown_role": "a turn is neither human's nor gpt's",
    "wrong_order": "questions and answers do not alternate",
    "no_answer": "no question is answered",
    "not_a_caption": "captions are wanted, and this is not one question with one answer",
    "special_token": "a text holds a special token, which would stand for what it is not",
    "bad_text": "a text is not valid Unicode",
    "too_many_marks": "more <image> marks than images",
    "unmarked_image": "an image, but no <image> mark says where",
    "several_images": "more than one image",
    "image_path": "the image's name is no path within the image folder",
    "missing_image": "no such image",
    "unreadable_image": "the system cannot read the image's file",
    "not_an_image": "the file is no image of a known kind",
    "image_too_large": "more pixels than allowed (a decompression bomb, say)",
    "damaged_image": "the image is cut short or cannot be decoded",
    "too_long": "no answer begins within the maximal length",
    "damaged_shard": "a tar shard ends too early or cannot be read to its end",
}
_DETAIL = 300  # characters of a message that a report keeps


class BrokenRecord(Exception):
    """A record cannot be used. ``reason`` is a key of :data:`REASONS`."""

    def __init__(self, reason: str, detail: str) -> None:
        assert reason in REASONS, reason
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class TooManyBroken(RuntimeError):
    """More records than allowed cannot be used."""


@dataclass(frozen=True)
class Skipped:
    """A record that was left out of its batch."""

    index: int
    name: str
    reason: str
    detail: str

    @classmethod
    def of(cls, index: int, name: str, error: BrokenRecord) -> Skipped:
        detail = " ".join(error.detail.split()).encode(errors="backslashreplace").decode()
        return cls(index, name, error.reason, detail if len(detail) <= _DETAIL else detail[: _DETAIL - 3] + "...")


@dataclass(frozen=True)
class BatchReport:
    """What became of the records of one batch.

    Attributes:
        seen: records that were asked for, ``skipped`` those of them that cannot be used.
        cut: rows that were cut to the maximal length.
        tokens, padding: positions of the batch that hold a token and that hold none.
    """

    seen: int
    skipped: tuple[Skipped, ...] = ()
    cut: int = 0
    tokens: int = 0
    padding: int = 0


@dataclass
class BrokenLog:
    """Counts what batches report, lists what was skipped in a file, and stops a run that skips too much.

    Args:
        path: the list, one JSON object a line (``index``, ``name``, ``reason``, ``detail``), each record once.
            Created with the first line. None for no list.
        limit: the part of the records seen that may be skipped, 0 to 1.
        minimum: a share of fewer records says little: until so many were seen, ``limit`` of this number is allowed.
    """

    path: Path | None = None
    limit: float = 0.01
    minimum: int = 1000
    seen: int = 0
    cut: int = 0
    tokens: int = 0
    padding: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    listed: dict[int, Skipped] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0.0 <= self.limit <= 1.0:
            raise ValueError(f"limit: expected a part of all records, 0 to 1, got {self.limit}")
        if self.minimum < 0:
            raise ValueError(f"minimum: expected 0 or more records, got {self.minimum}")
        if self.path is not None:
            self.path = Path(self.path)
            self.path.unlink(missing_ok=True)  # of an earlier run; a resumed one gets it back from its state

    @property
    def skipped(self) -> int:
        return sum(self.reasons.values())

    def add(self, report: BatchReport) -> None:
        """Count a batch.

        Raises:
            TooManyBroken: with counts by reason, the first of them, and where all are listed.
        """
        self.seen += report.seen
        self.cut += report.cut
        self.tokens += report.tokens
        self.padding += report.padding
        new = [one for one in report.skipped if one.index not in self.listed]
        self.listed.update({one.index: one for one in new})
        self.reasons.update(one.reason for one in report.skipped)
        if new and self.path is not None:
            self._append(new)
        self._check(max(self.seen, self.minimum))

    def end_epoch(self) -> None:
        """The whole data set was seen, so its share counts however small it is. Raises as :meth:`add`."""
        self._check(self.seen)

    def summary(self) -> str:
        """One line for people."""
        text = f"{self.seen} records seen, {self.skipped} skipped"
        if self.reasons:
            text += f" ({self._by_reason()})"
        return text + (f", {self.cut} cut to the maximal length" if self.cut else "")

    def state_dict(self) -> dict[str, Any]:
        """All of it as JSON values, for a checkpoint."""
        counts = {name: getattr(self, name) for name in ("seen", "cut", "tokens", "padding")}
        return {**counts, "reasons": dict(self.reasons), "listed": [asdict(one) for one in self.listed.values()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint: the list is what it was then."""
        for name in ("seen", "cut", "tokens", "padding"):
            setattr(self, name, int(state[name]))
        self.reasons = Counter(state["reasons"])
        self.listed = {one["index"]: Skipped(**one) for one in state["listed"]}
        if self.path is not None:
            self.path.unlink(missing_ok=True)
            if self.listed:
                self._append(list(self.listed.values()))

    def _append(self, skipped: list[Skipped]) -> None:
        assert self.path is not None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in skipped)

    def _by_reason(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in self.reasons.most_common())

    def _check(self, base: int) -> None:
        if self.skipped <= self.limit * base:
            return
        first = next(iter(self.listed.values()))
        where = "" if self.path is None else f"; all are listed in {self.path}"
        raise TooManyBroken(
            f"data: {self.skipped} of {self.seen} records cannot be used, expected at most {self.limit:.3g} of "
            f"{base}: {self._by_reason()}; the first is {first.name}: {REASONS[first.reason]}: {first.detail}{where}"
        )
