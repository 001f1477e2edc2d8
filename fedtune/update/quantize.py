"""Updates as integers: clipped, weighed, rounded, and noised if they are to be private.

After this everything is integer arithmetic, so the sum of many clients' vectors is exact and the
same in whatever order, and in whatever ring, it is made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import ConfigError, MalformedMessage, TrainingError
from fedtune.types import Float32Vector
from fedtune.update.skellam import SkellamNoise

Weighting = Literal["examples", "clients"]

MIN_BITS = 9  # a counter's slot goes up to 255
MAX_BITS = 30  # a sum of squares fits 63 bits, see _round
MAX_RING_BITS = 62
_ATTEMPTS = 64
_CHUNK = 1 << 18
_LIMB = 256
_EXAMPLE_LIMBS = 5
_LOSS_LIMBS = 6
_LOSS_UNIT = 2.0**-10


@dataclass(frozen=True)
class QuantizedSum:
    """What the sum of several clients' vectors says."""

    total: NDArray[np.float64]
    """Weighted sum of the updates, shape `[size]`; `total / weight` is their mean."""
    weight: float
    """Sum of the weights: of min(examples, cap)/cap, or the number of clients."""
    examples: int | None
    """How many examples the clients trained on, uncapped; None without metrics."""
    loss: float | None
    """Their mean training loss, weighted by examples; None without metrics."""


