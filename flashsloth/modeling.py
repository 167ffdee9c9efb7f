"""FlashSloth by composition: a SigLIP tower, a decoder of transformers, and what FlashSloth adds between them.

No modelling file is copied. The decoder runs as it is; a forward hook on the layer before ``query_layer`` replaces
the rows of the embedded queries, reading what it needs from the keyword arguments that decoders hand to layers.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.masking_utils import create_masks_for_generate
from transformers.utils import ModelOutput

from flashsloth import checkpoint
from flashsloth.attention import REGISTERED_NAME, padding_for_cache, registered_name
from flashsloth.config import FlashSlothConfig
from flashsloth.context import (
    ImageContext,
    QueryContext,
    check_questions,
    image_rows,
    image_seen,
    locate_queries,
    place_images,
    require,
)
from flashsloth.modules import EmbeddedQuery, LearnableTokens, PlainLinear, PlainPool, Projector, SpatialAttentionPool
from flashsloth.packing import PackedRows
from flashsloth_ops import ImageState


@dataclass
class FlashSlothOutput(ModelOutput):
    """Output of :class:`FlashSlothForConditionalGeneration`: a causal language model's, and the encoded images.

    ``image_context`` is what a later turn passes back so that no image is encoded twice.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_context: ImageContext | None = None


class _Ran:
    """Whether the hook did: no container, of which FSDP hands every layer a copy, to cast what is in it."""

    yet = False


class _EmbeddedQueries(NamedTuple):
    """What the hook needs; travels through the decoder as one keyword argument, so a recomputed layer has it too."""

    where: QueryContext
    replace: Tensor
    image: Tensor
    state: ImageState | None
    packed: PackedRows | None
    ran: _Ran


