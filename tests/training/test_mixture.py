"""Sources with one tile an image and with five in one run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("accelerate")

from flashsloth.data.broken import Skipped
from flashsloth.data.collate import Collator
from flashsloth.data.order import EpochBatches
from flashsloth.tiny import processor_for, tiny_config
from flashsloth.training.mixture import MixedBatches, Mixture
from tests.training.cases import configured, prepare

PLAIN, HD = {"records": "data/train.json"}, {"records": "data/train.json", "image_hd": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("mixture"), 22)


def mixture(folder: Path, *sources: dict[str, Any]) -> Mixture:
    return Mixture(configured(folder, data=list(sources)), processor_for(tiny_config()), 500)


def test_one_kind_is_one_order(folder: Path) -> None:
    data = mixture(folder, PLAIN | {"repeat": 2}, PLAIN)
    batches = data.batches(4, 1)
    assert isinstance(batches, EpochBatches)
    assert len(data) == 66
    assert sorted(i for batch in batches for i in batch) == list(range(66))
    # A record that comes again is the same row.
    np.testing.assert_array_equal(data[3].pixel_values, data[25].pixel_values)
    assert [data[i].index for i in (3, 25, 47)] == [3, 25, 47]


@pytest.mark.parametrize(("size", "world", "accumulation"), [(8, 1, 1), (2, 2, 2), (1, 4, 2), (4, 1, 2)])
def test_each_step_is_of_one_kind_however_it_is_made_up(folder: Path, size: int, world: int, accumulation: int) -> None:
    data = mixture(folder, PLAIN, HD)

    def steps(size: int, world: int, accumulation: int) -> list[list[int]]:
        ranks = [list(data.batches(size, accumulation, rank=r, world_size=world, seed=3)) for r in range(world)]
        assert {len(rank) for rank in ranks} == {6 * accumulation}
        starts = range(0, len(ranks[0]), accumulation)
        return [sorted(i for rank in ranks for batch in rank[s : s + accumulation] for i in batch) for s in starts]

    found = steps(size, world, accumulation)
    assert found == steps(8, 1, 1)
    assert sorted(i for step in found for i in step) == list(range(44))
    kinds = [{i >= 22 for i in step} for step in found]
    assert all(len(kind) == 1 for kind in kinds)
    assert [kind.pop() for kind in kinds] != [False] * 3 + [True] * 3


def test_epochs_and_seeds_differ(folder: Path) -> None:
    data = mixture(folder, PLAIN, HD)

    def order(seed: int, epoch: int) -> list[list[int]]:
        batches = data.batches(2, 1, seed=seed)
        assert isinstance(batches, MixedBatches)
        batches.set_epoch(epoch)
        return list(batches)

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({str(one) for one in orders}) == 4
    assert order(1, 1) == orders[3]
    kinds = [[batch[0] >= 22 for batch in one] for one in orders]
    assert len({str(one) for one in kinds}) > 1


def test_batches_have_one_number_of_tiles(folder: Path) -> None:
    data = mixture(folder, HD, PLAIN)
    collate = Collator(data.parts[0].processor.tokenizer.pad_token_id, data.blank(), packed=True)
    tiles = set()
    for indices in data.batches(4, 2):
        batch = collate([data[i] for i in indices])
        if "pixel_values" in batch:
            tiles.add(batch["pixel_values"].shape[1])
    assert tiles == {1, 5}


def test_a_broken_record_is_named_in_its_source(tmp_path: Path) -> None:
    prepare(tmp_path, 22)
    (tmp_path / "data" / "3.png").unlink()
    data = mixture(tmp_path, PLAIN, HD)
    broken = [item for item in (data[i] for i in range(44)) if isinstance(item, Skipped)]
    assert [(one.index, one.name, one.reason) for one in broken] == [
        (3, "train.json[3]", "missing_image"),
        (25, "train.json[3]", "missing_image"),
    ]


def test_a_checkpoint_of_other_sources_is_refused(folder: Path) -> None:
    both, one = mixture(folder, PLAIN, HD), mixture(folder, PLAIN)
    state = both.batches(2, 1).state_dict()
    both.batches(2, 1).load_state_dict(state)
    with pytest.raises(ValueError, match="the records of a step"):
        both.batches(4, 1).load_state_dict(state)
    mixed = both.batches(2, 1)
    with pytest.raises(ValueError, match="data: expected sources of 2 numbers of tiles"):
        mixed.load_state_dict(one.batches(2, 1).state_dict())
