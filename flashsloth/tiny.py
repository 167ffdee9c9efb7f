"""Models with random weights and a tokenizer without files: for the demo, for tests, for trying things out."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from flashsloth.config import SIGLIP_SO400M, FlashSlothConfig
from flashsloth.image_processing import FlashSlothImageProcessor
from flashsloth.modeling import FlashSlothForConditionalGeneration
from flashsloth.processing import FlashSlothProcessor
from flashsloth.prompt import IMAGE_TOKEN, QUERY_TOKEN
from flashsloth.tokenization import add_flashsloth_tokens

# Queries tell words of the question apart, and are told apart by what they read in it.
_QUERY_GAINS = {"t2q_attn.q": 8.0, "t2q_attn.k": 8.0, "i2q_attn.q": 1.3, "i2q_attn.k": 1.3}


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer in which every byte of UTF-8 is one token, with the special tokens of the prompt format.

    Needs no file. Ids 0 to 255 are bytes, ``<|endoftext|>`` is 256, and the three tokens of the format follow.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=end, bos_token=end, pad_token=end)
    return add_flashsloth_tokens(wrapped)


def tiny_config(
    tokenizer: PreTrainedTokenizerBase | None = None, *, text: dict[str, Any] | None = None, **changes: Any
) -> FlashSlothConfig:
    """A configuration of a few thousand parameters, its ids those of :func:`byte_tokenizer`.

    The grid is 6x6 vision tokens, pooled to 2x2. ``text`` are fields of the decoder's configuration, ``changes`` those
    of :class:`FlashSlothConfig`.
    """
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 42,
        "patch_size": 7,
    }
    decoder = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    fields: dict[str, Any] = {"query_layer": 1, "query_dim": 16, "num_queries": 9, **changes}
    return _with_ids(
        tokenizer or byte_tokenizer(), vision_config=vision, text_config=_phi(**decoder | (text or {})), **fields
    )


def demo_config(tokenizer: PreTrainedTokenizerBase | None = None) -> FlashSlothConfig:
    """The widths of the released model, where the fused ops are of full size, with few layers and a narrow MLP.

    Tower 1152 wide with 4 layers of 27, decoder 2560 wide with 32 heads and 4 layers of 32: 0.2 billion parameters.
    """
    vision = SIGLIP_SO400M | {"num_hidden_layers": 5}  # the last is not used
    text = _phi(hidden_size=2560, intermediate_size=2560, num_hidden_layers=4, num_attention_heads=32)
    return _with_ids(tokenizer or byte_tokenizer(), vision_config=vision, text_config=text, query_layer=2)


def random_model(config: FlashSlothConfig, seed: int = 0) -> FlashSlothForConditionalGeneration:
    """A model of random weights, ready for inference.

    The query module is drawn wider than training starts it: there all queries would attend to all tokens alike.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = FlashSlothForConditionalGeneration(config)
        for name, weight in model.embedded_query.named_parameters() if config.num_queries else ():
            if weight.dim() == 2:
                gain = next((gain for part, gain in _QUERY_GAINS.items() if part in name), 1.0)
                weight.normal_(0, gain * weight.shape[1] ** -0.5)
    return model.eval()


def processor_for(config: FlashSlothConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> FlashSlothProcessor:
    """The processor that goes with a configuration made here."""
    return FlashSlothProcessor(
        FlashSlothImageProcessor(
            image_size=config.vision_config.image_size,
            image_hd=config.image_hd,
            image_aspect_ratio=config.image_aspect_ratio,
        ),
        tokenizer or byte_tokenizer(),
        num_queries=config.num_queries,
        tokens_per_tile=config.tokens_per_tile,
    )


def _phi(**fields: Any) -> dict[str, Any]:
    return {
        "model_type": "phi",
        "vocab_size": 272,
        "partial_rotary_factor": 0.4,
        "max_position_embeddings": 2048,
        "resid_pdrop": 0.1,
        **fields,
    }


def _with_ids(tokenizer: PreTrainedTokenizerBase, **fields: Any) -> FlashSlothConfig:
    ids = tokenizer.get_vocab()
    return FlashSlothConfig(
        image_token_id=ids[IMAGE_TOKEN],
        learnable_token_id=ids[QUERY_TOKEN],
        query_offset_token_id=ids["."],
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **fields,
    )
