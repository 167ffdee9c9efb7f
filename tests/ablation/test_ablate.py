"""``flashsloth ablate``: same budget for all, runs that repeat bit for bit, nothing mixed, wrong input named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flashsloth.ablation import command, material, training
from flashsloth.ablation.flops import count
from flashsloth.ablation.material import Material
from flashsloth.ablation.scoring import answers, request
from flashsloth.ablation.settings import read_settings
from flashsloth.ablation.training import Rows, learning_rate, order
from flashsloth.ablation.variants import choose, processor_of, variants_of
from flashsloth.cli import main
from flashsloth.modeling import FlashSlothForConditionalGeneration
from flashsloth.tiny import random_model, tiny_config
from tests.ablation.cases import COUNTS, make_data, make_model, write_config
from tests.support import threads

USUAL = ["none", "average", "shuffle", "attention", "queries", "layer-2", "queries-3", "queries-27"]
USUAL += ["window-2", "window-4"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data and a configuration."""
    folder = tmp_path_factory.mktemp("ablation")
    make_model(folder / "model")
    make_data(folder / "data")
    write_config(folder)
    return folder


@pytest.fixture(scope="module")
def done(place: Path) -> Path:
    """Two variants with two seeds each, from the command line."""
    out = place / "done"
    with threads(1):
        assert main(["ablate", *_arguments(place, out)]) == 0
    return out


def _arguments(place: Path, out: Path, *more: str) -> list[str]:
    chosen = ["--variants", "none,queries", "--seeds", "0,1"]
    return ["--config", str(place / "config.yaml"), "--out", str(out), *chosen, *more]


def _runs(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out / "runs").iterdir())}


# ---- the runs ----


def test_all_variants_see_the_same_pictures_in_the_same_order(done: Path) -> None:
    runs = [json.loads(text) for text in _runs(done).values()]
    assert [(run["variant"], run["seed"]) for run in runs] == [("none", 0), ("none", 1), ("queries", 0), ("queries", 1)]
    orders = {run["seed"]: {one["order"] for one in runs if one["seed"] == run["seed"]} for run in runs}
    assert all(len(found) == 1 for found in orders.values())
    assert orders[0] != orders[1]
    assert len({json.dumps(run["settings"]) for run in runs}) == 1
    assert {(run["variant"], run["visual_tokens"], run["queries"]) for run in runs} == {
        ("none", 36, 0),
        ("queries", 4, 9),
    }
    for run in runs:
        assert len(run["losses"]) == 2
        assert all(np.isfinite(run["losses"]))
        assert sum(one["asked"] for one in run["scores"].values()) == len(_questions(done.parent))
        assert all(0 <= one["right"] <= one["asked"] for one in run["scores"].values())
        assert not any(str(done.parent) in json.dumps(value) for value in run.values())


def _questions(place: Path) -> list[Any]:
    return Material(read_settings(place / "config.yaml"), place / "unused").questions


def test_resuming_gives_identical_files(place: Path, done: Path, tmp_path: Path) -> None:
    """Of a folder from which a run was lost, as if it had been killed on the way."""
    wanted = _runs(done)
    out = tmp_path / "again"
    (out / "runs").mkdir(parents=True)
    for name, text in wanted.items():
        if name != "queries-seed1.json":
            (out / "runs" / name).write_bytes(text)
    (out / "runs" / ".queries-seed1.json.123").write_text('{"half": ')  # what a kill within a write leaves
    before = {name: (out / "runs" / name).stat().st_mtime_ns for name in _names(out)}
    with threads(1):
        assert main(["ablate", *_arguments(place, out, "--resume")]) == 0
    (out / "runs" / ".queries-seed1.json.123").unlink()
    assert _runs(out) == wanted
    assert {name: (out / "runs" / name).stat().st_mtime_ns for name in before} == before


def _names(out: Path) -> list[str]:
    return [path.name for path in (out / "runs").glob("[!.]*.json")]


