"""What comes out of a session is the plain sum of what arrived, or nothing."""

from collections import Counter
from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest
from adversary.federation import STEPS, Federation, aggregate
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.errors import TooFewClients, UnmaskingFailed, WireError
from fedtune.secagg.messages import SealedShares
from fedtune.secagg.ring import Ring
from fedtune.secagg.server import Aggregation
from fedtune.secagg.session import Terms


def ring_for(clients, bound):
    """The smallest ring in which `clients` values of at most `bound` do not wrap."""
    return Ring(max(8, (2 * clients * bound).bit_length()))


def plain_sum(federation, names):
    """In Python's integers."""
    columns = zip(*(federation.values[name].tolist() for name in names), strict=True)
    return [sum(column) for column in columns]


def arrived(federation, gone):
    return tuple(name for name in federation.names if gone.get(name, len(STEPS)) > 2)


def check(federation, ring, gone, slots):
    """The sum is right, or there is none and the masks of nobody can be opened."""
    _, names, total = aggregate(federation, ring, gone, slots)
    cohort = [name for name in federation.names if gone.get(name, 9) > 0]
    left = [sum(gone.get(name, 9) > step for name in cohort) for step in range(5)]
    needed = max(federation.terms.fewest_survivors(len(cohort)), 3)
    assert (total is not None) == (len(cohort) >= 3 and min(left) >= needed)
    if total is None:
        assert len(federation.revealed) < needed
        if min(left[:4]) < needed:
            assert federation.revealed == {}
        for name in federation.masked:
            assert federation.uncovered(name) != federation.values[name].tolist()
    else:
        assert names == arrived(federation, gone)
        assert total.dtype == np.int64
        assert total.tolist() == plain_sum(federation, names)


@settings(max_examples=25)
@given(
    clients=st.integers(3, 12),
    slots=st.integers(1, 40),
    magnitude=st.integers(1, 48),
    data=st.data(),
)
def test_the_sum_is_the_plain_sum(clients, slots, magnitude, data):
    bound = 2**magnitude - 1
    federation = Federation(clients)
    for name in federation.names:
        values = data.draw(st.lists(st.integers(-bound, bound), min_size=slots, max_size=slots))
        federation.values[name] = np.array(values, np.int64)
    gone = data.draw(
        st.dictionaries(st.sampled_from(federation.names), st.integers(0, 4), max_size=2)
    )
    check(federation, ring_for(clients, bound), gone, slots)


