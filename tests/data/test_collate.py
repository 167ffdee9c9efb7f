"""Batches: what the model gets of them, each record once an epoch, resuming, and the share of broken records."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flashsloth.data.broken import BatchReport, BrokenLog, Skipped, TooManyBroken
from flashsloth.data.collate import Collator, TrainingLoader, take_report
from flashsloth.data.llava import LlavaDataset, Sample
from flashsloth.data.order import EpochBatches
from flashsloth.data.records import RecordSource, open_records
from flashsloth.tiny import random_model, tiny_config
from tests.data.llava_cases import dataset_of, record, tiny_dataset, write_folder, write_json, write_shards


class Sizes:
    """A source of which only sizes and shards are read."""

    def __init__(self, sizes: Any, shards: Any = (0,)) -> None:
        self.sizes, self.shards = np.array(sizes, dtype=np.int64), np.array(shards, dtype=np.int64)


def batches(source: Any, size: int = 2, **options: Any) -> EpochBatches:
    return EpochBatches(source, size, **options)


def numbers(loader: TrainingLoader) -> list[list[int]]:
    """The answers of each batch, which are numbers; a blank row has none."""
    found = []
    for batch in loader:
        rows = [row[row != -100] for row in batch["labels"]]
        texts = [loader.dataset.processor.decode(row, skip_special_tokens=True) for row in rows if len(row)]
        found.append([int(text) for text in texts])
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 records; every fifth is text alone."""
    root = tmp_path_factory.mktemp("data")
    write_json(root / "train.json", write_folder(root, 23))
    return root


@pytest.fixture(scope="module")
def dataset(folder: Path) -> LlavaDataset:
    return tiny_dataset(open_records(folder / "train.json"))


@pytest.fixture(scope="module")
def model() -> Any:
    return random_model(tiny_config())


def loss_sum(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """As Trainer has it: a sum over tokens, divided by a number that is not of this batch."""
    return model(**{k: v for k, v in batch.items() if k != "report"}, num_items_in_batch=torch.tensor(1)).loss


# -------------------------------------------------------------------- the order


@pytest.mark.parametrize("shards", [(0,), (0, 7, 8, 40)], ids=["folder", "shards"])
@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize(("size", "world", "accumulation"), [(1, 1, 1), (4, 2, 3), (3, 5, 1), (7, 2, 2)])
def test_each_record_once_an_epoch(shards: Any, by_length: bool, size: int, world: int, accumulation: int) -> None:
    source = Sizes(np.random.default_rng(0).integers(1, 99, 101), shards)
    options = {"world_size": world, "accumulation": accumulation, "group_by_length": by_length, "window": 16}
    ranks = [list(batches(source, size, rank=rank, **options)) for rank in range(world)]
    assert {len(rank) for rank in ranks} == {len(batches(source, size, **options))}
    assert sorted(i for rank in ranks for batch in rank for i in batch) == list(range(101))
    assert all(len(batch) <= size for rank in ranks for batch in rank)
    assert all(len(batch) == size for rank in ranks for batch in rank[:-1])


@pytest.mark.parametrize("by_length", [False, True])
def test_a_step_is_the_same_however_it_is_made_up(by_length: bool) -> None:
    """8 = 8 x 1 x 1 = 2 x 2 x 2 = 1 x 4 x 2 rows x processes x accumulation."""
    source = Sizes(np.random.default_rng(0).integers(1, 99, 60))

    def steps(size: int, world: int, accumulation: int) -> list[set[int]]:
        options = {"world_size": world, "accumulation": accumulation, "group_by_length": by_length, "seed": 3}
        ranks = [list(batches(source, size, rank=rank, **options)) for rank in range(world)]
        return [
            {i for rank in ranks for batch in rank[start : start + accumulation] for i in batch}
            for start in range(0, len(ranks[0]), accumulation)
        ]

    assert len(steps(8, 1, 1)) == 8
    assert steps(8, 1, 1) == steps(2, 2, 2) == steps(1, 4, 2)


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int, **options: Any) -> list[int]:
        torch.manual_seed(seed + epoch)  # which must not matter
        one = batches(Sizes([1] * 50), seed=seed, **options)
        one.set_epoch(epoch)
        return one.order().tolist()

    assert order(1, 0) == order(1, 0, rank=1, world_size=2)
    orders = [order(0, 0), order(0, 1), order(1, 0), order(1, 1)]
    assert len({tuple(one) for one in orders}) == 4
    assert order(0, 5, shuffle=False) == list(range(50))
    # The numbers themselves, so that a checkpoint means the same with every version of every library.
    assert batches(Sizes([1] * 6), seed=7).order().tolist() == [1, 5, 4, 0, 2, 3]


