"""Specification of the three ops in plain PyTorch.

Written to be read beside the paper and to be checked against: no tricks, every intermediate has the
shape the equation gives it. Imports nothing of the project. Every backend is compared with these
functions in fp64, and ``use_backend("reference")`` runs them.
"""