class FlashSlothPreTrainedModel(PreTrainedModel):
    config: FlashSlothConfig
    config_class = FlashSlothConfig
    input_modalities: Any = ("image", "text")
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement: Any = ["past_key_values", "image_context"]  # noqa: RUF012, as transformers has it
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal(0, 0.02) for the query module, uniform for the learnable tokens, torch's default for the rest."""
        super()._init_weights(module)
        if isinstance(module, LearnableTokens):
            bound = module.token.shape[1] ** -0.5
            init.uniform_(module.token, -bound, bound)
        elif isinstance(module, PlainLinear):
            bound = module.in_features**-0.5
            init.uniform_(module.weight, -bound, bound)
            init.uniform_(module.bias, -bound, bound)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *model_args: Any, **kwargs: Any
    ) -> Any:
        """Load our layout or the official one, from a directory or the hub, and fail on any name that does not fit.

        Raises:
            ValueError: names missing or unexpected, a wrong shape, or a file that is not plain tensors.
            FileNotFoundError: a file of the checkpoint is not there.
        """
        return checkpoint.load(cls, super().from_pretrained, pretrained_model_name_or_path, *model_args, **kwargs)

    def set_attn_implementation(self, attn_implementation: str | dict[str, str], *args: Any, **kwargs: Any) -> None:
        """As in transformers, with ``"flashsloth"`` for our own attention."""
        super().set_attn_implementation(registered_name(attn_implementation), *args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:  # type: ignore[override]
        """Write our layout. Files appear in ``save_directory`` only once all of them have been written."""
        checkpoint.save(super().save_pretrained, save_directory, **kwargs)


class FlashSlothForConditionalGeneration(FlashSlothPreTrainedModel, GenerationMixin):
    """FlashSloth (arXiv 2412.04317): pooled vision tokens in front, embedded queries that look again inside."""

    def __init__(self, config: FlashSlothConfig) -> None:
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        tower = getattr(self.vision_tower, "vision_model", self.vision_tower)  # nested in some versions
        del tower.encoder.layers[config.vision_layers :]
        tower.post_layernorm = nn.Identity()  # features are the output of the last layer that is kept
        self.pooling = SpatialAttentionPool(config) if config.pooling == "attention" else PlainPool(config)
        self.projector = Projector(config)
        if config.num_queries:
            self.learnable_tokens = LearnableTokens(config)
            self.embedded_query = EmbeddedQuery(config)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        decoder = self.language_model.base_model
        if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
            raise ValueError(
                f"text_config: expected a decoder with a list `layers`, got {type(decoder).__name__} without one"
            )
        if config.num_queries:
            decoder.layers[config.query_layer - 1].register_forward_hook(self._update_queries, with_kwargs=True)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def get_decoder(self, *args: Any, **kwargs: Any) -> nn.Module:
        return self.language_model.base_model

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Tower output ``(images, tiles * H*W, Di)`` of ``pixel_values`` ``(images, tiles, 3, S, S)``."""
        size = self.config.vision_config.image_size
        channels = self.config.vision_config.num_channels
        if pixel_values.dim() == 4:
            pixel_values = pixel_values.unsqueeze(1)
        if pixel_values.dim() != 5 or pixel_values.shape[2:] != (channels, size, size):
            raise ValueError(
                f"pixel_values: expected (images, tiles, {channels}, {size}, {size}), got {tuple(pixel_values.shape)}"
            )
        if not pixel_values.is_floating_point():
            raise TypeError(f"pixel_values: expected a floating-point tensor, got {pixel_values.dtype}")
        images, tiles = pixel_values.shape[:2]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.freeze_vision_tower):
            features = self.vision_tower(pixel_values.flatten(0, 1)).last_hidden_state
        return features.reshape(images, tiles * features.shape[1], -1)

    def get_image_context(self, pixel_values: Tensor, row_image: Tensor | None = None) -> ImageContext:
        """Encode images once for any number of questions and turns.

        pixel_values ``(images, tiles, 3, S, S)``; ``row_image`` int64 ``(B,)`` says which image each row of the
        batch shows, -1 for none; by default row b shows image b.
        """
        return self.context_of_features(self.get_image_features(pixel_values), row_image)

    def context_of_features(self, features: Tensor, row_image: Tensor | None = None) -> ImageContext:
        """The same from what the tower gave, ``(images, tiles * H*W, Di)``: pooling, projector and query module alone.

        For features that are kept, where many runs share one frozen tower.
        """
        rows, columns = self.config.vision_grid
        width = self.config.vision_config.hidden_size
        if features.dim() != 3 or features.shape[1] % (rows * columns) or features.shape[2] != width:
            raise ValueError(
                f"features: expected (images, tiles * {rows * columns}, {width}), got {tuple(features.shape)}"
            )
        images = features.shape[0]
        tokens = self.projector(self.pooling(features.reshape(-1, rows * columns, width)))
        aligned = 0
        if row_image is None:
            row_image, aligned = torch.arange(images, device=features.device), 1
        # While gradients are recorded they flow through the op itself; a stored state would only take memory.
        stateless = torch.is_grad_enabled() or not self.config.num_queries
        state = None if stateless else self.embedded_query.image_state(features)
        return ImageContext(features, tokens.reshape(images, -1, tokens.shape[-1]), row_image, aligned, state)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        question_spans: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        image_context: ImageContext | None = None,
        token_rows: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> FlashSlothOutput | tuple[Any, ...]:
        """One pass over a batch, or over the next chunk of one.

        Args:
            input_ids: int64 ``(B, L)`` with placeholders expanded: an image is ``V`` times ``image_token_id``, an
                embedded-query group ``num_queries`` times ``learnable_token_id``. With a cache, the new ids only.
            pixel_values: ``(images, tiles, 3, S, S)``, one image for each row that has image tokens, in row order.
            attention_mask: ``(B, cached + L)``, 0 for padding, on either side; or prepared, 4-dimensional.
            question_spans: int64 ``(B, G, 2)``, [start, end) of the question each group follows, counted from the
                start of the padded row, the cached part included; ``(-1, -1)`` for unused groups, behind the used.
                ``end <= start`` is a question without text. Without spans every id is taken literally. Spans left
                on the CPU bound the work by the longest question without waiting for a device.
            labels: int64 ``(B, L)``, -100 where nothing is to be learned.
            image_context: what :meth:`get_image_context`, or an earlier output, holds; instead of ``pixel_values``.
            token_rows, cu_seqlens: int ``(T,)`` and ``(B + 1,)``, for training: the places of the T tokens in the
                flattened ``input_ids``, and where each row's begin among them. The decoder then runs on these alone,
                and ``logits`` are ``(1, T, vocabulary)``. Needs ``attn_implementation="flashsloth"``.

        Raises:
            ValueError: arguments that contradict each other, images and placeholders that do not match.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: expected exactly one of them")
        if pixel_values is not None and image_context is not None:
            raise ValueError("pixel_values, image_context: expected one of them, got both")
        if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError("logits_to_keep: expected 0 with labels, whose loss needs every position")
        return_dict = kwargs.pop("return_dict", None)
        past: int | Tensor = 0 if past_key_values is None else past_key_values.get_seq_length()
        first = isinstance(past, int) and past == 0

        packed = None
        if token_rows is not None or cu_seqlens is not None:
            packed = self._packed_rows(token_rows, cu_seqlens, input_ids, past_key_values, position_ids)
        queries = None
        if input_ids is None:
            if pixel_values is not None or question_spans is not None or image_context is not None:
                raise ValueError("inputs_embeds: expected input_ids with images or questions, to find placeholders")
        else:
            if pixel_values is not None:
                image_context = self._context_of_rows(pixel_values, input_ids)
            inputs_embeds, where = self._embed(input_ids, image_context, question_spans, past, first)
            if where is not None and image_context is not None and where.positions.shape[1]:
                image, state = image_context.per_row()
                replace = where.is_query & image_seen(input_ids, self.config.image_token_id, image_context.row_image)
                queries = _EmbeddedQueries(where, replace, image, state, packed, _Ran())
                kwargs["embedded_queries"] = queries

        assert inputs_embeds is not None
        if packed is not None:
            inputs_embeds, attention_mask, position_ids = (
                packed.pack(inputs_embeds),
                packed.prepared_mask,
                packed.position_ids,
            )
            labels = None if labels is None else packed.pack_labels(labels)
            kwargs["packed_index"], use_cache = packed.index, False
        elif attention_mask is not None and attention_mask.dim() == 2:
            batch, length = inputs_embeds.shape[:2]
            fixed = getattr(past_key_values, "is_compileable", False)  # its mask may reach to the end of the cache
            if isinstance(past, int) and not fixed and attention_mask.shape != (batch, past + length):
                raise ValueError(
                    f"attention_mask: expected {(batch, past + length)}, {past} cached positions and {length} new "
                    f"ones, got {tuple(attention_mask.shape)}"
                )
            if position_ids is None:
                chunk = torch.arange(length, device=attention_mask.device) + past
                position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0).index_select(1, chunk)

        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            labels=labels,
            logits_to_keep=logits_to_keep,
            return_dict=True,
            **kwargs,
        )
        if queries is not None and not queries.ran.yet:
            raise RuntimeError(
                f"text_config: expected a decoder that hands keyword arguments to its layers; "
                f"{type(self.language_model).__name__} does not, so the embedded queries saw no image"
            )
        result = FlashSlothOutput(
            loss=outputs.loss,
            logits=outputs.logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_context=image_context,
        )
        return result.to_tuple() if return_dict is False else result

    def _packed_rows(
        self,
        token_rows: Tensor | None,
        cu_seqlens: Tensor | None,
        input_ids: Tensor | None,
        past_key_values: Cache | None,
        position_ids: Tensor | None,
    ) -> PackedRows:
        if token_rows is None or cu_seqlens is None or input_ids is None:
            raise ValueError("token_rows, cu_seqlens: expected both of them, with input_ids")
        if past_key_values is not None or position_ids is not None:
            raise ValueError("token_rows: expected neither past_key_values nor position_ids beside it")
        if self.config.text_config._attn_implementation != REGISTERED_NAME:
            raise ValueError(
                f"token_rows: expected attn_implementation='flashsloth', which keeps packed sequences apart, got "
                f"{self.config.text_config._attn_implementation!r}"
            )
        return PackedRows.of(token_rows, cu_seqlens, input_ids)

    def _context_of_rows(self, pixel_values: Tensor, input_ids: Tensor) -> ImageContext:
        row_image, rows_per_image = image_rows(input_ids, self.config.image_token_id, pixel_values.shape[0])
        context = self.get_image_context(pixel_values)
        return context._replace(row_image=row_image, rows_per_image=rows_per_image)

    def _embed(
        self,
        input_ids: Tensor,
        images: ImageContext | None,
        question_spans: Tensor | None,
        past: int | Tensor,
        first: bool,
    ) -> tuple[Tensor, QueryContext | None]:
        """Embeddings with visual tokens and embedded queries in place, and where the queries are."""
        config = self.config
        embed = self.get_input_embeddings()
        embeds = embed(input_ids)
        batch = input_ids.shape[0]
        if images is not None:
            if images.row_image.shape != (batch,):
                raise ValueError(
                    f"image_context: expected one of {batch} rows as input_ids has, got {images.row_image.shape[0]}"
                )
            embeds = place_images(embeds, input_ids, config.image_token_id, images, first)
        elif input_ids.shape[1] > 1:
            require(
                (input_ids != config.image_token_id).all(),
                f"pixel_values: expected images for the image tokens (id {config.image_token_id}) in input_ids, "
                "got none",
            )
        if question_spans is None:
            return embeds, None
        if question_spans.dim() != 3 or question_spans.shape[0] != batch or question_spans.shape[2] != 2:
            raise ValueError(f"question_spans: expected ({batch}, groups, 2), got {tuple(question_spans.shape)}")
        if question_spans.is_floating_point() or question_spans.dtype == torch.bool:
            raise TypeError(f"question_spans: expected an integer tensor, got {question_spans.dtype}")
        where = locate_queries(input_ids, question_spans.long(), past, config.learnable_token_id, config.num_queries)
        check_questions(input_ids, where, (config.image_token_id, config.learnable_token_id))
        if not config.num_queries:
            return embeds, None
        offset = embed(input_ids.new_full((1,), config.query_offset_token_id))
        queries = (self.learnable_tokens.token + offset).to(embeds.dtype)
        queries = queries.index_select(0, (where.slot % config.num_queries).flatten()).view_as(embeds)
        return torch.where(where.is_query[..., None], queries, embeds), where

    def _update_queries(self, layer: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook of the layer before ``query_layer``: the rows of the embedded queries read text and image."""
        queries: _EmbeddedQueries | None = kwargs.get("embedded_queries")
        if queries is None:
            return None
        queries.ran.yet = True
        given = output[0] if isinstance(output, tuple) else output
        hidden = given if queries.packed is None else queries.packed.unpack(given)
        batch, _, width = hidden.shape
        where = queries.where
        groups = where.positions.shape[1] // self.config.num_queries

        def rows(index: Tensor) -> Tensor:
            return hidden.gather(1, index[..., None].expand(-1, -1, width))

        updated = self.embedded_query(
            rows(where.positions).reshape(batch * groups, self.config.num_queries, width),
            rows(where.text_index).reshape(batch * groups, -1, width),
            where.text_lengths,
            queries.image,
            queries.state,
        )
        updated = updated.reshape(batch, -1, width)
        updated = updated.gather(1, where.slot[..., None].expand(-1, -1, width))
        hidden = torch.where(queries.replace[..., None], updated.to(hidden.dtype), hidden)
        hidden = hidden if queries.packed is None else queries.packed.pack(hidden)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As in transformers; images and questions go with the prompt, not with each token after it."""
        parent: Any = super()
        inputs: dict[str, Any] = parent.prepare_inputs_for_generation(input_ids, *args, **kwargs)
        prompt = kwargs.get("is_first_iteration", False) or not kwargs.get("use_cache", True)
        if not prompt:
            for name in ("pixel_values", "image_context", "question_spans"):
                inputs.pop(name, None)
        return inputs

    def _expand_inputs_for_generation(  # type: ignore[override]
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Encode the images before rows are repeated, and while the whole conversation is there to map them."""
        pixel_values = model_kwargs.pop("pixel_values", None)
        if pixel_values is not None and input_ids is not None:
            if model_kwargs.get("image_context") is not None:
                raise ValueError("pixel_values, image_context: expected one of them, got both")
            pixel_values = pixel_values.to(self.device)
            model_kwargs["image_context"] = self._context_of_rows(pixel_values, input_ids.to(self.device))
        context = model_kwargs.get("image_context")
        if context is not None:
            model_kwargs["image_context"] = context.expand(expand_size)
        parent: Any = super()
        return parent._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )

    def create_masks_for_generate(self, *args: Any, **kwargs: Any) -> Any:
        """Masks ahead of compiled decoding; our attention takes the padding mask itself, filled to the cache."""
        if self.config.text_config._attn_implementation == REGISTERED_NAME:
            return padding_for_cache(kwargs.get("attention_mask"), kwargs.get("past_key_values"))
        return create_masks_for_generate(*args, **kwargs)