def test_shards_are_read_nearly_in_order() -> None:
    one = batches(Sizes([1] * 1000, range(0, 1000, 100)), window=50)
    shard = one.order() // 100
    changes = int((shard[1:] != shard[:-1]).sum())
    assert changes == 9  # 50 divides 100, so no window spans two shards
    assert not np.array_equal(shard, np.sort(shard))
    assert (np.diff(one.order()) != 1).sum() > 900


def test_records_of_a_json_file_are_spread_among_shards() -> None:
    order = batches(Sizes([1] * 1000, [*range(500), *range(500, 1000, 50)]), window=100).order()  # ten tar files
    assert sorted(order) == list(range(1000))
    of_json = [int((part < 500).sum()) for part in np.split(order, 10)]
    assert min(of_json) >= 10
    assert max(of_json) <= 90


def test_grouping_by_length_saves_padding() -> None:
    sizes = np.random.default_rng(1).integers(20, 2000, 640)

    def padding(**options: Any) -> float:
        lengths = [sizes[batch] for batch in batches(Sizes(sizes), 8, **options)]
        return 1 - sum(one.sum() for one in lengths) / sum(one.max() * len(one) for one in lengths)

    assert padding() > 0.3
    assert padding(group_by_length=True) < 0.03
    first = [int(sizes[batch].max()) for batch in batches(Sizes(sizes), 8, group_by_length=True)]
    assert first != sorted(first)


def test_drop_last() -> None:
    one = [list(batches(Sizes([1] * 21), 2, rank=r, world_size=2, accumulation=2, drop_last=True)) for r in (0, 1)]
    assert [len(batch) for rank in one for batch in rank] == [2] * 8
    assert len({i for rank in one for batch in rank for i in batch}) == 16


def test_wrong_arguments_are_named() -> None:
    for options, message in (
        ({"rank": 2, "world_size": 2}, "rank: expected 0 to 1"),
        ({"world_size": 0}, "world_size: expected 1 or more"),
        ({"accumulation": 0}, "accumulation: expected 1 or more"),
        ({"window": 0}, "window: expected 1 or more"),
        ({"seed": -1}, "seed: expected 0 or more"),
        ({"size": 0}, "batch_size: expected 1 or more"),
        ({"size": 4, "drop_last": True}, "drop_last: expected at least 4 records"),
    ):
        with pytest.raises(ValueError, match=message):
            batches(Sizes([1, 1, 1]), **options)


def test_a_checkpoint_of_other_data_is_refused() -> None:
    state = json.loads(json.dumps(batches(Sizes([1, 2, 3]), 2, accumulation=2).state_dict()))
    batches(Sizes([1, 2, 3]), 1, world_size=2, accumulation=2).load_state_dict(state)  # the same steps
    for source, options, message in (
        (Sizes([1, 2, 4]), {"accumulation": 2}, "the records"),
        (Sizes([1, 2, 3, 4]), {"accumulation": 2}, "number of records"),
        (Sizes([1, 2, 3]), {"accumulation": 2, "seed": 1}, "the seed to be as in the checkpoint, 0"),
        (Sizes([1, 2, 3]), {"accumulation": 1}, "records of a step"),
    ):
        with pytest.raises(ValueError, match=message):
            batches(source, 2, **options).load_state_dict(state)


# -------------------------------------------------------------------- loaders


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_two_ranks_with_two_workers_see_everything_once(folder: Path, tmp_path: Path, kind: str) -> None:
    records = json.loads((folder / "train.json").read_text())
    for i, one in enumerate(records):
        one["conversations"][1]["value"] = str(i)
    if kind == "folder":
        source: RecordSource = open_records(write_json(tmp_path / "train.json", records), folder)
    else:
        source = open_records(write_shards(tmp_path, records, folder, 6))
    data = tiny_dataset(source)
    collator = Collator.of(data)

    def epoch(workers: int, number: int) -> list[list[list[int]]]:
        ranks = []
        for rank in range(2):
            loader = TrainingLoader(data, batches(source, rank=rank, world_size=2, seed=5), collator, workers=workers)
            loader.set_epoch(number)
            ranks.append(numbers(loader))
        return ranks

    ranks = epoch(2, 0)
    assert [len(rank) for rank in ranks] == [6, 6]
    assert sorted(i for rank in ranks for batch in rank for i in batch) == list(range(23))
    assert epoch(0, 0) == ranks
    other = epoch(2, 1)
    assert other != ranks
    assert sorted(i for rank in other for batch in rank for i in batch) == list(range(23))


