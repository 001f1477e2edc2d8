"""Secure aggregation a second time: plain integers and lists, from the RFCs and the papers alone.

It shares no code with fedtune and takes one thing from a library: a single block of AES.
Slow and not constant-time; it checks, it protects nothing.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

FIELD = 2**255 - 19  # of Curve25519 and Ed25519
ORDER = 2**252 + 27742317777372353535851937790883648493  # of Ed25519's base point
PRIME = 2**256 + 297  # of the shares


# --- bytes to hash and sign


def transcript(label: str, fields: Sequence[bytes]) -> bytes:
    """Each part after its length, eight bytes little-endian."""
    out = b""
    for part in [b"fedtune v1 " + label.encode(), *fields]:
        out += len(part).to_bytes(8, "little") + part
    return out


def digest(label: str, fields: Sequence[bytes]) -> bytes:
    """SHA-256 of the transcript."""
    return hashlib.sha256(transcript(label, fields)).digest()


def number(value: int) -> bytes:
    """Eight bytes, little-endian."""
    return value.to_bytes(8, "little")


def places(values: Sequence[int]) -> bytes:
    """Four bytes each, little-endian."""
    return b"".join(value.to_bytes(4, "little") for value in values)


def session_digest(
    run: str, round: int, attempt: int, digests: Sequence[bytes], roster: bytes
) -> bytes:
    """`digests` of base model, manifest, configuration and global adapter, in this order."""
    return digest("session", [run.encode(), number(round), number(attempt), *digests, roster])


def roster_digest(keys: Mapping[str, bytes]) -> bytes:
    """Names in their order, each with its key; the server's name is empty."""
    return digest("roster", [part for name in sorted(keys) for part in (name.encode(), keys[name])])


def advert_signed(session: bytes, advert: Mapping[str, bytes]) -> bytes:
    """What the client `advert["client"]` signs when it makes its keys known."""
    names = ("client", "sealing_key", "masking_key", "commitment")
    return transcript("advert", [session, *(advert[name] for name in names)])


def cohort_digest(session: bytes, adverts: Sequence[Mapping[str, bytes]]) -> bytes:
    """Over all that the cohort advertised, signatures too."""
    names = ("client", "sealing_key", "masking_key", "commitment", "signature")
    return digest("cohort", [session, *(advert[name] for advert in adverts for name in names)])


def survivors_signed(binding: bytes, sharers: Sequence[int], survivors: Sequence[int]) -> bytes:
    """What survivors sign."""
    return transcript("survivors", [binding, places(sharers), places(survivors)])


def sharers_signed(binding: bytes, sharers: Sequence[int]) -> bytes:
    """What clients sign with their values."""
    return transcript("sharers", [binding, places(sharers)])


def commitment(seed: bytes) -> bytes:
    """The commitment to a self-mask's seed."""
    return digest("self-mask", [seed])


# --- X25519 (RFC 7748) and HKDF (RFC 5869)


def x25519(scalar: bytes, point: bytes) -> bytes:
    """The Montgomery ladder of RFC 7748, section 5."""
    k = int.from_bytes(scalar, "little") & ~7 & (2**255 - 1) | 2**254
    x1 = int.from_bytes(point, "little") & (2**255 - 1)
    x2, z2, x3, z3 = 1, 0, x1, 1
    for bit in range(254, -1, -1):
        if k >> bit & 1:
            x2, z2, x3, z3 = x3, z3, x2, z2
        a, b, c, d = x2 + z2, x2 - z2, x3 + z3, x3 - z3
        da, cb = d * a % FIELD, c * b % FIELD
        x3, z3 = (da + cb) ** 2 % FIELD, x1 * (da - cb) ** 2 % FIELD
        aa, bb = a * a % FIELD, b * b % FIELD
        e = aa - bb
        x2, z2 = aa * bb % FIELD, e * (aa + 121665 * e) % FIELD
        if k >> bit & 1:
            x2, z2, x3, z3 = x3, z3, x2, z2
    return (x2 * pow(z2, FIELD - 2, FIELD) % FIELD).to_bytes(32, "little")


