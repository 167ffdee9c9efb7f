from flashsloth_ops import reference
from flashsloth_ops.reference import spatial_pool as _ref
import torch
def spatial_attention_pool(x, w1, b1, w2, b2, *, grid, window=3, dropout_p=0.0, training=False, return_weights=False):
    window = (window, window) if isinstance(window, int) else window
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=x.device) if training and dropout_p else None
    y, a = _ref.spatial_attention_pool(x, w1, b1, w2, b2, grid=grid, window=window, dropout_p=dropout_p if training else 0.0, seed=seed)
    return (y, a) if return_weights else y
