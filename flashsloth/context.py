"""Where images, embedded queries and questions lie in a batch: index tensors, no loop over samples."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flashsloth_ops import ImageState


class ImageContext(NamedTuple):
    """The images of a batch, encoded once, for every question and turn about them.

    Attributes:
        features: tower output ``(images, N, Di)``, the tiles of an image end to end.
        tokens: visual tokens ``(images, V, Dm)``.
        row_image: int64 ``(B,)``, the image of each row of the batch, -1 for none.
        rows_per_image: r when row b shows image b // r for every b; 0 when only ``row_image`` can tell.
        state: what the query module keeps of the images; None while gradients are recorded.
    """

    features: Tensor
    tokens: Tensor
    row_image: Tensor
    rows_per_image: int
    state: ImageState | None

    def expand(self, times: int) -> ImageContext:
        """The context of a batch in which each row is repeated ``times`` in place (beams). Images are not copied."""
        return self._replace(
            row_image=self.row_image.repeat_interleave(times), rows_per_image=self.rows_per_image * times
        )

    def per_row(self) -> tuple[Tensor, ImageState | None]:
        """Features and state for the op: as they are where rows follow images, else gathered for each row."""
        if self.rows_per_image and self.features.shape[0] * self.rows_per_image == self.row_image.shape[0]:
            return self.features, self.state
        # A row without an image borrows the first; what it computes is thrown away.
        row = self.row_image.clamp(min=0)
        state = None if self.state is None else type(self.state)(*(part.index_select(0, row) for part in self.state))
        return self.features.index_select(0, row), state


class QueryContext(NamedTuple):
    """Where the embedded queries of a chunk are, and the question each group of them follows.

    Attributes:
        is_query: bool ``(B, L)``, the placeholders.
        slot: int64 ``(B, L)``, which of the row's placeholders a position is (clamped elsewhere).
        positions: int64 ``(B, G*Q)``, the position of each placeholder; 0 where the row has fewer.
        text_index: int64 ``(B, G*T)``, the positions of each group's question.
        text_lengths: int64 ``(B*G,)``, 0 for an empty question and an unused group.
    """

    is_query: Tensor
    slot: Tensor
    positions: Tensor
    text_index: Tensor
    text_lengths: Tensor


def require(ok: Tensor, message: str, got: Tensor | None = None) -> None:
    """Raise ValueError unless the bool scalar ``ok``; on a GPU and under compilation, assert without waiting."""
    if ok.is_meta:
        return
    if ok.is_cuda or torch.compiler.is_compiling():
        torch._assert_async(ok, message)
    elif not bool(ok):
        raise ValueError(message if got is None else f"{message}, got {got.tolist()}")


def image_rows(input_ids: Tensor, image_token_id: int, images: int) -> tuple[Tensor, int]:
    """``row_image`` and ``rows_per_image`` of a batch whose images belong, in order, to the rows with placeholders."""
    shows = (input_ids == image_token_id).any(1)
    require(
        shows.sum() == images,
        f"pixel_values: expected one image for each row of input_ids with image tokens (id {image_token_id}), "
        f"got {images} images and rows with image tokens",
        shows,
    )
    if images == input_ids.shape[0]:
        return torch.arange(images, device=input_ids.device), 1
    return torch.where(shows, shows.cumsum(0) - 1, -1), 0


def place_images(embeds: Tensor, input_ids: Tensor, image_token_id: int, images: ImageContext, first: bool) -> Tensor:
    """Put the visual tokens of each row's image at its placeholders. ``first``: nothing of the rows is cached."""
    is_image = input_ids == image_token_id
    visual = images.tokens.shape[1]
    count = is_image.sum(1)
    shown = images.row_image >= 0
    fits = torch.where(shown, count == visual, count == 0)
    if not first:
        fits = fits | (count == 0)
    require(
        fits.all(),
        f"input_ids: expected {visual} image tokens (id {image_token_id}) in each row with an image and none in others",
        count,
    )
    rank = (is_image.cumsum(1) - 1).clamp(0, visual - 1)
    flat = images.row_image.clamp(min=0)[:, None] * visual + rank
    tokens = images.tokens.flatten(0, 1).index_select(0, flat.flatten()).view(*flat.shape, -1)
    return torch.where(is_image[..., None], tokens.to(embeds.dtype), embeds)


