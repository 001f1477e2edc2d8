"""The privacy account against dp-accounting, brute force and closed forms."""

from __future__ import annotations

import json
import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from scipy import special

from fedtune.errors import BudgetExceeded, ConfigError, RunFolderError
from fedtune.privacy.accountant import (
    CLIENT_ORDERS,
    ClientRelease,
    Ledger,
    RecordRelease,
    calibrate_client_noise,
    calibrate_record_noise,
    integer_l1,
    skellam_rdp,
)

CLIENT = ClientRelease(round=1, l2=100.0, l1=1000.0, variance=4e4)
RECORD = RecordRelease(round=1, sampling_rate=0.02, noise_multiplier=1.1, steps=50)


def _divergence(order, shift, variance):
    """Rényi divergence between Skellam noise and itself shifted, summed up value by value."""
    reach = int(60 + 40 * math.sqrt(variance) + 2 * order * shift)
    values = np.arange(-reach, reach + 1)

    def log_pmf(k):
        with np.errstate(divide="ignore"):
            return np.log(special.ive(np.abs(k), variance))

    p, q = log_pmf(values - shift), log_pmf(values)
    there = np.isfinite(p) & np.isfinite(q)
    return special.logsumexp(order * p[there] - (order - 1) * q[there]) / (order - 1)


# ------------------------------------------------------------------------------ Skellam noise
@pytest.mark.parametrize("variance", [4.0, 30.0, 1000.0])
@pytest.mark.parametrize("order", [2, 3, 8])
@pytest.mark.parametrize("shift", [1, 2, 5])
def test_bound_is_above_the_divergence_in_one_dimension(order, shift, variance):
    exact = _divergence(order, shift, variance)
    assert exact <= skellam_rdp(order, shift, shift, variance)
    if variance >= 30:
        # Not far above, as long as order times shift is small next to the variance.
        room = 3 / variance + (order * shift / variance) ** 2 / 4
        assert skellam_rdp(order, shift, shift, variance) <= exact * (1 + room)


@pytest.mark.parametrize("vector", [[1] * 30, [7, -2, 1, 1, 0, 0], [12]])
@pytest.mark.parametrize("order", [2, 4, 16])
def test_bound_is_above_the_divergence_of_a_vector(vector, order):
    # Coordinates are independent, so their divergences add up.
    variance = 900.0
    exact = sum(_divergence(order, abs(shift), variance) for shift in vector if shift)
    l2, l1 = math.hypot(*vector), float(sum(map(abs, vector)))
    bound = skellam_rdp(order, l2, l1, variance)
    assert exact <= bound <= exact * (1 + 3 / variance + (order * l2 / variance) ** 2 / 4)


def test_both_bounds_of_the_theorem_are_used():
    # By hand: α l2²/2μ, and ((2α-1) l2² + 6 l1)/4μ² or 3 l1/2μ.
    assert skellam_rdp(2, 3.0, 5.0, 10.0) == pytest.approx(18 / 20 + (27 + 30) / 400)
    assert skellam_rdp(4, 3.0, 5.0, 0.5) == pytest.approx(36.0 + 15.0)


@pytest.mark.parametrize("order", [1, 2.5, 0, -3])
def test_bound_only_at_the_orders_where_it_is_proven(order):
    with pytest.raises(ValueError, match="orders"):
        skellam_rdp(order, 1.0, 1.0, 1.0)


def test_orders_are_distinct_integers_from_2_on():
    assert CLIENT_ORDERS[0] == 2
    assert CLIENT_ORDERS[-1] == 2**14
    assert list(CLIENT_ORDERS) == sorted(set(CLIENT_ORDERS))