class Counting(LlavaDataset):
    """Counts what is read in this process."""

    reads: Counter[int] = Counter()  # noqa: RUF012

    def __getitem__(self, index: int) -> Sample | Skipped:
        self.reads[index] += 1
        return super().__getitem__(index)


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name]
        for name, value in first.items()
    )


def test_resuming_reads_nothing_that_was_skipped(dataset: LlavaDataset) -> None:
    """Skipping as accelerate does it: batches of indices are left out before they are read."""
    data = Counting(dataset.source, dataset.processor)
    collator = Collator.of(data)

    def loader() -> TrainingLoader:
        one = TrainingLoader(data, batches(data.source, seed=2), collator)
        one.set_epoch(3)
        return one

    whole = list(loader())
    Counting.reads.clear()
    resumed = loader()
    rest = list(islice(iter(resumed.batch_sampler), 7, None))
    got = [collator([data[i] for i in batch]) for batch in rest]
    assert len(got) == len(whole) - 7
    assert all(same(*pair) for pair in zip(got, whole[7:], strict=True))
    assert set(Counting.reads) == {i for batch in rest for i in batch}


def test_trainers_own_skip(dataset: LlavaDataset) -> None:
    accelerate = pytest.importorskip("accelerate")
    data = Counting(dataset.source, dataset.processor)
    loader = TrainingLoader(data, batches(data.source, seed=2), Collator.of(data), workers=0)
    loader.set_epoch(1)
    whole = list(loader)
    fresh = TrainingLoader(data, batches(data.source, seed=2), Collator.of(data), workers=0)
    skipped = accelerate.skip_first_batches(fresh, 5)
    skipped.batch_sampler.batch_sampler.set_epoch(1)  # where Trainer looks for it
    Counting.reads.clear()
    got = list(skipped)
    assert len(got) == len(whole) - 5
    assert all(same(*pair) for pair in zip(got, whole[5:], strict=True))
    assert sum(Counting.reads.values()) == 23 - 10


def test_a_loader_leaves_the_random_numbers_alone(dataset: LlavaDataset) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for _ in TrainingLoader(dataset, batches(dataset.source), Collator.of(dataset), workers=1):
        pass
    assert torch.equal(torch.get_rng_state(), before)


# -------------------------------------------------------------------- batches