@pytest.mark.parametrize(
    ("clients", "terms"),
    [
        (40, Terms()),
        (60, Terms(neighbours=20, colluding=0.1)),
        (30, Terms(neighbours=6, colluding=0.1)),
        (12, Terms(neighbours=4, colluding=0.1)),
        (21, Terms(neighbours=20)),
        (20, Terms(neighbours=20)),
    ],
)
def test_large_and_sparse_cohorts(clients, terms):
    federation = Federation(clients, terms, 16)
    names = federation.names
    gone = {names[-1]: 0, names[1]: 2, names[clients // 2]: 3, names[clients // 3]: 4}
    _, summed, total = aggregate(federation, ring_for(clients, 999), gone, 16)
    assert summed == arrived(federation, gone)
    assert total.tolist() == plain_sum(federation, summed)


def test_a_hundred_in_the_complete_graph():
    federation = Federation(100, slots=4)
    gone = {"c17": 2, "c99": 2, "c40": 3, "c41": 4}
    check(federation, ring_for(100, 999), gone, 4)


@pytest.mark.parametrize("clients", [3, 4])
def test_every_way_of_dropping_out_in_a_small_cohort(clients):
    for moments in product(range(6), repeat=clients):
        if clients == 3 or sum(moment == 5 for moment in moments) >= 2:
            federation = Federation(clients, slots=2)
            gone = dict(zip(federation.names, moments, strict=True))
            check(federation, Ring(13), gone, 2)


@pytest.mark.parametrize("clients", [5, 6])
@pytest.mark.parametrize("moment", range(5))
def test_every_set_of_clients_dropping_out_at_one_moment(clients, moment):
    for size in range(clients + 1):
        for who in combinations(range(clients), size):
            federation = Federation(clients, slots=2)
            gone = {federation.names[place]: moment for place in who}
            check(federation, Ring(14), gone, 2)


@pytest.mark.parametrize("clients", [3, 7, 16])
@pytest.mark.parametrize("bits", [12, 32, 33, 56])
@pytest.mark.parametrize("sign", [-1, 1])
def test_values_at_the_edge_of_the_ring(clients, bits, sign):
    """With `clients` at the bound the sum just fits; with one more it wraps, as computed."""
    bound = (2 ** (bits - 1) - 1) // clients
    assert ring_for(clients, bound).bits == bits
    for count in (clients, clients + 1):
        federation = Federation(count, slots=3)
        for name in federation.names:
            federation.values[name] = np.full(3, sign * bound, np.int64)
        total = aggregate(federation, Ring(bits), {}, 3)[2].tolist()
        exact = sign * bound * count
        wrapped = (exact + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)
        assert total == [wrapped] * 3
        assert (wrapped == exact) == (abs(exact) < 2 ** (bits - 1))


def test_the_most_negative_sum_fits():
    federation = Federation(4, slots=1)
    for name in federation.names:
        federation.values[name] = np.array([-(2**9)], np.int64)
    assert aggregate(federation, Ring(12), {}, 1)[2].tolist() == [-(2**11)]


FAULTS = ("silent", "silent", "liar", "damaged advert", "damaged share", "cut values", "repeats")


def taken(send, *message):
    """Whether the other side took it."""
    try:
        send(*message)
    except WireError:
        return False
    return True


def flipped(data):
    return bytes([data[0] ^ 1]) + data[1:]


class FaultyFederation(Federation):
    """Clients with a 1 in the coordinate of their own place; some fail, each in one way."""

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        clients = int(rng.integers(3, 10))
        sparse = clients >= 8 and rng.random() < 0.5
        terms = Terms(neighbours=6, colluding=0.2) if sparse else Terms()
        super().__init__(clients, terms, clients)
        self.ring = Ring(int(rng.integers(8, 57)))
        self.values = dict(zip(self.names, np.eye(clients, dtype=np.int64), strict=True))
        faulty = rng.choice(self.names, int(rng.integers(0, clients // 3 + 2)), replace=False)
        self.fault = {str(name): str(rng.choice(FAULTS)) for name in faulty}
        silent = [name for name, fault in self.fault.items() if fault == "silent"]
        self.gone = {name: int(rng.integers(5)) for name in silent}
        self.added = []

    def here(self, step, names):
        return [name for name in names if self.gone.get(name, 9) > step]

    def has(self, name, fault):
        return self.fault.get(name) == fault

    def collect(self):
        """An honest server's whole session; the sum."""
        server = self.with_values()
        sealed = server.close_values()
        for name in self.here(3, sealed.names):
            if taken(self.sign, name, sealed.survivors):
                server.receive_signature(name, self.signature[name])
        unmasking = server.close_signatures()
        for name in self.here(4, list(self.signature)):
            reveal = self.reveal(name, unmasking)
            if self.has(name, "liar"):
                reveal = replace(reveal, self_masks=reveal.self_masks[::-1])
            server.receive_reveal(name, reveal)
        return server.close_reveals().tolist()

    def with_values(self):
        """A server to which all have sent their values."""
        server = Aggregation(self.session.digest, self.roster, self.terms, len(self.names))
        for name in self.here(0, self.names):
            advert = self.begin(name)
            if self.has(name, "damaged advert"):
                damaged = replace(advert, masking_key=flipped(advert.masking_key))
                assert not taken(server.receive_advert, name, damaged)
            else:
                server.receive_advert(name, advert)
        cohort = server.close_adverts()
        for name in self.here(1, [advert.client for advert in cohort]):
            shares = self.share(name, cohort)
            if self.has(name, "damaged share"):
                shares = SealedShares((flipped(shares.sealed[0]), *shares.sealed[1:]))
            server.receive_shares(name, shares)
        deliveries = server.close_shares()
        server.expect(self.ring)
        for name in self.here(2, deliveries):
            if taken(self.accept, name, deliveries[name]):
                masked = self.mask(name)
                cut = replace(masked, packed=masked.packed[1:])
                if self.has(name, "cut values"):
                    assert not taken(server.receive_values, name, cut)
                else:
                    server.receive_values(name, masked)
                    self.added.append(name)
                if self.has(name, "repeats"):
                    assert not taken(server.receive_values, name, masked)
        return server


def test_two_hundred_faulty_federations_add_up_every_survivor_once():
    outcomes = Counter()
    for seed in range(200):
        federation = FaultyFederation(seed)
        try:
            total = federation.collect()
        except (TooFewClients, UnmaskingFailed) as error:
            outcomes[type(error)] += 1
            assert federation.fault
            if type(error) is UnmaskingFailed:
                assert "liar" in federation.fault.values()
        else:
            outcomes["sum"] += 1
            assert total == [int(name in federation.added) for name in federation.names]
    assert outcomes["sum"] > 100
    assert outcomes[TooFewClients] > 10
    assert outcomes[UnmaskingFailed] > 2
