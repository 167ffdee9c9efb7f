"""Where windows and their tokens are: shared by the kernels of spatial attention pooling."""

# mypy: allow-untyped-defs
import triton
import triton.language as tl


@triton.jit
def window_box(grids, images, height, width, window_height, window_width, window, BLOCK_B: tl.constexpr):
    """Of window number ``window`` (int64) of the batch: its first token, the width of its image, its rows and columns.

    ``grids`` None: every image is height x width. Otherwise each program finds its image among the sizes itself,
    BLOCK_B at a time, which needs no launch of its own and no host; a window beyond the last gets an empty box.
    """
    first = tl.zeros((), tl.int64)
    within = window
    if grids is None:
        per_image = tl.cdiv(height, window_height) * tl.cdiv(width, window_width)
        first += window // per_image * height * width
        within = window % per_image
    else:
        height = tl.zeros((), tl.int64)
        width = tl.zeros((), tl.int64)
        seen = tl.zeros((), tl.int64)
        within = tl.zeros((), tl.int64)
        for base in range(0, images, BLOCK_B):
            image = base + tl.arange(0, BLOCK_B)
            h = tl.load(grids + 2 * image, mask=image < images, other=0)
            w = tl.load(grids + 2 * image + 1, mask=image < images, other=0)
            windows = tl.cdiv(h, window_height) * tl.cdiv(w, window_width)
            ends = seen + tl.cumsum(windows, axis=0)
            mine = (ends - windows <= window) & (window < ends)
            first += tl.sum(tl.where(ends <= window, h * w, 0), axis=0)
            height += tl.sum(tl.where(mine, h, 0), axis=0)
            width += tl.sum(tl.where(mine, w, 0), axis=0)
            within += tl.sum(tl.where(mine, window - (ends - windows), 0), axis=0)
            seen += tl.sum(windows, axis=0)
    across = tl.maximum(tl.cdiv(width, window_width), 1)
    top = within // across * window_height
    left = within % across * window_width
    rows = tl.minimum(height - top, window_height)
    columns = tl.minimum(width - left, window_width)
    return first + top * width + left, width, rows, columns


@triton.jit
def window_tokens(first, width, rows, columns, start, tokens, BLOCK_T: tl.constexpr):
    """Tokens ``start`` to ``start + BLOCK_T`` of a window, row-major, and which of them exist."""
    t = start + tl.arange(0, BLOCK_T)
    token = first + t // columns * width + t % columns
    return token, (t < rows * columns) & (token < tokens)