class Quantizer:
    """Client: update → integer vector. Server: sum of those → weighted sum of updates.

    A vector of L2 norm `clip` becomes about `bound` = 2^(`bits` - 1) - 1 integer units long. Of
    one client, without noise, the update's integers have an L2 norm of `bound` or less, whatever
    the update was: this is the sensitivity that noise has to hide. The weight is 1 ("clients")
    or min(examples, `example_cap`) / `example_cap` ("examples"), so it never lengthens a vector.

    Behind the update come counters in base 256, one slot of at most 255 per limb and client, so
    that they do not wrap where the update does not: the examples (5 limbs; `metrics`), the capped
    examples (5 limbs; weighting "examples") and the loss times examples (6 limbs; `metrics`).

    Raises `ConfigError` for values out of range, for too few `bits` for `size`, and for counters
    together with noise.
    """

    def __init__(
        self,
        size: int,
        clip: float,
        bits: int,
        weighting: Weighting,
        example_cap: int,
        metrics: bool,
        noise: SkellamNoise | None,
    ) -> None:
        _check(size, clip, bits, example_cap)
        if noise is not None and (metrics or weighting != "clients"):
            raise ConfigError(
                "counters of examples and losses are exact, so not differentially private: with "
                "noise, weighting must be clients and metrics must be off"
            )
        self.size = size
        self.bits = bits
        self.bound = _largest(bits)
        """Of one client before noise: the largest |slot|, and the largest L2 norm of the update."""
        self.noise = noise
        self._clip = clip
        self._length = shrunk_norm(self.bound, size)
        self.scale = self._length / clip
        """Integer units per unit of the update, float64."""
        self._weighting = weighting
        self._cap = example_cap
        self._limbs: dict[str, int] = {}
        if metrics:
            self._limbs["examples"] = _EXAMPLE_LIMBS
        if weighting == "examples":
            self._limbs["capped"] = _EXAMPLE_LIMBS
        if metrics:
            self._limbs["loss"] = _LOSS_LIMBS
        self.slots = size + sum(self._limbs.values())
        """Length of an encoded vector."""

    def encode(
        self, update: Float32Vector, examples: int, loss: float | None, rng: np.random.Generator
    ) -> NDArray[np.int64]:
        """int64 `[slots]` of one client; `update` has shape `[size]`, `loss` is its mean loss,
        which is not looked at without metrics.

        `rng` decides only which way values are rounded. It need not be secret: the bound on the
        norm holds for every outcome. What protects is the noise, and that has its own source.

        Raises `TrainingError` if the update is not finite, if there is no example, or if there
        are metrics and the loss is negative, not finite or None.
        """
        if update.shape != (self.size,):
            raise ValueError(f"an update of shape {update.shape}, not [{self.size}]")
        if examples < 1:
            raise TrainingError(f"an update from {examples} examples has no weight")
        counters = self._counters(examples, loss)
        weight = min(examples, self._cap) / self._cap if self._weighting == "examples" else 1.0
        factor = weight * self._length / max(_norm(update), self._clip)
        vector = np.zeros(self.slots, np.int64)
        self._round(update, factor, rng, vector[: self.size])
        if self.noise is not None:
            vector[: self.size] += self.noise.sample(self.size)
        vector[self.size :] = counters
        return vector

    def decode(self, total: NDArray[np.int64], clients: int) -> QuantizedSum:
        """What int64 `[slots]`, the sum over `clients` vectors, says.

        Raises `MalformedMessage` if no such sum can be, as when a client broke the protocol.
        """
        if total.shape != (self.slots,) or clients < 1:
            raise MalformedMessage(
                f"a sum over {clients} clients of shape {total.shape}, not [{self.slots}]"
            )
        update = total[: self.size]
        largest = max(int(update.max()), -int(update.min()))
        if largest > self._reach(clients):
            raise MalformedMessage(f"{clients} clients cannot reach a value of {largest}")
        counts = self._read_counters(total, clients)
        weight = float(clients)
        if self._weighting == "examples":
            capped = counts["capped"]
            if not clients <= capped <= clients * self._cap:
                raise MalformedMessage(
                    f"{capped} examples at {clients} clients that count at most {self._cap} each"
                )
            weight = capped / self._cap
        examples = counts.get("examples")
        if examples is not None and examples < counts.get("capped", clients):
            raise MalformedMessage(f"{examples} examples at {clients} clients, fewer than counted")
        loss = counts["loss"] * _LOSS_UNIT / examples if examples is not None else None
        return QuantizedSum(update / self.scale, weight, examples, loss)

    def ring_bits(self, clients: int) -> int:
        """The fewest bits w so that the sum of `clients` vectors does not wrap modulo 2^w.

        With noise: wraps with p ≤ 2⁻⁶⁴ per value. Raises `ConfigError` above 62.
        """
        values = 2 * self._reach(clients) + 1
        needed = (values - 1).bit_length()
        if needed > MAX_RING_BITS:
            noise = "no noise" if self.noise is None else f"noise variance {self.noise.variance:g}"
            raise ConfigError(
                f"the sum of {clients} clients with {self.bits} bits each and {noise} needs "
                f"{needed} bits, more than {MAX_RING_BITS}; use fewer bits or fewer clients"
            )
        return needed

    def _reach(self, clients: int) -> int:
        tail = 0 if self.noise is None else self.noise.tail(clients)
        return clients * self.bound + tail

    def _round(
        self,
        update: Float32Vector,
        factor: float,
        rng: np.random.Generator,
        rounded: NDArray[np.int64],
    ) -> None:
        """Round `factor` · `update` into `rounded`, at an L2 norm of at most `bound`.

        Conditional stochastic rounding (Kairouz et al. 2021, "The distributed discrete Gaussian
        mechanism", arXiv 2102.06387, section 4): unbiased, and again until the norm is in bounds.
        """
        for _ in range(_ATTEMPTS):
            squares = 0
            for start in range(0, self.size, _CHUNK):
                part = update[start : start + _CHUNK].astype(np.float64) * factor
                low = np.floor(part)
                integers = (low + (rng.random(part.size) < part - low)).astype(np.int64)
                rounded[start : start + _CHUNK] = integers
                # Even rejected, the norm is below 3 · bound: 63 bits hold its square.
                squares += int(np.dot(integers, integers))
            if squares <= self.bound**2:
                return
        # An attempt fails with p ≤ 0.61, all of them with 10⁻¹³. Towards zero no value gets
        # larger, so neither does the norm, and that of the input was below the bound.
        for start in range(0, self.size, _CHUNK):
            part = update[start : start + _CHUNK].astype(np.float64) * factor
            rounded[start : start + _CHUNK] = np.trunc(part).astype(np.int64)

    def _counters(self, examples: int, loss: float | None) -> list[int]:
        values = {"examples": int(examples), "capped": int(min(examples, self._cap))}
        if "loss" in self._limbs:
            if loss is None or not (math.isfinite(loss) and loss >= 0):
                raise TrainingError(f"the training loss is {loss}; it must be finite and >= 0")
            ceiling = float(_LIMB**_LOSS_LIMBS - 1)
            values["loss"] = round(min(loss * examples / _LOSS_UNIT, ceiling))
        slots: list[int] = []
        for name, limbs in self._limbs.items():
            value = min(values[name], _LIMB**limbs - 1)
            slots += value.to_bytes(limbs, "little")
        return slots

    def _read_counters(self, total: NDArray[np.int64], clients: int) -> dict[str, int]:
        counts: dict[str, int] = {}
        start = self.size
        for name, limbs in self._limbs.items():
            sums = [int(value) for value in total[start : start + limbs]]
            if min(sums) < 0 or max(sums) > clients * (_LIMB - 1):
                raise MalformedMessage(f"{clients} clients cannot count {name} as {sums}")
            counts[name] = sum(value * _LIMB**place for place, value in enumerate(sums))
            start += limbs
        return counts