def x25519_public(scalar: bytes) -> bytes:
    """The public key of a private one."""
    return x25519(scalar, bytes([9]) + bytes(31))


def hkdf(secret: bytes, salt: bytes, info: bytes) -> bytes:
    """HKDF-SHA256, 32 bytes: one block of output."""
    key = hmac.digest(salt, secret, "sha256")
    return hmac.digest(key, info + b"\x01", "sha256")


def derived_secret(
    private: bytes, public: bytes, purpose: str, binding: bytes, names: Sequence[str]
) -> bytes:
    """What two clients derive for one purpose."""
    info = transcript(purpose, [name.encode() for name in names])
    return hkdf(x25519(private, public), binding, info)


# --- Ed25519 (RFC 8032, section 6)

D = -121665 * pow(121666, FIELD - 2, FIELD) % FIELD
BASE_Y = 4 * pow(5, FIELD - 2, FIELD) % FIELD


def _recover_x(y: int, sign: int) -> int:
    square = (y * y - 1) * pow(D * y * y + 1, FIELD - 2, FIELD)
    x = pow(square, (FIELD + 3) // 8, FIELD)
    if (x * x - square) % FIELD:
        x = x * pow(2, (FIELD - 1) // 4, FIELD) % FIELD
    return FIELD - x if x & 1 != sign else x


BASE = (_recover_x(BASE_Y, 0), BASE_Y)


def _add(p: tuple[int, int], q: tuple[int, int]) -> tuple[int, int]:
    product = D * p[0] * q[0] * p[1] * q[1] % FIELD
    x = (p[0] * q[1] + q[0] * p[1]) * pow(1 + product, FIELD - 2, FIELD)
    y = (p[1] * q[1] + p[0] * q[0]) * pow(1 - product, FIELD - 2, FIELD)
    return x % FIELD, y % FIELD


def _times(scalar: int) -> bytes:
    total, step = (0, 1), BASE
    while scalar:
        if scalar & 1:
            total = _add(total, step)
        step, scalar = _add(step, step), scalar >> 1
    return (total[1] | (total[0] & 1) << 255).to_bytes(32, "little")


def _sha512(data: bytes) -> int:
    return int.from_bytes(hashlib.sha512(data).digest(), "little")


def ed25519_public(seed: bytes) -> bytes:
    """The public key of a private one."""
    return _times(_sha512(seed) % 2**256 & ~7 & (2**255 - 1) | 2**254)


def ed25519_sign(seed: bytes, message: bytes) -> bytes:
    """R, then S."""
    hashed = hashlib.sha512(seed).digest()
    secret = int.from_bytes(hashed[:32], "little") & ~7 & (2**255 - 1) | 2**254
    nonce = _sha512(hashed[32:] + message) % ORDER
    point = _times(nonce)
    challenge = _sha512(point + _times(secret) + message)
    return point + ((nonce + challenge * secret) % ORDER).to_bytes(32, "little")


# --- ChaCha20-Poly1305 (RFC 8439)


def _quarter(s: list[int], a: int, b: int, c: int, d: int) -> None:
    for first, second, third, turn in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
        s[first] = (s[first] + s[second]) % 2**32
        mixed = s[third] ^ s[first]
        s[third] = (mixed << turn | mixed >> (32 - turn)) % 2**32


def _chacha_block(key: bytes, counter: int) -> bytes:
    words = b"expand 32-byte k" + key + counter.to_bytes(4, "little") + bytes(12)
    start = [int.from_bytes(words[i : i + 4], "little") for i in range(0, 64, 4)]
    state = list(start)
    for _ in range(10):
        for i in range(4):
            _quarter(state, i, 4 + i, 8 + i, 12 + i)
        for i in range(4):
            _quarter(state, i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4)
    mixed = [(a + b) % 2**32 for a, b in zip(state, start, strict=True)]
    return b"".join(word.to_bytes(4, "little") for word in mixed)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 16)


def seal(key: bytes, plaintext: bytes, associated: bytes) -> bytes:
    """The ciphertext and its tag, under the nonce zero."""
    blocks = range(1, len(plaintext) // 64 + 2)
    stream = b"".join(_chacha_block(key, counter) for counter in blocks)
    sealed = bytes(a ^ b for a, b in zip(plaintext, stream, strict=False))
    lengths = number(len(associated)) + number(len(sealed))
    data = _padded(associated) + _padded(sealed) + lengths
    once = _chacha_block(key, 0)
    r = int.from_bytes(once[:16], "little") & 0x0FFFFFFC0FFFFFFC0FFFFFFC0FFFFFFF
    tag = 0
    for start in range(0, len(data), 16):
        tag = (tag + int.from_bytes(data[start : start + 16] + b"\x01", "little")) * r
        tag %= 2**130 - 5
    tag = (tag + int.from_bytes(once[16:32], "little")) % 2**128
    return sealed + tag.to_bytes(16, "little")


def sealed_share(
    private: bytes, public: bytes, binding: bytes, sender: str, receiver: str, pair: bytes
) -> bytes:
    """One client's two shares for another."""
    names = [sender, receiver]
    key = derived_secret(private, public, "sealed shares", binding, names)
    associated = transcript("sealed shares", [binding, sender.encode(), receiver.encode()])
    return seal(key, pair, associated)


# --- shares (Shamir 1979)


def share_at(coefficients: Sequence[int], point: int) -> bytes:
    """The polynomial's value; `coefficients` from the constant (the secret) up."""
    value = sum(c * point**power for power, c in enumerate(coefficients)) % PRIME
    return value.to_bytes(33, "little")


def combine(shares: Mapping[int, bytes]) -> int:
    """The value at zero of the polynomial through `shares` by point."""
    total = 0
    for own, share in shares.items():
        top = bottom = 1
        for other in shares:
            if other != own:
                top, bottom = top * -other, bottom * (own - other)
        total += int.from_bytes(share, "little") * top * pow(bottom, -1, PRIME)
    return total % PRIME


# --- masks and packing


def expand(seed: bytes, size: int, bits: int) -> list[int]:
    """AES-256 of 0, 1, 2 …, cut into words of 4 (8) bytes and these modulo 2^bits."""
    aes = Cipher(algorithms.AES(seed), modes.ECB()).encryptor()
    width = 4 if bits <= 32 else 8
    stream = b"".join(aes.update(i.to_bytes(16, "big")) for i in range(size * width // 16 + 1))
    words = [stream[i * width : (i + 1) * width] for i in range(size)]
    return [int.from_bytes(word, "little") % 2**bits for word in words]


def add(vector: Sequence[int], other: Sequence[int], bits: int, sign: int = 1) -> list[int]:
    """`vector` plus (minus) `other` modulo 2^bits."""
    return [(a + sign * b) % 2**bits for a, b in zip(vector, other, strict=True)]


def signed(vector: Sequence[int], bits: int) -> list[int]:
    """The representatives in [-2^(bits-1), 2^(bits-1))."""
    return [(value + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1) for value in vector]


def pack(vector: Sequence[int], bits: int) -> bytes:
    """One large number with the first element lowest."""
    large = sum(value << bits * i for i, value in enumerate(vector))
    return large.to_bytes(-(-len(vector) * bits // 8), "little")


def unpack(data: bytes, size: int, bits: int) -> list[int]:
    """The inverse of `pack`."""
    large = int.from_bytes(data, "little")
    return [large >> bits * i & 2**bits - 1 for i in range(size)]


def masked(
    values: Sequence[int], bits: int, own: int, self_mask: bytes, pairwise: Mapping[int, bytes]
) -> list[int]:
    """`values` plus the self-mask, plus (minus) the mask shared with each later (earlier) place."""
    vector = add([v % 2**bits for v in values], expand(self_mask, len(values), bits), bits)
    for other, seed in pairwise.items():
        vector = add(vector, expand(seed, len(values), bits), bits, 1 if own < other else -1)
    return vector
