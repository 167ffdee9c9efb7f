"""FlashSlothProcessor: ids, spans and labels against golden data; batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    PreTrainedTokenizerBase,
)

from flashsloth.image_processing import FlashSlothImageProcessor
from flashsloth.processing import FlashSlothProcessor
from tests.model.official_spans import official_spans
from tests.model.prompting import (
    EOS,
    IMAGE,
    LEARNABLE,
    PAD,
    assistant,
    collapse,
    full_tokenizer,
    golden_json,
    golden_messages,
    official_dir,
    photo,
    processor,
    prompt_cases,
    small_processor,
    span_case,
    spans,
    text_of,
    user,
)

__all__ = ["full_tokenizer", "official_dir", "processor"]  # fixtures


# -------------------------------------------------------------------- golden ids, spans and labels


def test_chat_template_gives_the_official_prompts_and_ids(processor: FlashSlothProcessor) -> None:
    cases = prompt_cases("inference_phi2")
    assert len(cases) == 4
    for case in cases:
        messages = golden_messages(case)
        assert processor.apply_chat_template(messages) == case["prompt"]
        images = [photo()] if case["image"] else None
        out = processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, processor_kwargs={"images": images}
        )
        assert collapse(out["input_ids"][0].tolist()) == case["input_ids"]
        assert out["input_ids"][0].tolist().count(IMAGE) == (81 if images else 0)
        assert out["input_ids"][0].tolist().count(LEARNABLE) == 9 * len(case["questions"])
        assert ("pixel_values" in out) == case["image"]
        for span, question in zip(spans(out)[0], case["questions"], strict=True):
            assert text_of(processor, out["input_ids"][0], span).strip() == question


def test_string_contents_give_the_same_prompt(processor: FlashSlothProcessor) -> None:
    case = prompt_cases("inference_phi2")[3]
    strings = [
        {"role": m["role"], "content": text}
        for m, text in zip(golden_messages(case), ["What is this?", "Answer 0.", "And that?"], strict=True)
    ]
    assert processor.apply_chat_template(strings) == case["prompt"]
    assert processor.apply_chat_template([strings, strings[:1]])[0] == case["prompt"]


def test_the_whole_vocabulary_gives_the_same_ids(full_tokenizer: PreTrainedTokenizerBase) -> None:
    whole = FlashSlothProcessor(FlashSlothImageProcessor(), full_tokenizer)
    for case in prompt_cases("inference_phi2") + prompt_cases("finetune_phi2") + prompt_cases("pretrain_plain"):
        text = case.get("training_text") or case["prompt"]
        out = whole(text=text, images=photo() if "<image>" in text else None)
        assert collapse(out["input_ids"][0].tolist()) == case["input_ids"]


@pytest.mark.parametrize("name", ["model_a_single", "model_a2_multiturn_infer", "model_c_hd"])
def test_inference_spans(processor: FlashSlothProcessor, name: str) -> None:
    """Equal to the official ones, but a later question has its own span where the official code repeats the first."""
    case = span_case(name)
    hd = name == "model_c_hd"
    out = processor(text=case["prompt"], images=photo(), image_hd=hd)
    ids = out["input_ids"][0].tolist()
    assert collapse(ids) == case["input_ids"][0]
    assert [i for i in range(len(ids)) if ids[i] == LEARNABLE and ids[i - 1] != LEARNABLE] == case["insert_place"][0]
    official = case["question_token_ranges"][0]
    assert spans(out)[0][0] == official[0]
    assert out["pixel_values"].shape == (1, 5 if hd else 1, 3, 384, 384)
    if name == "model_a2_multiturn_infer":
        assert official[1] == official[0]
        assert spans(out)[0][1] == [144, 156]
        asked = text_of(processor, out["input_ids"][0], spans(out)[0][1])
        assert asked == " How many dogs are there, and what colour are they?"


def test_a_text_only_question_keeps_its_first_token(processor: FlashSlothProcessor) -> None:
    """The official start 32 is right after "USER: <image>"; without an image the question starts at 31."""
    case = span_case("model_d_text")
    out = processor(text=case["prompt"])
    ids = out["input_ids"][0].tolist()
    assert collapse(ids) == collapse(case["input_ids"][0])
    assert "pixel_values" not in out
    first = ids.index(LEARNABLE)
    assert spans(out)[0] == [[31, first]]
    assert official_spans([[-100] * len(ids)], [[first]], 81, [1])[0] == [[32, first]]
    assert text_of(processor, out["input_ids"][0], (31, first)) == " What is the man in the red jacket holding?"


def dialogue_of(processor: FlashSlothProcessor, ids: list[int]) -> list[dict[str, str]]:
    """The official form of a dialogue, read back from golden training ids."""
    special = {-200: "<image>", LEARNABLE: "<learnable>", EOS: "</s>", PAD: ""}
    text = "".join(special[i] if i in special else processor.decode([i]) for i in ids)
    turns = []
    for turn in text.split("USER: ", 1)[1].removesuffix("</s>").split("</s>USER: "):
        question, answer = turn.split(" <learnable> ASSISTANT: ")
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return turns


@pytest.mark.parametrize("name", ["model_b_train", "model_b2_mixed"])
def test_training_batches(processor: FlashSlothProcessor, name: str) -> None:
    """Ids, labels and spans of the golden training batches; a text-only first question starts one token earlier."""
    case = span_case(name)
    dialogues = [dialogue_of(processor, ids) for ids in case["input_ids"]]
    images = [photo(i) if modal == 2 else None for i, modal in enumerate(case["modal"])]
    out = processor.encode_dialogue(dialogues, images=images)
    assert out["pixel_values"].shape[0] == case["modal"].count(2)
    for i, modal in enumerate(case["modal"]):
        length = int(out["attention_mask"][i].sum())
        ids, labels = out["input_ids"][i].tolist(), out["labels"][i].tolist()
        official = sum(case["attention_mask"][i])
        assert collapse(ids[:length]) == case["input_ids"][i][:official]
        wanted = [label for label in case["labels"][i] if label != -100]
        assert [label for label in labels if label != -100] == wanted
        assert all(label in (-100, token) for label, token in zip(labels, ids, strict=True))
        assert all(label == -100 for token, label in zip(ids, labels, strict=True) if token in (IMAGE, LEARNABLE))
        assert ids[length:] == [PAD] * (len(ids) - length)
        assert labels[length:] == [-100] * (len(ids) - length)
        expected = [list(span) for span in case["question_token_ranges"][i]]
        if modal == 1:
            assert expected[0][0] == 32
            expected[0][0] = 31
        assert spans(out)[i] == expected
        # ... which is what the rule gives for these labels
        rule = official_spans([labels[:length]], [case["insert_place"][i]], 81, [modal])
        assert rule[0] == case["question_token_ranges"][i]


def test_golden_labels_align_with_expanded_ids(processor: FlashSlothProcessor) -> None:
    for case in prompt_cases("finetune_phi2"):
        out = processor.encode_dialogue(case["conversation"], images=photo() if case["image"] else None)
        assert list(out["input_ids"].shape) == list(out["labels"].shape)
        check_labels(out, case)


def test_captions(processor: FlashSlothProcessor) -> None:
    """The official span skips the first token of a caption; ours is the caption."""
    for case in prompt_cases("pretrain_plain"):
        out = processor.encode_caption(case["caption"], images=photo())
        check_labels(out, case)
        assert text_of(processor, out["input_ids"][0], spans(out)[0][0]) == case["caption"]
        place = out["input_ids"][0].tolist().index(LEARNABLE)
        assert spans(out)[0] == [[81, place]]
        assert official_spans([[-100]] * 20, [[place]] * 20, 81, [2] * 20)[0] == [[82, place]]
    both = processor.encode_caption(["a red car on a street", "Sunset."], images=[photo(), photo(1)])
    assert spans(both) == [[[81, 87]], [[81, 84]]]


def test_captions_do_not_depend_on_the_batch_size(processor: FlashSlothProcessor) -> None:
    """From 20 samples on the official code takes the plain form for granted, below it the conversation."""
    for name in ("model_e_plain20", "model_e2_plain_small_batch"):
        case = span_case(name)
        texts = []
        for ids in case["input_ids"]:
            special = {-200: "<image>", LEARNABLE: "<learnable>", PAD: ""}
            texts.append("".join(special[i] if i in special else processor.decode([i]) for i in ids))
        captions = [text.removeprefix("<image>").removesuffix("<learnable>\n") for text in texts]
        out = processor.encode_caption(captions, images=[photo()] * len(captions))
        as_text = processor(text=texts, images=[photo()] * len(texts), padding_side="right")
        assert torch.equal(as_text["input_ids"], out["input_ids"])
        for i, (ids, places) in enumerate(zip(case["input_ids"], case["insert_place"], strict=True)):
            assert (
                collapse(out["input_ids"][i][: int(out["attention_mask"][i].sum())].tolist())
                == ids[: sum(case["attention_mask"][i])]
            )
            assert spans(out)[i] == spans(as_text)[i] == [[81, places[0]]]
            start = case["question_token_ranges"][i][0][0]
            assert start == (82 if name == "model_e_plain20" else 114)


def check_labels(out: Any, case: dict[str, Any]) -> None:
    ids, labels = out["input_ids"][0].tolist(), out["labels"][0].tolist()
    kept = [i for i in range(len(ids)) if not (ids[i] in (IMAGE, LEARNABLE) and i and ids[i - 1] == ids[i])]
    assert collapse(ids) == case["input_ids"]
    assert [labels[i] for i in kept] == case["labels"]
    assert {labels[i] for i in range(len(ids)) if i not in kept} <= {-100}


def test_the_official_rule_of_the_tests_is_the_official_one() -> None:
    cases = golden_json("ranges.json")
    assert len(cases) == 13
    for case in cases:
        labels = []
        for row in case["labels"]:
            labels.append([-100] * row["length"])
            for start, end in row["targets"]:
                labels[-1][start:end] = [1] * (end - start)
        got = official_spans(labels, case["insert_place"], case["n_visual"], case["modal"])
        assert got == case["result"], case["desc"]


def test_assistant_in_a_question_moves_no_span(processor: FlashSlothProcessor) -> None:
    turns = [{"from": "human", "value": "Is ASSISTANT a word?"}, {"from": "gpt", "value": "ASSISTANT is."}]
    out = processor.encode_dialogue(turns)
    assert out["input_ids"][0].tolist().count(LEARNABLE) == 9
    assert text_of(processor, out["input_ids"][0], spans(out)[0][0]) == " Is ASSISTANT a word? "


# -------------------------------------------------------------------- batches


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_equals_its_rows(processor: FlashSlothProcessor, side: str) -> None:
    case = prompt_cases("inference_phi2")
    texts = [c["prompt"] for c in case] + ["no queries at all", "<image>"]
    images = [photo(i, 9 + i, 30) for i in range(3)]
    out = processor(text=texts, images=images, padding_side=side)
    assert out["pixel_values"].shape[0] == 3
    assert out["question_spans"].shape == (6, 2, 2)
    each = iter(range(3))
    for i, text in enumerate(texts):
        k = next(each) if "<image>" in text else None
        one = processor(text=text, images=None if k is None else images[k])
        length = one["input_ids"].shape[1]
        row = slice(-length, None) if side == "left" else slice(0, length)
        assert torch.equal(out["input_ids"][i][row], one["input_ids"][0])
        assert out["attention_mask"][i].sum() == length
        assert out["attention_mask"][i][row].all()
        shift = out["input_ids"].shape[1] - length if side == "left" else 0
        assert spans(out)[i] == [[a + shift, b + shift] for a, b in spans(one)[0]]
        if k is not None:
            assert torch.equal(out["pixel_values"][k], one["pixel_values"][0])
    assert spans(out)[4:] == [[], []]


def test_types_and_names(processor: FlashSlothProcessor) -> None:
    out = processor.apply_chat_template([user("Is it?", photo())], tokenize=True, return_dict=True)
    assert set(out) == set(processor.model_input_names)
    for name in ("input_ids", "attention_mask", "question_spans"):
        assert out[name].dtype == torch.int64
    moved = out.to(dtype=torch.bfloat16)  # what a pipeline does
    assert moved["pixel_values"].dtype == torch.bfloat16
    assert moved["question_spans"].dtype == torch.int64


def test_rows_without_queries_have_an_empty_group_axis() -> None:
    out = small_processor()(text=["a", "bc"])
    assert out["question_spans"].shape == (2, 0, 2)
    assert out["question_spans"].dtype == torch.int64


def test_images_in_every_arrangement() -> None:
    small = small_processor()
    texts = ["<image>a<learnable>", "b<learnable>", "<image>c<learnable>"]
    x, y = photo(1), photo(2)
    expected = small(text=texts, images=[x, y])
    assert torch.equal(expected["pixel_values"][1], small.image_processor(y)["pixel_values"][0])
    for images in ([[x], [], [y]], [x, None, y], [[x], None, [y]], np.stack([x, y]), [Image.fromarray(x), y]):
        out = small(text=texts, images=images)
        assert torch.equal(out["pixel_values"], expected["pixel_values"])
        assert torch.equal(out["question_spans"], expected["question_spans"])
    alone = small(images=[x, y])
    assert set(alone) == {"pixel_values"}
    assert torch.equal(alone["pixel_values"], expected["pixel_values"])


def test_images_inside_messages(tmp_path: Path) -> None:
    small = small_processor()
    Image.fromarray(photo(3)).save(tmp_path / "a.png")
    path = str(tmp_path / "a.png")
    parts = [{"image": photo(3)}, {"path": path}, {"url": path}, {"image": Image.fromarray(photo(3))}]
    expected = small.image_processor(photo(3))["pixel_values"]
    for part in [{"type": "image", **p} for p in parts] + [{"type": "image_url", "image_url": {"url": path}}]:
        messages = [{"role": "user", "content": [part, {"type": "text", "text": "q"}]}]
        out = small.apply_chat_template(messages, tokenize=True, return_dict=True)
        assert torch.equal(out["pixel_values"], expected)
        assert torch.equal(small.apply_chat_template(messages, tokenize=True), out["input_ids"])
    batch = small.apply_chat_template([messages, [user("p")], messages], tokenize=True, return_dict=True)
    assert batch["pixel_values"].shape[0] == 2
    assert "image_url" in messages[0]["content"][0]["type"]  # the caller's messages are left as they were


def test_an_image_in_a_later_turn() -> None:
    small = small_processor()
    messages = [user("hi"), assistant("yes"), user("and this?", photo())]
    assert "</s>USER: <image>\nand this?<learnable> ASSISTANT:" in small.apply_chat_template(messages)
    out = small.apply_chat_template(messages, tokenize=True, return_dict=True)
    # A byte tokenizer keeps the space of "USER: " apart, so a span is the question to the letter.
    assert [text_of(small, out["input_ids"][0], span) for span in spans(out)[0]] == ["hi", "and this?"]


def test_text_after_image_part_order_and_joined_parts() -> None:
    small = small_processor()
    parts = [{"type": "text", "text": "What "}, {"type": "image"}, {"type": "text", "text": "is it?"}]
    assert small.apply_chat_template([{"role": "user", "content": parts}]).endswith(
        " USER: <image>\nWhat is it?<learnable> ASSISTANT:"
    )


def test_hd_counts() -> None:
    for hd in (False, True):
        small = small_processor(image_hd=hd)
        for override in (None, False, True):
            tiles = 5 if (hd if override is None else override) else 1
            out = small(text="<image>q<learnable>", images=photo(), image_hd=override)
            assert out["pixel_values"].shape == (1, tiles, 3, 8, 8)
            assert (out["input_ids"] == small.image_token_id).sum() == 4 * tiles
            assert (out["input_ids"] == small.learnable_token_id).sum() == 2
            assert spans(out) == [[[4 * tiles, 4 * tiles + 1]]]


def test_grouped_arguments() -> None:
    small = small_processor()
    expected = small(text="<image>q", images=photo(), image_hd=True, padding="max_length", max_length=40)
    grouped = small(
        text="<image>q", images=photo(), images_kwargs={"image_hd": True},
        text_kwargs={"padding": "max_length", "max_length": 40}, common_kwargs={"return_tensors": "pt"},
    )  # fmt: skip
    assert expected["input_ids"].shape == (1, 40)
    for name in expected:
        assert torch.equal(grouped[name], expected[name])
    assert small(text=["a", "bcd"], pad_to_multiple_of=8)["input_ids"].shape == (2, 8)
    lists = small(text=["a<learnable>", "bcd"], padding=False, return_tensors=None)
    assert [len(row) for row in lists["input_ids"]] == [3, 3]
    assert lists["question_spans"] == [[[0, 1]], [[-1, -1]]]
    assert isinstance(small(text="a", return_tensors="np")["input_ids"], np.ndarray)


def test_unicode_questions_are_whole(full_tokenizer: PreTrainedTokenizerBase) -> None:
    """A character may be several tokens, and a space may belong to a word or to a run of spaces."""
    whole = FlashSlothProcessor(FlashSlothImageProcessor(image_size=14), full_tokenizer, tokens_per_tile=1)
    for question in ["Что это?", "é😀 日本語", "  two  spaces\t\there", "trailing  ", "\n\nlines\n", "ﷺ", "x" * 300]:
        for image in (True, None):
            out = whole.apply_chat_template(
                [user(question, image)], tokenize=True, return_dict=True, images=photo() if image else None
            )
            row = out["input_ids"][0].tolist()
            (start, end), (place,) = spans(out)[0][0], [row.index(LEARNABLE)]
            assert end == place
            text = whole.decode(row[start:end])
            assert text.strip() == question.strip()
            assert whole.decode(row[:start]).rstrip().endswith("<image>" if image else "USER:")
