"""Questions that are left out leave the others as they are, with their picture."""

from __future__ import annotations

from typing import Any

from flashsloth.nano.selection import EASY, SHARE, fewer_easy, only

KINDS = ("color", "count", "word", "shape", "relation")


def record(index: int, kinds: tuple[str, ...] = KINDS) -> dict[str, Any]:
    said = []
    for number, kind in enumerate(kinds):
        said.append({"from": "human", "value": ("" if number else "<image>\n") + f"{kind} of {index}?"})
        said.append({"from": "gpt", "value": f"{kind} {index}"})
    return {"id": index, "image": f"{index}.png", "conversations": said, "kinds": list(kinds)}


def test_only_what_is_wanted() -> None:
    found = list(only([record(0), record(1, ("color",)), record(2, ("word", "count"))], ("word", "digit")))
    assert [one["id"] for one in found] == [0, 2]
    assert found[0]["conversations"] == [
        {"from": "human", "value": "<image>\nword of 0?"},
        {"from": "gpt", "value": "word 0"},
    ]
    assert [one["kinds"] for one in found] == [["word"], ["word"]]
    assert found[0]["image"] == "0.png"


def test_a_part_of_the_easy_questions_and_all_others() -> None:
    records = [record(index) for index in range(1000)]
    found = list(fewer_easy(records, without=("relation",)))
    assert [one["id"] for one in found] == list(range(1000))
    easy = 0
    for one in found:
        assert [kind for kind in one["kinds"] if kind not in EASY] == ["count", "word"]
        said = [turn["value"] for turn in one["conversations"]]
        assert said[1::2] == [f"{kind} {one['id']}" for kind in one["kinds"]]
        assert [text.removeprefix("<image>\n") for text in said[::2]] == [
            f"{kind} of {one['id']}?" for kind in one["kinds"]
        ]
        assert said[0].startswith("<image>\n")
        assert "<image>" not in "".join(said[1:])
        easy += len(one["kinds"]) - 2
    assert abs(easy / 2000 - SHARE) < 0.04  # four standard deviations
    assert found == list(fewer_easy(records, without=("relation",)))
    assert records == [record(index) for index in range(1000)]


def test_a_record_of_easy_questions_alone_may_go() -> None:
    found = list(fewer_easy([record(index, ("color",)) for index in range(100)]))
    assert 5 < len(found) < 50
    assert all(one["kinds"] == ["color"] for one in found)
