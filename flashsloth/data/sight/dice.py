"""Randomness that is the same on every machine, and the one rule that keeps the splits apart."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

SPLITS = ("train", "validation", "test")
_TRAIN, _VALIDATION = 0.70, 0.85  # where the shares of train and of validation end


def split_of(key: str) -> str:
    """The split that owns ``key`` (a word, a digit sample, the layout of a picture): 70, 15 and 15 of 100 keys.

    It depends on the key alone, not on a seed: what one run trains on can never be what another run tests on.
    """
    place = _digest(key) / 2**256
    return "train" if place < _TRAIN else "validation" if place < _VALIDATION else "test"


class Dice:
    """A stream of random numbers named by its key, ``Dice(seed, "train", 17)``.

    Every picture has its own stream, so neither the number of processes nor the order of work changes one. Only
    ``Random.random`` is used underneath: it is the one method whose sequence Python promises to keep.
    """

    def __init__(self, *key: object):
        self._random = random.Random(_digest("/".join(str(part) for part in key)))

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self._random.random()

    def integer(self, low: int, high: int) -> int:
        """A whole number from ``low`` to ``high``, both included."""
        return low + int(self._random.random() * (high - low + 1))

    def coin(self, chance: float = 0.5) -> bool:
        return self._random.random() < chance

    def choice(self, items: Sequence[T]) -> T:
        return items[int(self._random.random() * len(items))]

    def weighted(self, items: Sequence[T], weights: Sequence[float]) -> T:
        left = self._random.random() * sum(weights)
        for item, weight in zip(items, weights, strict=True):
            left -= weight
            if left < 0:
                return item
        return items[-1]

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """``count`` different items in random order."""
        pool = list(items)
        for i in range(count):
            j = i + int(self._random.random() * (len(pool) - i))
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:count]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        return self.sample(items, len(items))


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")
