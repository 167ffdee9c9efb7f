"""Configuration: a vision tower and a language model of transformers, and what FlashSloth puts between them."""

from __future__ import annotations

import os
from typing import Any, ClassVar

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from flashsloth.attention import registered_name

# SigLIP so400m/14 at 384 pixels, the tower of every released checkpoint; here so that none needs the network.
SIGLIP_SO400M: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
PHI_2: dict[str, Any] = {
    "model_type": "phi",
    "vocab_size": 51200,
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "partial_rotary_factor": 0.4,
    "max_position_embeddings": 2048,
    "resid_pdrop": 0.1,
}
HD_TILES = 5
POOLINGS = ("attention", "average", "pixel_shuffle", "none")


class FlashSlothConfig(PretrainedConfig):
    """Configuration of :class:`flashsloth.FlashSlothForConditionalGeneration`.

    Args:
        vision_config: configuration (or dict) of a SigLIP vision tower. Default SigLIP so400m/14 at 384 pixels.
        text_config: configuration (or dict, with ``model_type``) of any decoder that transformers knows as a
            causal language model with the usual list of layers. Default phi-2.
        vision_select_layer: negative index of the tower layer whose output is used; later layers are not built.
        image_hd: an image is five tiles (the whole, then its four quarters), not one.
        pooling: how the tokens of a window become one: "attention" (the paper's), "average", "pixel_shuffle" (all of
            them side by side, a token as wide as the window has places; the window must divide the grid) or "none":
            every vision token is a visual token. The last three have no weights; they are for comparison.
        pool_window: side of the pooling window, in vision tokens; "none" does not read it.
        pool_dropout: dropout on the hidden layer of the pooling scores, in training.
        num_queries: embedded queries behind each question; 0 for a model without them and without their module.
        query_layer: the query module runs before the decoder layer of this index.
        query_dim: inner width of the query module.
        query_heads: heads of the query module; None takes those of the decoder.
        image_token_id, learnable_token_id: ids that stand for a visual token and for an embedded query.
        query_offset_token_id: token whose embedding is added to every embedded query (" .").
        freeze_vision_tower: the tower runs without gradients, also in training.
        image_aspect_ratio: "square" (squash) or "pad", read by the processor.

    Raises:
        ValueError: a field that does not fit the others, with what was expected and what came.
    """

    model_type = "flashsloth"
    sub_configs: ClassVar[dict[str, Any]] = {"vision_config": AutoConfig, "text_config": AutoConfig}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "image_context"]

    def __init__(
        self,
        vision_config: PretrainedConfig | dict[str, Any] | None = None,
        text_config: PretrainedConfig | dict[str, Any] | None = None,
        vision_select_layer: int = -2,
        image_hd: bool = False,
        pooling: str = "attention",
        pool_window: int = 3,
        pool_dropout: float = 0.1,
        num_queries: int = 9,
        query_layer: int = 7,
        query_dim: int = 576,
        query_heads: int | None = None,
        image_token_id: int = 50297,
        learnable_token_id: int = 50295,
        query_offset_token_id: int = 764,
        freeze_vision_tower: bool = True,
        image_aspect_ratio: str = "square",
        initializer_range: float = 0.02,
        eos_token_id: int | list[int] | None = 50296,
        pad_token_id: int | None = 50256,
        **kwargs: Any,
    ) -> None:
        self.vision_config = _sub_config("vision_config", vision_config, SIGLIP_SO400M)
        self.text_config = _sub_config("text_config", text_config, PHI_2)
        self.vision_config.vision_use_head = False
        self.vision_select_layer = vision_select_layer
        self.image_hd = image_hd
        self.pooling = pooling
        self.pool_window = pool_window
        self.pool_dropout = pool_dropout
        self.num_queries = num_queries
        self.query_layer = query_layer
        self.query_dim = query_dim
        self.query_heads = self.text_config.num_attention_heads if query_heads is None else query_heads
        self.image_token_id = image_token_id
        self.learnable_token_id = learnable_token_id
        self.query_offset_token_id = query_offset_token_id
        self.freeze_vision_tower = freeze_vision_tower
        self.image_aspect_ratio = image_aspect_ratio
        self.initializer_range = initializer_range
        self._check()
        kwargs.setdefault("tie_word_embeddings", getattr(self.text_config, "tie_word_embeddings", False))
        kwargs.update(eos_token_id=eos_token_id, pad_token_id=pad_token_id)
        super().__init__(**kwargs)

    @property
    def vision_grid(self) -> tuple[int, int]:
        """Rows and columns of vision tokens of one tile."""
        side = self.vision_config.image_size // self.vision_config.patch_size
        return side, side

    @property
    def vision_layers(self) -> int:
        """Tower layers that are built."""
        return self.vision_config.num_hidden_layers + self.vision_select_layer + 1

    @property
    def num_tiles(self) -> int:
        """Tiles of an image as the processor makes them."""
        return HD_TILES if self.image_hd else 1

    @property
    def tokens_per_tile(self) -> int:
        """Visual tokens the language model sees of one tile."""
        rows, columns = self.vision_grid
        window = 1 if self.pooling == "none" else self.pool_window
        return -(-rows // window) * -(-columns // window)

    @property
    def pooled_width(self) -> int:
        """Width of a pooled token, which the projector takes."""
        tokens = self.pool_window**2 if self.pooling == "pixel_shuffle" else 1
        return int(self.vision_config.hidden_size) * tokens

    @property
    def num_visual_tokens(self) -> int:
        """Visual tokens the language model sees of one image."""
        return self.num_tiles * self.tokens_per_tile

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        from flashsloth.checkpoint import convert_config, is_official

        if is_official(config_dict):
            config_dict = convert_config(config_dict, pretrained_model_name_or_path)
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        # AutoConfig reads the file itself and comes here with the path as name_or_path.
        from flashsloth.checkpoint import convert_config, is_official

        if is_official(config_dict):
            config_dict = convert_config(config_dict, kwargs.get("name_or_path"))
        return super().from_dict(config_dict, **kwargs)

    @property
    def _attn_implementation(self) -> Any:
        return PretrainedConfig._attn_implementation.fget(self)  # type: ignore[attr-defined]

    @_attn_implementation.setter
    def _attn_implementation(self, value: Any) -> None:
        PretrainedConfig._attn_implementation.fset(self, registered_name(value))  # type: ignore[attr-defined]

    def _check(self) -> None:
        vision, text = self.vision_config, self.text_config
        if vision.model_type != "siglip_vision_model":
            raise ValueError(f"vision_config: expected model_type siglip_vision_model, got {vision.model_type!r}")
        if not isinstance(vision.image_size, int) or not isinstance(vision.patch_size, int):
            raise ValueError(
                f"vision_config: expected image_size and patch_size as one int each, got {vision.image_size!r} "
                f"and {vision.patch_size!r}"
            )
        if not -vision.num_hidden_layers <= self.vision_select_layer <= -1:
            raise ValueError(
                f"vision_select_layer: expected -{vision.num_hidden_layers} to -1 for a tower of "
                f"{vision.num_hidden_layers} layers, got {self.vision_select_layer}"
            )
        for name, least in (("pool_window", 1), ("num_queries", 0), ("query_dim", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected {least} or more, got {getattr(self, name)}")
        if self.num_queries:
            self._check_queries()
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling: expected one of {', '.join(POOLINGS)}, got {self.pooling!r}")
        if self.pooling == "pixel_shuffle" and any(side % self.pool_window for side in self.vision_grid):
            rows, columns = self.vision_grid
            raise ValueError(
                f"pool_window: expected a divisor of the grid {rows}x{columns} with pooling='pixel_shuffle', "
                f"got {self.pool_window}"
            )
        if not 0.0 <= self.pool_dropout < 1.0:
            raise ValueError(f"pool_dropout: expected 0 <= p < 1, got {self.pool_dropout}")
        for name in ("image_token_id", "learnable_token_id", "query_offset_token_id"):
            if not 0 <= getattr(self, name) < text.vocab_size:
                raise ValueError(
                    f"{name}: expected an id below the vocabulary size {text.vocab_size}, got {getattr(self, name)}"
                )
        if self.image_token_id == self.learnable_token_id:
            raise ValueError(f"image_token_id, learnable_token_id: expected different ids, got {self.image_token_id}")
        if self.image_aspect_ratio not in ("square", "pad"):
            raise ValueError(f"image_aspect_ratio: expected 'square' or 'pad', got {self.image_aspect_ratio!r}")

    def _check_queries(self) -> None:
        vision, text = self.vision_config, self.text_config
        if not 1 <= self.query_layer < text.num_hidden_layers:
            raise ValueError(
                f"query_layer: expected 1 to {text.num_hidden_layers - 1} for a decoder of "
                f"{text.num_hidden_layers} layers, got {self.query_layer}"
            )
        for name, width in (("query_dim", self.query_dim), ("vision_config.hidden_size", vision.hidden_size)):
            if self.query_heads < 1 or width % self.query_heads:
                raise ValueError(f"query_heads: expected a divisor of {name} = {width}, got {self.query_heads}")


def _sub_config(name: str, value: PretrainedConfig | dict[str, Any] | None, default: dict[str, Any]) -> Any:
    if isinstance(value, PretrainedConfig):
        return value
    if value is None:
        value = default
    elif not isinstance(value, dict):
        raise TypeError(f"{name}: expected a configuration, a dict or None, got {type(value).__name__}")
    fields = dict(value)
    model_type = fields.pop("model_type", default["model_type"])
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"{name}: expected a model_type that transformers knows, got {model_type!r}")
    return CONFIG_MAPPING[model_type](**fields)