def test_a_report_and_times_come_with_the_runs(done: Path) -> None:
    text = (done / "ablation.md").read_text()
    assert "4 runs: 2 variants, seeds 0, 1" in text
    assert "first token, over A" in text
    assert (done / "ablation.svg").stat().st_size > 1000
    times = json.loads((done / "times.json").read_text())
    assert set(times["seconds"]) == {"none", "queries"}
    assert all(len(one) == 2 and min(one) > 0 for one in times["seconds"].values())
    assert {path.name.split("-")[0] for path in (done / "features").iterdir()} == {"train", "test"}


def test_a_killed_run_leaves_nothing(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "score", killed)
    assert main(["ablate", *_arguments(place, tmp_path / "out")]) == 130
    assert not (tmp_path / "out" / "runs").exists()


def test_results_of_other_settings_are_refused(
    place: Path, done: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _runs(done)
    for changes, said in (
        ({"steps": 3}, "with steps 2, not 3"),
        ({"learning_rate": 2e-3}, "with learning_rate 0.001, not 0.002"),
        ({"test_pictures": 2}, "with test_pictures 1, not 2"),
        ({"init": "model"}, "with init None, not '"),
    ):
        other = write_config(place, "other.yaml", **changes)
        assert main(["ablate", "--config", str(other), "--out", str(done), "--resume"]) == 2
        assert said in capsys.readouterr().err
    assert main(["ablate", *_arguments(place, done)]) == 2
    assert "expected a folder without runs, or --resume" in capsys.readouterr().err
    assert _runs(done) == before


def test_another_tower_or_other_data_is_another_setting(place: Path, tmp_path: Path) -> None:
    make_model(tmp_path / "other", seed=1)
    make_data(tmp_path / "data", seed=1)
    base = Material(read_settings(place / "config.yaml"), tmp_path).identity
    tower = write_config(place, "tower.yaml", tower=str(tmp_path / "other"))
    found = Material(read_settings(tower), tmp_path).identity
    assert {name for name in base if base[name] != found[name]} == {"tower"}
    data = write_config(place, "data.yaml", data=str(tmp_path / "data"))
    found = Material(read_settings(data), tmp_path).identity
    assert {name for name in base if base[name] != found[name]} == {"train", "test"}


# ---- the same start ----


def test_variants_start_from_the_same_tower_and_decoder(place: Path, tmp_path: Path) -> None:
    make_model(tmp_path / "decoder", seed=5)
    settings = read_settings(write_config(place, "init.yaml", init=str(tmp_path / "decoder")))
    shared = Material(settings, tmp_path)
    given = FlashSlothForConditionalGeneration.from_pretrained(place / "model").state_dict()
    decoder = FlashSlothForConditionalGeneration.from_pretrained(tmp_path / "decoder").state_dict()
    for variant in choose(variants_of(shared.config), ["none", "shuffle", "queries"]):
        weights = shared.build(variant.config(shared.config), seed=1).state_dict()
        for name, weight in weights.items():
            if name.startswith("vision_tower."):
                assert torch.equal(weight, given[name])
            if name.startswith("language_model."):
                assert torch.equal(weight, decoder[name])


def test_parts_that_variants_share_are_drawn_alike_and_by_the_seed(place: Path, tmp_path: Path) -> None:
    shared = Material(read_settings(place / "config.yaml"), tmp_path)
    variants = variants_of(shared.config)

    def weights(name: str, seed: int) -> dict[str, torch.Tensor]:
        return shared.build(variants[name].config(shared.config), seed).state_dict()

    first, other, again = weights("queries", 1), weights("average", 1), weights("queries", 2)
    drawn = [name for name in first if "vision_tower" not in name]
    common = [name for name in drawn if name in other]
    assert any("projector" in name for name in common)
    assert any("language_model" in name for name in common)
    assert all(torch.equal(first[name], other[name]) for name in common)
    assert any(not torch.equal(first[name], again[name]) for name in drawn if "embedded_query" in name)
    assert not torch.equal(first["projector.0.weight"], again["projector.0.weight"])
    assert first["pooling.mlp.0.weight"].std() > 0


def test_the_tower_is_not_trained_and_the_rest_is(place: Path, tmp_path: Path) -> None:
    shared = Material(read_settings(place / "config.yaml"), tmp_path)
    model = shared.build(shared.config, 0)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    training.train(model, shared.processor, shared, 0)
    moved = {name.split(".")[0] for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert moved == {"pooling", "projector", "learnable_tokens", "embedded_query", "language_model"}
    assert not model.training


@pytest.mark.parametrize("muon", [None, 0.02])
def test_training_learns(muon: float | None, place: Path, tmp_path: Path) -> None:
    """Six pictures by heart: every answer's first letters, at least."""
    settings = read_settings(write_config(place, "long.yaml", steps=40, learning_rate=5e-3, muon=muon))
    shared = Material(settings, tmp_path)
    losses = training.train(shared.build(shared.config, 0), shared.processor, shared, 0)
    assert len(losses) == 40
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:3])