@pytest.mark.parametrize("rounds", [1, 40])
@pytest.mark.parametrize("multiplier", [0.7, 3.0, 40.0])
@pytest.mark.parametrize("delta", [1e-5, 1e-8])
def test_epsilon_tends_to_that_of_gaussian_noise(rounds, multiplier, delta):
    l2 = 32767.0
    releases = [
        ClientRelease(i + 1, l2, integer_l1(10**6, l2), (multiplier * l2) ** 2)
        for i in range(rounds)
    ]
    gaussian = RdpAccountant(CLIENT_ORDERS)
    gaussian.compose(dp_accounting.GaussianDpEvent(multiplier), rounds)
    ours = Ledger(releases).epsilon(delta)
    assert ours == pytest.approx(gaussian.get_epsilon(delta), rel=1e-6)
    # And that is an upper bound on what is tight for Gaussian noise.
    tight = dp_accounting.get_epsilon_gaussian(multiplier / math.sqrt(rounds), delta)
    assert tight < ours < 1.3 * tight


def test_little_noise_costs_more_than_gaussian_noise():
    gaussian = RdpAccountant(CLIENT_ORDERS)
    gaussian.compose(dp_accounting.GaussianDpEvent(1.0))
    ours = Ledger([ClientRelease(1, 3.0, 9.0, 9.0)]).epsilon(1e-5)
    assert ours > 1.05 * gaussian.get_epsilon(1e-5)


def test_l1_of_integers():
    assert integer_l1(100, 3.0) == 9.0  # nine ones
    assert integer_l1(4, 10.0) == 20.0  # four times five


# ------------------------------------------------------------------------------ DP-SGD
def _theirs(accountant, releases):
    for release in releases:
        gaussian = dp_accounting.GaussianDpEvent(release.noise_multiplier)
        sampled = dp_accounting.PoissonSampledDpEvent(release.sampling_rate, gaussian)
        accountant.compose(sampled, release.steps)
    return accountant


@pytest.mark.parametrize("delta", [1e-5, 1e-9])
def test_record_level_epsilon_is_that_of_dp_accounting(delta):
    releases = [RecordRelease(i, 0.02, 1.1, 50) for i in range(1, 9)]
    releases += [RecordRelease(9, 0.5, 4.0, 3), RecordRelease(10, 1.0, 30.0, 2)]
    theirs = _theirs(RdpAccountant(), releases).get_epsilon(delta)
    assert Ledger(releases).epsilon(delta) == pytest.approx(theirs, abs=1e-3)


def test_record_level_epsilon_is_above_the_tight_one_and_not_by_much():
    releases = [RecordRelease(i, 0.02, 1.1, 50) for i in range(1, 9)]
    tight = _theirs(PLDAccountant(), releases).get_epsilon(1e-5)
    assert tight < Ledger(releases).epsilon(1e-5) < 1.15 * tight


def test_record_level_epsilon_at_orders_that_do_not_converge(caplog):
    release = RecordRelease(1, 0.05, 0.415388, 500)
    theirs = _theirs(RdpAccountant(), [release]).get_epsilon(1e-5)
    caplog.clear()
    assert Ledger([release]).epsilon(1e-5) == pytest.approx(theirs, abs=1e-3)
    assert caplog.messages == []


# ------------------------------------------------------------------------------ the ledger
def test_an_empty_ledger_has_spent_nothing():
    assert Ledger().epsilon(1e-5) == 0


@pytest.mark.parametrize("release", [CLIENT, RECORD])
def test_epsilon_grows_with_releases_and_falls_with_delta(release):
    once, twice = Ledger([release]), Ledger([release, release])
    assert 0 < once.epsilon(1e-5) < twice.epsilon(1e-5) < 2.01 * once.epsilon(1e-5)
    assert once.epsilon_with(release, 1e-5) == twice.epsilon(1e-5)
    assert once.epsilon(1e-4) < once.epsilon(1e-5) < once.epsilon(1e-6)


def test_order_does_not_matter():
    other = ClientRelease(2, 100.0, 1000.0, 1e5)
    one, two = Ledger([CLIENT, other, CLIENT]), Ledger([CLIENT, CLIENT, other])
    assert one.epsilon(1e-5) == pytest.approx(two.epsilon(1e-5), rel=1e-12)


