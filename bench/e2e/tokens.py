"""What each model's processor makes of an image: tiles for the tower, tokens for the language model.

Every rule is written out here, with its source, because processors come with tokenizers and need files from the hub.
Where transformers has the rule as a function, a test compares the two.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple


class Layout(NamedTuple):
    """One image, laid out.

    Attributes:
        tiles: pictures that the tower encodes.
        grid: rows and columns of patches of a tile.
        visual: runs of visual tokens, each with the number of marks (tags, line breaks) that stand before it.
        end: marks behind the last run.
    """

    tiles: int
    grid: tuple[int, int]
    visual: tuple[tuple[int, int], ...]
    end: int = 0

    @property
    def visual_tokens(self) -> int:
        """Tokens of the image that the language model sees."""
        return sum(count for _, count in self.visual)

    @property
    def marks(self) -> int:
        """Tokens that the processor adds around and between them."""
        return sum(marks for marks, _ in self.visual) + self.end

    @property
    def patches(self) -> int:
        """Patches that the tower encodes."""
        return self.tiles * self.grid[0] * self.grid[1]


def flashsloth(config: Any, width: int, height: int) -> Layout:
    """Squashed to one square tile, or to five (the whole and its quarters): ``flashsloth/image_processing.py``."""
    return Layout(config.num_tiles, config.vision_grid, ((0, config.num_visual_tokens),))


def llava(config: Any, width: int, height: int) -> Layout:
    """Squashed to the square of the tower, as FlashSloth's one tile is; every patch becomes a visual token."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    return Layout(1, (side, side), ((0, side * side),))


def compressed(window: int) -> Any:
    """The same with one visual token for each ``window x window`` patches."""

    def rule(config: Any, width: int, height: int) -> Layout:
        layout = llava(config, width, height)
        return layout._replace(visual=((0, layout.patches // window**2),))

    return rule


def qwen2_vl(config: Any, width: int, height: int) -> Layout:
    """Native resolution: sides rounded to two patches, and a token for every 2x2 patches between two tags.

    ``smart_resize`` of transformers' Qwen2-VL image processor. The official preprocessor_config.json allows 3136 to
    12845056 pixels, so the resolutions of this benchmark are never scaled.
    """
    vision = config.vision_config
    step = vision.patch_size * vision.spatial_merge_size
    rows, columns = (round(side / step) * vision.spatial_merge_size for side in (height, width))
    return Layout(1, (rows, columns), ((1, rows * columns // vision.spatial_merge_size**2),), 1)


# config.json of OpenGVLab/InternVL2-2B and InternVL2_5-1B: min_dynamic_patch 1, max_dynamic_patch 12, use_thumbnail.
INTERNVL_TILES = 12


def internvl(config: Any, width: int, height: int) -> Layout:
    """Up to twelve tiles of the tower's size in the arrangement closest in aspect, and the whole where they are many.

    ``dynamic_preprocess`` of the InternVL2 model cards; ``get_optimal_tiled_canvas`` and
    ``get_number_of_image_patches`` of transformers' GOT-OCR2 image processor, which InternVL uses.
    """
    vision = config.vision_config
    side, patch = vision.image_size[0], vision.patch_size[0]
    columns, rows = _closest(width, height, side, INTERNVL_TILES)
    tiles = rows * columns + (rows * columns > 1)
    grid = (side // patch, side // patch)
    each = int(grid[0] * config.downsample_ratio) * int(grid[1] * config.downsample_ratio)
    return Layout(tiles, grid, ((1, tiles * each),), 1)


def _closest(width: int, height: int, side: int, most: int) -> tuple[int, int]:
    """Columns and rows: the closest aspect ratio, of equals the largest one that enlarges the area less than twice."""
    every = [(c, r) for c in range(1, most + 1) for r in range(1, most + 1) if c * r <= most]
    best, difference = (1, 1), math.inf
    for columns, rows in sorted(every, key=lambda grid: grid[0] * grid[1]):
        found = abs(width / height - columns / rows)
        if found < difference or (found == difference and width * height > 0.5 * side * side * columns * rows):
            best, difference = (columns, rows), found
    return best


# preprocessor_config.json of HuggingFaceTB/SmolVLM2-2.2B-Instruct: size.longest_edge 1536, in tiles of 384.
SMOLVLM_LONGEST = 4


def smolvlm(config: Any, width: int, height: int) -> Layout:
    """Scaled until the longer side is four tiles, cut into tiles, and the whole: 17 tiles of a square, however small.

    ``resize``, ``resize_for_vision_encoder`` and ``split_images`` of transformers' SmolVLM image processor; the tags
    are those of ``get_image_prompt_string`` in its processor: two before each tile, a line break behind each row.
    """
    vision = config.vision_config
    side = vision.image_size
    rows, columns = _tile_rows_columns(width, height, side)
    grid = (side // vision.patch_size, side // vision.patch_size)
    each = grid[0] * grid[1] // config.scale_factor**2
    runs = [(2 + (row > 0 and column == 0), each) for row in range(rows) for column in range(columns)]
    return Layout(rows * columns + 1, grid, (*runs, (3, each)), 1)


def _tile_rows_columns(width: int, height: int, side: int) -> tuple[int, int]:
    longest = SMOLVLM_LONGEST * side
    if width >= height:
        shorter = int(longest / (width / height))
        return math.ceil((shorter + shorter % 2) / side), SMOLVLM_LONGEST
    shorter = int(longest * (width / height))
    return SMOLVLM_LONGEST, math.ceil((shorter + shorter % 2) / side)
