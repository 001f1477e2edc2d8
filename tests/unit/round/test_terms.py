"""What a configuration means: noise, its shares, what it costs, and a ring that is wide enough."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedtune.config import Config, parse_config
from fedtune.errors import ConfigError
from fedtune.privacy.accountant import CLIENT_ORDERS, Ledger
from fedtune.round.terms import (
    client_release,
    make_quantizer,
    make_ring,
    make_terms,
    noise_variance,
    record_release,
)
from fedtune.secagg.ring import Ring
from fedtune.update.quantize import Quantizer

CLIENT = (
    "update.clip=0.5",
    "secagg.enabled=true",
    "aggregate.weighting=uniform",
    "privacy.unit=client",
)
SIZE = 40


def _config(*overrides: str) -> Config:
    return parse_config("", "test", overrides)


def _quantizer(config: Config, size: int, clients: int) -> Quantizer:
    return make_quantizer(config, size, clients, make_terms(config, clients))


def _client(*overrides: str, bits: int = 12, noise: float | None = 1.0) -> Config:
    told = () if noise is None else (f"privacy.noise-multiplier={noise}",)
    return _config(*CLIENT, f"update.bits={bits}", *told, *overrides)


# ------------------------------------------------------------------------------------ the variance
@pytest.mark.parametrize("bits", [9, 16, 24])
@pytest.mark.parametrize("noise", [0.05, 1.0, 3.7])
def test_the_noise_is_the_multiplier_times_the_clip(bits, noise):
    expected = (noise * (2 ** (bits - 1) - 1)) ** 2
    config = _client(bits=bits, noise=noise)
    assert noise_variance(config, SIZE) == pytest.approx(expected, rel=1e-12)
    release = client_release(config, SIZE, 3)
    assert release.variance == noise_variance(config, SIZE)
    assert math.sqrt(release.variance) / release.l2 == pytest.approx(noise)
    assert release.round == 3
    assert release.l2 == 2 ** (bits - 1) - 1


@pytest.mark.parametrize(
    ("overrides", "clients", "fewest", "colluders"),
    [
        ((), 4, 3, 1),
        ((), 6, 5, 2),
        ((), 8, 6, 2),
        ((), 9, 7, 3),
        ((), 30, 21, 8),
        (("rounds.min-clients=5",), 6, 5, 2),
        (("rounds.min-clients=6",), 6, 6, 2),
        (("rounds.min-clients=7",), 8, 7, 2),
        (("secagg.threshold=0.9",), 10, 10, 3),
        (("secagg.threshold=0.5", "secagg.colluding=0.0"), 10, 6, 0),
    ],
)
def test_each_client_adds_the_share_of_the_fewest_honest_that_may_be_left(
    overrides, clients, fewest, colluders
):
    config = _client(*overrides)
    terms = make_terms(config, clients)
    assert terms.fewest_survivors(clients) == fewest
    share = _quantizer(config, SIZE, clients).noise.variance
    assert share * (fewest - colluders) == pytest.approx(noise_variance(config, SIZE), rel=1e-12)


def test_colluders_are_counted_on_the_roster_however_few_are_invited():
    """Whoever chooses the cohort may choose all of them into it."""
    config = _client("secagg.colluding=0.04")
    terms = make_terms(config, 100)
    assert [terms.colluders_of(cohort) for cohort in (10, 50, 100)] == [4, 4, 4]
    with pytest.raises(ConfigError, match=r"7 of 10 clients do not withstand 4"):
        terms.check(10)
    terms.check(13)
    make_terms(config, 10).check(10)


@pytest.mark.parametrize("clients", [4, 6, 9])
def test_the_noise_of_the_fewest_honest_survivors_is_as_large_as_promised(clients):
    """Measured in the sums of real encodings of nothing, from the system's own random numbers."""
    size = 24_000
    config = _client()
    quantizer, terms = _quantizer(config, size, clients), make_terms(config, clients)
    # Colluders count as survivors, and may leave their noise out.
    honest = terms.fewest_survivors(clients) - math.ceil(clients / 4)
    rng = np.random.default_rng(1)
    nothing = np.zeros(size, np.float32)
    total = sum(quantizer.encode(nothing, 1, 0.0, rng)[:size] for _ in range(honest))
    measured = float(np.mean(np.square(total.astype(np.float64))))
    target = (2**11 - 1) ** 2
    # The mean of n squares of nearly normal values has a relative deviation of √(2/n), here
    # 0.9 %; 5 of these are exceeded once in 3.5 million, and a share too small is 14 % or more.
    spread = 5 * math.sqrt(2 / size)
    assert target * (1 - spread) < measured < target * (1 + spread)
    assert abs(total.mean()) < 6 * math.sqrt(target / size)


