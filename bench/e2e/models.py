"""The models: how each is built, which parts it has, and what a request to it looks like."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    InternVLForConditionalGeneration,
    LlavaForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
    SmolVLMForConditionalGeneration,
)

from bench.e2e import configs, tokens
from bench.e2e.tokens import Layout
from flashsloth.modeling import FlashSlothForConditionalGeneration

RESOLUTIONS = ((384, 384), (768, 768), (1344, 896))
SMALL_RESOLUTIONS = ((42, 42), (84, 84), (147, 98))
# Tokens of the question and of the chat template around it, the same for every model.
TEXT_TOKENS, SMALL_TEXT_TOKENS = 64, 8
WINDOW = 3

Request = dict[str, Any]


@dataclass(frozen=True)
class Parts:
    """Where the phases of a forward pass meet, and what is trained.

    Attributes:
        tower_end: the module whose output ends the work of the vision tower.
        language: the language model, which starts when all visual tokens are there.
        tower: frozen in both stages.
        projector: trained in the first stage, and in the second with all that is not ``tower``.
    """

    tower_end: nn.Module
    language: nn.Module
    tower: nn.Module
    projector: tuple[nn.Module, ...]


@dataclass(frozen=True)
class Model:
    """A model to measure.

    Attributes:
        name: as reports show it. ``ours``: whether the fused ops run in it.
        title: what it is made of.
        config: makes a configuration, full or small.
        cls: the class of the model.
        layout: what its processor makes of an image, for a configuration, a width and a height.
        parts: of a built model.
        window: side of the pooling window, where the projector compresses; 1 where every patch stays.
        shuffled: whether it does so by stacking the window's features instead of averaging them.
    """

    name: str
    title: str
    config: Callable[[bool], Any]
    cls: Any
    layout: Callable[[Any, int, int], Layout]
    parts: Callable[[Any], Parts]
    ours: bool = False
    window: int = 1
    shuffled: bool = False

    def build(self, small: bool, device: str, dtype: torch.dtype, attention: str = "sdpa") -> Any:
        """The model with random weights, in evaluation mode.

        It is made where it will run: layers draw their weights there at once, and what is computed and not drawn
        (rotary frequencies, position ids) is right from the start. On ``"meta"`` it has shapes and no memory.
        """
        with torch.device(device):
            model = self.cls._from_config(self.config(small), dtype=dtype, attn_implementation=attention)
            if self.window > 1 and not self.ours:
                before = torch.get_default_dtype()
                torch.set_default_dtype(dtype)
                try:
                    model.model.multi_modal_projector = Compressor(model.config, self.window, self.shuffled)
                finally:
                    torch.set_default_dtype(before)
        # An answer has the length that is asked for, whatever random weights say.
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        return model.eval()

    def request(
        self, config: Any, layout: Layout, batch: int, text: int, device: str, dtype: torch.dtype, seed: int = 0
    ) -> Request:
        """Random pixels and ids, laid out as the processor does it: what ``forward`` and ``generate`` take."""
        generator = torch.Generator().manual_seed(seed)
        ids = _ids(config, layout, batch, text, generator)
        if self.ours:
            request = _flashsloth_request(config, layout, ids, text, generator)
        else:
            request = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            request |= _pixels(config, layout, batch, ids, generator)
        return {
            name: value.to(device, dtype)
            if value.is_floating_point()
            else value.to("cpu" if name == "question_spans" else device)
            for name, value in request.items()
        }

    def prompt(self, layout: Layout, config: Any, text: int) -> int:
        """Tokens of a whole prompt: visual ones, the marks of the processor, embedded queries, text."""
        return layout.visual_tokens + layout.marks + (config.num_queries if self.ours else 0) + text


class Compressor(nn.Module):
    """LLaVA's projector behind a pooling of windows: by their average, or by stacking their features."""

    def __init__(self, config: Any, window: int, shuffled: bool) -> None:
        super().__init__()
        vision, width = config.vision_config, config.text_config.hidden_size
        self.side, self.window, self.shuffled = vision.image_size // vision.patch_size, window, shuffled
        self.linear_1 = nn.Linear(vision.hidden_size * (window**2 if shuffled else 1), width)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(width, width)

    def forward(self, features: Tensor) -> Tensor:
        """``(B, H*W, D)`` -> ``(B, windows, Dm)``."""
        rows = self.side // self.window
        windows = features.view(features.shape[0], rows, self.window, rows, self.window, -1)
        if self.shuffled:
            pooled = windows.transpose(2, 3).reshape(features.shape[0], rows * rows, -1)
        else:
            pooled = windows.mean((2, 4)).flatten(1, 2)
        return self.linear_2(self.act(self.linear_1(pooled)))


def _ids(config: Any, layout: Layout, batch: int, text: int, generator: torch.Generator) -> Tensor:
    """``(batch, L)``: the image as laid out, then text. Which words stand there changes no time."""
    image: list[int] = []
    for marks, count in layout.visual:
        image += [1] * marks + [config.image_token_id] * count
    image += [1] * layout.end
    words = torch.randint(10, 256, (batch, text), generator=generator)
    return torch.cat([torch.tensor(image).expand(batch, -1), words], dim=1)