@pytest.mark.parametrize("release", [CLIENT, RECORD])
def test_a_budget_holds_to_the_last_release(release):
    delta = 1e-6
    budget = Ledger([release] * 3).epsilon(delta)
    ledger = Ledger()
    for _ in range(3):
        ledger.charge(release, budget, delta)
    with pytest.raises(BudgetExceeded, match=f"above the budget of {budget:g}"):
        ledger.charge(release, budget, delta)
    assert ledger.releases == (release,) * 3
    assert ledger.epsilon(delta) == budget


def test_delta_is_the_budgets():
    budget = Ledger([CLIENT]).epsilon(1e-3)
    Ledger().charge(CLIENT, budget, 1e-3)
    with pytest.raises(BudgetExceeded):
        Ledger().charge(CLIENT, budget, 1e-4)


def test_no_release_fits_a_budget_that_is_not_a_number():
    with pytest.raises(BudgetExceeded):
        Ledger().charge(CLIENT, math.nan, 1e-5)


def test_kinds_do_not_mix():
    ledger = Ledger([CLIENT])
    for enter in (
        lambda: ledger.append(RECORD),
        lambda: ledger.charge(RECORD, 1e9, 1e-5),
        lambda: ledger.epsilon_with(RECORD, 1e-5),
    ):
        with pytest.raises(ValueError, match="record release in a ledger of clients"):
            enter()
    assert ledger.releases == (CLIENT,)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_delta_is_between_0_and_1(delta):
    for ledger in (Ledger(), Ledger([CLIENT])):
        with pytest.raises(ConfigError, match="delta"):
            ledger.epsilon(delta)


# ------------------------------------------------------------------------------ JSON
@pytest.mark.parametrize("release", [CLIENT, RECORD])
def test_json_and_back(release):
    ledger = Ledger([release, release])
    text = json.dumps(ledger.to_json(), allow_nan=False)
    back = Ledger.from_json(json.loads(text))
    assert back.releases == ledger.releases
    assert back.epsilon(1e-5) == ledger.epsilon(1e-5)


def test_json_keys_are_what_a_reader_of_the_file_sees():
    assert Ledger([CLIENT]).to_json() == {
        "releases": [{"kind": "client", "round": 1, "l2": 100.0, "l1": 1000.0, "variance": 40000.0}]
    }
    assert Ledger([RECORD]).to_json()["releases"] == [
        {
            "kind": "record",
            "round": 1,
            "sampling_rate": 0.02,
            "noise_multiplier": 1.1,
            "steps": 50,
        }
    ]


def _changed(release, **changes):
    entry = Ledger([release]).to_json()["releases"][0]
    return {key: value for key, value in {**entry, **changes}.items() if value != "absent"}


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        {},
        {"releases": None},
        {"releases": {}},
        {"releases": [], "more": 1},
        {"releases": [None]},
        {"releases": [[]]},
        {"releases": [_changed(CLIENT, kind="server")]},
        {"releases": [_changed(CLIENT, kind=["client"])]},
        {"releases": [_changed(CLIENT, kind="record")]},
        {"releases": [_changed(CLIENT, kind="absent")]},
        {"releases": [_changed(CLIENT, l1="absent")]},
        {"releases": [_changed(CLIENT, more=1)]},
        {"releases": [_changed(CLIENT, variance="4")]},
        {"releases": [_changed(CLIENT, variance=None)]},
        {"releases": [_changed(CLIENT, variance=True)]},
        {"releases": [_changed(CLIENT, variance=0.0)]},
        {"releases": [_changed(CLIENT, variance=-1.0)]},
        {"releases": [_changed(CLIENT, variance=math.inf)]},
        {"releases": [_changed(CLIENT, l2=math.nan)]},
        {"releases": [_changed(CLIENT, l2=10**400)]},
        {"releases": [_changed(CLIENT, round=1.0)]},
        {"releases": [_changed(CLIENT, round=0)]},
        {"releases": [_changed(RECORD, sampling_rate=1.01)]},
        {"releases": [_changed(RECORD, steps=2.5)]},
        {"releases": [_changed(RECORD), _changed(CLIENT)]},
    ],
)
def test_json_that_is_no_ledger_is_refused(data):
    with pytest.raises(RunFolderError, match="not a privacy ledger"):
        Ledger.from_json(data)


