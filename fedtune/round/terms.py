"""What a configuration means for secure aggregation and privacy: both sides derive it alike."""

from __future__ import annotations

import math
from functools import lru_cache

from fedtune.config import Config, Privacy
from fedtune.privacy.accountant import (
    ClientRelease,
    RecordRelease,
    calibrate_client_noise,
    calibrate_record_noise,
    integer_l1,
    sampling_rate,
)
from fedtune.secagg.ring import Ring
from fedtune.secagg.session import MINIMUM_COHORT, Terms
from fedtune.update.quantize import Quantizer
from fedtune.update.skellam import SkellamNoise


def make_terms(config: Config, clients: int) -> Terms:
    """The terms of secure aggregation among `clients` clients of a roster."""
    secagg = config.secagg
    minimum = config.rounds.min_clients or MINIMUM_COHORT
    return Terms(secagg.threshold, secagg.colluding, minimum, secagg.neighbours, clients)


def make_quantizer(config: Config, size: int, cohort: int, terms: Terms | None = None) -> Quantizer:
    """How updates of `size` values become integers in a round that `cohort` clients begin.

    Each client adds its share of the noise as if only the fewest clients that a round may end
    with were left, and the colluders of `terms` among them added none: with more the noise is
    larger than promised, never smaller. Raises `ConfigError` if the integers cannot hold the
    update.
    """
    update = config.update
    if update.clip is None or update.bits is None:
        raise ValueError("update.clip and update.bits are unset")
    noise = None
    if config.privacy.unit == "client":
        if terms is None:
            raise ValueError("noise is shared on the terms of secure aggregation")
        shares = terms.fewest_survivors(cohort) - terms.colluders_of(cohort)
        noise = SkellamNoise(noise_variance(config, size) / shares)
    return Quantizer(
        size,
        update.clip,
        update.bits,
        "examples" if config.aggregate.weighting == "examples" else "clients",
        update.example_cap,
        # A loss, and who knows how many examples it is of, has no noise.
        metrics=config.privacy.unit == "none",
        noise=noise,
    )


def fisher_scale(config: Config, size: int) -> float:
    """Rule "fisher": the factor of the weights that travel behind an update of `size` values.

    They share the clip, and so the integers, with the values that they weigh. Of an update that is
    as long as the clip a value is about `clip` / √`size`. Times that, weights of mean square 1 are
    as long as the update, and rounding does the same harm to both: the quotient q = s·a/b of two
    sums is changed by s/b if a is a unit off, and by q/b if b is. Without a clip it does not
    matter: a float's error goes with its size.
    """
    return 1.0 if config.update.clip is None else config.update.clip / math.sqrt(size)


def make_ring(quantizer: Quantizer, clients: int) -> Ring:
    """The smallest ring in which the sum of `clients` vectors cannot wrap."""
    return Ring(quantizer.ring_bits(clients))


def noise_variance(config: Config, size: int) -> float:
    """Unit "client": the variance of the noise in each value of the sum, in integer units²."""
    if config.update.bits is None:
        raise ValueError("update.bits is unset")
    return _noise_variance(config.privacy, config.update.bits, size, config.rounds.count)


@lru_cache(maxsize=64)
def _noise_variance(privacy: Privacy, bits: int, size: int, rounds: int) -> float:
    length = float(2 ** (bits - 1) - 1)
    if privacy.noise_multiplier is not None:
        return (privacy.noise_multiplier * length) ** 2
    return calibrate_client_noise(
        privacy.epsilon or math.inf, privacy.delta, rounds, length, integer_l1(size, length)
    )


def client_release(config: Config, size: int, round_number: int) -> ClientRelease:
    """Unit "client": what one round releases."""
    length = float(2 ** ((config.update.bits or 0) - 1) - 1)
    return ClientRelease(
        round_number, length, integer_l1(size, length), noise_variance(config, size)
    )


def record_release(config: Config, examples: int, round_number: int) -> RecordRelease:
    """Unit "record": what one round of a client with `examples` examples releases."""
    train, privacy = config.train, config.privacy
    rate = sampling_rate(train.batch_size, examples)
    noise = privacy.noise_multiplier or _record_noise(
        privacy.epsilon or math.inf, privacy.delta, rate, train.steps * config.rounds.count
    )
    return RecordRelease(round_number, rate, noise, train.steps)


_record_noise = lru_cache(maxsize=4096)(calibrate_record_noise)