def _flashsloth_request(
    config: Any, layout: Layout, ids: Tensor, text: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """The queries follow the question, which here is the first half of the text; the rest stands for the template."""
    asked = ids.shape[1] - text // 2
    queries = torch.full((ids.shape[0], config.num_queries), config.learnable_token_id)
    ids = torch.cat([ids[:, :asked], queries, ids[:, asked:]], dim=1)
    side = config.vision_config.image_size
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "question_spans": torch.tensor([layout.visual_tokens, asked]).expand(ids.shape[0], 1, 2).clone(),
        "pixel_values": torch.randn(ids.shape[0], layout.tiles, 3, side, side, generator=generator),
    }


def _pixels(config: Any, layout: Layout, batch: int, ids: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Pixels in the shape that each processor gives them, and what goes with them."""
    patch = config.vision_config.patch_size
    rows, columns = layout.grid
    if config.model_type == "qwen2_vl":
        vision = config.vision_config
        length = vision.in_channels * vision.temporal_patch_size * patch * patch
        return {
            "pixel_values": torch.randn(batch * rows * columns, length, generator=generator),
            "image_grid_thw": torch.tensor([[1, rows, columns]]).expand(batch, -1).clone(),
            "mm_token_type_ids": (ids == config.image_token_id).int(),
        }
    if config.model_type == "internvl":
        height, width = rows * patch[0], columns * patch[1]
        return {"pixel_values": torch.randn(batch * layout.tiles, 3, height, width, generator=generator)}
    side = config.vision_config.image_size
    if config.model_type == "smolvlm":
        return {
            "pixel_values": torch.randn(batch, layout.tiles, 3, side, side, generator=generator),
            "pixel_attention_mask": torch.ones(batch, layout.tiles, side, side, dtype=torch.long),
        }
    return {"pixel_values": torch.randn(batch, 3, side, side, generator=generator)}


def _flashsloth_parts(model: Any) -> Parts:
    return Parts(
        model.vision_tower, model.language_model, model.vision_tower, (model.pooling, model.projector)
    )


def _llava_parts(model: Any) -> Parts:
    inner = model.model
    return Parts(inner.vision_tower, inner.language_model, inner.vision_tower, (inner.multi_modal_projector,))


def _qwen2_vl_parts(model: Any) -> Parts:
    # The merger, which compresses, is the last part of its tower, and is trained as others' projectors are.
    inner = model.model
    return Parts(inner.visual.blocks[-1], inner.language_model, inner.visual, (inner.visual.merger,))


def _smolvlm_parts(model: Any) -> Parts:
    inner = model.model
    return Parts(inner.vision_model, inner.text_model, inner.vision_model, (inner.connector,))


_SIGLIP_PHI = "SigLIP so400m, Phi-2"

FLASHSLOTH = Model(
    "FlashSloth",
    f"{_SIGLIP_PHI}; pooled 3x3, nine embedded queries",
    configs.flashsloth,
    FlashSlothForConditionalGeneration,
    tokens.flashsloth,
    _flashsloth_parts,
    ours=True,
    window=WINDOW,
)
FLASHSLOTH_HD = Model(
    "FlashSloth-HD",
    f"{_SIGLIP_PHI}; five tiles, pooled 3x3, nine embedded queries",
    configs.flashsloth_hd,
    FlashSlothForConditionalGeneration,
    tokens.flashsloth,
    _flashsloth_parts,
    ours=True,
    window=WINDOW,
)
CONTROL = Model(
    "uncompressed",
    f"{_SIGLIP_PHI}; every patch a token",
    configs.control,
    LlavaForConditionalGeneration,
    tokens.llava,
    _llava_parts,
)
AVERAGE = Model(
    "average pooling",
    f"{_SIGLIP_PHI}; 3x3 averaged",
    configs.control,
    LlavaForConditionalGeneration,
    tokens.compressed(WINDOW),
    _llava_parts,
    window=WINDOW,
)
SHUFFLE = Model(
    "pixel shuffle",
    f"{_SIGLIP_PHI}; 3x3 stacked",
    configs.control,
    LlavaForConditionalGeneration,
    tokens.compressed(WINDOW),
    _llava_parts,
    window=WINDOW,
    shuffled=True,
)
QWEN2_VL = Model(
    "Qwen2-VL-2B",
    "ViT of 32 layers, Qwen2 1.5B; 2x2 merged, native resolution",
    configs.qwen2_vl_2b,
    Qwen2VLForConditionalGeneration,
    tokens.qwen2_vl,
    _qwen2_vl_parts,
)
INTERNVL_2B = Model(
    "InternVL2-2B",
    "InternViT 300M, InternLM2 1.8B as Llama; 2x2 stacked, up to 12 tiles",
    configs.internvl2_2b,
    InternVLForConditionalGeneration,
    tokens.internvl,
    _llava_parts,
)
INTERNVL_1B = Model(
    "InternVL2.5-1B",
    "InternViT 300M, Qwen2.5 0.5B; 2x2 stacked, up to 12 tiles",
    configs.internvl2_5_1b,
    InternVLForConditionalGeneration,
    tokens.internvl,
    _llava_parts,
)
SMOLVLM = Model(
    "SmolVLM2-2.2B",
    "SigLIP so400m, SmolLM2 1.7B; 3x3 stacked, up to 16 tiles and the whole",
    configs.smolvlm2_2b,
    SmolVLMForConditionalGeneration,
    tokens.smolvlm,
    _smolvlm_parts,
)
MODELS = (FLASHSLOTH, FLASHSLOTH_HD, CONTROL, AVERAGE, SHUFFLE, QWEN2_VL, INTERNVL_2B, INTERNVL_1B, SMOLVLM)