def shrunk_norm(bound: int, size: int) -> float:
    """The length Δ' whose stochastic rounding stays within `bound` with p ≥ 1 - exp(-1/2).

    The solution of Δ'² + size/4 + √(2 ln(1/β)) (Δ' + √size/2) = bound² at β = exp(-1/2), where
    the root is 1 (Kairouz et al. 2021, arXiv 2102.06387, section 4). 0 if there is none.
    """
    discriminant = 1 + 4 * bound**2 - size - 2 * math.sqrt(size)
    return (math.sqrt(discriminant) - 1) / 2 if discriminant > 1 else 0.0


def _largest(bits: int) -> int:
    return int(2 ** (bits - 1) - 1)


def _check(size: int, clip: float, bits: int, example_cap: int) -> None:
    if size < 1:
        raise ConfigError(f"an adapter of {size} values has nothing to quantize")
    if not (math.isfinite(clip) and clip > 0 and math.isfinite(_largest(MAX_BITS) / clip)):
        raise ConfigError(f"the clipping norm {clip} is not a usable positive number")
    if not 1 <= example_cap < _LIMB**_EXAMPLE_LIMBS:
        raise ConfigError(f"an example cap of {example_cap} is not in [1, 2^40)")
    enough = [
        b
        for b in range(MIN_BITS, MAX_BITS + 1)
        if 2 * shrunk_norm(_largest(b), size) >= _largest(b)
    ]
    if not enough:
        raise ConfigError(f"an adapter of {size} values is too large for {MAX_BITS} bits")
    if bits not in enough:
        raise ConfigError(
            f"{bits} bits cannot hold an update of {size} values; use {enough[0]} to {MAX_BITS}"
        )


def _norm(update: Float32Vector) -> float:
    """L2 norm in float64; float32 squares neither overflow nor vanish there."""
    parts = []
    for start in range(0, update.size, _CHUNK):
        part = update[start : start + _CHUNK].astype(np.float64)
        parts.append(float(np.dot(part, part)))
    norm = math.sqrt(math.fsum(parts)) if all(map(math.isfinite, parts)) else math.inf
    if not math.isfinite(norm):
        count = int((~np.isfinite(update)).sum())
        raise TrainingError(f"{count} of {update.size} values of the update are not finite")
    return norm