def image_seen(input_ids: Tensor, image_token_id: int, row_image: Tensor) -> Tensor:
    """bool ``(B, L)``: has the row's image come before a position? A cached image has; a row without one never."""
    is_image = input_ids == image_token_id
    return (row_image >= 0)[:, None] & ((is_image.cumsum(1) > 0) | ~is_image.any(1, keepdim=True))


def locate_queries(
    input_ids: Tensor, question_spans: Tensor, past: int | Tensor, learnable_token_id: int, num_queries: int
) -> QueryContext:
    """Find the groups of placeholders in a chunk ``input_ids`` (B, L) that follows ``past`` cached positions.

    ``question_spans`` int64 ``(B, G, 2)`` holds [start, end) of each group's question, counted from the start of
    the padded row, cached part included. A group belongs to the chunk when its question ends there: its
    placeholders follow. Earlier groups are cached with their answers.
    """
    length, groups = input_ids.shape[1], question_spans.shape[1]
    capacity = max(groups * num_queries, 1)
    spans = question_spans.to(input_ids.device)
    start, end = spans[..., 0], spans[..., 1]
    here = (end >= past) & (end >= 0)
    cached = ((end >= 0) & (end < past)).sum(1, keepdim=True)
    empty = end <= start
    require(
        (~here | ((end <= past + length) & (empty | (start >= past)))).all(),
        f"question_spans: expected each question that ends behind the cache to lie within the {length} tokens of "
        "input_ids",
        spans,
    )
    is_query = input_ids == learnable_token_id
    count = is_query.sum(1)
    require(
        (count == here.sum(1) * num_queries).all(),
        f"input_ids: expected {num_queries} learnable tokens (id {learnable_token_id}) for each question of the row",
        count,
    )

    rank = is_query.cumsum(1) - 1
    slot = rank.clamp(0, capacity - 1)
    # The n-th placeholder goes to column n; every other position to a spare column that is cut off.
    column = torch.where(is_query & (rank < capacity), rank, capacity)
    here_at = torch.arange(length, device=input_ids.device).expand_as(input_ids)
    positions = here_at.new_zeros(input_ids.shape[0], capacity + 1).scatter(1, column, here_at)[:, :capacity]

    group = (cached + torch.arange(groups, device=input_ids.device)).clamp(max=max(groups - 1, 0))
    inside = torch.arange(groups, device=input_ids.device) < here.sum(1, keepdim=True)
    start = start.gather(1, group) - past
    lengths = torch.where(inside, (end.gather(1, group) - past - start).clamp(min=0), 0)
    text = start[..., None] + torch.arange(_text_bound(question_spans, length), device=input_ids.device)
    return QueryContext(
        is_query,
        slot,
        positions[:, : groups * num_queries],
        text.clamp(0, max(length - 1, 0)).flatten(1),
        lengths.flatten(),
    )


def check_questions(input_ids: Tensor, where: QueryContext, placeholders: tuple[int, ...]) -> None:
    """A question is text: spans that reach into an image or into queries were made for other ids or another padding
    (transformers' pipelines pad ids on the left and leave spans as they were)."""
    if not where.text_index.numel():
        return
    width = where.text_index.numel() // where.text_lengths.numel()
    inside = torch.arange(width, device=input_ids.device) < where.text_lengths[:, None]
    ids = input_ids.gather(1, where.text_index).view_as(inside)
    text = torch.stack([ids != placeholder for placeholder in placeholders]).all(0)
    require(
        (text | ~inside).all(),
        f"question_spans: expected questions without image or query placeholders (ids {placeholders}); "
        "do the spans count the padding of input_ids?",
    )


def _text_bound(question_spans: Tensor, length: int) -> int:
    """Upper bound of the questions' lengths: exact where reading the spans waits for no device, else ``length``."""
    if question_spans.device.type != "cpu" or torch.compiler.is_compiling() or not question_spans.numel():
        return max(length, 1)
    longest = int((question_spans[..., 1] - question_spans[..., 0]).max())
    return min(max(longest, 1), max(length, 1))
