"""A start for a small vision transformer: heads of the first layers look at the patches next to each.

From random weights a transformer learns colours quickly and shapes late: its heads must first find out that patches
have neighbours (docs/nano.md has what was measured). Here some channels hold the position,
as waves, and the queries and keys of a head compare them at an offset: at first the layer is a convolution, as in
"Structured Initialization for Attention in Vision Transformers" (Zheng et al., 2024), and from there all is trained.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import SiglipVisionModel

# (down, right) of the patch that each of four heads looks at, layer by layer. Later layers start at random.
OFFSETS = (
    ((0, 1), (0, -1), (1, 0), (-1, 0)),
    ((1, 1), (1, -1), (-1, 1), (-1, -1)),
    ((0, 2), (0, -2), (2, 0), (-2, 0)),
)
_ADDED = 0.3
_FAINT = 0.003  # what is fainter is noise
_PEAK = 10.0  # by how much the logit of that patch is above those of others


@torch.no_grad()
def look_at_neighbours(tower: SiglipVisionModel) -> None:
    """Initialises a tower in place; half of a head's channels are waves along each side of the grid.

    Raises:
        ValueError: a number of heads that is not four.
    """
    inner: Any = getattr(tower, "vision_model", tower)  # nested in some versions
    layers, heads = inner.encoder.layers, inner.config.num_attention_heads
    if heads != len(OFFSETS[0]):
        raise ValueError(f"num_attention_heads: expected {len(OFFSETS[0])}, got {heads}")
    width, head = inner.config.hidden_size, inner.config.hidden_size // heads
    side, waves = inner.config.image_size // inner.config.patch_size, head // 4
    places = torch.arange(side)
    across, down = torch.meshgrid(places, places, indexing="xy")
    embeddings = inner.embeddings
    embeddings.patch_embedding.weight[:head] = 0  # these channels are for the position
    embeddings.patch_embedding.bias.zero_()
    embeddings.position_embedding.weight.zero_()
    embeddings.position_embedding.weight[:, :head] = torch.cat((_waves(across, waves), _waves(down, waves)), -1)
    for layer in layers:  # what a layer adds is small at first, so that pixels are not lost under it
        layer.self_attn.out_proj.weight *= _ADDED
        layer.mlp.fc2.weight *= _ADDED
    # Waves of lengths side / k for k = 1 ... waves: together they are a peak at no distance, and flat elsewhere.
    gain = math.sqrt(_PEAK * math.sqrt(head) / waves)
    for layer, offsets in zip(layers, OFFSETS, strict=False):
        query, key = layer.self_attn.q_proj.weight.view(heads, head, width), layer.self_attn.k_proj.weight
        key = key.view(heads, head, width)
        for written in (layer.self_attn.out_proj, layer.mlp.fc2):
            written.weight[:head] = 0  # the next layer finds the position as it was
        query.zero_(), key.zero_()
        for i, (below, right) in enumerate(offsets):
            key[i, :, :head] = gain * torch.eye(head)
            query[i, :, :head] = gain * torch.block_diag(_shift(right, waves, side), _shift(below, waves, side))


@torch.no_grad()
def whiten_patches(tower: SiglipVisionModel, pixels: Tensor) -> None:
    """Let the other channels hold the principal components of patches, at about equal strength. As it is, the mean
    colour of a patch has 25 times the variance of anything else in it.

    Args:
        pixels: (B, 3, S, S), pictures of the kind that will be seen.
    """
    inner: Any = getattr(tower, "vision_model", tower)
    embedding, waves = inner.embeddings.patch_embedding, inner.config.hidden_size // inner.config.num_attention_heads
    patches = F.unfold(pixels, inner.config.patch_size, stride=inner.config.patch_size).mT.flatten(0, 1).double()
    mean = patches.mean(0)
    strength, directions = torch.linalg.eigh(torch.cov((patches - mean).T))
    wanted = inner.config.hidden_size - waves
    if len(strength) < wanted:
        raise ValueError(f"patch_size: expected patches of at least {wanted} values, got {len(strength)}")
    strength, directions = strength.flip(0)[:wanted], directions.flip(1)[:, :wanted]
    weight = (directions / (strength + _FAINT).sqrt()).T
    embedding.weight[waves:] = weight.view(wanted, *embedding.weight.shape[1:]).float()
    embedding.bias[waves:] = -(weight @ mean).float()


def _waves(places: Tensor, count: int) -> Tensor:
    """(places, 2 count): cosine and sine of each wave."""
    angles = places.flatten()[:, None] * _rates(count, math.isqrt(places.numel()))
    return torch.stack((angles.cos(), angles.sin()), -1).flatten(1)


def _rates(count: int, side: int) -> Tensor:
    return torch.arange(1, count + 1) * 2 * math.pi / side


def _shift(by: int, count: int, side: int) -> Tensor:
    """The matrix that takes the waves at a place to those ``by`` places on."""
    turns = [torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]]) for a in by * _rates(count, side)]
    return torch.block_diag(*turns)