@pytest.mark.parametrize(("fast", "allowed"), [({"compile": True}, 1e-4), ({"bf16": True}, 0.02)])
def test_faster_training_changes_nothing_but_rounding(
    fast: dict[str, bool], allowed: float, place: Path, tmp_path: Path
) -> None:
    make_model(tmp_path / "model", pool_dropout=0.0, text={"resid_pdrop": 0.0})
    changes: dict[str, Any] = {"model": str(tmp_path / "model"), "learning_rate": 1e-4}
    found = {}
    for name, changed in (("plain", {}), ("fast", fast)):
        shared = Material(read_settings(write_config(place, f"{name}.yaml", **changes, **changed)), tmp_path)
        model: Any = shared.build(shared.config, 0)
        found[name] = training.train(model, shared.processor, shared, 0)
        assert all("forward" not in vars(layer) for layer in model.get_decoder().layers)
        assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert found["fast"] == pytest.approx(found["plain"], rel=allowed)
    if "bf16" in fast:
        assert found["fast"] != found["plain"]


def test_an_order_is_whole_passes() -> None:
    seed = 3
    steps = list(order(seed, pictures=5, batch=3, steps=5))
    together = np.concatenate(steps)
    assert [len(step) for step in steps] == [3] * 5
    for start in range(0, 15, 5):
        assert sorted(together[start : start + 5]) == list(range(5))
    assert not np.array_equal(together[:5], together[5:10])
    assert np.array_equal(together, np.concatenate(list(order(seed, 5, 3, 5))))
    assert not np.array_equal(together, np.concatenate(list(order(seed + 1, 5, 3, 5))))


