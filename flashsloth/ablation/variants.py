"""The variants of a model that are compared: what of its configuration each one changes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from flashsloth.config import FlashSlothConfig
from flashsloth.processing import FlashSlothProcessor

NONE, AVERAGE, SHUFFLE, ATTENTION, QUERIES = "none", "average", "shuffle", "attention", "queries"
COUNTS, WINDOWS = (3, 9, 27), (2, 3, 4)


@dataclass(frozen=True)
class Variant:
    """One variant.

    Attributes:
        name: on the command line and in file names.
        title: in tables.
        family: variants of one kind are drawn alike.
        changes: fields of :class:`FlashSlothConfig` that differ from the model's.
        wanted: whether it takes part where no variants are named.
    """

    name: str
    title: str
    family: str
    changes: dict[str, Any] = field(default_factory=dict)
    wanted: bool = True

    def config(self, base: FlashSlothConfig) -> FlashSlothConfig:
        """The configuration of the variant. Raises ValueError where the model's does not allow it."""
        try:
            found = FlashSlothConfig.from_dict({**base.to_dict(), **self.changes})
        except ValueError as error:
            raise ValueError(f"--variants: {self.name} does not fit the model: {error}") from error
        assert isinstance(found, FlashSlothConfig)
        return found


def variants_of(base: FlashSlothConfig, query_layers: tuple[int, ...] | None = None) -> dict[str, Variant]:
    """All variants of a model with attention pooling and embedded queries, by name; those that stand for it first.

    Raises:
        ValueError: a model without them, or a layer that is not there.
    """
    if base.pooling != "attention" or not base.num_queries:
        raise ValueError(
            f"model: expected attention pooling and embedded queries, which are varied; got pooling={base.pooling!r} "
            f"and num_queries={base.num_queries}"
        )
    window, queries = base.pool_window, base.num_queries
    whole = f"attention, {window}x{window}, {queries} queries"
    found = [
        Variant(NONE, "no compression", NONE, {"pooling": "none", "num_queries": 0}),
        Variant(AVERAGE, f"average, {window}x{window}", AVERAGE, {"pooling": "average", "num_queries": 0}),
        Variant(SHUFFLE, f"pixel shuffle, {window}x{window}", SHUFFLE, {"pooling": "pixel_shuffle", "num_queries": 0}),
        Variant(ATTENTION, f"attention, {window}x{window}", ATTENTION, {"num_queries": 0}),
        Variant(QUERIES, whole, QUERIES),
    ]
    for layer in _layers(base, query_layers):
        found.append(Variant(f"layer-{layer}", f"{whole} before layer {layer}", QUERIES, {"query_layer": layer}))
    for count in COUNTS:
        if count != queries:
            title = f"attention, {window}x{window}, {count} queries"
            found.append(Variant(f"queries-{count}", title, QUERIES, {"num_queries": count}))
    for side in WINDOWS:
        if side != window:
            title = f"attention, {side}x{side}, {queries} queries"
            found.append(Variant(f"window-{side}", title, QUERIES, {"pool_window": side}))
    # Not part of the usual comparison: the curves of two families over the number of tokens.
    for side in WINDOWS:
        if side != window:
            for kind in (AVERAGE, ATTENTION):
                changes = {"pooling": kind, "num_queries": 0, "pool_window": side}
                found.append(Variant(f"{kind}-window-{side}", f"{kind}, {side}x{side}", kind, changes, wanted=False))
    return {variant.name: variant for variant in found}


def choose(variants: dict[str, Variant], names: list[str] | None) -> list[Variant]:
    """Those named, in the order of the table; the usual ones without names. Raises ValueError for an unknown name."""
    for name in names or ():
        if name not in variants:
            raise ValueError(f"--variants: expected some of {', '.join(variants)}, got {name!r}")
    return [one for one in variants.values() if (one.wanted if names is None else one.name in names)]


def processor_of(base: FlashSlothProcessor, config: FlashSlothConfig) -> FlashSlothProcessor:
    """The processor of a variant: the same tokenizer and images, other numbers of tokens."""
    template: Any = base.chat_template
    return FlashSlothProcessor(
        base.image_processor,
        base.tokenizer,
        chat_template=template,
        num_queries=config.num_queries,
        tokens_per_tile=config.tokens_per_tile,
    )


def _layers(base: FlashSlothConfig, wanted: tuple[int, ...] | None) -> list[int]:
    last = base.text_config.num_hidden_layers - 1
    if wanted is None:
        wanted = (1, (last + 1) // 2, last)
    for layer in wanted:
        if not 1 <= layer <= last:
            raise ValueError(f"query_layers: expected 1 to {last}, got {layer}")
    return sorted(set(wanted) - {base.query_layer})