def test_a_batch_is_its_rows_and_padding_costs_nothing_in_attention(dataset: LlavaDataset, model: Any) -> None:
    collator = Collator.of(dataset)
    items = [dataset[i] for i in (6, 4, 1)]  # with an image, text alone, with an image
    batch = collator(items)
    assert batch["pixel_values"].shape[0] == 2
    report = batch["report"]
    assert report.tokens == int(batch["attention_mask"].sum())
    assert report.tokens + report.padding == batch["input_ids"].numel()
    assert report.padding > 0
    for implementation in ("flashsloth", "sdpa"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            together, alone = loss_sum(model, batch), sum(loss_sum(model, collator([item])) for item in items)
        assert torch.allclose(together, alone, rtol=1e-5)
    model.set_attn_implementation("flashsloth")


def test_lengths_in_multiples(dataset: LlavaDataset) -> None:
    assert Collator.of(dataset, pad_to_multiple_of=64)([dataset[0]])["input_ids"].shape[1] % 64 == 0


def test_packed_tokens_are_rounded_up_by_padding_behind_rows(dataset: LlavaDataset, model: Any) -> None:
    items = [dataset[i] for i in range(4)]
    plain, packed = (
        Collator.of(dataset, packed=True)(items),
        Collator.of(dataset, packed=True, packed_multiple=8)(items),
    )
    before, rounded = len(plain["token_rows"]), len(packed["token_rows"])
    assert rounded == -(-before // 8) * 8 > before
    assert packed["report"] == plain["report"]
    kept = torch.zeros_like(packed["attention_mask"]).flatten()
    kept[packed["token_rows"]] = 1
    kept = kept.view_as(packed["attention_mask"])
    assert torch.equal(kept, kept.cummin(1).values)  # of each row, from its first place on
    assert (kept >= packed["attention_mask"]).all()
    assert packed["cu_seqlens"].tolist() == [0, *kept.sum(1).cumsum(0).tolist()]
    assert torch.allclose(loss_sum(model, packed), loss_sum(model, plain), rtol=1e-6)
    full = Collator.of(dataset, packed=True, packed_multiple=10**6)(items)  # no more than there is
    assert len(full["token_rows"]) == full["input_ids"].numel()


def test_a_packed_batch_learns_the_same_without_padding(dataset: LlavaDataset, model: Any) -> None:
    items = [dataset[i] for i in (6, 4, 1)]
    plain, packed = Collator.of(dataset)(items), Collator.of(dataset, packed=True)(items)
    tokens = packed["report"].tokens
    assert packed["token_rows"].shape == (tokens,)
    assert packed["cu_seqlens"].tolist() == [0, *np.cumsum([len(item.row.ids) for item in items])]
    ids = [token for item in items for token in item.row.ids]
    assert packed["input_ids"].flatten()[packed["token_rows"]].tolist() == ids
    model.set_attn_implementation("flashsloth")
    with torch.no_grad():
        assert torch.allclose(loss_sum(model, packed), loss_sum(model, plain), rtol=1e-5)
        take_report(packed)
        assert model(**packed).logits.shape[:2] == (1, tokens)


def skipped(index: int, reason: str = "missing_image") -> Skipped:
    return Skipped(index, f"train.json[{index}]", reason, "why")


def test_broken_rows_are_left_out(dataset: LlavaDataset) -> None:
    collator = Collator.of(dataset)
    batch, wanted = collator([dataset[0], skipped(9), dataset[4]]), collator([dataset[0], dataset[4]])
    report, other = take_report(batch), take_report(wanted)
    assert same(batch, wanted)
    assert report is not None
    assert other is not None
    assert (report.seen, report.skipped, other.seen) == (3, (skipped(9),), 2)
    assert take_report(batch) is None


@pytest.mark.parametrize("items", [[], [skipped(1), skipped(2)]], ids=["no row left", "all broken"])
def test_an_empty_batch_is_blank(dataset: LlavaDataset, model: Any, items: list[Skipped]) -> None:
    """Every parameter takes part, and nothing is learned."""
    batch = Collator.of(dataset)(items)
    report = take_report(batch)
    assert report is not None
    assert (report.seen, report.tokens) == (len(items), 0)
    assert (batch["labels"] == -100).all()
    model.zero_grad()
    loss = loss_sum(model, batch)
    loss.backward()
    assert loss.item() == 0.0
    for name, parameter in model.named_parameters():
        if not name.startswith("vision_tower."):
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name


def test_a_batch_of_text_can_have_a_blank_image(dataset: LlavaDataset, model: Any) -> None:
    texts = [dataset[4], dataset[9]]
    plain = Collator.of(dataset)(texts)
    filled = Collator.of(dataset, always_image=True)(texts)
    assert "pixel_values" not in plain
    assert filled["pixel_values"].shape[0] == 1
    assert filled["report"].tokens == plain["report"].tokens
    gradients = []
    for batch in (plain, filled):
        model.zero_grad(set_to_none=True)
        loss_sum(model, batch).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() < gradients[1].keys()
    for name, gradient in gradients[1].items():
        wanted = gradients[0].get(name, torch.zeros_like(gradient))
        assert torch.allclose(gradient, wanted, rtol=1e-4, atol=1e-5 * max(wanted.abs().max().item(), 1e-30)), name
    with_image = [dataset[0], dataset[4]]
    first, second = Collator.of(dataset)(with_image), Collator.of(dataset, always_image=True)(with_image)
    assert same(first, second)


def test_the_blank_row_has_an_image(dataset: LlavaDataset) -> None:
    text = dataset[4]
    assert isinstance(text, Sample)
    with pytest.raises(ValueError, match="blank: expected a row with an image"):
        Collator(0, text)


# -------------------------------------------------------------------- too many broken records


def report(seen: int, *indices: int, reason: str = "missing_image") -> BatchReport:
    return BatchReport(seen, tuple(skipped(i, reason) for i in indices), tokens=seen * 10)


def test_a_run_fails_when_too_much_is_broken(tmp_path: Path) -> None:
    path = tmp_path / "out" / "broken.jsonl"
    log = BrokenLog(path)
    log.add(report(500))
    assert not path.exists()
    for i in range(10):  # ten of the first thousand are one in a hundred
        log.add(report(1, i, reason="damaged_image" if i else "malformed_json"))
    with pytest.raises(TooManyBroken) as error:
        log.add(report(1, 10))
    message = str(error.value)
    assert message.startswith("data: 11 of 511 records cannot be used, expected at most 0.01 of 1000: ")
    assert "9 damaged_image" in message
    assert "1 malformed_json" in message
    assert "the first is train.json[0]: the entry is no JSON: why" in message
    assert str(path) in message
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(11))
    assert lines[0] == {"index": 0, "name": "train.json[0]", "reason": "malformed_json", "detail": "why"}


def test_later_the_share_of_what_was_seen_counts() -> None:
    log = BrokenLog(limit=0.05, minimum=100)
    log.add(report(1000, *range(50)))
    with pytest.raises(TooManyBroken, match=r"51 of 1001 records .* at most 0\.05 of 1001"):
        log.add(report(1, 50))


def test_a_small_data_set_is_judged_at_the_end_of_its_epoch() -> None:
    log = BrokenLog()
    log.add(report(100, 3))
    log.end_epoch()
    log.add(report(50, 4))
    with pytest.raises(TooManyBroken, match="2 of 150"):
        log.end_epoch()


def test_limits() -> None:
    log = BrokenLog(limit=0.0, minimum=0)
    log.add(report(10))
    log.end_epoch()
    with pytest.raises(TooManyBroken):
        log.add(report(1, 0))
    BrokenLog(limit=1.0).add(report(5, *range(5)))
    with pytest.raises(ValueError, match=r"limit: expected a part of all records, 0 to 1, got 1\.5"):
        BrokenLog(limit=1.5)
    with pytest.raises(ValueError, match="minimum: expected 0 or more records, got -1"):
        BrokenLog(minimum=-1)


def test_a_log_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    log = BrokenLog(first, limit=1.0)
    log.add(report(4, 1))
    log.add(report(4, 2, 1))  # the next epoch's
    log.add(BatchReport(1, (Skipped(7, "odd\udcff.tar:1", "malformed_json", "why"),)))  # not every file name is Unicode
    state = json.loads(json.dumps(log.state_dict()))
    kept = first.read_text()
    log.add(report(4, 3))
    resumed = BrokenLog(second, limit=1.0)
    resumed.load_state_dict(state)
    assert second.read_text() == kept
    resumed.add(report(4, 3))
    assert resumed.state_dict() == log.state_dict()
    assert second.read_text() == first.read_text()
    assert resumed.summary() == "13 records seen, 5 skipped (4 missing_image, 1 malformed_json)"
    assert BrokenLog(first).summary() == "0 records seen, 0 skipped"
    assert not first.exists()  # another run's


def test_from_broken_files_to_the_report(tmp_path: Path) -> None:
    """All of it: workers, collator, log and file."""
    records: list[Any] = write_folder(tmp_path, 10)
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:100])
    (tmp_path / "5.png").unlink()
    records[7] = {"conversations": []}
    records[8] = record("<image>\nWho?", "x" * 500, image="8.png")
    data = dataset_of(tmp_path, records, max_length=300)
    log = BrokenLog(tmp_path / "broken.jsonl", limit=0.5)
    for batch in TrainingLoader(data, batches(data.source), Collator.of(data), workers=2):
        found = take_report(batch)
        assert found is not None
        log.add(found)
    log.end_epoch()
    lines = [json.loads(line) for line in (tmp_path / "broken.jsonl").read_text().splitlines()]
    assert {line["name"]: line["reason"] for line in lines} == {
        "train.json[2]": "damaged_image",
        "train.json[5]": "missing_image",
        "train.json[7]": "empty_conversation",
    }
    assert (log.seen, log.skipped, log.cut) == (10, 3, 1)
    assert log.summary().endswith(", 1 cut to the maximal length")
