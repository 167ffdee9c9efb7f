"""Processor and model together, from a checkpoint directory to an answer, as a user of transformers has them."""

from __future__ import annotations

import json
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, TextIteratorStreamer, pipeline

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor
from tests.model.prompting import write_official
from tests.model.support import PHI, VISION
from tests.support import Golden, golden_path

QUESTION = "What is the man in the red jacket holding?"


def photo(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 60, 3), dtype=np.uint8))


def chat(question: str, image: Image.Image | None = None) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "text", "text": question}]
    return [{"role": "user", "content": ([{"type": "image", "image": image}] if image else []) + parts}]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint in our layout, with tokenizer, chat template and image settings."""
    from flashsloth import FlashSlothConfig

    official = write_official(tmp_path_factory.mktemp("official"))
    target = tmp_path_factory.mktemp("ours")
    torch.manual_seed(0)
    config = FlashSlothConfig(
        vision_config=VISION,
        text_config={**PHI, "vocab_size": 50304, "max_position_embeddings": 512},
        pool_window=2,
        num_queries=3,
        query_layer=2,
        query_dim=16,
    )
    FlashSlothForConditionalGeneration(config).save_pretrained(target)
    size = VISION["image_size"]
    processor = FlashSlothProcessor.from_pretrained(official, image_size=size, num_queries=3, tokens_per_tile=4)
    processor.save_pretrained(target)
    return target


def test_auto_classes(directory: Path) -> None:
    assert type(AutoModelForImageTextToText.from_pretrained(directory)) is FlashSlothForConditionalGeneration
    assert type(AutoProcessor.from_pretrained(directory)) is FlashSlothProcessor


def test_pipeline(directory: Path) -> None:
    """transformers' pipeline gives what model and processor give by hand: a chat, a batch of chats, a prompt."""
    run = pipeline("image-text-to-text", model=str(directory))
    model, processor = AutoModelForImageTextToText.from_pretrained(directory), AutoProcessor.from_pretrained(directory)
    options = {"max_new_tokens": 6, "do_sample": False}
    wanted = []
    for seed in (0, 1):
        prompt = processor.apply_chat_template(chat(QUESTION, photo(seed)), tokenize=False)
        inputs = processor(images=photo(seed), text=prompt)
        ids = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
        wanted.append(processor.decode(ids, skip_special_tokens=True))
    chats = [chat(QUESTION, photo(seed)) for seed in (0, 1)]
    assert run(text=chats[0], generate_kwargs=options, return_full_text=False)[0]["generated_text"] == wanted[0]
    batch = run(text=chats, generate_kwargs=options, return_full_text=False)
    assert [row[0]["generated_text"] for row in batch] == wanted
    prompt = processor.apply_chat_template(chats[1], tokenize=False)
    raw = run(images=photo(1), text=prompt, generate_kwargs=options, return_full_text=False)
    assert raw[0]["generated_text"] == wanted[1]


def test_streaming(directory: Path) -> None:
    model, processor = AutoModelForImageTextToText.from_pretrained(directory), AutoProcessor.from_pretrained(directory)
    inputs = processor(images=photo(), text=processor.apply_chat_template(chat(QUESTION, photo()), tokenize=False))
    options = {"max_new_tokens": 6, "do_sample": False}
    whole = processor.decode(model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :])
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True)
    thread = Thread(target=model.generate, kwargs={**inputs, **options, "streamer": streamer})
    thread.start()
    assert "".join(streamer) == whole
    thread.join()


def test_two_turns_with_a_cache_equal_the_conversation_without(directory: Path) -> None:
    """What a chat does: the whole conversation is processed again, the cache and the images are passed back."""
    model, processor = AutoModelForImageTextToText.from_pretrained(directory), AutoProcessor.from_pretrained(directory)
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
    messages = chat(QUESTION, photo())
    first = processor(images=photo(), text=processor.apply_chat_template(messages, tokenize=False))
    context = model.get_image_context(first.pop("pixel_values"))
    turn = model.generate(**first, image_context=context, **options)

    answer = {"role": "assistant", "content": " A grey umbrella."}
    messages = [*messages, answer, *chat("How many dogs are there, and what colour are they?")]
    second = processor(images=photo(), text=processor.apply_chat_template(messages, tokenize=False))
    alone = model.generate(**second, **options).sequences
    second.pop("pixel_values")
    cache = turn.past_key_values
    cache.crop(first["input_ids"].shape[1] - cache.get_seq_length())  # the answer given is not the one generated
    cached = model.generate(**second, image_context=context, past_key_values=cache, **options).sequences
    assert torch.equal(cached, alone)


def test_photograph_to_answer_is_the_official_one(tmp_path: Path) -> None:
    """Golden picture and prompt through processor and model: the ids the official code generates."""
    source = golden_path("model_weights")
    golden = Golden("model_a_single")
    meta = json.loads((source / "meta.json").read_text())
    write_official(tmp_path, full=True, **meta["llm_config"])
    (tmp_path / "vision_tower").mkdir()
    tower = {"model_type": "siglip_vision_model", **meta["siglip_config"]}
    (tmp_path / "vision_tower" / "config.json").write_text(json.dumps(tower))
    weights = {name: tensor.float() for name, tensor in load_file(source / "weights.safetensors").items()}
    save_file(weights, tmp_path / "model.safetensors")

    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    processor = FlashSlothProcessor.from_pretrained(tmp_path)
    picture = Image.fromarray(load_file(golden_path("model_images") / "io.safetensors")["images_u8"][0].numpy())
    prompt = processor.apply_chat_template(chat("Describe this photo in detail.", picture), tokenize=False)
    assert prompt == golden.meta["prompt"]
    inputs = processor(images=picture, text=prompt)
    generated = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert generated.tolist() == golden.io["generated_ids"][0].long().tolist()
