"""The paper's claims on efficiency beside what is counted and measured here, saying where they do not hold.

FlashSloth (arXiv 2412.04317): against other tiny multimodal models it saves 80 to 89 % of the visual tokens, 61 to 80 %
of the memory and 70 to 98 % of the flops, and answers 2 to 5 times sooner. Tokens and flops need no measurement and
are counted at full size on any machine; memory and latency are compared where both models were measured at full size in
the same result.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bench.e2e.counted import Counted, count
from bench.e2e.flops import ANSWER, FIRST_TOKEN, PREFILL, TRAINING_2
from bench.e2e.models import (
    CONTROL,
    FLASHSLOTH,
    FLASHSLOTH_HD,
    INTERNVL_1B,
    INTERNVL_2B,
    QWEN2_VL,
    RESOLUTIONS,
    SMOLVLM,
)
from bench.e2e.points import OP
from bench.result import Row

OURS = (FLASHSLOTH.name, FLASHSLOTH_HD.name)
# Models that do not compress, or less; average pooling and pixel shuffle save what FlashSloth saves, by design.
PEERS = (CONTROL.name, QWEN2_VL.name, INTERNVL_2B.name, INTERNVL_1B.name, SMOLVLM.name)


class Claim(NamedTuple):
    """What the paper says of a quantity: the share saved, or how many times less.

    ``low`` and ``high`` are shares between 0 and 1, or factors where ``factor``.
    """

    quantity: str
    low: float
    high: float
    factor: bool = False

    def gain(self, ours: float, peer: float) -> float:
        """What ours saves of the peer's: the measure of the claim."""
        return peer / ours if self.factor else 1 - ours / peer

    def shown(self, gain: float) -> str:
        """A gain as text."""
        return f"{gain:.2g}x" if self.factor else f"{-gain:+.0%}"


TOKENS = Claim("visual tokens", 0.80, 0.89)
FLOPS = Claim("flops to the first token", 0.70, 0.98)
PREFILL_FLOPS = Claim("flops of the prefill alone", 0.70, 0.98)
TRAINING_MEMORY = Claim("memory in training, stage 2", 0.61, 0.80)
INFERENCE_MEMORY = Claim("memory of an answer", 0.61, 0.80)
LATENCY = Claim("time to the answer", 2.0, 5.0, factor=True)
FIRST_LATENCY = Claim("time to the first token", 2.0, 5.0, factor=True)
CLAIMS = (TOKENS, FLOPS, PREFILL_FLOPS, TRAINING_MEMORY, INFERENCE_MEMORY, LATENCY, FIRST_LATENCY)
_MEASURED = {
    TRAINING_MEMORY: (TRAINING_2, "peak_bytes"),
    INFERENCE_MEMORY: (ANSWER, "peak_bytes"),
    LATENCY: (ANSWER, "p50"),
    FIRST_LATENCY: (FIRST_TOKEN, "p50"),
}
# By claim, model, width and height of the image, and batch.
Values = dict[tuple[Claim, str, int, int, int], float]


class Finding(NamedTuple):
    """One claim about one of our models against one peer, on images of one size."""

    claim: Claim
    model: str
    peer: str
    width: int
    height: int
    batch: int
    ours: float
    peers: float

    @property
    def gain(self) -> float:
        return self.claim.gain(self.ours, self.peers)

    @property
    def holds(self) -> bool:
        """Whether the gain is at least what the paper claims at least, in the digits in which it does."""
        return round(self.gain, 1 if self.claim.factor else 2) >= self.claim.low


def findings(rows: Iterable[Row] = (), counted: Sequence[Counted] | None = None) -> list[Finding]:
    """All that can be said: counted claims always, measured ones where ``rows`` have both sides at full size.

    ``counted`` is :func:`bench.e2e.counted.count`, for callers that have it already.
    """
    return [*_counted(count() if counted is None else counted), *_measured(rows)]


def _counted(counted: Sequence[Counted]) -> list[Finding]:
    values: Values = {}
    for one in counted:
        about = {TOKENS: one.visual_tokens, FLOPS: one.flops[FIRST_TOKEN], PREFILL_FLOPS: one.flops[PREFILL]}
        for claim, value in about.items():
            values[claim, one.model.name, one.width, one.height, 1] = float(value)
    return _compared(values)


def _measured(rows: Iterable[Row]) -> list[Finding]:
    values: Values = {}
    for row in rows:
        size = row.size
        if row.op != OP or not row.passed or (size.get("width"), size.get("height")) not in RESOLUTIONS:
            continue
        for claim, (phase, field) in _MEASURED.items():
            value = getattr(row, field)
            if row.mode == phase and value is not None:
                values[claim, row.provider, size["width"], size["height"], size["batch"]] = float(value)
    return _compared(values)


def _compared(values: Values) -> list[Finding]:
    found = []
    for (claim, model, width, height, batch), ours in values.items():
        for peer in PEERS if model in OURS else ():
            other = values.get((claim, peer, width, height, batch))
            if other is not None:
                found.append(Finding(claim, model, peer, width, height, batch, ours, other))
    return found


class Line(NamedTuple):
    """A claim about one of our models on images of one size, over batches and peers."""

    quantity: str
    claimed: str
    model: str
    image: str
    found: str
    verdict: str


def table(found: Sequence[Finding]) -> list[Line]:
    """Findings in lines: the gain against each peer (over batches, from the least to the most), and where it holds.

    A claim without a finding gets one line that says so.
    """
    lines = []
    for claim in CLAIMS:
        about = [one for one in found if one.claim is claim]
        claimed = f"{claim.shown(claim.low)} to {claim.shown(claim.high)}"
        if not about:
            lines.append(Line(claim.quantity, claimed, "", "", "not measured at full size", ""))
        for key in dict.fromkeys((one.model, one.width, one.height) for one in about):
            group = [one for one in about if (one.model, one.width, one.height) == key]
            names = list(dict.fromkeys(one.peer for one in group))
            each = [f"{name} {_range(claim, [one for one in group if one.peer == name])}" for name in names]
            wrong = [name for name in names if not all(one.holds for one in group if one.peer == name)]
            if not wrong:
                verdict = "holds"
            elif len(wrong) == len(names):
                verdict = "does not hold"
            else:
                verdict = f"does not hold against {', '.join(wrong)}"
            lines.append(Line(claim.quantity, claimed, key[0], f"{key[1]}x{key[2]}", "; ".join(each), verdict))
    return lines


def _range(claim: Claim, group: Sequence[Finding]) -> str:
    least, most = (claim.shown(bound(one.gain for one in group)) for bound in (min, max))
    return least if least == most else f"{least} to {most}"
