"""Ring, shares, masks, mask graph and vectors against simple code and closed forms."""

import math
import secrets
from fractions import Fraction
from functools import cache
from itertools import combinations, product

import numpy as np
import pytest
from adversary.federation import SPARSE, Federation
from hypothesis import given, settings
from hypothesis import strategies as st
from vectors import simple_secagg as simple

from fedtune.errors import ConfigError, MalformedMessage
from fedtune.secagg import shamir
from fedtune.secagg.graph import MaskGraph
from fedtune.secagg.keys import RoundKey
from fedtune.secagg.masks import add_mask, subtract_mask
from fedtune.secagg.ring import Ring
from fedtune.secagg.session import Terms

BITS = st.integers(8, 56)
SEEDS = st.binary(min_size=32, max_size=32)


def elements(bits, **sizes):
    return st.lists(st.integers(0, 2**bits - 1), **sizes)


# --- Ring


@given(BITS, st.data())
def test_packing_is_one_large_number(bits, data):
    words = data.draw(elements(bits, max_size=40))
    ring = Ring(bits)
    packed = ring.pack(np.array(words, ring.dtype))
    assert packed == simple.pack(words, bits)
    assert len(packed) == ring.packed_bytes(len(words)) == math.ceil(len(words) * bits / 8)
    unpacked = ring.unpack(packed, len(words))
    assert unpacked.dtype == ring.dtype
    assert unpacked.tolist() == words


