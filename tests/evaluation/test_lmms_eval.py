"""The plug-in of lmms-eval: with the package itself where it is installed, else against its documented interface.

The stand-in has what the plug-in touches: the base class ``lmms`` with its hook, and ``ModelManifest``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from tests.model.talking import picture, talking_model
from tests.support import ROOT

try:
    import lmms_eval  # noqa: F401

    INSTALLED = True
except ModuleNotFoundError:
    INSTALLED = False
needs_package = pytest.mark.skipif(not INSTALLED, reason="the package lmms-eval is not installed")


class _Base:
    is_simple = True

    def __init__(self) -> None:
        self.task_dict: dict[str, Any] = {}
        self.cache_hook = SimpleNamespace(add_partial=lambda *_: None)


class _Manifest(SimpleNamespace):
    pass


@pytest.fixture(scope="module")
def plugin() -> Iterator[Any]:
    """The module of the plug-in, over lmms-eval or the stand-in."""
    before = dict(sys.modules)
    if not INSTALLED:
        for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model", "lmms_eval.models"):
            sys.modules[name] = ModuleType(name)
        sys.modules["lmms_eval.api.model"].lmms = _Base  # type: ignore[attr-defined]
        sys.modules["lmms_eval.models.registry_v2"] = registry = ModuleType("lmms_eval.models.registry_v2")
        registry.ModelManifest = _Manifest  # type: ignore[attr-defined]
    import flashsloth.lmms_eval as module

    yield module
    if not INSTALLED:
        for name in [name for name in sys.modules if "lmms_eval" in name and name not in before]:
            del sys.modules[name]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    model, processor = talking_model(space_first=False)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


DOCUMENTS = [
    {"question": "What is it?", "seed": 0},
    {"question": "What is it?", "seed": 1},
    {"question": "And this, which is a longer question?", "seed": 2},
    {"question": "2 + 2?", "seed": None},
]


def pictures(document: dict[str, Any]) -> list[Image.Image]:
    return [] if document["seed"] is None else [picture(document["seed"])]


@pytest.fixture
def model(plugin: Any, checkpoint: Path) -> Any:
    made = plugin.FlashSloth(pretrained=str(checkpoint), device="cpu", batch_size=3)
    made.task_dict = {"shapes": {"test": DOCUMENTS}}
    return made


def requests(*second: Any, texts: list[str] | None = None) -> list[Any]:
    asked = texts or [document["question"] for document in DOCUMENTS]
    given = second if len(second) > 1 else second * len(asked)
    return [
        SimpleNamespace(args=(text, more, pictures, i, "shapes", "test"))
        for i, (text, more) in enumerate(zip(asked, given, strict=True))
    ]


def losses(model: Any, asked: list[Any]) -> list[tuple[float, bool]]:
    return [getattr(one, "text", one) for one in model.loglikelihood(asked)]


def alone(model: Any, document: dict[str, Any], count: int) -> str:
    """By nothing of the plug-in but its model and processor."""
    content: list[dict[str, str]] = [{"type": "image"}] if pictures(document) else []
    content.append({"type": "text", "text": document["question"]})
    prompt = model.processor.apply_chat_template([{"role": "user", "content": content}])
    batch = model.processor(images=pictures(document) or None, text=prompt)
    ids = model.model.generate(**batch, max_new_tokens=count, do_sample=False)[0, batch["input_ids"].shape[1] :]
    return str(model.processor.tokenizer.decode(ids, skip_special_tokens=True)).strip()


def test_the_entry_point_leads_to_the_model(plugin: Any) -> None:
    declared = (ROOT / "pyproject.toml").read_text().split('[project.entry-points."lmms_eval.models"]\n')[1]
    name, value = (part.strip().strip('"') for part in declared.splitlines()[0].split("="))
    manifest = EntryPoint(name, value, "lmms_eval.models").load()()
    assert manifest.model_id == name == "flashsloth"
    module, _, attribute = manifest.simple_class_path.rpartition(".")
    assert getattr(sys.modules[module], attribute) is plugin.FlashSloth


@pytest.mark.parametrize("batch_size", [1, 3, "64"])
def test_answers_of_a_batch_are_those_of_each_alone(plugin: Any, checkpoint: Path, batch_size: Any) -> None:
    model = plugin.FlashSloth(pretrained=str(checkpoint), device="cpu", batch_size=batch_size)
    model.task_dict = {"shapes": {"test": DOCUMENTS}}
    kept: list[Any] = []
    model.cache_hook = SimpleNamespace(add_partial=lambda *given: kept.append(given))
    settings: tuple[dict[str, Any], ...] = tuple(
        {"max_new_tokens": count, "temperature": 0, "until": ["\n\n"]} for count in (6, 9, 6, 9)
    )
    before = json.dumps(settings)
    answers = model.generate_until(requests(*settings))
    want = [alone(model, document, s["max_new_tokens"]) for document, s in zip(DOCUMENTS, settings, strict=True)]
    assert answers == want
    assert len(set(want)) > 1
    assert json.dumps(settings) == before  # another task's requests may share them
    assert {(name, key[0], answer) for name, key, answer in kept} == {
        ("generate_until", document["question"], answer) for document, answer in zip(DOCUMENTS, want, strict=True)
    }


def test_an_answer_ends_before_what_ends_it(model: Any) -> None:
    whole = model.generate_until(requests({"max_new_tokens": 9}))
    end = whole[0][3]
    cut = model.generate_until(requests({"max_new_tokens": 9, "until": [end, ""]}))
    assert cut == [text.split(end)[0] for text in whole]
    assert cut[0] != whole[0]
    assert model.generate_until(requests({"max_new_tokens": 9, "until": end})) == cut


def test_a_mark_in_the_text_stands_for_the_picture(model: Any) -> None:
    texts = ["<image>\n" + document["question"] for document in DOCUMENTS]
    plain = model.generate_until(requests({"max_new_tokens": 5}))
    assert model.generate_until(requests({"max_new_tokens": 5}, texts=texts)) == plain


def test_losses_are_those_of_the_tokens(model: Any) -> None:
    targets = ("cat", " dog", "", "four")
    found = losses(model, requests(*targets))
    assert len({loss for loss, _ in found}) == 4
    for document, target, (loss, greedy) in zip(DOCUMENTS, targets, found, strict=True):
        content: list[dict[str, str]] = [{"type": "image"}] if pictures(document) else []
        content.append({"type": "text", "text": document["question"]})
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        begin = model.processor(images=pictures(document) or None, text=model.processor.apply_chat_template(messages))[
            "input_ids"
        ].shape[1]
        text = model.processor.apply_chat_template([*messages, {"role": "assistant", "content": target}])
        batch = model.processor(images=pictures(document) or None, text=text)
        ids = batch["input_ids"][0]
        with torch.no_grad():
            logits = model.model(**batch).logits[0].double()
        want = [-float(logits[i - 1].log_softmax(-1)[ids[i]]) for i in range(begin, len(ids))]
        assert len(want) == len(" " + target.strip()) + 1 if target else len(want) == 1
        assert loss == pytest.approx(sum(want) / len(want), rel=1e-4)
        assert greedy == all(int(logits[i - 1].argmax()) == int(ids[i]) for i in range(begin, len(ids)))


def test_a_target_may_be_a_function_and_a_choice_stand_by_itself(model: Any) -> None:
    by_name = losses(model, requests("cat"))
    by_call = losses(model, requests(lambda document: "cat"))
    assert by_call == by_name
    alone = losses(model, [SimpleNamespace(args=("", "cat"))])
    assert len(alone) == 1
    assert alone[0][0] != by_name[0][0]


def test_greedy_text_is_told_as_such(model: Any) -> None:
    ids = model.processor.tokenizer(" ab")["input_ids"] + [model.model.config.eos_token_id]
    passes: list[int] = []

    def force(_: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        for place, token in enumerate(ids):
            output.logits[:, place - len(ids) - 1, token] += 1e9
        passes.append(1)

    handle = model.model.register_forward_hook(force, with_kwargs=True)
    try:
        same, other = losses(model, requests("ab", "ac", texts=["One?", "Two?"]))
    finally:
        handle.remove()
    assert len(passes) == 1  # both in one batch
    assert same[1] is True
    assert other[1] is False


def test_in_hd_pictures_are_five_tiles(plugin: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = plugin.FlashSloth(pretrained=str(checkpoint), device="cpu", batch_size=4, image_hd=True)
    model.task_dict = {"shapes": {"test": DOCUMENTS}}
    tiles = []
    encode = type(model.model).get_image_features
    monkeypatch.setattr(
        type(model.model), "get_image_features", lambda self, p: (tiles.append(p.shape[:2]), encode(self, p))[1]
    )
    model.generate_until(requests({"max_new_tokens": 2}))
    assert tiles == [torch.Size([3, 5])]


def test_wrong_input_is_named(plugin: Any, checkpoint: Path, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashsloth.shipped.WEIGHTS", checkpoint / "none")
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"pretrianed": "x"}, TypeError, "model_args: expected pretrained, .* got pretrianed"),
        ({"batch_size": "auto"}, ValueError, "batch_size: expected a number of at least 1, got 'auto'"),
        ({"image_hd": "yes"}, ValueError, "image_hd: expected True or False, got 'yes'"),
        ({}, FileNotFoundError, "no trained weights ship with this copy"),
        ({"pretrained": str(checkpoint / "none")}, FileNotFoundError, "expected a directory with a checkpoint"),
    ]
    for given, kind, said in cases:
        with pytest.raises(kind, match=said):
            plugin.FlashSloth(**given)
    model.task_dict["shapes"] = {"test": [{"seed": 0}]}
    two = SimpleNamespace(args=("What?", {}, lambda document: [picture(), picture()], 0, "shapes", "test"))
    with pytest.raises(ValueError, match="task shapes: expected at most one picture a question, got 2"):
        model.generate_until([two])
    with pytest.raises(ValueError, match="context: expected less than 2048 tokens"):
        model.generate_until([SimpleNamespace(args=("x" * 2048, {}, None, 0, "shapes", "test"))])
    with pytest.raises(NotImplementedError, match="several rounds"):
        model.generate_until_multi_round([])


# ---- lmms-eval itself ----

TASK = """
task: local_shapes
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
doc_to_visual: !function functions.visual
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
{choices}
process_results: !function functions.results
generation_kwargs:
  max_new_tokens: 6
