"""All cases, one file an op."""

from __future__ import annotations

from bench.case import Case
from bench.cases import embedded_query, sparse_prefill, spatial_pool, train

CASES: tuple[Case, ...] = (*spatial_pool.CASES, *embedded_query.CASES, *sparse_prefill.CASES, *train.CASES)