@pytest.mark.parametrize("bits", [8, 17, 25, 26, 32, 33, 56])
def test_packing_of_more_values_than_one_piece(bits):
    """A piece is 65536 values; the last one here ends in the middle of a group."""
    size = 65536 + 8192 + 5
    words = np.random.default_rng(bits).integers(0, 2**bits, size, np.uint64)
    ring = Ring(bits)
    packed = ring.pack(words.astype(ring.dtype))
    for start in (0, 8 * 1000, 65536 - 8, 65536, size - 5 - 8):
        piece = words[start : start + 13].tolist()
        span = packed[start * bits // 8 :][: ring.packed_bytes(len(piece))]
        # Eight whole values are `bits` bytes.
        assert span[:bits] == simple.pack(piece, bits)[:bits]
    assert (ring.unpack(packed, size) == words.astype(ring.dtype)).all()


@given(BITS, st.integers(1, 40), st.data())
def test_another_length_or_padding_is_refused(bits, size, data):
    ring = Ring(bits)
    packed = ring.pack(np.zeros(size, ring.dtype))
    for wrong in (packed[:-1], packed + b"\0", b""):
        with pytest.raises(MalformedMessage, match="bytes are not"):
            ring.unpack(wrong, size)
    padding = len(packed) * 8 - size * bits
    if padding:
        bit = data.draw(st.integers(8 - padding, 7))
        with pytest.raises(MalformedMessage, match="padding"):
            ring.unpack(packed[:-1] + bytes([1 << bit]), size)


@given(BITS, st.data())
def test_lowering_and_lifting_are_inverse(bits, data):
    half = 2 ** (bits - 1)
    values = data.draw(st.lists(st.integers(-half, half - 1), max_size=20))
    values += [-half, -1, 0, 1, half - 1]
    ring = Ring(bits)
    words = ring.lower(np.array(values, np.int64))
    assert words.dtype == ring.dtype
    assert words.tolist() == [value % 2**bits for value in values]
    assert ring.lift(words).tolist() == values == simple.signed(words.tolist(), bits)


@given(BITS, st.sampled_from([-1, 1]), st.integers(0, 2**60))
def test_values_outside_the_ring_are_refused(bits, sign, beyond):
    half = 2 ** (bits - 1)
    value = half + beyond if sign > 0 else -half - 1 - beyond
    with pytest.raises(ValueError, match=f"ring of {bits} bits"):
        Ring(bits).lower(np.array([0, value], np.int64))


def test_reducing_is_in_place():
    words = np.array([2**20 + 5, 2**32 - 1], "<u4")
    assert Ring(20).reduce(words) is words
    assert words.tolist() == [5, 2**20 - 1]


# --- Shares


@given(SEEDS, st.integers(1, 12), st.data())
def test_any_threshold_of_the_shares_give_the_secret(secret, threshold, data):
    count = data.draw(st.integers(threshold, 15))
    shares = shamir.split(secret, threshold, count)
    points = data.draw(st.permutations(range(1, count + 1)))[:threshold]
    chosen = {point: shares[point - 1] for point in points}
    assert all(shamir.is_share(share) for share in shares)
    assert shamir.combine(chosen, shamir.weights(points)) == secret
    assert simple.combine(chosen) == int.from_bytes(secret, "little")


@pytest.mark.parametrize(("threshold", "count"), [(1, 3), (2, 5), (3, 5), (5, 6)])
def test_every_choice_of_shares_of_the_extreme_secrets(threshold, count):
    for secret in (bytes(32), b"\xff" * 32, bytes(31) + b"\x80"):
        shares = shamir.split(secret, threshold, count)
        for size in range(threshold, count + 1):
            for points in combinations(range(1, count + 1), size):
                chosen = {point: shares[point - 1] for point in points}
                assert shamir.combine(chosen, shamir.weights(points)) == secret


@given(SEEDS, SEEDS, st.integers(2, 8))
def test_fewer_shares_fit_every_other_secret_as_well(secret, other, threshold):
    """One polynomial of degree t - 1 goes through t - 1 shares and any value at zero."""
    shares = shamir.split(secret, threshold, threshold)
    known = {point: shares[point - 1] for point in range(1, threshold)}
    # The point t + 1 of the polynomial through (0, other) and the known shares, by Lagrange.
    through = {0: other + b"\0", **known}
    target = threshold + 1
    shifted = {point - target: share for point, share in through.items()}
    share = simple.combine(shifted).to_bytes(33, "little")
    forged = {**known, target: share}
    assert shamir.combine(forged, shamir.weights(list(forged))) == other


def test_shares_are_spread_over_the_whole_field():
    """The top bits of single shares of one secret, 16 cells; a false alarm has odds of 1e-6."""
    shares = [s for _ in range(800) for s in shamir.split(bytes(32), 3, 2 + 3)]
    for place in range(5):
        tops = [int.from_bytes(share, "little") >> 252 for share in shares[place::5]]
        counts = [tops.count(cell) for cell in range(16)]
        assert chi_square(counts) < critical(15)


def test_two_splittings_of_a_secret_have_nothing_in_common():
    first, second = (shamir.split(b"\x07" * 32, 3, 5) for _ in range(2))
    assert not set(first) & set(second)


@pytest.mark.parametrize("points", [[1, 1], [0, 1], [-1, 2], [shamir.PRIME, 1]])
def test_points_that_are_none_have_no_weights(points):
    with pytest.raises(ValueError, match="points must be different"):
        shamir.weights(points)


@pytest.mark.parametrize(("threshold", "count"), [(0, 3), (4, 3), (-1, 3)])
def test_a_threshold_that_is_none_is_refused(threshold, count):
    with pytest.raises(ValueError, match="threshold"):
        shamir.split(bytes(32), threshold, count)


def test_the_prime_is_the_smallest_above_the_secrets():
    """Fermat's test with many bases for the prime, and a witness against all before it."""
    prime = simple.PRIME
    assert prime == shamir.PRIME
    assert all(pow(base, prime - 1, prime) == 1 for base in range(2, 40))
    for number in range(2**256 + 1, prime, 2):
        assert pow(3, number - 1, number) != 1


# --- Masks


def chi_square(counts):
    expected = sum(counts) / len(counts)
    return sum((count - expected) ** 2 for count in counts) / expected


def critical(freedom):
    """Upper 1e-7 quantile of the chi-square distribution (Wilson and Hilferty 1931)."""
    z = 5.2
    return freedom * (1 - 2 / (9 * freedom) + z * math.sqrt(2 / (9 * freedom))) ** 3


@given(SEEDS, BITS, st.integers(0, 70))
def test_a_mask_is_the_key_stream_word_by_word(seed, bits, size):
    ring = Ring(bits)
    vector = np.zeros(size, ring.dtype)
    add_mask(vector, seed)
    assert ring.reduce(vector.copy()).tolist() == simple.expand(seed, size, bits)
    subtract_mask(vector, seed)
    assert not vector.any()


@pytest.mark.parametrize("bits", [32, 33])
def test_a_long_mask_goes_on_where_its_pieces_meet(bits):
    size = 3 * 32768 + 7  # pieces are 32768 or 16384 words
    seed = b"\x5a" * 32
    vector = np.zeros(size, Ring(bits).dtype)
    add_mask(vector, seed)
    words = Ring(bits).reduce(vector).tolist()
    expected = simple.expand(seed, size, bits)
    assert words == expected


@pytest.mark.parametrize("bits", [8, 20, 31, 32, 33, 48, 56])
@pytest.mark.parametrize("seed", range(3))
def test_masked_values_are_uniform_at_both_ends_of_the_word(bits, seed):
    ring = Ring(bits)
    vector = ring.lower(np.full(1 << 15, 1, np.int64))
    add_mask(vector, simple.digest("seed", [bytes([seed, bits])]))
    words = ring.reduce(vector)
    for cells in (words >> words.dtype.type(bits - 8), words & words.dtype.type(255)):
        assert chi_square(np.bincount(cells.astype(int), minlength=256)) < critical(255)


@pytest.mark.parametrize("length", [0, 16, 31, 33])
def test_a_seed_of_another_length_is_refused(length):
    with pytest.raises(ValueError, match="a seed of"):
        add_mask(np.zeros(4, np.uint32), bytes(length))


# --- Mask graph


def pieces(graph, alive):
    """Number of groups into which the `alive` fall."""
    left, groups = set(alive), 0
    while left:
        groups += 1
        reached = [left.pop()]
        while reached:
            near = left & set(graph.neighbours(reached.pop()))
            left -= near
            reached += near
    return groups


@pytest.mark.parametrize("clients", range(2, 11))
def test_colluders_withstood_is_the_brute_force_vertex_connectivity(clients):
    """For every survivor set: take away one client after the other until it splits."""
    for half in range(1, clients // 2 + 1):
        graph = MaskGraph(clients, half)

        @cache
        def cheapest(alive, graph=graph):
            if len(alive) < 2:
                return math.inf
            if pieces(graph, alive) > 1:
                return 0
            return 1 + min(cheapest(alive - {one}) for one in alive)

        for size in range(2, clients + 1):
            for survivors in combinations(range(clients), size):
                expected = min(cheapest(frozenset(survivors)), size - 1) - 1
                assert graph.colluders_withstood(survivors) == expected, (half, survivors)


@given(st.integers(2, 60), st.integers(0, 40))
def test_masking_is_mutual(clients, half):
    graph = MaskGraph(clients, half)
    for place in range(clients):
        near = list(graph.neighbours(place))
        assert near == sorted(set(near))
        assert place not in near
        assert len(near) == min(2 * half, clients - 1)
        assert all(place in graph.neighbours(other) for other in near)


# --- Terms


def protects(terms, clients):
    try:
        terms.check(clients)
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize("clients", [3, 4, 7, 8, 15])
def test_terms_hold_just_when_two_survivor_sets_cannot_both_be_opened(clients):
    """Each of n - c honest clients answers to one of two sets, c colluders to both."""
    for threshold, colluders in product(range(1, clients + 1), range(clients + 1)):
        share = (threshold - 0.5) / clients
        terms = Terms(share, max(colluders - 0.5, 0) / clients)
        assert terms.threshold_of(clients) == threshold
        assert terms.colluders_of(clients) == colluders
        honest = clients - colluders
        both = any(
            min(first, honest - first) + colluders >= threshold for first in range(honest + 1)
        )
        # And one honest client's masks need another honest one to cover it.
        assert protects(terms, clients) == (not both and colluders <= clients - 2)


@given(st.integers(1, 500), st.integers(1, 12), st.data())
def test_threshold_and_colluders_are_exact_fractions_of_the_cohort(clients, below, data):
    fraction = Fraction(data.draw(st.integers(0, below - 1)), below)
    terms = Terms(float(fraction), float(fraction), minimum=5)
    more_than = min(clients, math.floor(clients * fraction) + 1)
    assert terms.threshold_of(clients) == more_than
    colluders = math.ceil(clients * fraction)
    assert terms.colluders_of(clients) == colluders
    assert terms.fewest_survivors(clients) == max(more_than, 5, colluders + 2)


def test_the_default_terms_protect_every_cohort():
    for clients in range(3, 300):
        Terms().check(clients)


# --- Vectors of a whole session


@settings(max_examples=12)
@given(st.sampled_from([(3, None), (6, None), (12, SPARSE)]), st.integers(8, 56), st.data())
def test_a_masked_vector_is_that_of_the_simple_implementation(size, bits, data):
    clients, terms = size
    federation = Federation(clients, terms, slots=5)
    half = 2 ** (bits - 1)
    federation.ring = Ring(bits)
    for name in federation.names:
        values = data.draw(st.lists(st.integers(-half, half - 1), min_size=5, max_size=5))
        federation.values[name] = np.array(values, np.int64)
    federation.until("begin", "share", "accept", "mask")
    place = data.draw(st.integers(0, clients - 1))
    name = federation.names[place]
    state = federation.secretive(name)
    fields = [
        {"client": a.client.encode(), **{key: getattr(a, key) for key in ADVERT}}
        for a in federation.cohort
    ]
    binding = simple.cohort_digest(federation.session.digest, fields)
    pairwise = {}
    steps = range(1, 4) if terms else range(1, clients)
    for other in {(place + sign * step) % clients for step in steps for sign in (-1, 1)} - {place}:
        names = [federation.names[p] for p in sorted((place, other))]
        pairwise[other] = simple.derived_secret(
            state.masking.private_key,
            federation.cohort[other].masking_key,
            "pairwise mask",
            binding,
            names,
        )
    values = federation.values[name].tolist()
    vector = simple.masked(values, bits, place, state.self_mask, pairwise)
    assert federation.masked[name].packed == simple.pack(vector, bits)


ADVERT = ("sealing_key", "masking_key", "commitment", "signature")


@given(st.data())
@settings(max_examples=8)
def test_a_sealed_pair_is_that_of_the_simple_implementation(data):
    federation = Federation(4).until("begin", "share")
    sender, receiver = data.draw(st.permutations(range(4)))[:2]
    state = federation.state[federation.names[sender]]
    # The pairs are random: the receiver opens its own and the simple code seals it again.
    name = federation.names[receiver]
    federation.accept(name)
    pair = federation.state[name].shares[sender]
    sealed = simple.sealed_share(
        state.sealing.private_key,
        federation.cohort[receiver].sealing_key,
        state.binding,
        federation.names[sender],
        name,
        pair,
    )
    assert federation.sealed_for(name, federation.names[sender]) == sealed


def test_shares_of_all_clients_give_their_secrets():
    """The simple code opens both secrets of each client from what the others hold."""
    federation = Federation(6).until("begin", "share", "accept")
    for owner, owner_name in enumerate(federation.names):
        state = federation.state[owner_name]
        for half, secret in (
            (slice(33), state.masking.private_key),
            (slice(33, 66), state.self_mask),
        ):
            for holders in combinations(range(6), 5):
                shares = {
                    h + 1: federation.state[federation.names[h]].shares[owner][half]
                    for h in holders
                }
                assert simple.combine(shares) == int.from_bytes(secret, "little")


@given(SEEDS, SEEDS)
@settings(max_examples=10)
def test_key_agreement_is_that_of_the_ladder(first, second):
    keys = RoundKey(first), RoundKey(second)
    assert keys[0].public_key == simple.x25519_public(first)
    binding = secrets.token_bytes(32)
    expected = simple.derived_secret(first, keys[1].public_key, "purpose", binding, ["a", "b"])
    assert keys[0].secret_with(keys[1].public_key, "purpose", binding, "a", "b") == expected
    assert keys[1].secret_with(keys[0].public_key, "purpose", binding, "a", "b") == expected
    assert keys[1].secret_with(keys[0].public_key, "purpose", binding, "b", "a") != expected
