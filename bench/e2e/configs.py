"""Architectures, from configuration alone: nothing is read from the hub, and the weights are random.

Numbers are those of the official config.json of each checkpoint, named beside them. Fields that change no shape
(rotary bases, norm epsilons, dropout) are left as transformers has them. ``small=True`` gives the same classes on the
same path with few and narrow layers; its tiles are 42 pixels where the full ones are 384, so images scaled alike
(:data:`bench.e2e.models.SMALL_RESOLUTIONS`) are cut into as many tiles.
"""

from __future__ import annotations

from typing import Any

from transformers import (
    InternVLConfig,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen2VLConfig,
    SiglipVisionConfig,
    SmolVLMConfig,
)
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig

from flashsloth.config import PHI_2, SIGLIP_SO400M, FlashSlothConfig

# Ids of placeholders in small vocabularies; the full ones have those of the checkpoint.
SMALL_VOCABULARY, SMALL_IMAGE, SMALL_LEARNABLE, SMALL_VIDEO, SMALL_START = 320, 300, 301, 302, 303
_SMALL_TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "image_size": 42, "patch_size": 7}
_SMALL_DECODER = {
    "vocab_size": SMALL_VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
_SMALL_GROUPED = _SMALL_DECODER | {"num_key_value_heads": 2}
_NO_TOKENS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def flashsloth(small: bool, image_hd: bool = False) -> FlashSlothConfig:
    """Tower, language model and modules as released: the defaults of :class:`flashsloth.FlashSlothConfig`."""
    if not small:
        return FlashSlothConfig(image_hd=image_hd)
    return FlashSlothConfig(
        vision_config=SIGLIP_SO400M | _SMALL_TOWER | {"num_hidden_layers": 3},
        text_config=PHI_2 | _SMALL_DECODER,
        image_hd=image_hd,
        query_layer=1,
        query_dim=16,
        image_token_id=SMALL_IMAGE,
        learnable_token_id=SMALL_LEARNABLE,
        query_offset_token_id=46,
        eos_token_id=None,
        pad_token_id=None,
    )


def flashsloth_hd(small: bool) -> FlashSlothConfig:
    """Five tiles instead of one."""
    return flashsloth(small, image_hd=True)


def control(small: bool) -> LlavaConfig:
    """FlashSloth's tower (without the layer it leaves out) and language model, and LLaVA's projector between them."""
    tower = SIGLIP_SO400M | (_SMALL_TOWER if small else {})
    tower["num_hidden_layers"] = 2 if small else SIGLIP_SO400M["num_hidden_layers"] - 1
    text = PHI_2 | (_SMALL_DECODER if small else {})
    return LlavaConfig(
        vision_config=SiglipVisionConfig(**_fields(tower), vision_use_head=False),
        text_config=PhiConfig(**_fields(text), **_NO_TOKENS),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",  # SigLIP has no class token to drop
        image_token_index=SMALL_IMAGE if small else FlashSlothConfig().image_token_id,
        tie_word_embeddings=False,
    )


def qwen2_vl_2b(small: bool) -> Qwen2VLConfig:
    """config.json of Qwen/Qwen2-VL-2B-Instruct."""
    text: dict[str, Any] = {
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    vision: dict[str, Any] = {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16, "patch_size": 14}
    ids: dict[str, Any] = {}
    if small:
        rotary = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
        text = {**_SMALL_GROUPED, "rope_parameters": rotary}
        vision = {"depth": 2, "embed_dim": 32, "hidden_size": text["hidden_size"], "num_heads": 2, "patch_size": 7}
        ids = {
            "image_token_id": SMALL_IMAGE,
            "video_token_id": SMALL_VIDEO,
            "vision_start_token_id": SMALL_START,
            "vision_end_token_id": SMALL_START + 1,
        }
    return Qwen2VLConfig(text_config={**text, **_NO_TOKENS}, vision_config=vision, tie_word_embeddings=True, **ids)


def internvl2_2b(small: bool) -> InternVLConfig:
    """config.json of OpenGVLab/InternVL2-2B; InternLM2 1.8B is a Llama with its projections in one matrix."""
    text: dict[str, Any] = {
        "vocab_size": 92553,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    }
    # "<IMG_CONTEXT>" of its tokenizer.
    return _internvl(LlamaConfig(**(_SMALL_GROUPED if small else text), **_NO_TOKENS), small, 92546)


def internvl2_5_1b(small: bool) -> InternVLConfig:
    """config.json of OpenGVLab/InternVL2_5-1B, whose language model is Qwen2.5 0.5B."""
    text: dict[str, Any] = {
        "vocab_size": 151674,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    }
    return _internvl(Qwen2Config(**(_SMALL_GROUPED if small else text), **_NO_TOKENS), small, 151667)


def _internvl(text: PretrainedConfig, small: bool, image_token_id: int) -> InternVLConfig:
    """InternViT-300M-448px, the tower of both (vision_config of the same files), and the projector of transformers."""
    vision: dict[str, Any] = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 448,
        "patch_size": 14,
    }
    if small:
        # 56 is to 42 nearly as 448 to 384, and gives an even grid, which the shuffle needs.
        vision = {**_SMALL_TOWER, "num_hidden_layers": 2, "image_size": 56}
    return InternVLConfig(
        vision_config=InternVLVisionConfig(**vision, attention_bias=True, norm_type="layer_norm"),
        text_config=text,
        image_token_id=SMALL_IMAGE if small else image_token_id,
        image_seq_length=(vision["image_size"] // vision["patch_size"]) ** 2 // 4,
        tie_word_embeddings=False,
    )


def smolvlm2_2b(small: bool) -> SmolVLMConfig:
    """config.json of HuggingFaceTB/SmolVLM2-2.2B-Instruct: SigLIP so400m/14 at 384 pixels and SmolLM2 1.7B."""
    text: dict[str, Any] = {
        "vocab_size": 49280,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    }
    vision = _fields(SIGLIP_SO400M | (_SMALL_TOWER | {"num_hidden_layers": 2} if small else {}))
    return SmolVLMConfig(
        vision_config=SmolVLMVisionConfig(**vision),
        text_config=LlamaConfig(**(_SMALL_DECODER if small else text), **_NO_TOKENS),
        scale_factor=3,
        image_token_id=SMALL_IMAGE if small else 49190,
        tie_word_embeddings=False,
    )


def _fields(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != "model_type"}
