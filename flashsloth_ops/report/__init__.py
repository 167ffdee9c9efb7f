"""What compilers made of every GPU kernel, read from the binaries: no GPU is needed.

    python -m flashsloth_ops kernels

======================= ==============================================================================
:mod:`.cases`           calls of the ops that stand for all: sizes, dtypes and options that matter
:mod:`.triton_kernels`  records what these calls launch and compiles it for each architecture
:mod:`.cuda_kernels`    compiles ``csrc/cuda/*.cu``
:mod:`.binary`          registers, stack and shared memory of a binary, spills and tensor-core instructions
:mod:`.architecture`    limits of each architecture, and the occupancy they leave
:mod:`.table`           rows, what fails a check, and what a change did
:mod:`.command`         the command
======================= ==============================================================================
"""
