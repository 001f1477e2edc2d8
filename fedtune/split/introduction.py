"""How a client proves who it is: its identity key signs what the server made up for this stream.

The connection is TLS with a server that the federation's own authority vouches for, so nobody on
the network sees or changes what follows. What is signed names the server's roster, which has the
server's own key in it, and what is worked on: a signature that one server gets is of no use at
another, and an old one is of no use at all. Python's gRPC shows a client nothing of the connection
that could be signed as well; with one authority per server, there is nobody to tell apart by it.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable

from fedtune.errors import BadSignature, ContextMismatch
from fedtune.secagg.keys import Identity, Roster
from fedtune.secagg.transcript import transcript
from fedtune.wire.split import NONCE_BYTES, Challenge, Introduction, Terms

NOT_KNOWN = (
    "the server of the base model has no client {name!r} with this key in its roster; is "
    "public.toml with the operator, and the server started with the new roster?"
)


def new_challenge() -> Challenge:
    """A challenge that nobody has seen before."""
    return Challenge(secrets.token_bytes(NONCE_BYTES))


def introduce(
    identity: Identity, roster: Roster, terms: Terms, challenge: Challenge
) -> Introduction:
    """A client's answer to a challenge."""
    unsigned = Introduction(identity.name, roster.digest, terms.digest, b"")
    signature = identity.sign(_signed(unsigned, challenge))
    return Introduction(identity.name, roster.digest, terms.digest, signature)


def check_introduction(
    introduction: Introduction, challenge: Challenge, roster: Roster, terms: Terms
) -> None:
    """Raise `BadSignature` unless a client of the roster answers this very challenge.

    Raises `ContextMismatch` if it does, with another roster or other terms. Whoever is not known
    learns nothing of who is.
    """
    name = introduction.name
    try:
        roster.verify(name, _signed(introduction, challenge), introduction.signature)
    except BadSignature as error:
        raise BadSignature(NOT_KNOWN.format(name=name)) from error
    if introduction.roster_digest != roster.digest:
        raise ContextMismatch(
            "client and server have different rosters; the operator sends the same roster.toml to "
            "all"
        )
    if introduction.terms_digest != terms.digest:
        raise ContextMismatch("client and server have different configurations or base models")


def _signed(introduction: Introduction, challenge: Challenge) -> bytes:
    parts: Iterable[bytes] = (
        challenge.nonce,
        introduction.name.encode(),
        introduction.roster_digest,
        introduction.terms_digest,
    )
    return transcript("split introduction", parts)
