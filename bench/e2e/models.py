"""The models: how each is built, which parts it has, and what a request to it looks like."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

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
        devices = [torch.cuda.current_device()] if device == "cuda" else []
        with torch.random.fork_rng(devices), torch.device(device):
            torch.manual_seed(0)
            model = self.cls._from_config(self.config(small), dtype=dtype, attn_implementation=attention)
            if self.ours:
                _spread(model.embedded_query)
            elif self.window > 1:
                compressor = Compressor(model.config, self.window, self.shuffled)
                model.model.multi_modal_projector = compressor.to(dtype)
        # An answer has the length that is asked for, whatever random weights say.
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        return model.eval()

    def request(
        self, config: Any, layout: Layout, batch: int, text: int, device: str, dtype: torch.dtype, seed: int = 0
    ) -> Request:
        """Random pixels and ids, laid out as the processor does it: what ``forward`` and ``generate`` take."""
        draw = Draw(torch.Generator(device).manual_seed(seed), dtype)
        ids = _ids(config, layout, batch, text, draw)
        if self.ours:
            return _flashsloth_request(config, layout, ids, text, draw)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **_pixels(config, layout, ids, draw)}

    def prompt(self, layout: Layout, config: Any, text: int) -> int:
        """Tokens of a whole prompt: visual ones, the marks of the processor, embedded queries, text."""
        return layout.visual_tokens + layout.marks + (config.num_queries if self.ours else 0) + text


class Draw(NamedTuple):
    """Random inputs, made where they are needed: the pixels of a large batch take a processor seconds."""

    generator: torch.Generator
    dtype: torch.dtype

    def pixels(self, *shape: int) -> Tensor:
        device = self.generator.device
        return torch.randn(*shape, generator=self.generator, device=device, dtype=self.dtype)

    def words(self, *shape: int) -> Tensor:
        """Ids of no special token. Which words they are changes no time."""
        return torch.randint(10, 256, shape, generator=self.generator, device=self.generator.device)


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


@torch.no_grad()
def _spread(module: nn.Module) -> None:
    """Draw matrices so wide that attention differs from an average: a check would hardly tell the two apart."""
    for weight in module.parameters():
        if weight.dim() == 2:
            weight.normal_(0, weight.shape[1] ** -0.5)


def _ids(config: Any, layout: Layout, batch: int, text: int, draw: Draw) -> Tensor:
    """``(batch, L)``: the image as laid out, then text."""
    image: list[int] = []
    for marks, count in layout.visual:
        image += [1] * marks + [config.image_token_id] * count
    image += [1] * layout.end
    words = draw.words(batch, text)
    return torch.cat([torch.tensor(image, device=words.device).expand(batch, -1), words], dim=1)


def _flashsloth_request(config: Any, layout: Layout, ids: Tensor, text: int, draw: Draw) -> Request:
    """The queries follow the question, which here is the first half of the text; the rest stands for the template."""
    batch, asked = ids.shape[0], ids.shape[1] - text // 2
    queries = ids.new_full((batch, config.num_queries), config.learnable_token_id)
    ids = torch.cat([ids[:, :asked], queries, ids[:, asked:]], dim=1)
    side = config.vision_config.image_size
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        # On the CPU, as the processor leaves them: the model then knows the longest question without waiting.
        "question_spans": torch.tensor([layout.visual_tokens, asked]).repeat(batch, 1, 1),
        "pixel_values": draw.pixels(batch, layout.tiles, 3, side, side),
    }


def _pixels(config: Any, layout: Layout, ids: Tensor, draw: Draw) -> Request:
    """Pixels in the shape that each processor gives them, and what goes with them."""
    batch, vision, (rows, columns) = ids.shape[0], config.vision_config, layout.grid
    if config.model_type == "qwen2_vl":
        length = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        return {
            "pixel_values": draw.pixels(batch * rows * columns, length),
            "image_grid_thw": torch.tensor([1, rows, columns], device=ids.device).repeat(batch, 1),
            "mm_token_type_ids": (ids == config.image_token_id).int(),
        }
    if config.model_type == "internvl":
        return {"pixel_values": draw.pixels(batch * layout.tiles, 3, *vision.image_size)}
    shape = (vision.image_size, vision.image_size)
    if config.model_type == "smolvlm":
        return {
            "pixel_values": draw.pixels(batch, layout.tiles, 3, *shape),
            "pixel_attention_mask": ids.new_ones(batch, layout.tiles, *shape),
        }
    return {"pixel_values": draw.pixels(batch, 3, *shape)}


def _flashsloth_parts(model: Any) -> Parts:
    return Parts(model.vision_tower, model.language_model, model.vision_tower, (model.pooling, model.projector))


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
