"""No secret shows in what a log, a traceback or a report could print."""

import base64
import traceback

import pytest
from adversary.federation import RING, Federation, aggregate

from fedtune.errors import FedtuneError


@pytest.fixture(scope="module")
def finished():
    """A session in which one client dropped out before its values and one later."""
    federation = Federation()
    server, names, total = aggregate(federation, RING, {"c02": 2, "c05": 4}, 6)
    assert total.tolist() == sum(federation.values[name] for name in names).tolist()
    return federation, server


def test_states_keys_and_messages_print_without_secrets(finished):
    federation, server = finished
    printed = [
        *federation.history,
        *(state.sealing for state in federation.history),
        *(state.masking for state in federation.history),
        *federation.identities.values(),
        *federation.advert.values(),
        *federation.shares.values(),
        *federation.masked.values(),
        federation.roster,
        federation.session,
        federation.terms,
        server,
        server._sealed,
    ]
    assert len({state.stage for state in federation.history}) == 6
    for thing in printed:
        federation.assert_no_secret_in(f"{thing!r} {thing!s}")


@pytest.mark.parametrize(
    "spell",
    [
        bytes.hex,
        lambda secret: secret.hex().upper(),
        lambda secret: base64.b64encode(secret).decode(),
        lambda secret: base64.urlsafe_b64encode(secret).decode(),
        repr,
        lambda secret: repr(list(secret)),
        lambda secret: str(int.from_bytes(secret, "little")),
        lambda secret: str(int.from_bytes(secret, "big")),
    ],
)
def test_the_search_finds_a_secret_in_every_spelling(finished, spell):
    federation, _ = finished
    state = federation.secretive("c01")
    for secret in (state.self_mask, state.masking.private_key, state.shares[3][33:]):
        with pytest.raises(AssertionError):
            federation.assert_no_secret_in(f"a log line with {spell(secret)} in it")


def test_tracebacks_of_refusals_show_no_secret():
    federation = Federation().until("begin", "share")
    forged = federation.delivery("c00", (0, 2, 3, 4, 5, 6))
    shown = []
    for action in (
        lambda: federation.accept("c00", forged.__class__(forged.sharers, forged.sealed[::-1])),
        lambda: federation.mask("c00"),
        lambda: federation.sign("c00"),
        lambda: federation.share("c00"),
    ):
        try:
            action()
        except FedtuneError:
            shown.append(traceback.format_exc())
    assert len(shown) == 4
    for text in shown:
        federation.assert_no_secret_in(text)
