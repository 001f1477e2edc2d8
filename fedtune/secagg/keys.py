"""Keys: who a party is for good (Ed25519), and with whom it shares a secret this round (X25519)."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedtune.errors import BadSignature
from fedtune.secagg.transcript import digest, transcript

KEY_BYTES = 32
SIGNATURE_BYTES = 64
TAG_BYTES = 16
SERVER = ""  # the server's name in a roster; no client can have it


@dataclass(frozen=True)
class Identity:
    """A party's long-term signing key. It never leaves the machine that it was made on."""

    name: str
    private_key: bytes = field(repr=False)  # 32 bytes, the Ed25519 seed

    @classmethod
    def generate(cls, name: str) -> Identity:
        """A fresh identity."""
        return cls(name, secrets.token_bytes(KEY_BYTES))

    @cached_property
    def _key(self) -> Ed25519PrivateKey:
        return Ed25519PrivateKey.from_private_bytes(self.private_key)

    @property
    def public_key(self) -> bytes:
        """The 32 bytes that go into the roster."""
        return self._key.public_key().public_bytes_raw()

    def sign(self, message: bytes) -> bytes:
        """An Ed25519 signature, 64 bytes."""
        return self._key.sign(message)


class Roster:
    """Who belongs to a federation: public Ed25519 keys by name, the server's under `SERVER`.

    Every party has it from outside the federation's own messages; its digest is part of all
    that is signed, so parties with different rosters cannot even talk to each other.
    """

    def __init__(self, keys: Mapping[str, bytes]) -> None:
        """Raises `ValueError` for a key of another length, or one that two names share."""
        if SERVER not in keys:
            raise ValueError("a roster needs the server's key")
        if any(len(key) != KEY_BYTES for key in keys.values()):
            raise ValueError(f"a public key is {KEY_BYTES} bytes long")
        if len(set(keys.values())) != len(keys):
            raise ValueError("two names in the roster have the same key")
        self.keys = dict(sorted(keys.items()))

    @property
    def clients(self) -> int:
        """How many of them are clients."""
        return len(self.keys) - 1

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 over names and keys, 32 bytes."""
        fields = [part for name, key in self.keys.items() for part in (name.encode(), key)]
        return digest("roster", fields)

    def verify(self, name: str, message: bytes, signature: bytes) -> None:
        """Raise `BadSignature` unless `name` is in the roster and signed `message`."""
        if name not in self.keys:
            raise BadSignature(f"{name or 'the server'} is not in the roster")
        try:
            Ed25519PublicKey.from_public_bytes(self.keys[name]).verify(signature, message)
        except (InvalidSignature, ValueError) as error:
            who = name or "the server"
            raise BadSignature(f"a signature is not that of {who} in the roster") from error


@dataclass(frozen=True)
class RoundKey:
    """An X25519 key pair that lives for one session."""

    private_key: bytes = field(repr=False)

    @classmethod
    def generate(cls) -> RoundKey:
        """A fresh pair."""
        return cls(secrets.token_bytes(KEY_BYTES))

    @cached_property
    def _key(self) -> X25519PrivateKey:
        return X25519PrivateKey.from_private_bytes(self.private_key)

    @cached_property
    def public_key(self) -> bytes:
        """32 bytes."""
        return self._key.public_key().public_bytes_raw()

    def secret_with(self, public_key: bytes, purpose: str, binding: bytes, *names: str) -> bytes:
        """32 bytes that only the holders of the two private keys can derive (HKDF-SHA256).

        `binding` is the digest of the session and its cohort; `names` say which pair, in an
        order on which both sides agree. Raises `BadSignature` for a public key that gives the
        same secret with every private key (RFC 7748, section 6.1).
        """
        try:
            shared = self._key.exchange(X25519PublicKey.from_public_bytes(public_key))
        except ValueError as error:
            raise BadSignature("a public key contributes nothing to the shared secret") from error
        info = transcript(purpose, [name.encode() for name in names])
        return HKDF(hashes.SHA256(), KEY_BYTES, salt=binding, info=info).derive(shared)


def seal(key: bytes, plaintext: bytes, associated: bytes) -> bytes:
    """ChaCha20-Poly1305 under a key that seals exactly one message, hence the constant nonce."""
    return ChaCha20Poly1305(key).encrypt(bytes(12), plaintext, associated)


def unseal(key: bytes, sealed: bytes, associated: bytes) -> bytes:
    """The plaintext; raises `BadSignature` if it was not sealed with this key and data."""
    try:
        return ChaCha20Poly1305(key).decrypt(bytes(12), sealed, associated)
    except InvalidTag as error:
        raise BadSignature("a sealed share does not open") from error