def test_noise_of_two_clients_and_of_two_rounds_has_nothing_in_common():
    size = 4000
    quantizer = _quantizer(_client(), size, 4)
    nothing = np.zeros(size, np.float32)
    one, other = (
        quantizer.encode(nothing, 1, 0.0, np.random.default_rng(7)).astype(np.float64)
        for _ in range(2)
    )
    correlation = np.corrcoef(one, other)[0, 1]
    assert abs(correlation) < 6 / math.sqrt(size)


def test_only_unit_client_has_noise_in_the_update():
    for overrides in (
        ("update.clip=0.5", "update.bits=12", "secagg.enabled=true"),
        (
            "update.clip=0.5",
            "update.bits=12",
            "privacy.unit=record",
            "privacy.noise-multiplier=1.0",
        ),
    ):
        assert _quantizer(_config(*overrides), SIZE, 6).noise is None


def test_metrics_are_only_counted_without_privacy():
    common = ("update.clip=0.5", "update.bits=12")
    uniform = (*common, "aggregate.weighting=uniform")
    record = ("privacy.unit=record", "privacy.noise-multiplier=1.0")
    assert _quantizer(_config(*common), SIZE, 6).slots == SIZE + 5 + 5 + 6
    assert _quantizer(_config(*uniform), SIZE, 6).slots == SIZE + 5 + 6
    assert _quantizer(_config(*common, *record), SIZE, 6).slots == SIZE + 5
    assert _quantizer(_config(*uniform, *record), SIZE, 6).slots == SIZE
    assert _quantizer(_client(), SIZE, 6).slots == SIZE


# -------------------------------------------------------------------------------------- its cost
def _gaussian(noise: float, rounds: int, delta: float) -> float:
    """What the Gaussian mechanism costs, by dp-accounting alone."""
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(CLIENT_ORDERS)
    accountant.compose(dp_accounting.GaussianDpEvent(noise), rounds)
    return float(accountant.get_epsilon(delta))


@pytest.mark.parametrize("rounds", [1, 10, 100])
@pytest.mark.parametrize("noise", [0.7, 1.0, 4.0])
def test_with_many_bits_it_costs_what_gaussian_noise_costs(noise, rounds):
    config = _client(bits=24, noise=noise)
    ledger = Ledger(client_release(config, SIZE, number + 1) for number in range(rounds))
    found, expected = ledger.epsilon(1e-5), _gaussian(noise, rounds, 1e-5)
    assert expected <= found < expected + 1e-3


def test_with_few_bits_it_costs_more_and_never_less():
    costs = [
        Ledger([client_release(_client(bits=bits), SIZE, 1)]).epsilon(1e-5) for bits in (9, 12, 24)
    ]
    assert costs[0] > costs[1] > costs[2] >= _gaussian(1.0, 1, 1e-5)


@pytest.mark.parametrize("rounds", [1, 7])
def test_noise_that_is_calibrated_fits_all_rounds_and_not_one_more(rounds):
    config = _client(f"rounds.count={rounds}", "privacy.epsilon=2.0", noise=None)
    spent = [
        Ledger(client_release(config, SIZE, 1) for _ in range(count)).epsilon(1e-5)
        for count in (rounds, rounds + 1)
    ]
    assert 1.99 < spent[0] <= 2.0 < spent[1]


def test_a_multiplier_that_is_given_is_taken_whatever_the_budget():
    config = _client("privacy.epsilon=0.5", noise=2.0)
    assert client_release(config, SIZE, 1).variance == (2.0 * (2**11 - 1)) ** 2


@pytest.mark.parametrize(("examples", "rate"), [(3, 1.0), (8, 1.0), (16, 0.5), (1000, 0.008)])
def test_a_clients_own_release(examples, rate):
    record = ("privacy.unit=record", "train.batch-size=8", "train.steps=5", "rounds.count=4")
    config = _config(*record, "privacy.noise-multiplier=1.3")
    release = record_release(config, examples, 2)
    assert (release.round, release.steps, release.noise_multiplier) == (2, 5, 1.3)
    assert release.sampling_rate == pytest.approx(rate)
    calibrated = _config(*record, "privacy.epsilon=3.0")
    release = record_release(calibrated, examples, 1)
    assert 2.99 < Ledger([release] * 4).epsilon(1e-5) <= 3.0
    assert Ledger([release] * 5).epsilon(1e-5) > 3.0


