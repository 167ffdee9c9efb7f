"""FlashSlothProcessor: ids, spans and labels against golden data, batches, saving and loading, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoProcessor,
    CodeGenTokenizer,
    ImageTextToTextPipeline,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from flashsloth.image_processing import FlashSlothImageProcessor
from flashsloth.processing import FlashSlothProcessor
from flashsloth.prompt import CHAT_TEMPLATE
from flashsloth.tokenization import add_flashsloth_tokens, load_tokenizer
from tests.model.official_spans import official_spans
from tests.model.prompting import (
    EOS,
    IMAGE,
    LEARNABLE,
    PAD,
    assistant,
    byte_tokenizer,
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
    user,
    write_official,
)

__all__ = ["full_tokenizer", "official_dir", "processor"]  # fixtures

QUESTION = [user("What is this?", True)]


def text_of(processor: FlashSlothProcessor, row: torch.Tensor, span: Any) -> str:
    return processor.decode(row[int(span[0]) : int(span[1])])


def spans(out: Any) -> list[list[list[int]]]:
    """Spans without the unused groups."""
    return [[span for span in row if span != [-1, -1]] for row in out["question_spans"].tolist()]


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


# -------------------------------------------------------------------- conversations


def test_ids_of_a_turn_are_a_prefix_of_the_next(full_tokenizer: PreTrainedTokenizerBase) -> None:
    """Prompt, then prompt with the generated ids, then the next prompt: each a prefix of the following one."""
    whole = FlashSlothProcessor(FlashSlothImageProcessor(image_size=14), full_tokenizer, tokens_per_tile=1)
    tokenizer = whole.tokenizer
    answers = [" A grey umbrella.", " It is\n\n- one\n- two", "", " 42", " l'été 日本", " Yes. ", "\nno", "A"]
    for answer in answers:
        generated = tokenizer(answer, add_special_tokens=False)["input_ids"] + [EOS]
        messages = [user("What is it?", photo())]
        first = whole.apply_chat_template(messages, tokenize=True, return_dict=True)
        seen = first["input_ids"][0].tolist() + generated
        decoded = whole.decode(generated, skip_special_tokens=True)
        assert decoded == answer
        messages += [assistant(decoded), user("And why?")]
        second = whole.apply_chat_template(messages, tokenize=True, return_dict=True)
        ids = second["input_ids"][0].tolist()
        assert ids[: first["input_ids"].shape[1]] == first["input_ids"][0].tolist()
        if not answer or answer[0] == " ":
            assert ids[: len(seen)] == seen, answer
        assert spans(second)[0][0] == spans(first)[0][0]
        start, end = spans(second)[0][1]
        assert start >= first["input_ids"].shape[1]
        assert whole.decode(ids[start:end]) == " And why?"


def test_an_answer_gets_one_space(processor: FlashSlothProcessor) -> None:
    for answer in ("Yes.", " Yes."):
        prompt = processor.apply_chat_template([user("a"), assistant(answer), user("b")])
        assert prompt.endswith("ASSISTANT: Yes.</s>USER: b<learnable> ASSISTANT:")
    assert processor.apply_chat_template([user("a"), assistant("Yes.")]).endswith("<learnable> ASSISTANT: Yes.</s>")
    assert processor.apply_chat_template([user("a"), assistant("")]).endswith("<learnable> ASSISTANT:</s>")


def test_generation_prompt_and_continuation(processor: FlashSlothProcessor) -> None:
    assert processor.apply_chat_template([user("a")]).endswith("USER: a<learnable> ASSISTANT:")
    assert processor.apply_chat_template([user("a")], add_generation_prompt=False).endswith("USER: a<learnable> ")
    for content in ("It is a", " It is a", [{"type": "text", "text": "It is a"}]):
        messages = [user("a"), {"role": "assistant", "content": content}]
        assert processor.apply_chat_template(messages, continue_final_message=True).endswith("ASSISTANT: It is a")
    with pytest.raises(ValueError, match="continue_final_message expects an assistant's message"):
        processor.apply_chat_template([user("a")], continue_final_message=True)


def test_another_template_may_be_given(processor: FlashSlothProcessor) -> None:
    assert processor.apply_chat_template([user("a")], "{{ messages[0].content[0].text + sign }}", sign="!") == "a!"
    for name in ("sign", "temperature"):
        with pytest.raises(TypeError, match=f"no template reads: {name}"):
            processor.apply_chat_template([user("a")], **{name: 1})


# -------------------------------------------------------------------- saving and loading


def test_saved_processors_load_as_they_were(processor: FlashSlothProcessor, tmp_path: Path) -> None:
    for i, saved in enumerate([processor, small_processor(image_hd=True, image_aspect_ratio="pad")]):
        folder = tmp_path / str(i)
        saved.save_pretrained(folder)
        assert (folder / "chat_template.jinja").read_text() == CHAT_TEMPLATE
        loaded = FlashSlothProcessor.from_pretrained(folder)
        assert loaded.to_dict() == saved.to_dict()
        assert loaded.chat_template == CHAT_TEMPLATE
        assert loaded.tokenizer.padding_side == saved.tokenizer.padding_side == "left"
        messages = [user("Is this a dog?", photo())]
        ours, theirs = (p.apply_chat_template(messages, tokenize=True, return_dict=True) for p in (saved, loaded))
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), name


def test_a_changed_template_and_side_are_kept(tmp_path: Path) -> None:
    small = small_processor()
    small.chat_template = "{{ 'x' }}"
    small.tokenizer.padding_side = "right"
    small.save_pretrained(tmp_path)
    loaded = FlashSlothProcessor.from_pretrained(tmp_path)
    assert loaded.apply_chat_template([user("a")]) == "x"
    assert loaded.tokenizer.padding_side == "right"
    changed = FlashSlothProcessor.from_pretrained(tmp_path, image_hd=True, num_queries=3, chat_template=CHAT_TEMPLATE)
    assert (changed.image_processor.image_hd, changed.num_queries, changed.tokens_per_tile) == (True, 3, 4)
    assert changed.chat_template == CHAT_TEMPLATE


def test_auto_processor(tmp_path: Path) -> None:
    class ProcessorTestConfig(PreTrainedConfig):
        model_type = "flashsloth_processor_test"

    AutoConfig.register(ProcessorTestConfig.model_type, ProcessorTestConfig, exist_ok=True)
    AutoProcessor.register(ProcessorTestConfig, FlashSlothProcessor, exist_ok=True)
    official = write_official(tmp_path / "official", image_hd=True)
    (official / "config.json").write_text(json.dumps({"model_type": ProcessorTestConfig.model_type, "image_hd": True}))
    loaded = AutoProcessor.from_pretrained(official)
    assert type(loaded) is FlashSlothProcessor
    assert loaded.image_processor.image_hd
    loaded.save_pretrained(tmp_path / "ours")
    assert type(AutoProcessor.from_pretrained(tmp_path / "ours")) is FlashSlothProcessor


def test_the_official_layout(official_dir: Path, tmp_path: Path) -> None:
    plain = FlashSlothProcessor.from_pretrained(official_dir)
    assert (plain.image_token_id, plain.learnable_token_id) == (IMAGE, LEARNABLE)
    assert (plain.tokenizer.eos_token_id, plain.tokenizer.pad_token_id) == (EOS, PAD)
    assert (plain.num_queries, plain.tokens_per_tile, plain.num_image_tokens()) == (9, 81, 81)
    assert (plain.image_processor.image_size, plain.image_processor.image_hd) == (384, False)
    hd = FlashSlothProcessor.from_pretrained(write_official(tmp_path / "hd", image_hd=True, image_aspect_ratio="pad"))
    assert hd.num_image_tokens() == 405
    assert hd.image_processor.image_aspect_ratio == "pad"
    other = write_official(tmp_path / "tower")
    (other / "vision_tower").mkdir()
    tower = {"vision_config": {"image_size": 28, "patch_size": 7}}
    (other / "vision_tower" / "config.json").write_text(json.dumps(tower))
    loaded = FlashSlothProcessor.from_pretrained(other)
    assert (loaded.image_processor.image_size, loaded.tokens_per_tile) == (28, 4)
    (other / "named").mkdir()
    (other / "vision_tower" / "config.json").rename(other / "named" / "config.json")
    (other / "config.json").write_text(json.dumps({"mm_vision_tower": str(other / "named")}))
    assert FlashSlothProcessor.from_pretrained(other).image_processor.image_size == 28
    ours = {"vision_config": {"image_size": 60, "patch_size": 10}, "pool_window": 4, "num_queries": 5, "image_hd": True}
    (other / "config.json").write_text(json.dumps(ours))
    loaded = FlashSlothProcessor.from_pretrained(other)
    assert (loaded.image_processor.image_size, loaded.num_image_tokens(), loaded.num_queries) == (60, 20, 5)


def test_the_full_official_tokenizer(full_tokenizer: PreTrainedTokenizerBase) -> None:
    """With the whole vocabulary the three tokens have the ids that released weights and the golden data use."""
    ids = full_tokenizer.convert_tokens_to_ids(["<learnable>", "</s>", "<image>", "  ", "\t\t", "<|endoftext|>"])
    assert ids == [50295, 50296, 50297, 50286, 50294, 50256]
    assert len(full_tokenizer) == 50298


def test_tokens_are_added_once_and_in_order() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.pad_token is None
    assert add_flashsloth_tokens(tokenizer) is tokenizer
    ids = tokenizer.convert_tokens_to_ids(["<learnable>", "</s>", "<image>"])
    assert ids == [256, 257, 258]
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.padding_side) == ("</s>", "</s>", "left")
    add_flashsloth_tokens(tokenizer)
    assert len(tokenizer) == 259


def test_loading_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: expected a directory with a checkpoint"):
        FlashSlothProcessor.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"expected tokenizer.json, or vocab.json and merges.txt"):
        FlashSlothProcessor.from_pretrained(tmp_path)
    folder = write_official(tmp_path / "a")
    (folder / "vision_tower").mkdir()
    (folder / "vision_tower" / "config.json").write_text('{"image_size": "big"}')
    with pytest.raises(ValueError, match="as positive ints, got big, 14, 3"):
        FlashSlothProcessor.from_pretrained(folder)
    for text, match in (("{", "expected a JSON object"), ("[]", "expected a JSON object, got list")):
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match=match):
            FlashSlothProcessor.from_pretrained(folder)
    with pytest.raises(FileNotFoundError, match=r"vocab\.json"):
        load_tokenizer(tmp_path)


def test_constructor_errors() -> None:
    images = FlashSlothImageProcessor()
    with pytest.raises(ValueError, match=r"expected it to have <image>, <learnable>.*add_flashsloth_tokens"):
        FlashSlothProcessor(images, byte_tokenizer())
    tokenizer = add_flashsloth_tokens(byte_tokenizer())
    with pytest.raises(ValueError, match="num_queries: expected an int >= 0, got -1"):
        FlashSlothProcessor(images, tokenizer, num_queries=-1)
    with pytest.raises(ValueError, match=r"tokens_per_tile: expected a positive int, got 8\.5"):
        FlashSlothProcessor(images, tokenizer, tokens_per_tile=8.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="fast tokenizer"):
        add_flashsloth_tokens(object())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="image_processor"):
        FlashSlothProcessor(tokenizer, tokenizer)  # type: ignore[arg-type]


# -------------------------------------------------------------------- errors of a call


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        ({}, ValueError, "expected at least one of them"),
        ({"text": []}, ValueError, "at least one text, got an empty list"),
        ({"text": ""}, ValueError, r"text\[0\]: expected a text, got an empty string"),
        ({"text": ["a", 3]}, TypeError, r"text\[1\]: expected a string, got int"),
        ({"text": 3}, TypeError, "text: expected a string or a list"),
        ({"text": "a\ud800"}, ValueError, r"text\[0\]: expected valid Unicode"),
        ({"text": "<image>a"}, ValueError, "1 <image> in all, but 0 images"),
        ({"text": "a", "images": [photo()]}, ValueError, "0 <image> in all, but 1 images"),
        ({"text": ["<image>", "a<image>"], "images": [photo()]}, ValueError, "2 <image> in all, but 1 images"),
        ({"text": ["<image>", "a"], "images": [[], [photo()]]}, ValueError, r"text\[0\] has 1 <image>, but .* holds 0"),
        ({"text": ["<image>", "a"], "images": [[photo()]]}, ValueError, "one list for each of 2 texts, got 1"),
        ({"text": ["a", "<image> <image>"], "images": [photo()] * 2}, ValueError, r"text\[1\]: expected at most one"),
        ({"text": ["<image>", "<image>"], "images": [photo(), "nowhere"]}, ValueError, r"images\[1\]: cannot read"),
        ({"text": ["<image>"], "images": [["nowhere"]]}, ValueError, r"images\[0\]\[0\]: cannot read"),
        ({"images": []}, ValueError, "at least one image, got none"),
        ({"text": "a", "truncation": True}, ValueError, "truncation: not supported"),
        ({"text": "a", "add_special_tokens": True}, ValueError, "add_special_tokens: not supported"),
        ({"text": "a", "videos": [1]}, ValueError, "got videos or audio"),
        ({"text": "a", "colour": 1}, TypeError, "unknown arguments: colour"),
        ({"text": "a", "text_kwargs": {"stride": 1}}, TypeError, "unknown arguments: stride"),
        ({"text": "a", "return_tensors": "tf"}, ValueError, "return_tensors.*'tf'"),
        ({"text": "a", "padding": "left"}, ValueError, "padding: expected True, False.*'left'"),
        ({"text": "a", "padding_side": "top"}, ValueError, "padding_side: expected 'left' or 'right', got 'top'"),
        ({"text": ["a", "bc"], "padding": False}, ValueError, r"different lengths \[1, 2\]"),
        ({"text": "abc", "padding": "max_length"}, ValueError, "max_length: expected a length"),
        ({"text": "abc", "padding": "max_length", "max_length": 2}, ValueError, r"at most 2 tokens.*\[3\]"),
        ({"text": "abc", "pad_to_multiple_of": -2}, ValueError, "pad_to_multiple_of"),
    ],
)  # fmt: skip
def test_wrong_calls_are_named(call: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        small_processor()(**call)


@pytest.mark.parametrize("token", ["<image>", "<learnable>", "</s>", "<|endoftext|>"])
def test_messages_smuggle_no_special_tokens(processor: FlashSlothProcessor, token: str) -> None:
    for role in range(2):
        contents = ["a", "b"]
        contents[role] += token
        messages = [user(contents[0]), assistant(contents[1]), user("c")]
        with pytest.raises(ValueError, match=rf"conversation\[{role}\].*reserved"):
            processor.apply_chat_template(messages)
        with pytest.raises(ValueError, match=rf"conversation\[1\]\[{role}\].*reserved"):
            processor.apply_chat_template([[user("x")], messages])
    with pytest.raises(ValueError, match="reserved"):
        processor.encode_dialogue([user("a"), assistant("b" + token)])
    with pytest.raises(ValueError, match="reserved"):
        processor.encode_caption("a" + token, images=photo())


@pytest.mark.parametrize(
    ("call", "match"),
    [
        ({"conversation": []}, "expected a list of messages"),
        ({"conversation": "hi"}, "expected a list of messages"),
        ({"conversation": [[]]}, r"conversation\[0\]: expected at least one message"),
        ({"conversation": QUESTION, "tokenize": True}, "1 <image> in all, but 0 images"),
        ({"conversation": QUESTION, "tools": [{}]}, "tools: not part of this format"),
        ({"conversation": QUESTION, "return_assistant_tokens_mask": True}, "encode_dialogue"),
    ],
)
def test_wrong_conversations_are_named(call: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        small_processor().apply_chat_template(**call)


def test_wrong_training_calls_are_named() -> None:
    small = small_processor()
    turns = [user("q", True), assistant("a")]
    with pytest.raises(ValueError, match="1 <image> in all, but 0 images"):
        small.encode_dialogue(turns)
    with pytest.raises(TypeError, match="truncation"):
        small.encode_dialogue(turns, truncation=True)
    for empty in ([], "", "text"):
        with pytest.raises(ValueError, match="expected a dialogue"):
            small.encode_dialogue(empty)
    with pytest.raises(ValueError, match="at least one caption"):
        small.encode_caption([])
    held = [user("q", photo()), assistant("a")]
    assert small.encode_dialogue(held)["pixel_values"].shape == (1, 1, 3, 8, 8)
    assert small.encode_dialogue([held, [user("p"), assistant("b")]])["labels"].shape[0] == 2


# -------------------------------------------------------------------- what a pipeline calls


class Echo:
    """Stands for a model in a pipeline: "generates" ids that were set before."""

    def __init__(self, answer: list[int]) -> None:
        self.answer = torch.tensor([answer])
        self.seen: dict[str, Any] = {}

    def generate(self, **inputs: Any) -> torch.Tensor:
        for name in ("generation_config", "return_dict_in_generate"):  # some versions pass these
            inputs.pop(name, None)
        self.seen = inputs
        ids = inputs["input_ids"]
        return torch.cat([ids, self.answer.expand(len(ids), -1)], dim=1)


class OnlyProcessing(ImageTextToTextPipeline):
    """The real pre- and postprocessing of transformers' pipeline around a model that only echoes."""

    def __init__(self, processor: FlashSlothProcessor, model: Echo) -> None:
        self.processor, self.tokenizer, self.model = processor, processor.tokenizer, model

    dtype = torch.float32
    generation_config = None

    def _prepare_generate_kwargs(self, generate_kwargs: dict[str, Any], **_: Any) -> dict[str, Any]:
        return generate_kwargs

    def ask(self, inputs: Any, **options: Any) -> Any:
        return self.postprocess(self._forward(self.preprocess(inputs)), **options)


