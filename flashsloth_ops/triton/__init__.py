"""Triton kernels: a file an op, whose functions have the names and arguments of the ops' schemas.

Every kernel is launched by :func:`flashsloth_ops.triton.launch.launch` and configured by
:func:`flashsloth_ops.triton.tuning.choose`. On a CPU they run with TRITON_INTERPRET=1, in fp32 and fp16: the
interpreter has no bf16 arithmetic.
"""
