"""More questions on training pictures: of the same pictures, right, and none that gives another away."""

from __future__ import annotations

import pytest

pytest.importorskip("sklearn")

from flashsloth.data.sight import load_sources, make_sample
from flashsloth.data.sight.questions import _FORMS
from flashsloth.data.sight.sample import Settings
from flashsloth.nano.questions import more_questions, more_records

PICTURES = 40


def test_questions_are_on_the_picture_and_no_two_alike() -> None:
    sources, settings = load_sources(), Settings()
    more = fewer = 0
    for index in range(PICTURES):
        sample, asked = make_sample(settings, "train", index, sources), more_questions(settings, index, sources)
        assert len({one.text for one in asked}) == len(asked)
        forms = {one.form for one in asked}
        assert not ("shows" in forms and forms & {"word", "digit", "greatest"})
        for one in asked:
            if one.form == "shows":  # which other words it asks for is drawn
                continue
            possible = _FORMS[one.form][1](sample.scene, None, "train")  # type: ignore[arg-type]
            assert (one.text, one.answer) in list(possible)
        if sample.record["kinds"] != ["describe"]:
            more, fewer = more + len(asked), fewer + len(sample.questions)
    assert more > 1.5 * fewer


def test_records_keep_their_pictures_and_descriptions() -> None:
    settings, sources = Settings(), load_sources()
    records = [make_sample(settings, "train", index, sources).record for index in range(12)]
    found = list(more_records(records, settings, 1))
    assert [one["image"] for one in found] == [one["image"] for one in records]
    for one, before in zip(found, records, strict=True):
        said = [turn["value"] for turn in one["conversations"]]
        assert len(said) == 2 * len(one["kinds"])
        assert said[0].startswith("<image>\n")
        assert "<image>" not in "".join(said[1:])
        if before["kinds"] == ["describe"]:
            assert one == before
    assert sum(len(one["kinds"]) for one in found) > sum(len(one["kinds"]) for one in records)
