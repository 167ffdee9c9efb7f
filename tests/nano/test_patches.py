"""Labels of patches: what is drawn where."""

from __future__ import annotations

import numpy as np
import pytest

from flashsloth.data.sight.dice import Dice
from flashsloth.data.sight.paint import paint
from flashsloth.data.sight.scene import Scene, Thing
from flashsloth.data.sight.sources import load_sources
from flashsloth.nano.crowd import crowd
from flashsloth.nano.patches import INKS, KINDS, View, label_patches, views

pytest.importorskip("sklearn")


def test_views_are_those_of_the_image_processor() -> None:
    whole, quarters = views(216, 108)
    assert whole == View(0.5)
    assert [(v.scale, v.left, v.top) for v in quarters] == [(1, 0, 0), (1, 108, 0), (1, 0, 108), (1, 108, 108)]


def test_shape_in_the_whole_and_in_a_quarter() -> None:
    scene = Scene("shapes", 216, (Thing("shape", "star", "red", 150, 60, (20, 20)),))
    whole, quarters = views(216, 108)
    labels = label_patches(scene, whole, 18, 6, upright=True)
    rows, columns = np.nonzero(labels.kind)
    assert set(labels.kind[rows, columns]) == {KINDS.index("star")}
    assert set(labels.ink[rows, columns]) == {INKS.index("red")}
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (4, 5, 11, 13)
    offset = labels.geometry[4, 11]  # this patch's centre is at 69, 27, the star's at 75, 30, of 108
    assert offset == pytest.approx([6 / 108, 3 / 108, 10 / 108, 10 / 108, 0, 75 / 108, 30 / 108])
    assert not labels.spelling.any()
    assert not label_patches(scene, quarters[0], 18, 6, upright=True).kind.any()
    near = label_patches(scene, quarters[1], 18, 6, upright=True)
    assert near.kind.any()
    assert near.geometry[near.kind > 0][0, 2] == pytest.approx(20 / 108)


def test_letters_are_where_their_ink_is() -> None:
    """Ink in the middle of a patch is that of the letter it is labelled with."""
    word = Thing("word", "owl", "blue", 108, 108, (70, 30), source=44, face="DejaVuSans-Bold")
    labels = label_patches(Scene("words", 216, (word,)), View(0.5), 18, 6, upright=True)
    middle = labels.letter[9].flatten()
    spelt = [chr(96 + code) for code in middle[middle > 0]]
    assert "".join(dict.fromkeys(spelt)) == "owl"
    spelt_everywhere = labels.spelling[labels.kind > 0]
    assert {tuple(codes) for codes in spelt_everywhere.tolist()} == {(15, 23, 12, 0, 0)}  # o, w, l
    assert not labels.spelling[labels.kind == 0].any()
    places = labels.place[9].flatten()
    assert np.array_equal(places[places > 0], np.sort(places[places > 0]))
    image, _ = paint(Scene("words", 216, (word,)), Dice(5), "train", load_sources())
    pixels = np.asarray(image.resize((108, 108))).astype(int)
    blue = pixels[..., 2] - pixels[..., 0] > 60
    ink = blue.reshape(18, 6, 18, 6)[:, 2:4, :, 2:4].all((1, 3))
    assert ink.sum() > 4
    assert (labels.letter.any(-1) | ~ink).all()


def test_crowds_are_of_the_training_split_and_full() -> None:
    sources = load_sources()
    scene = crowd(Dice("crowd", 1), 216, sources)
    assert len(scene.things) > 5
    for thing in scene.things:
        assert thing.half[0] <= thing.x + 1 <= 218 - thing.half[0]
        assert thing.y + thing.half[1] <= 217
        if thing.family == "digit":
            assert thing.source in sources.digit_ids["train"]
    assert scene == crowd(Dice("crowd", 1), 216, sources)
