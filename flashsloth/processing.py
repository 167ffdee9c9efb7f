"""FlashSlothProcessor: texts and images to what the model takes, with the place of every question."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin
from transformers.utils import logging

from .encoding import check_string, encode_prompt, match_images, pad_rows
from .image_processing import FlashSlothImageProcessor
from .prompt import (
    CHAT_TEMPLATE,
    IMAGE_TOKEN,
    QUERY_TOKEN,
    Prompt,
    caption_prompt,
    check_messages,
    dialogue_prompt,
    find_questions,
    message_images,
)
from .tokenization import load_tokenizer, read_json, special_tokens

logger = logging.get_logger(__name__)

_BATCH_KWARGS = ("padding", "padding_side", "max_length", "pad_to_multiple_of", "return_tensors")
_VIEW_KWARGS = ("image_hd", "image_aspect_ratio")
_OPTIONS = (*_BATCH_KWARGS, *_VIEW_KWARGS, "truncation", "add_special_tokens")
_CALL_KWARGS = ("images", "text_kwargs", "images_kwargs", "common_kwargs", *_OPTIONS)
_IMAGE_SETTINGS = ("image_size", "image_hd", "image_aspect_ratio", "image_mean", "image_std")
# What auto classes and pipelines hand to every part of a model.
_OF_AUTO_CLASSES = {"_from_auto", "_from_pipeline", "trust_remote_code", "code_revision", "use_fast", "dtype"}
_HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")


class FlashSlothProcessor(ProcessorMixin):
    """Expands placeholders, finds the questions and prepares images.

    ``processor(images=..., text=...)`` takes prompt strings with ``<image>`` and ``<learnable>`` in them, as
    :meth:`apply_chat_template` makes them, and returns

    * ``input_ids`` (B, L) int64: ``<image>`` is ``tokens_per_tile`` times its id for each tile (81, or 405 in HD) and
      ``<learnable>`` is ``num_queries`` times its id;
    * ``attention_mask`` (B, L) int64, padding on the tokenizer's side or on ``padding_side``;
    * ``question_spans`` (B, G, 2) int64: ``[start, end)`` of the text that belongs to each ``<learnable>``, in the
      coordinates of ``input_ids``; G is the most groups in a row and unused groups are (-1, -1); an empty question has
      ``start == end``;
    * ``pixel_values`` (num_images, tiles, 3, S, S) float32, for the rows that have an image, in their order; no such
      key when no row has one.

    A text is tokenized in the pieces between its placeholders, which gives the ids of the official code.

    A follow-up turn for a cached conversation is obtained by processing the whole conversation again. The ids of the
    first call are a prefix of those of the second, and so are the ids that were generated (the end token included),
    as long as tokenizing the decoded answer gives them back. That holds for the way a tokenizer splits a text; a model
    may generate another split of the same text, so compare before reusing a cache. What the cache has not seen is the
    rest, ``input_ids[:, n:]``; its image has been seen, and spans count from the start of the whole conversation.

    Args:
        image_processor: a :class:`~flashsloth.image_processing.FlashSlothImageProcessor`.
        tokenizer: a fast tokenizer that has the three tokens (:func:`~flashsloth.tokenization.add_flashsloth_tokens`).
        chat_template: jinja template; the official format by default.
        num_queries: ids a ``<learnable>`` becomes; 0 for a model without embedded queries.
        tokens_per_tile: ids an image becomes for each of its tiles: 81 = (27 / 3)^2.
    """

    def __init__(
        self,
        image_processor: FlashSlothImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        num_queries: int = 9,
        tokens_per_tile: int = 81,
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)
        for name, value, least in (("num_queries", num_queries, 0), ("tokens_per_tile", tokens_per_tile, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: expected {'a positive int' if least else 'an int >= 0'}, got {value!r}")
        self.num_queries = num_queries
        self.tokens_per_tile = tokens_per_tile
        if not getattr(tokenizer, "is_fast", False):
            raise TypeError(f"tokenizer: expected a fast tokenizer (with offsets), got {type(tokenizer).__name__}")
        special = special_tokens(tokenizer)
        lacking = [token for token in (IMAGE_TOKEN, QUERY_TOKEN) if token not in special]
        lacking += [name for name in ("eos_token", "pad_token") if getattr(tokenizer, name) is None]
        if lacking:
            raise ValueError(
                f"tokenizer: expected it to have {', '.join(lacking)}; "
                "flashsloth.tokenization.add_flashsloth_tokens adds what is missing"
            )
        self.image_token, self.learnable_token = IMAGE_TOKEN, QUERY_TOKEN
        vocabulary = tokenizer.get_vocab()
        self.image_token_id, self.learnable_token_id = vocabulary[IMAGE_TOKEN], vocabulary[QUERY_TOKEN]

    # ---------------------------------------------------------------- loading

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> FlashSlothProcessor:
        """Loads a processor from our layout (``save_pretrained``) or from the official one, a directory or a hub id.

        The official layout has no processor files, and a model saved alone has none: then the template is the built-in
        one, HD is ``image_hd`` and padding ``image_aspect_ratio`` of ``config.json``, and the tile size and its tokens
        follow from the vision configuration there or in ``vision_tower/config.json`` (384 and 81 without one).

        Args:
            kwargs: hub arguments of transformers, and ``num_queries``, ``tokens_per_tile``, ``chat_template`` or
                settings of the image processor (``image_hd``), which override what is stored.

        Raises:
            FileNotFoundError: no such directory, or no tokenizer files in it.
            ValueError: a JSON file or a setting that cannot be used.
        """
        path = os.fspath(pretrained_model_name_or_path)
        if not os.path.isdir(path) and (os.path.isabs(path) or path.startswith(".") or os.path.exists(path)):
            raise FileNotFoundError(f"{path}: expected a directory with a checkpoint; there is none")
        hub = {key: kwargs.pop(key) for key in _HUB_KWARGS if key in kwargs}
        hub = {key: value for key, value in hub.items() if value is not None}
        stored, _ = cls.get_processor_dict(path, **hub)
        settings = stored if stored.get("image_processor") else _settings_of_config(path, **hub)
        own: dict[str, Any] = {key: settings[key] for key in ("num_queries", "tokens_per_tile") if key in settings}
        own["chat_template"] = stored.get("chat_template")
        own.update(
            {key: kwargs.pop(key) for key in ("num_queries", "tokens_per_tile", "chat_template") if key in kwargs}
        )
        image_settings = {**settings["image_processor"]}
        image_settings.update({key: kwargs.pop(key) for key in _IMAGE_SETTINGS if key in kwargs})
        ignored = sorted(set(kwargs) - _OF_AUTO_CLASSES)
        if ignored:
            logger.warning(f"FlashSlothProcessor.from_pretrained ignores {', '.join(ignored)}")
        return cls(FlashSlothImageProcessor.from_dict(image_settings), load_tokenizer(path, **hub), **own)

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> Any:
        # A tokenizer writes the padding side it was loaded with, not the one it has.
        self.tokenizer.init_kwargs["padding_side"] = self.tokenizer.padding_side
        return super().save_pretrained(save_directory, push_to_hub, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", "question_spans"]

    def num_image_tokens(self, image_hd: bool | None = None) -> int:
        """Ids one ``<image>`` becomes."""
        return self.tokens_per_tile * self.image_processor.num_tiles(image_hd)

    # ---------------------------------------------------------------- inference

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: None = None,
        audio: None = None,
        *,
        padding: bool | str = True,
        padding_side: str | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        image_hd: bool | None = None,
        image_aspect_ratio: str | None = None,
        return_tensors: str | None = "pt",
        truncation: bool | None = None,
        add_special_tokens: bool | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Processes a batch of prompt strings and their images; see the class for what it returns.

        Args:
            images: one image, a list of images in the order of the rows that have ``<image>``, or one list (or None)
                for each row. Kinds of image: see :class:`~flashsloth.image_processing.FlashSlothImageProcessor`.
                Without ``text`` only ``pixel_values`` is returned.
            text: one prompt or a list of them.
            padding: True or "longest": to the longest row; "max_length": to ``max_length``; False: rows of one length
                only, unless ``return_tensors`` is None.
            padding_side: "left" or "right"; the tokenizer's by default.
            image_hd, image_aspect_ratio: override the image processor's settings.
            return_tensors: "pt", "np" or None (lists).
            truncation: not possible, as it would cut a run of placeholders.
            kwargs: the same arguments grouped as ``text_kwargs``, ``images_kwargs`` and ``common_kwargs``.

        Raises:
            ValueError: more or fewer images than ``<image>``, two of them in a row, an empty batch or text, an image
                that cannot be read (naming its position), or an argument's value; TypeError: an argument of the wrong
                type.
        """
        if videos is not None or audio is not None:
            raise ValueError("FlashSlothProcessor takes images and text; got videos or audio")
        options = {
            "padding": padding,
            "padding_side": padding_side,
            "max_length": max_length,
            "pad_to_multiple_of": pad_to_multiple_of,
            "image_hd": image_hd,
            "image_aspect_ratio": image_aspect_ratio,
            "return_tensors": return_tensors,
            "truncation": truncation,
            "add_special_tokens": add_special_tokens,
        }
        for group in ("text_kwargs", "images_kwargs", "common_kwargs"):
            options.update(kwargs.pop(group, None) or {})
        # transformers' own chat-template code hands these over with no effect on images and text.
        for name in ("sanitize_control_tokens", "return_metadata"):
            kwargs.pop(name, None)
        unknown = [*kwargs, *(key for key in options if key not in _OPTIONS)]
        if unknown:
            raise TypeError(f"FlashSlothProcessor got unknown arguments: {', '.join(sorted(unknown))}")
        if options.pop("truncation"):
            raise ValueError(
                "truncation: not supported, it would cut the placeholders of an image; shorten the text instead"
            )
        if options.pop("add_special_tokens"):
            raise ValueError("add_special_tokens: not supported, a prompt string contains the special tokens it needs")
        if text is None:
            if images is None:
                raise ValueError("text, images: expected at least one of them, got neither")
            view = {key: options[key] for key in _VIEW_KWARGS}
            return self.image_processor(images, return_tensors=options["return_tensors"], **view)
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, (list, tuple)):
            raise TypeError(f"text: expected a string or a list of strings, got {type(text).__name__}")
        if not texts:
            raise ValueError("text: expected at least one text, got an empty list")
        for i, one in enumerate(texts):
            check_string(one, f"text[{i}]")
        prompts = [Prompt(one, find_questions(one, self.tokenizer.eos_token)) for one in texts]
        return self._batch(prompts, images, options, labels=False)

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = "pt",
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Renders a conversation, or a batch of them, as the official inference prompt, and on request processes it.

        Args:
            conversation: messages ``{"role": "user" | "assistant", "content": str | list of parts}``, parts
                ``{"type": "text", "text": ...}`` and ``{"type": "image", "image" | "url" | "path" | "base64": ...}``;
                or a list of conversations. At most one image in each, which is put before the text of its message.
            add_generation_prompt: whether to end with ``ASSISTANT:``; by default where the last message is the user's.
            continue_final_message: leave the last message, an assistant's, open, to be continued.
            tokenize: return the processed batch: all of it with ``return_dict``, else its ``input_ids``.
            processor_kwargs: arguments of the processor's call, which may be given directly too. ``images`` gives the
                images of parts that hold none.

        Returns:
            A string (a list of strings for a batch), or what the call returns.

        Raises:
            ValueError, TypeError: naming the message that is wrong (roles alternate, user first, no system message),
                or contains a special token such as ``<image>``, which would stand for what it is not.
        """
        if not isinstance(conversation, Sequence) or isinstance(conversation, str) or len(conversation) == 0:
            raise ValueError(f"conversation: expected a list of messages or of such lists, got {conversation!r:.80}")
        if kwargs.pop("return_assistant_tokens_mask", False):
            raise ValueError("return_assistant_tokens_mask: not supported; encode_dialogue gives labels")
        for name in ("tools", "documents"):
            if kwargs.pop(name, None):
                raise ValueError(f"{name}: not part of this format")
        kwargs.pop("sanitize_control_tokens", None)  # messages with such tokens are refused below
        options = {key: value for key, value in kwargs.items() if key not in _CALL_KWARGS}
        self._check_template_options(chat_template, options)
        batched = not isinstance(conversation[0], Mapping)
        conversations = [getattr(c, "messages", c) for c in conversation] if batched else [conversation]
        prompts = []
        for i, messages in enumerate(conversations):
            name = f"conversation[{i}]" if batched else "conversation"
            check_messages(messages, self._reserved(), name=name)
            ask = messages[-1]["role"] == "user"
            if continue_final_message and ask:
                raise ValueError(f"{name}: continue_final_message expects an assistant's message last, got a user's")
            generate = (ask and not continue_final_message) if add_generation_prompt is None else add_generation_prompt
            prompts.append(
                super().apply_chat_template(
                    [_plain_parts(message) for message in messages],
                    chat_template,
                    add_generation_prompt=generate,
                    continue_final_message=continue_final_message,
                    tokenize=False,
                    **options,
                )
            )
        if not tokenize:
            return prompts if batched else prompts[0]
        call = {key: value for key, value in kwargs.items() if key in _CALL_KWARGS}
        call.update(processor_kwargs or {})
        # Newer transformers' name for "as the processor prefers".
        call.setdefault("return_tensors", "pt" if return_tensors == "auto" else return_tensors)
        images = [message_images(messages) for messages in conversations]
        call.setdefault("images", images if any(images) else None)
        out = self(text=prompts, **call)
        return out if return_dict else out["input_ids"]

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """Decodes a batch of generated ids (B, L), placeholders left out with the special tokens."""
        return self.tokenizer.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)

    # ---------------------------------------------------------------- training

    def encode_dialogue(self, conversation: Sequence[Any], images: Any = None, **options: Any) -> BatchFeature:
        """Encodes a dialogue, or a list of dialogues, for fine-tuning: what the call returns and ``labels``.

        Args:
            conversation: ``{"from": "human" | "gpt", "value": str}`` turns of the official data or chat messages; see
                :func:`~flashsloth.prompt.dialogue_prompt`.
            images: as in the call; images inside chat messages are used where none are given.
            options: ``padding``, ``padding_side`` (right by default), ``max_length``, ``pad_to_multiple_of``,
                ``return_tensors``, ``image_hd``, ``image_aspect_ratio``.

        Returns:
            The call's entries and ``labels`` (B, L) int64: the ids of each answer and the ``</s>`` after it, -100
            elsewhere.

        Raises:
            ValueError, TypeError: as the call and :func:`~flashsloth.prompt.dialogue_prompt`.
        """
        if isinstance(conversation, str) or not isinstance(conversation, Sequence) or len(conversation) == 0:
            raise ValueError(f"conversation: expected a dialogue or a list of dialogues, got {conversation!r:.80}")
        dialogues = [conversation] if isinstance(conversation[0], Mapping) else conversation
        prompts = [dialogue_prompt(one, self.tokenizer.eos_token, self._reserved()) for one in dialogues]
        if images is None:
            held = [message_images([m for m in one if "content" in m]) for one in dialogues]
            images = held if any(held) else None
        return self._training_batch(prompts, images, options)

    def encode_caption(self, caption: str | Sequence[str], images: Any = None, **options: Any) -> BatchFeature:
        """Encodes ``<image>caption<learnable>\\n`` for pre-training; arguments and result as :meth:`encode_dialogue`.
        The span of the queries is the caption, and the caption and the newline after the queries are the labels."""
        captions = [caption] if isinstance(caption, str) else caption
        if not captions:
            raise ValueError("caption: expected at least one caption, got none")
        return self._training_batch([caption_prompt(one, self._reserved()) for one in captions], images, options)

    # ---------------------------------------------------------------- parts

    def _training_batch(self, prompts: list[Prompt], images: Any, options: dict[str, Any]) -> BatchFeature:
        unknown = set(options) - {*_BATCH_KWARGS, *_VIEW_KWARGS}
        if unknown:
            raise TypeError(f"expected options of the processor's call, got {', '.join(sorted(unknown))}")
        return self._batch(prompts, images, {"padding_side": "right", **options}, labels=True)

    def _batch(self, prompts: list[Prompt], images: Any, options: Mapping[str, Any], *, labels: bool) -> BatchFeature:
        return_tensors = options.get("return_tensors", "pt")
        if return_tensors not in ("pt", "np", None):
            raise ValueError(f"return_tensors: expected 'pt', 'np' or None, got {return_tensors!r}")
        named = match_images(images, [prompt.text for prompt in prompts])
        view = {key: options.get(key) for key in _VIEW_KWARGS}
        expansion = {
            self.image_token_id: self.num_image_tokens(view["image_hd"]),
            self.learnable_token_id: self.num_queries,
        }
        data = pad_rows(
            [encode_prompt(self.tokenizer, prompt, expansion) for prompt in prompts],
            self.tokenizer.pad_token_id,
            options.get("padding_side") or self.tokenizer.padding_side,
            labels=labels,
            padding=options.get("padding", True),
            max_length=options.get("max_length"),
            pad_to_multiple_of=options.get("pad_to_multiple_of"),
            as_arrays=return_tensors is not None,
        )
        if named:
            data["pixel_values"] = self.image_processor.pixel_values(named, **view)
        return BatchFeature(data, tensor_type=return_tensors)

    def _check_template_options(self, chat_template: str | None, options: Mapping[str, Any]) -> None:
        """A template ignores what it does not read, a misspelt argument say, so that is refused."""
        templates = self.chat_template if isinstance(self.chat_template, dict) else {"default": self.chat_template}
        template = templates.get(chat_template or "default", chat_template) or ""
        unknown = [key for key in options if not re.search(rf"\b{re.escape(key)}\b", template)]
        if unknown:
            raise TypeError(f"apply_chat_template got arguments no template reads: {', '.join(sorted(unknown))}")

    def _reserved(self) -> list[str]:
        """What no message may contain: the tokens that would end a turn or stand for a placeholder."""
        return special_tokens(self.tokenizer)


def _plain_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message reduced to what the template reads, so that no image is loaded or copied to render a text."""
    content = message["content"]
    if not isinstance(content, str):
        content = [{"type": "text", "text": p["text"]} if p["type"] == "text" else {"type": "image"} for p in content]
    return {"role": message["role"], "content": content}


