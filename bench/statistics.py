"""How sure the ratio of two timings is: a robust estimate of its logarithm, and an interval around it.

What disturbs a timing multiplies it, so everything here is about logarithms; only :meth:`Estimate.ratio` and
:meth:`Estimate.interval` speak of ratios.

* The centre is the mean of the middle half of the samples: how long a spike is does not matter to it, unless a quarter
  of the samples are spikes, and it needs a fifth fewer samples than the median for the same accuracy. Its variance
  comes from the winsorised samples (Tukey and McLaughlin 1963), and two of them are compared as by Yuen (Biometrika 61,
  1974): Student's t with the degrees of freedom of Welch (1947).
* Noise of a machine is autocorrelated: a slow second spoils several rounds. With lag-one correlation r, n samples are
  worth n (1 - r) / (1 + r) (Zwiers and von Storch, J. Climate 8, 1995); variance and degrees of freedom follow. That
  mends most of it: with r = 0.5 and 20 rounds, 95 % intervals hold in 92 % of the cases, without it in 78 %.
* Drift common to two timings of the same rounds cancels in their difference: :func:`paired`.
* A run as a whole is off by something its samples do not show: where memory happened to lie, how warm the processor
  was (Mytkowicz et al., ASPLOS 2009). That is a variance of its own: known beforehand (:func:`known`), or seen by
  starting again several times (:func:`repeated`).

Nothing here is random. Samples run along the last axis; leading axes are so many independent problems.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

TRIMMED = 0.25  # of the samples, at each end
FEWEST = 3  # samples, below which nothing can be said


class Estimate(NamedTuple):
    """The logarithm of a time or of a ratio, the variance of that logarithm, and its degrees of freedom."""

    log: Array
    variance: Array
    freedom: Array

    @property
    def ratio(self) -> float:
        """The ratio itself; of a single problem."""
        return float(np.exp(self.log))

    def lower(self, error: float) -> Array:
        """The bound which the true logarithm is below with probability ``error``."""
        return self.log - student(error, self.freedom) * np.sqrt(self.variance)

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """The ratio lies between these with probability ``level``; of a single problem."""
        half = float(student((1 - level) / 2, self.freedom) * np.sqrt(self.variance))
        return math.exp(float(self.log) - half), math.exp(min(float(self.log) + half, 700.0))


def centre(logs: ArrayLike) -> Estimate:
    """The centre of samples that are logarithms, in the order in which they were measured.

    Raises:
        ValueError: fewer than :data:`FEWEST` samples.
    """
    samples = np.asarray(logs, dtype=np.float64)
    count = samples.shape[-1] if samples.ndim else 0
    if count < FEWEST:
        raise ValueError(f"samples: expected at least {FEWEST}, got {count}")
    cut = int(TRIMMED * count)
    kept = count - 2 * cut
    ordered = np.sort(samples, axis=-1)
    winsorised = np.clip(samples, ordered[..., cut, None], ordered[..., count - 1 - cut, None])
    deviations = winsorised - winsorised.mean(axis=-1, keepdims=True)
    squares = (deviations**2).sum(axis=-1)
    each = _samples_worth_one(deviations, squares)
    variance = squares / (kept * (kept - 1)) * each
    mean = ordered[..., cut : count - cut].mean(axis=-1)
    return Estimate(mean, variance, np.maximum((kept - 1) / each, 1.0))


def _samples_worth_one(deviations: Array, squares: Array) -> Array:
    """How many consecutive samples say as much as one independent one; never below 1.

    Of few samples the correlation comes out too low, by (1 + 3 r) / n (Kendall, Biometrika 41, 1954).
    """
    count = deviations.shape[-1]
    found = (deviations[..., 1:] * deviations[..., :-1]).sum(axis=-1) / np.maximum(squares, 1e-300)
    correlation = np.clip(found + (1 + 3 * found) / count, 0.0, 0.9)
    return (1 + correlation) / (1 - correlation)


def known(variance: ArrayLike) -> Estimate:
    """Something around zero whose variance is not estimated from samples."""
    value = np.asarray(variance, dtype=np.float64)
    return Estimate(np.zeros_like(value), value, np.full_like(value, np.inf))


def combined(parts: Iterable[tuple[float, Estimate]]) -> Estimate:
    """The sum of independent estimates, each with its weight; degrees of freedom by Welch and Satterthwaite."""
    listed = list(parts)
    variances = [weight**2 * part.variance for weight, part in listed]
    total = np.asarray(sum(variances), dtype=np.float64)
    spread = sum(v**2 / part.freedom for v, (_, part) in zip(variances, listed, strict=True))
    spread = np.asarray(spread, dtype=np.float64)
    freedom = np.where(spread > 0, total**2 / np.where(spread > 0, spread, 1.0), np.inf)
    return Estimate(np.asarray(sum(weight * part.log for weight, part in listed)), total, freedom)


def paired(times: ArrayLike, base: ArrayLike) -> Estimate:
    """``times`` over ``base``, where values at one place were measured in the same round.

    Raises:
        ValueError: lengths differ, or too few samples.
    """
    above, below = np.asarray(times, dtype=np.float64), np.asarray(base, dtype=np.float64)
    if above.shape != below.shape:
        raise ValueError(f"base: expected samples of shape {above.shape}, got {below.shape}")
    return centre(np.log(above) - np.log(below))


def repeated(launches: Sequence[Estimate]) -> Estimate:
    """The mean over several launches of the same programs, each of which is one sample of it, with all that varies from
    launch to launch (Kalibera and Jones, ISMM 2013). Of one launch, what its own samples say.

    Raises:
        ValueError: no launch.
    """
    if len(launches) < 2:
        if not launches:
            raise ValueError("launches: expected at least one, got none")
        return launches[0]
    logs = np.stack([one.log for one in launches])
    count = len(launches)
    mean = logs.mean(axis=0)
    return Estimate(mean, logs.var(axis=0, ddof=1) / count, np.full_like(mean, count - 1.0))


def unpaired(times: ArrayLike, base: ArrayLike) -> Estimate:
    """``times`` over ``base``, from two runs, without what a run as a whole is off by. Raises as :func:`centre`."""
    return combined([(1.0, centre(np.log(times))), (-1.0, centre(np.log(base)))])


def student(error: float, freedom: ArrayLike) -> Array:
    """What a variable of Student's t exceeds with probability ``error``; degrees of freedom from 1 to infinity."""
    inverse, quantiles = _student_table(error)
    return np.asarray(np.exp(np.interp(1 / np.maximum(freedom, 1.0), inverse, quantiles)))


@lru_cache
def _student_table(error: float) -> tuple[Array, Array]:
    """Logarithms of the quantile over 1 / freedom: a smooth curve, so interpolation between its points is exact enough.

    With t = sqrt(n) tan(angle), the density over the angle is proportional to cos(angle) to the power n - 1.
    """
    if not 0 < error < 0.5:
        raise ValueError(f"error: expected a probability between 0 and 0.5, got {error}")
    inverse = np.linspace(0.0, 1.0, 201)
    quantiles = [math.log(NormalDist().inv_cdf(1 - error))]
    for freedom in 1 / inverse[1:]:
        # From the far end, where the density is tiny: the sum must resolve the tail. Eighth powers put points there.
        rest = np.linspace(0.0, 1.0, 4001) ** 4 * (math.pi / 2)
        density = np.sin(rest) ** (freedom - 1)
        area = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(rest))])
        angle = np.interp(error, area / (2 * area[-1]), rest)
        quantiles.append(math.log(math.sqrt(freedom) / math.tan(angle)))
    return inverse, np.array(quantiles)