def test_a_pipelines_pre_and_postprocessing() -> None:
    from transformers.pipelines.image_text_to_text import Chat, ReturnType

    small = small_processor()
    model = Echo([*small.tokenizer(" Yes.")["input_ids"], small.tokenizer.eos_token_id])
    pipe = OnlyProcessing(small, model)
    messages = [user("Is it?", photo())]
    (record,) = pipe.ask(Chat(messages))
    assert model.seen["pixel_values"].shape == (1, 1, 3, 8, 8)
    assert set(model.seen) == set(small.model_input_names)
    assert record["generated_text"][-1] == {"role": "assistant", "content": " Yes."}
    # The record, with the space that the answer begins with, can be continued.
    again = record["generated_text"] + [user("And?")]
    pipe.ask(Chat(again))
    seen = small.apply_chat_template(messages, tokenize=True)[0].tolist() + model.answer[0].tolist()
    assert model.seen["input_ids"][0].tolist()[: len(seen)] == seen

    (record,) = pipe.ask(Chat(messages), return_type=ReturnType.NEW_TEXT)
    assert record["generated_text"] == " Yes."
    (record,) = pipe.ask({"images": photo_image(), "text": "<image>q<learnable> ASSISTANT:"})
    assert record["generated_text"] == "<image>q<learnable> ASSISTANT: Yes."
    prefilled = [*messages, {"role": "assistant", "content": [{"type": "text", "text": "I say"}]}]
    (record,) = pipe.ask(Chat(prefilled))
    assert record["generated_text"][-1]["content"][-1]["text"] == "I say Yes."
    texts = ["<image>q<learnable>", "longer<learnable>"]
    records = pipe.ask({"images": [photo_image()], "text": texts})
    assert [r["generated_text"] for r in records] == [text + " Yes." for text in texts]


def photo_image() -> Image.Image:
    return Image.fromarray(photo())


def test_decoding_leaves_placeholders_out() -> None:
    small = small_processor()
    out = small(text=["<image>one<learnable> two</s>", "three"], images=photo())
    assert small.batch_decode(out["input_ids"], skip_special_tokens=True) == ["one two", "three"]
    assert small.post_process_image_text_to_text(out["input_ids"]) == ["one two", "three"]
    assert small.decode(out["input_ids"][0], skip_special_tokens=True) == "one two"


def test_codegen_tokenizers_of_either_name_load(tmp_path: Path) -> None:
    folder = write_official(tmp_path)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for name in ("CodeGenTokenizer", "CodeGenTokenizerFast", None):
        settings["tokenizer_class"] = name
        if name is None:
            del settings["tokenizer_class"]
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        tokenizer = load_tokenizer(folder)
        assert isinstance(tokenizer, CodeGenTokenizer)
        assert tokenizer.convert_tokens_to_ids("<image>") == IMAGE