def test_integers_are_numbers():
    back = Ledger.from_json({"releases": [_changed(CLIENT, variance=40000)]})
    assert back.releases == (CLIENT,)


# ------------------------------------------------------------------------------ calibration
@pytest.mark.parametrize("epsilon", [0.05, 1.0, 8.0, 60.0])
@pytest.mark.parametrize("l2", [200.0, 32767.0])
def test_client_noise_is_the_least_that_does(epsilon, l2):
    delta, rounds, l1 = 1e-6, 30, integer_l1(5000, l2)
    variance = calibrate_client_noise(epsilon, delta, rounds, l2, l1)
    ledger = Ledger()
    for number in range(1, rounds + 1):
        ledger.charge(ClientRelease(number, l2, l1, variance), epsilon, delta)
    assert epsilon - 1e-3 < ledger.epsilon(delta) <= epsilon
    with pytest.raises(BudgetExceeded):
        ledger.charge(ClientRelease(rounds + 1, l2, l1, variance), epsilon, delta)


@pytest.mark.parametrize(("epsilon", "sampling_rate"), [(0.3, 0.01), (3.0, 0.2), (8.0, 1.0)])
def test_record_noise_is_the_least_that_does(epsilon, sampling_rate):
    multiplier = calibrate_record_noise(epsilon, 1e-5, sampling_rate, 300)
    release = RecordRelease(1, sampling_rate, multiplier, 100)
    ledger = Ledger()
    for _ in range(3):
        ledger.charge(release, epsilon, 1e-5)
    theirs = _theirs(RdpAccountant(), [release] * 3).get_epsilon(1e-5)
    assert epsilon - 1e-3 < theirs < epsilon + 1e-3
    assert epsilon - 1e-3 < ledger.epsilon(1e-5) <= epsilon


def test_noise_is_monotone():
    by_epsilon = [calibrate_client_noise(e, 1e-5, 10, 50.0, 500.0) for e in (0.5, 1, 2, 4, 50)]
    assert by_epsilon == sorted(by_epsilon, reverse=True)
    by_delta = [calibrate_client_noise(1, d, 10, 50.0, 500.0) for d in (1e-3, 1e-5, 1e-9)]
    assert by_delta == sorted(by_delta)
    by_rounds = [calibrate_client_noise(1, 1e-5, r, 50.0, 500.0) for r in (1, 10, 300)]
    assert by_rounds == sorted(by_rounds)
    by_rate = [calibrate_record_noise(1, 1e-5, q, 100) for q in (0.01, 0.1, 1.0)]
    assert by_rate == sorted(by_rate)
    assert len({*by_epsilon, *by_delta, *by_rounds}) == 9  # (1, 1e-5, 10) is in all three


def test_calibration_agrees_with_the_analytic_gaussian_mechanism():
    # Balle and Wang 2018, by dp-accounting: tight, so somewhat less noise.
    ours = math.sqrt(calibrate_client_noise(1.0, 1e-5, 1, 32767.0, 1e6)) / 32767
    tight = dp_accounting.get_sigma_gaussian(1.0, 1e-5)
    assert tight < ours < 1.2 * tight


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.nan, math.inf, 1e-9])
def test_an_epsilon_out_of_reach_is_refused(epsilon):
    with pytest.raises(ConfigError, match="epsilon"):
        calibrate_client_noise(epsilon, 1e-7, 10, 100.0, 1000.0)
    with pytest.raises(ConfigError, match="epsilon"):
        calibrate_record_noise(epsilon, 1e-7, 1.0, 10)


def test_nothing_to_calibrate_for_is_refused():
    with pytest.raises(ConfigError, match="rounds"):
        calibrate_client_noise(1.0, 1e-5, 0, 100.0, 1000.0)
    with pytest.raises(ConfigError, match="steps"):
        calibrate_record_noise(1.0, 1e-5, 0.1, 0)
    with pytest.raises(ConfigError, match="delta"):
        calibrate_client_noise(1.0, 0.0, 10, 100.0, 1000.0)
