"""What clients and server tell each other. Clients are named by their place in the cohort."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedtune.errors import MalformedMessage
from fedtune.secagg.keys import KEY_BYTES, SIGNATURE_BYTES, TAG_BYTES
from fedtune.secagg.shamir import SHARE_BYTES
from fedtune.secagg.transcript import DIGEST_BYTES, digest, transcript

SEALED_BYTES = 2 * SHARE_BYTES + TAG_BYTES


@dataclass(frozen=True)
class Advert:
    """A client's keys for one session, signed with its long-term key.

    `sealing_key` is for sealing shares, `masking_key` for pairwise masks (X25519, 32 bytes
    each); `commitment` is the digest of its self-mask's seed.
    """

    client: str
    sealing_key: bytes
    masking_key: bytes
    commitment: bytes
    signature: bytes = b""

    def check(self) -> None:
        """Raise `MalformedMessage` for a field of another length."""
        _length(self.sealing_key, KEY_BYTES, "a sealing key")
        _length(self.masking_key, KEY_BYTES, "a masking key")
        _length(self.commitment, DIGEST_BYTES, "a commitment")
        _length(self.signature, SIGNATURE_BYTES, "a signature")

    def fields(self) -> list[bytes]:
        """What is signed, besides the session."""
        return [self.client.encode(), self.sealing_key, self.masking_key, self.commitment]

    def signed(self, session: bytes) -> bytes:
        """The bytes under the signature."""
        return transcript("advert", [session, *self.fields()])


@dataclass(frozen=True)
class SealedShares:
    """One client's shares for each other client of the cohort, in the cohort's order."""

    sealed: tuple[bytes, ...]

    def check(self, clients: int) -> None:
        """Raise `MalformedMessage` unless there is one for each other of `clients`."""
        _count(self.sealed, clients - 1, "sealed shares")
        for item in self.sealed:
            _length(item, SEALED_BYTES, "a sealed share")


@dataclass(frozen=True)
class Delivery:
    """Who has shared keys, and what each but the receiver itself sealed for the receiver."""

    sharers: tuple[int, ...]
    sealed: tuple[bytes, ...]


@dataclass(frozen=True)
class MaskedValues:
    """One client's values under all masks, and its signature on the sharers it masked with.

    Without the signature a server could name other sharers to one client than to the rest: its
    masks would then not be those that the others think they are.
    """

    packed: bytes = field(repr=False)
    voucher: bytes


@dataclass(frozen=True)
class Survivors:
    """Whose values are in the sum, and each one's signature on the sharers."""

    places: tuple[int, ...]
    vouchers: tuple[bytes, ...]


@dataclass(frozen=True)
class Unmasking:
    """Signatures on one survivor set by `signers`."""

    signers: tuple[int, ...]
    signatures: tuple[bytes, ...]


@dataclass(frozen=True)
class Reveal:
    """One client's shares: of each survivor's self-mask, of each dropped client's masking key."""

    self_masks: tuple[bytes, ...] = field(repr=False)
    masking_keys: tuple[bytes, ...] = field(repr=False)

    def check(self, survivors: int, dropped: int) -> None:
        """Raise `MalformedMessage` for another number or length of shares."""
        _count(self.self_masks, survivors, "shares of self-masks")
        _count(self.masking_keys, dropped, "shares of masking keys")
        for share in (*self.self_masks, *self.masking_keys):
            _length(share, SHARE_BYTES, "a share")


def cohort_digest(session: bytes, adverts: tuple[Advert, ...]) -> bytes:
    """32 bytes that bind all keys and signatures of the cohort to the session."""
    parts = [part for advert in adverts for part in (*advert.fields(), advert.signature)]
    return digest("cohort", [session, *parts])


def sharers_signed(binding: bytes, sharers: tuple[int, ...]) -> bytes:
    """What a client signs with its values: in this cohort these shared keys, as it was told."""
    return transcript("sharers", [binding, _places(sharers)])


def survivors_signed(binding: bytes, sharers: tuple[int, ...], survivors: tuple[int, ...]) -> bytes:
    """What a client signs: in this cohort these shared keys, and of those these are added up."""
    return transcript("survivors", [binding, _places(sharers), _places(survivors)])


def commitment_to(seed: bytes) -> bytes:
    """The commitment to a self-mask's seed; hiding because the seed has 256 random bits."""
    return digest("self-mask", [seed])


def _places(places: tuple[int, ...]) -> bytes:
    return b"".join(place.to_bytes(4, "little") for place in places)


def _length(data: bytes, expected: int, name: str) -> None:
    if len(data) != expected:
        raise MalformedMessage(f"{name} has {len(data)} bytes, not {expected}")


def _count(items: tuple[bytes, ...], expected: int, name: str) -> None:
    if len(items) != expected:
        raise MalformedMessage(f"{len(items)} {name}, not {expected}")
