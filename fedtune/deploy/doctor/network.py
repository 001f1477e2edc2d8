"""The way to the server: name, port, certificate, clock, and whether it lets this site in."""

from __future__ import annotations

import datetime
import email.utils
import http.client
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import urlsplit

from cryptography.hazmat.primitives.asymmetric import ec

from fedtune.deploy.doctor.findings import Examination, Verdict
from fedtune.errors import ConfigError

TIMEOUT = 5.0  # seconds for each step on the way
WARN_DAYS = 30
WARN_SECONDS = 30.0
_LARGEST = 1 << 20
_PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
# OpenSSL's numbers of what is wrong with a certificate (X509_V_ERR_…).
_NOT_YET_VALID, _EXPIRED = 9, 10
_UNKNOWN_AUTHORITY = (18, 19, 20, 21, 7)
_WRONG_NAME = (62, 64)
Found = TypeVar("Found")


@dataclass(frozen=True)
class Address:
    """Where a server is."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """`HOST:PORT`, as in site.server; raises `ConfigError`."""
        try:
            parts = urlsplit(f"//{text}")
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise ConfigError(f"site.server = {text!r}: {error}; write HOST:PORT") from error
        if not host:
            raise ConfigError(f"site.server = {text!r}: no host; write HOST:PORT")
        return cls(host, port or 443)

    def __str__(self) -> str:
        return f"{self.host} port {self.port}"


@dataclass(frozen=True)
class Greeting:
    """What a server showed in a handshake that was accepted."""

    days_left: float
    clock_offset: float | None  # seconds by which its clock is ahead; None: it does not say


def examine_network(
    examination: Examination,
    server: str,
    authority: bytes | None,
    transport: ec.EllipticCurvePrivateKey | None,
) -> None:
    """Go the way to `server` as far as it leads; nothing is changed there."""
    examination.begin("network")
    if any(os.environ.get(name) for name in _PROXIES):
        examination.add(
            "proxy",
            Verdict(
                "warning",
                "a proxy is set in the environment: fedtune client goes through it, these checks "
                "but the last do not",
                "unset it, or name the server in NO_PROXY, if the server is reached directly",
            ),
        )
    address = examination.run("address", lambda: _look_up(Address.parse(server)))
    reached = address and examination.run("port", lambda: _connect(address))
    if reached is None:
        why, todo = "the server was not reached", "solve the problem above first"
    elif authority is None:
        why, todo = "there is no certificate of the authority", "see site.certificate"
    else:
        greeting = examination.run("certificate", lambda: _greet(reached, authority))
        if greeting is not None:
            examination.run("clock", lambda: _clock(greeting))
            if transport is None:
                examination.skip("admission", "there is no transport key", "see the keys")
            else:
                examination.run("admission", lambda: _admission(server, authority, transport))
            return
        why, todo = "there is no connection to be trusted", "solve the problem above first"
    for check in ("certificate", "clock", "admission"):
        if check != "certificate" or reached is None or authority is None:
            examination.skip(check, why, todo)


def _look_up(address: Address) -> Verdict[Address]:
    try:
        found = _within(
            TIMEOUT,
            lambda: socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM),
        )
    except (socket.gaierror, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "not a name"
        return Verdict(
            "problem",
            f"{address.host} is not known: {reason}",
            "correct site.server, or ask for the name to be published where this machine looks",
        )
    except TimeoutError:
        return Verdict(
            "problem",
            f"no answer within {TIMEOUT:g} s to the question where {address.host} is",
            "see whether this machine reaches its name server",
        )
    numbers = sorted({str(entry[4][0]) for entry in found})
    return Verdict("ok", f"{address.host} is {', '.join(numbers)}", value=address)


def _connect(address: Address) -> Verdict[Address]:
    try:
        _within(TIMEOUT, lambda: _open(address).close())
    except ConnectionRefusedError:
        return Verdict(
            "problem",
            f"{address} refuses: nobody listens there",
            "is fedtune server running, and site.server's port the one in its server.toml?",
        )
    except TimeoutError:
        return Verdict(
            "problem",
            f"{address} does not answer within {TIMEOUT:g} s",
            "a firewall on the way may drop it; ask for this port to be opened, outgoing here and "
            "incoming there",
        )
    except OSError as error:
        words = f"{address} cannot be reached: {error.strerror or type(error).__name__}"
        return Verdict("problem", words, "see whether this machine has a route to it")
    return Verdict("ok", f"{address} is open", value=address)


def _greet(address: Address, authority: bytes) -> Verdict[Greeting]:
    from fedtune.tls import tls_context

    try:
        context = tls_context(authority)
    except (ssl.SSLError, ValueError):
        words = "site.certificate is not a certificate in PEM form"
        return Verdict("problem", words, "ask the operator for ca.crt again")
    try:
        greeting = _within(2 * TIMEOUT, lambda: _shake_hands(address, context))
    except ssl.SSLCertVerificationError as error:
        return Verdict("problem", *_distrust(error, address))
    except TimeoutError:
        return Verdict(
            "problem",
            f"{address} accepts the connection and says nothing",
            "something else than fedtune server may listen there; ask the operator",
        )
    except (ssl.SSLError, http.client.HTTPException, ConnectionError) as error:
        reason = getattr(error, "reason", None) or type(error).__name__
        return Verdict(
            "problem",
            f"{address} does not speak HTTP over TLS 1.3 ({reason})",
            "something else listens there, or a proxy on the way opens the connection",
        )
    days = greeting.days_left
    text = f"the server's certificate is vouched for, and ends in {days:.0f} days"
    numbers = {"days_left": days}
    if days < WARN_DAYS:
        advice = "tell the operator: fedtune keys server makes another"
        return Verdict("warning", text, advice, numbers, greeting)
    return Verdict("ok", text, numbers=numbers, value=greeting)


def _distrust(error: ssl.SSLCertVerificationError, address: Address) -> tuple[str, str]:
    """What is wrong with a server's certificate, and what to do."""
    code = error.verify_code
    if code == _EXPIRED:
        return (
            "the server's certificate has expired",
            "the operator makes another (fedtune keys server); compare this machine's clock too",
        )
    if code == _NOT_YET_VALID:
        return "the server's certificate is not valid yet", "set this machine's clock"
    if code in _UNKNOWN_AUTHORITY:
        return (
            "the server's certificate is signed by another authority than site.certificate",
            "compare with the operator's ca.crt; if it is the same, someone else answers there",
        )
    if code in _WRONG_NAME:
        return (
            f"the server's certificate is not for {address.host}",
            "write the name in site.server that the operator gave to fedtune keys server --host",
        )
    words = f"the server's certificate is not accepted: {error.verify_message}"
    return words, "send this line to the operator"


