"""FlashSlothProcessor in use: conversations, pipelines, saving and loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
from tests.model.prompting import (
    EOS,
    IMAGE,
    LEARNABLE,
    PAD,
    assistant,
    byte_tokenizer,
    full_tokenizer,
    official_dir,
    photo,
    processor,
    small_processor,
    spans,
    user,
    write_official,
)

__all__ = ["full_tokenizer", "official_dir", "processor"]  # fixtures


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