metric_list:
  - metric: right
    aggregation: !function functions.mean
    higher_is_better: true
"""
FUNCTIONS = """
from PIL import Image

def visual(document):
    return [Image.open(document["picture"]).convert("RGB")]

def results(document, found, **more):
    answer = found[0]
    if not isinstance(answer, str):  # the losses of two choices
        answer = ("cat", "dog")[min(range(2), key=lambda i: found[i][0])]
    return {"right": float(answer == document["answer"])}

def mean(values):
    return sum(values) / len(values)
"""


@needs_package
@pytest.mark.parametrize("kind", ["generate_until", "multiple_choice"])
def test_lmms_eval_runs_a_task_of_local_files(
    plugin: Any, checkpoint: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmms_eval import evaluator, models
    from lmms_eval.models import registry_v2
    from lmms_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    model = plugin.FlashSloth(pretrained=str(checkpoint), device="cpu")
    records = []
    for seed, document in enumerate(DOCUMENTS[:3]):
        path = tmp_path / f"{seed}.png"
        picture(seed).save(path)
        if kind == "generate_until":
            answer = alone(model, document, 6) if seed else "something else"
        else:
            model.task_dict = {"shapes": {"test": DOCUMENTS}}
            pair = [
                losses(model, [SimpleNamespace(args=(document["question"], c, pictures, seed, "shapes", "test"))])
                for c in ("cat", "dog")
            ]
            better = ("cat", "dog")[int(pair[1][0][0] < pair[0][0][0])]
            answer = better if seed else {"cat": "dog", "dog": "cat"}[better]
        records.append({"question": document["question"], "answer": answer, "picture": str(path)})
    (tmp_path / "records.json").write_text(json.dumps(records))
    folder = tmp_path / "task"
    folder.mkdir()
    choices = "doc_to_choice: ['cat', 'dog']" if kind == "multiple_choice" else ""
    text = TASK.format(data=tmp_path / "records.json", kind=kind, choices=choices)
    (folder / "local_shapes.yaml").write_text(text)
    (folder / "functions.py").write_text(FUNCTIONS)

    entry = EntryPoint("flashsloth", "flashsloth.lmms_eval:manifest", "lmms_eval.models")
    monkeypatch.setattr(registry_v2, "entry_points", lambda: EntryPoints([entry]))
    models.MODEL_REGISTRY_V2.load_entrypoint_manifests(overwrite=True)
    found = evaluator.simple_evaluate(
        model="flashsloth",
        model_args=f"pretrained={checkpoint}",
        tasks=["local_shapes"],
        batch_size=2,
        device="cpu",
        task_manager=TaskManager(include_path=str(folder)),
        bootstrap_iters=0,
    )
    scores = found["results"]["local_shapes"]
    score = next(value for name, value in scores.items() if name.startswith("right,"))
    assert score == pytest.approx(2 / 3)