def _clock(greeting: Greeting) -> Verdict[None]:
    offset = greeting.clock_offset
    if offset is None:
        words = "the server does not say what time it has"
        return Verdict("skipped", words, "compare the clocks in another way")
    text = f"the server's clock is {offset:+.0f} s from this machine's"
    numbers = {"offset_seconds": offset}
    if abs(offset) > WARN_SECONDS:
        advice = "set the clock that is wrong; certificates are checked by this machine's"
        return Verdict("warning", text, advice, numbers)
    return Verdict("ok", text, numbers=numbers)


def _admission(
    server: str, authority: bytes, transport: ec.EllipticCurvePrivateKey
) -> Verdict[None]:
    from fedtune.flower.network import NodeConnection

    connection = NodeConnection(server, authority, transport, _LARGEST, timeout=TIMEOUT)
    try:
        admitted = _within(3 * TIMEOUT, connection.is_admitted)
    except TimeoutError:
        words = f"the server does not answer within {3 * TIMEOUT:g} s"
        return Verdict("problem", words, "tell the operator")
    finally:
        connection.close()
    if not admitted:
        return Verdict(
            "problem",
            "the server does not let this site in: its roster has no such transport key",
            "is public.toml with the operator, and the server started with the new roster?",
        )
    return Verdict("ok", "the server would let this site in")


def _shake_hands(address: Address, context: ssl.SSLContext) -> Greeting:
    """Connect, and ask for a page that is not there: the answer says what time it is."""
    connection = http.client.HTTPSConnection(
        address.host, address.port, timeout=TIMEOUT, context=context
    )
    try:
        connection.connect()
        end = ssl.cert_time_to_seconds(_peer(connection)["notAfter"])
        asked = time.time()
        connection.request("GET", "/")
        date = connection.getresponse().getheader("date")
        now = (asked + time.time()) / 2
    finally:
        connection.close()
    try:
        # The date is cut to whole seconds: on average it is half a second later.
        offset = email.utils.parsedate_to_datetime(date or "").timestamp() + 0.5 - now
    except ValueError:
        offset = None
    return Greeting((end - now) / datetime.timedelta(days=1).total_seconds(), offset)


def _peer(connection: http.client.HTTPSConnection) -> dict[str, str]:
    certificate = connection.sock.getpeercert() or {}
    return {key: value for key, value in certificate.items() if isinstance(value, str)}


def _open(address: Address) -> socket.socket:
    return socket.create_connection((address.host, address.port), timeout=TIMEOUT)


def _within(seconds: float, work: Callable[[], Found]) -> Found:
    """What `work` gives or raises; `TimeoutError` if it is not done in time.

    The timeouts of sockets are for each packet: whoever sends them one by one would never end.
    """
    results: list[Found] = []
    errors: list[BaseException] = []

    def target() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError
    return results[0]