def _settings_of_config(path: str, **hub: Any) -> dict[str, Any]:
    """What a checkpoint without processor files says of images and queries in ``config.json``, official or ours."""
    config = read_json(path, "config.json", **hub) or {}
    tower = config.get("vision_config") or read_json(path, "vision_tower/config.json", **hub)
    named = config.get("mm_vision_tower")
    if tower is None and isinstance(named, str) and os.path.isdir(named):
        tower = read_json(named, "config.json")
    tower = tower or {}
    tower = tower.get("vision_config", tower)
    side, patch = tower.get("image_size", 384), tower.get("patch_size", 14)
    window = config.get("pool_window", 3)
    if not (all(isinstance(value, int) for value in (side, patch, window)) and 0 < patch <= side and window > 0):
        raise ValueError(
            f"{path}: expected image_size and patch_size of the vision tower, and pool_window, as positive ints, "
            f"got {side}, {patch}, {window}"
        )
    regions = -(-(side // patch) // (1 if config.get("pooling") == "none" else window))
    image: dict[str, Any] = {"image_size": side, "image_hd": bool(config.get("image_hd", False))}
    # "square" is also what the official code does for values it does not know, such as a missing one.
    image["image_aspect_ratio"] = "pad" if config.get("image_aspect_ratio") == "pad" else "square"
    return {
        "image_processor": image,
        "tokens_per_tile": regions * regions,
        "num_queries": config.get("num_queries", 9),
    }
