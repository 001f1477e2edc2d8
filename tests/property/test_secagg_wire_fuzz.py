"""Any bytes at every decoder: a message with just these bytes, or a typed refusal."""

from __future__ import annotations

from adversary.hostile_bytes import other_spellings, spoiled, varint
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.wire.secagg_kinds import ALL, SECAGG, Codec

from fedtune.errors import WireError
from fedtune.secagg.keys import SERVER, Identity, Roster
from fedtune.secagg.messages import Advert, Delivery, Reveal, SealedShares, Survivors, Unmasking
from fedtune.wire.envelope import Kind, read_envelope

# The same examples on every machine and every day.
FIXED = settings(derandomize=True, max_examples=150)
KIND = st.sampled_from(sorted(ALL))
EXAMPLES = [of.encode(of.example) for of in ALL.values()]


def _read(of: Codec, payload: bytes) -> bool:
    """Whether it was a message; then nothing else has its bytes."""
    try:
        found = of.decode(payload)
    except WireError:
        return False
    assert of.encode(found) == payload
    assert of.decode(of.encode(found)) == found
    return True


@FIXED
@given(KIND, st.binary(max_size=400))
def test_random_bytes(kind, payload):
    _read(ALL[kind], payload)


# A field: number, wire type and what stands behind it, right or wrong.
FIELD = st.builds(
    lambda number, kind, content, length: (
        varint(number << 3 | kind)
        + (varint(len(content) if length is None else length) if kind == 2 else b"")
        + content
    ),
    st.integers(1, 8),
    st.integers(0, 5),
    st.one_of(
        st.binary(max_size=9),
        st.sampled_from([bytes(32), bytes(64), bytes(40), bytes(90), b"\x01", b"\x08\x01"]),
        st.sampled_from(EXAMPLES),
    ),
    st.one_of(st.none(), st.none(), st.integers(0, 2**64 - 1)),
)


@FIXED
@given(KIND, st.lists(FIELD, max_size=7))
def test_bytes_that_look_like_fields(kind, fields):
    _read(ALL[kind], b"".join(fields))


@FIXED
@given(KIND, KIND)
def test_one_kind_as_another(kind, other):
    of = ALL[other]
    _read(ALL[kind], of.encode(of.example))


CHANGE = st.tuples(
    st.sampled_from(["flip", "cut", "insert", "delete", "repeat", "set"]),
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 255),
)


def _changed(payload: bytes, changes: list[tuple[str, float, int]]) -> bytes:
    data = bytearray(payload)
    for how, where, value in changes:
        at = int(where * len(data))
        if how == "insert" or not data:
            data.insert(at, value)
        elif how == "flip":
            data[at] ^= 1 << (value % 8)
        elif how == "cut":
            del data[at:]
        elif how == "delete":
            del data[at : at + value % 9]
        elif how == "repeat":
            data[at:at] = data[at : at + value % 40]
        else:
            data[at] = value
    return bytes(data)


@settings(derandomize=True, max_examples=500)
@given(KIND, st.lists(CHANGE, min_size=1, max_size=4))
def test_messages_that_were_damaged(kind, changes):
    of = ALL[kind]
    _read(of, _changed(of.encode(of.example), changes))


@FIXED
@given(KIND, KIND, st.floats(0, 1), st.floats(0, 1))
def test_two_messages_spliced(kind, other, cut, start):
    one, two = (ALL[k].encode(ALL[k].example) for k in (kind, other))
    _read(ALL[kind], one[: int(cut * len(one))] + two[int(start * len(two)) :])


def test_every_spelling_of_every_kind():
    for of in ALL.values():
        payload = of.encode(of.example)
        assert _read(of, payload)
        for other in (*other_spellings(payload).values(), *spoiled(payload).values()):
            _read(of, other)


def test_every_cut_and_every_flip_of_a_bit():
    for of in ALL.values():
        payload = of.encode(of.example)
        for place in range(len(payload)):
            _read(of, payload[:place])
            for bit in range(0, 8, 1 if len(payload) < 300 else 3):
                data = bytearray(payload)
                data[place] ^= 1 << bit
                _read(of, bytes(data))


BYTES = st.binary(max_size=90)
PLACES = st.lists(st.integers(0, 2**32 - 1), max_size=9).map(tuple)
BLOBS = st.lists(BYTES, max_size=9).map(tuple)
ADVERTS = st.lists(
    st.builds(
        Advert, st.text(st.characters(codec="utf-8"), max_size=20), BYTES, BYTES, BYTES, BYTES
    ),
    max_size=5,
).map(tuple)
VALUES = {
    "cohort": ADVERTS,
    "sealed shares": st.builds(SealedShares, BLOBS),
    "train request": st.tuples(
        st.binary(min_size=40, max_size=40), st.builds(Delivery, PLACES, BLOBS)
    ),
    "survivors": st.builds(Survivors, PLACES, BLOBS),
    "signature": BYTES,
    "unmasking": st.builds(Unmasking, PLACES, BLOBS),
    "reveal": st.builds(Reveal, BLOBS, BLOBS),
}


@FIXED
@given(st.sampled_from(sorted(VALUES)).flatmap(lambda k: st.tuples(st.just(k), VALUES[k])))
def test_what_is_encoded_is_decoded(kind_and_value):
    kind, value = kind_and_value
    assert SECAGG[kind].decode(SECAGG[kind].encode(value)) == value


ROSTER = Roster(
    {SERVER: Identity(SERVER, b"0" * 32).public_key, "a": Identity("a", b"k" * 32).public_key}
)


@FIXED
@given(st.lists(CHANGE, min_size=1, max_size=3))
def test_a_damaged_envelope_is_never_opened(changes):
    """Not one byte of it can be changed: what does open is what was sealed."""
    payload = SECAGG["envelope"].encode(SECAGG["envelope"].example)
    damaged = _changed(payload, changes)
    try:
        body = read_envelope(damaged, 999).open(ROSTER, "a", bytes(32), (Kind.REVEAL,))
    except WireError:
        assert damaged != payload
    else:
        assert (damaged, body) == (payload, b"b")
