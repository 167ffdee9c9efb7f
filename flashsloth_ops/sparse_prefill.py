from flashsloth_ops.reference import sparse_prefill as _ref


def token_sparse_prefill(q, k, v, index=None, *, causal=True, scale=None, return_lse=False, importance_rows=None):
    qi, ki = index if isinstance(index, tuple) and not hasattr(index, "indices") else (index, index)
    out, lse, imp = _ref.token_sparse_prefill(
        q, k, v, qi, ki, causal=causal, scale=scale, importance_rows=importance_rows
    )
    r = (out,) + ((lse,) if return_lse else ()) + ((imp,) if importance_rows is not None else ())
    return r if len(r) > 1 else out
