"""flashsloth-nano before training: its sizes, and a directory with all but the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, SiglipVisionConfig

from flashsloth.config import FlashSlothConfig
from flashsloth.image_processing import FlashSlothImageProcessor
from flashsloth.nano.tokenizer import build_tokenizer, words_of_questions
from flashsloth.processing import FlashSlothProcessor
from flashsloth.prompt import IMAGE_TOKEN, QUERY_TOKEN

# 108 pixels in patches of 6 are a grid of 18 x 18, which windows of 3 pool to 36 tokens. Pictures of ``sight`` have 216
# pixels, so the four tiles of HD see every one.
VISION: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "image_size": 108,
    "patch_size": 6,
}
TEXT: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 1024,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
}
QUERIES: dict[str, Any] = {"query_layer": 2, "query_dim": 128, "query_heads": 4, "num_queries": 9}


def vision_config() -> SiglipVisionConfig:
    return SiglipVisionConfig(**VISION, vision_use_head=False)


def nano_config(tokenizer: PreTrainedTokenizerBase) -> FlashSlothConfig:
    ids = tokenizer.get_vocab()
    return FlashSlothConfig(
        vision_config={"model_type": "siglip_vision_model", **VISION},
        text_config={**TEXT, "vocab_size": -(-len(ids) // 8) * 8, "bos_token_id": None, "eos_token_id": None},
        vision_select_layer=-1,
        pool_window=3,
        pool_dropout=0.0,
        image_token_id=ids[IMAGE_TOKEN],
        learnable_token_id=ids[QUERY_TOKEN],
        query_offset_token_id=ids["."],
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.05,
        **QUERIES,
    )


def write_start(out: Path) -> Path:
    """Configuration, tokenizer and processor, and no weights: what ``flashsloth train`` starts from."""
    tokenizer = build_tokenizer(words_of_questions())
    config = nano_config(tokenizer)
    processor = FlashSlothProcessor(
        FlashSlothImageProcessor(image_size=config.vision_config.image_size),
        tokenizer,
        num_queries=config.num_queries,
        tokens_per_tile=config.tokens_per_tile,
    )
    out.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(out)
    processor.save_pretrained(out)
    return out