def test_the_rate_rises_and_falls() -> None:
    rates = [learning_rate(step, 100, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert sorted(rates[9:], reverse=True) == rates[9:]
    assert 0 < rates[-1] < 0.001
    assert learning_rate(0, 1, 0.0) == 1.0


# ---- what a run is made of ----


def test_a_row_is_that_of_the_training_data(place: Path, tmp_path: Path) -> None:
    """Kept features, packed: the same loss as from the pixels of the same records."""
    shared = Material(read_settings(place / "config.yaml"), tmp_path)
    model = shared.build(shared.config, 0)
    rows = Rows(shared.train, shared.processor, shared)
    chosen = np.array([4, 1])
    batch = rows.batch(chosen, torch.device("cpu"))
    pixels = torch.from_numpy(np.stack([shared.pixels(shared.train, int(i)) for i in chosen]))
    with torch.no_grad():
        kept = torch.from_numpy(shared.train_features[chosen]).float()
        torch.testing.assert_close(kept, model.get_image_features(pixels), rtol=2e-3, atol=1e-3)
        loss = model(**batch, image_context=model.context_of_features(kept)).loss
        torch.testing.assert_close(loss, model(**batch, pixel_values=pixels).loss, rtol=1e-3, atol=0)


def test_batched_answers_are_those_of_one_question_at_a_time(place: Path, tmp_path: Path) -> None:
    shared = Material(read_settings(write_config(place, "two.yaml", test_pictures=2, new_tokens=4)), tmp_path)
    for name in ("queries", "average"):
        config = variants_of(shared.config)[name].config(shared.config)
        model, processor = shared.build(config, 0), processor_of(shared.processor, config)
        asked = [*shared.questions[:2], shared.questions[-1]]
        together = answers(model, processor, shared, asked)
        alone = [answers(model, processor, shared, [question])[0] for question in asked]
        assert together == alone
    assert asked[0].picture != asked[-1].picture


def test_questions_are_those_of_the_records(place: Path, tmp_path: Path) -> None:
    shared = Material(read_settings(write_config(place, "all.yaml", test_pictures=None)), tmp_path)
    assert shared.test.pictures == COUNTS["test"]
    records = json.loads((place / "data/test/questions.json").read_text())
    asked = [(kind, answer["value"]) for record in records for kind, answer in _pairs(record)]
    assert [(question.kind, question.answer) for question in shared.questions] == asked
    assert not any("<image>" in question.text for question in shared.questions)
    lengths = sorted(len(question.text) for question in shared.questions)
    assert len(shared.typical.text) == lengths[len(lengths) // 2]  # a token is a byte here


def _pairs(record: dict[str, Any]) -> Any:
    return zip(record["kinds"], record["conversations"][1::2], strict=True)


@pytest.mark.parametrize("changes", [{}, {"pooling": "none", "num_queries": 0}, {"image_hd": True}])
def test_flops_are_those_that_torch_counts(changes: dict[str, Any]) -> None:
    """Of a plain model; torch does not see into the fused ops, which are counted as what they multiply."""
    from torch.utils.flop_counter import FlopCounterMode

    model = random_model(tiny_config(**changes))
    model.set_attn_implementation("eager")
    config = model.config
    pixels = torch.zeros(1, config.num_tiles, 3, 42, 42)
    found = count(model, 70, 10)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.vision_tower(pixels.flatten(0, 1))
    assert found.tower == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.language_model(inputs_embeds=torch.zeros(1, 70, 48), logits_to_keep=1)
    assert found.prefill == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.projector(torch.zeros(1, config.num_visual_tokens, config.pooled_width))
    assert found.projector == counter.get_total_flops()
    tokens = 36 * config.num_tiles
    assert found.pooling == (0 if changes.get("pooling") else 2 * tokens * (32 * 32 + 32))
    assert (found.queries > 0) == bool(config.num_queries)
    assert found.total == sum(found)


def test_flops_of_the_query_module() -> None:
    """By hand: 36 image tokens of 32, text 48 wide, inner width 16, 4 heads, 9 queries, a question of 10."""
    multiplied = 36 * 32 * 16 + 19 * 48 * 16 + 29 * 16 * 16 + 2 * 9 * 16 * 16 + 9 * 32 * (32 + 48)
    multiplied += 2 * 9 * 10 * 16 + 9 * 4 * 36 * (16 + 32)
    assert count(random_model(tiny_config()), 70, 10).queries == 2 * multiplied


# ---- variants and input ----


def test_the_usual_variants(place: Path) -> None:
    variants = variants_of(tiny_config())
    assert [one.name for one in choose(variants, None)] == USUAL
    assert {"average-window-2", "attention-window-4"} <= set(variants)
    configs = {name: one.config(tiny_config()) for name, one in variants.items()}
    tokens = {name: config.num_visual_tokens for name, config in configs.items()}
    assert (tokens["none"], tokens["window-2"], tokens["window-4"], tokens["queries-27"]) == (36, 9, 4, 4)
    assert configs["layer-2"].query_layer == 2
    assert configs["queries-27"].num_queries == 27
    assert configs["queries"].to_dict() == tiny_config().to_dict()
    assert len({one.title for one in variants.values()}) == len(variants)
    request(processor_of(make_processor(place), configs["none"]), "What?")


def make_processor(place: Path) -> Any:
    from flashsloth.processing import FlashSlothProcessor

    return FlashSlothProcessor.from_pretrained(place / "model")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stepz": 1}, "stepz: expected one of model, data, steps"),
        ({"steps": None}, "steps: expected a value, got none"),
        ({"steps": 0}, "steps: expected 1 or more, got 0"),
        ({"steps": "many"}, "steps: expected a whole number, got 'many'"),
        ({"steps": True}, "steps: expected a whole number, got True"),
        ({"learning_rate": "fast"}, "learning_rate: expected a number, got 'fast'"),
        ({"learning_rate": 0}, "learning_rate: expected a number above 0 and at most 1, got 0"),
        ({"bf16": 1}, "bf16: expected true or false, got 1"),
        ({"compile": "yes"}, "compile: expected true or false, got 'yes'"),
        ({"muon": -1}, "muon: expected a number above 0 and at most 1, got -1"),
        ({"warmup": 2.0}, "warmup: expected 0 to 1, got 2.0"),
        ({"clip": float("nan")}, "clip: expected a number above 0, got nan"),
        ({"model": "gone"}, "model: expected a directory, got"),
        ({"data": "model"}, "data: expected a folder of `flashsloth data make sight`"),
        ({"tower": "data"}, "tower: "),
        ({"batch": 7}, "batch: expected at most the 6 pictures, got 7"),
        ({"test_pictures": 3}, "test_pictures: expected at most 2, the pictures of the split, got 3"),
        ({"query_layers": [5]}, "query_layers: expected 1 to 2, got 5"),
        ({"query_layers": 1}, "query_layers: expected a list of whole numbers, got 1"),
    ],
)
def test_settings_that_cannot_be_used_are_named(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], said: str
) -> None:
    path = write_config(place, "wrong.yaml", **changes)
    assert main(["ablate", "--config", str(path), "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert len(told.splitlines()) == 1


def test_other_wrong_input_is_named(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(place / "config.yaml")
    out = str(tmp_path / "out")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "broken.yaml").write_text("a: [\n")
    (tmp_path / "file").write_text("")
    cases = [
        (["--out", out], "--config: expected a YAML file, got none"),
        (["--config", str(tmp_path / "none.yaml"), "--out", out], "--config: expected a YAML file, got"),
        (["--config", str(tmp_path / "list.yaml"), "--out", out], "expected keys and values, got list"),
        (["--config", str(tmp_path / "broken.yaml"), "--out", out], "expected YAML: "),
        (["--config", config, "--out", out, "--variants", "none,best"], "--variants: expected some of none, average"),
        (["--config", config, "--out", str(tmp_path / "file")], "--out: expected a folder, got the file"),
        (["--out", out, "--report"], "--out: expected a folder with runs of an ablation, got"),
    ]
    for arguments, said in cases:
        assert main(["ablate", *arguments]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["ablate", "--out", out, "--seeds", "0,0"])
    assert "expected different whole numbers such as 0,1,2, got '0,0'" in capsys.readouterr().err


def test_a_model_without_what_is_varied_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model: expected attention pooling and embedded queries"):
        variants_of(tiny_config(num_queries=0))
    with pytest.raises(ValueError, match="--variants: shuffle does not fit the model: pool_window"):
        variants_of(tiny_config(pool_window=4))["shuffle"].config(tiny_config(pool_window=4))
    shared = Material(read_settings(place / "config.yaml"), tmp_path)
    decoder = shared.build(shared.config, 0).language_model
    with pytest.raises(ValueError, match=r"init: expected .* of shape"):
        material.load_part(decoder, {}, "init")
    quantised = {name: weight.to(torch.int8) for name, weight in decoder.state_dict().items()}
    with pytest.raises(ValueError, match=r"init: expected .* in floating point, got torch\.int8"):
        material.load_part(decoder, quantised, "init")


def test_a_rate_too_high_is_told(place: Path, tmp_path: Path) -> None:
    shared = Material(read_settings(place / "config.yaml"), tmp_path)
    model = shared.build(shared.config, 0)
    torch.nn.init.constant_(model.projector[0].weight, float("inf"))
    with pytest.raises(ValueError, match=r"learning_rate: expected one with which the loss stays finite, got 0\.001"):
        training.train(model, shared.processor, shared, 0)


def test_features_beyond_float16_are_refused(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = Material(read_settings(place / "config.yaml"), tmp_path)
    big = FlashSlothForConditionalGeneration.get_image_features
    monkeypatch.setattr(FlashSlothForConditionalGeneration, "get_image_features", lambda *a: big(*a) * 1e6)
    with pytest.raises(ValueError, match="tower: expected features within the range of float16"):
        _ = shared.test_features
    assert list((tmp_path / "features").iterdir()) == []