# --------------------------------------------------------------------------------------- the ring
PLAIN = ("update.clip=0.5", "secagg.enabled=true")


def _largest_sum(ring: Ring, values: np.ndarray, clients: int) -> np.ndarray:
    """What comes out of the ring when so many clients send `values`."""
    element = ring.unpack(ring.pack(ring.lower(values)), len(values))
    total = np.zeros(len(values), ring.dtype)
    for _ in range(clients):
        total += element
    return ring.lift(ring.reduce(total))


@pytest.mark.parametrize("bits", [9, 10, 16, 24, 25, 30])
@pytest.mark.parametrize("sign", [1, -1])
def test_no_sum_of_clients_at_the_bound_wraps(bits, sign):
    config = _config(*PLAIN, f"update.bits={bits}")
    for clients in (*range(3, 19), 31, 32, 33, 127, 128, 129):
        quantizer = _quantizer(config, SIZE, clients)
        ring = make_ring(quantizer, clients)
        values = np.full(quantizer.slots, sign * quantizer.bound, np.int64)
        if sign > 0:
            values[SIZE:] = 255  # a counter's largest digit
        else:
            values[SIZE:] = 0
        total = _largest_sum(ring, values, clients)
        assert np.array_equal(total, clients * values)
        # One client more than agreed: the ring would have to be as wide as theirs.
        more = _largest_sum(make_ring(quantizer, clients + 1), values, clients + 1)
        assert np.array_equal(more, (clients + 1) * values)


@pytest.mark.parametrize("bits", [9, 16, 24])
def test_the_ring_is_no_wider_than_it_must_be(bits):
    config = _config(*PLAIN, f"update.bits={bits}")
    for clients in (3, 4, 5, 8, 9, 16, 17):
        quantizer = _quantizer(config, SIZE, clients)
        ring = make_ring(quantizer, clients)
        values = np.full(1, quantizer.bound, np.int64)
        narrow = Ring(max(8, ring.bits - 1))
        if ring.bits - 1 >= bits:
            assert _largest_sum(narrow, values, clients)[0] != clients * quantizer.bound


def test_the_ring_holds_the_noise_too():
    config = _client(noise=20.0)
    for clients in (4, 6, 12):
        quantizer = _quantizer(config, SIZE, clients)
        ring = make_ring(quantizer, clients)
        deviation = math.sqrt(quantizer.noise.variance * clients)
        # 9 standard deviations of a normal value have p = 2⁻⁶², and more is promised.
        assert ring.modulus // 2 > clients * quantizer.bound + 9 * deviation
        rng = np.random.default_rng(0)
        update = np.ones(SIZE, np.float32)
        vectors = [quantizer.encode(update, 1, 0.0, rng) for _ in range(clients)]
        total = np.zeros(SIZE, ring.dtype)
        for vector in vectors:
            total += ring.lower(vector)
        assert np.array_equal(ring.lift(ring.reduce(total)), np.sum(vectors, axis=0))


def test_without_clip_and_bits_there_is_no_quantizer():
    with pytest.raises(ValueError, match="unset"):
        _quantizer(_config(), SIZE, 6)


def test_bits_that_cannot_hold_an_adapter_are_refused():
    """Rounding may take half of the norm, 255 at 9 bits: size + 2 √size <= 1 + 4·255² - 256²."""
    config = _config(*PLAIN, "update.bits=9")
    most = math.floor((math.sqrt(1 + 1 + 4 * 255**2 - 256**2) - 1) ** 2)
    _quantizer(config, most, 6)
    for size in (most + 1, 10**6):
        with pytest.raises(ConfigError, match="9 bits cannot hold"):
            _quantizer(config, size, 6)


def test_both_sides_derive_the_same():
    config = _client(*("rounds.min-clients=4",))
    again = _client(*("rounds.min-clients=4",))
    assert make_terms(config, 7) == make_terms(again, 7)
    assert make_terms(config, 7).minimum == 4
    assert make_terms(_client(), 6).minimum == 3
    one, other = (_quantizer(c, SIZE, 7) for c in (config, again))
    assert (one.slots, one.bound, one.scale, one.noise) == (
        other.slots,
        other.bound,
        other.scale,
        other.noise,
    )
    assert make_ring(one, 7) == make_ring(other, 7)
