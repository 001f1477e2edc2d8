"""Keys and certificates of a federation. A private key never leaves the folder it was made in.

The server has an authority (a CA of its own), a TLS certificate signed by it, and an identity. A
site has an identity, which signs what it says in a round, and a transport key, which lets it
connect. Public parts go from the sites to the operator as small files, and come back to all as
the roster.
"""

from __future__ import annotations

import base64
import binascii
import datetime
import ipaddress
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tomli_w
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedtune.config import read_toml
from fedtune.errors import KeyFileError
from fedtune.files import write_atomic, write_private
from fedtune.secagg.keys import SERVER, Identity, Roster
from fedtune.secagg.transcript import transcript

IDENTITY = "identity.key"
TRANSPORT = "transport.key"
AUTHORITY_KEY = "ca.key"
AUTHORITY = "ca.crt"
SERVER_KEY = "server.key"
SERVER_CERTIFICATE = "server.crt"
PUBLIC = "public.toml"
AUTHORITY_DAYS, SERVER_DAYS = 3650, 397
_LARGEST_FILE = 1 << 20
_PEM = serialization.Encoding.PEM
_HOST = re.compile(r"(?=.{1,253}\Z)(\*\.)?[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*")


@dataclass(frozen=True)
class SiteKeys:
    """A site's private keys."""

    identity: Identity
    transport: ec.EllipticCurvePrivateKey = field(repr=False)


@dataclass(frozen=True)
class Members:
    """The roster, and by which key (DER, SubjectPublicKeyInfo) each client may connect."""

    roster: Roster
    transport: dict[str, bytes]


def make_server_keys(folder: Path, hosts: Sequence[str]) -> None:
    """A new authority, a certificate for `hosts` (names or addresses), and an identity."""
    names = _host_names(hosts)
    _make_folder(folder)
    authority, server = _transport_key(), _transport_key()
    issuer = _name("fedtune authority")
    now = datetime.datetime.now(datetime.UTC)
    end = now + datetime.timedelta(days=AUTHORITY_DAYS)
    ca = (
        _certificate(issuer, issuer, authority.public_key(), now, end)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign_certificates=True), critical=True)
        .add_extension(
            x509.SubjectKeyIdentifier.from_public_key(authority.public_key()), critical=False
        )
        .sign(authority, hashes.SHA256())
    )
    certificate = _server_certificate(names, server.public_key(), ca, authority)
    write_private(folder / AUTHORITY_KEY, _private_pem(authority))
    write_private(folder / SERVER_KEY, _private_pem(server))
    write_private(folder / IDENTITY, _private_pem(Ed25519PrivateKey.generate()))
    (folder / SERVER_CERTIFICATE).write_bytes(certificate.public_bytes(_PEM))
    (folder / AUTHORITY).write_bytes(ca.public_bytes(_PEM))


def renew_certificate(folder: Path, hosts: Sequence[str] = ()) -> x509.Certificate:
    """A new certificate of the authority in `folder` for the server's key, which stays.

    It is for `hosts`, or without any for those of the old one, and takes the old one's place.
    With another key two files would have to change at once, and a key that was stolen is not
    helped by a new certificate: nobody looks whether an old one was revoked.

    Raises `KeyFileError`, and then the old certificate stays.
    """
    authority = read_private(folder / AUTHORITY_KEY)
    server = read_private(folder / SERVER_KEY)
    ca = read_certificate(folder / AUTHORITY)
    if not isinstance(server, ec.EllipticCurvePrivateKey):
        raise KeyFileError(f"{folder / SERVER_KEY}: not an elliptic-curve key")
    if (
        not isinstance(authority, ec.EllipticCurvePrivateKey)
        or authority.public_key() != ca.public_key()
    ):
        raise KeyFileError(f"{folder / AUTHORITY_KEY}: not the key of {folder / AUTHORITY}")
    if ca.not_valid_after_utc <= datetime.datetime.now(datetime.UTC):
        raise KeyFileError(f"{folder / AUTHORITY}: the authority has expired; make a new one")
    path = folder / SERVER_CERTIFICATE
    names = _host_names(hosts) if hosts else _names_of(read_certificate(path), path)
    renewed = _server_certificate(names, server.public_key(), ca, authority)
    write_atomic(path, renewed.public_bytes(_PEM))
    return renewed


def make_site_keys(folder: Path, name: str) -> Path:
    """A new identity and transport key for the site `name`; the file to send to the operator."""
    if not name or len(name) > 256 or not name.isprintable():
        raise KeyFileError(f"{name!r} is no name for a site; take 1 to 256 printable characters")
    _make_folder(folder)
    signing, transport = Ed25519PrivateKey.generate(), _transport_key()
    write_private(folder / IDENTITY, _private_pem(signing))
    write_private(folder / TRANSPORT, _private_pem(transport))
    public = public_der(transport)
    value = {
        "name": name,
        "identity": signing.public_key().public_bytes_raw().hex(),
        "transport": base64.b64encode(public).decode(),
        "signature": signing.sign(_site_signed(name, public)).hex(),
    }
    path = folder / PUBLIC
    path.write_text(tomli_w.dumps(value), encoding="utf-8")
    return path


def make_roster(path: Path, server_keys: Path, sites: Sequence[Path]) -> Members:
    """Write the roster of the server and of the sites whose public files these are."""
    identity = read_identity(server_keys, SERVER)
    clients: dict[str, dict[str, str]] = {}
    for file in sites:
        value = read_toml(file)
        try:
            name, public = value["name"], base64.b64decode(value["transport"], validate=True)
            key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(value["identity"]))
            key.verify(bytes.fromhex(value["signature"]), _site_signed(name, public))
        except (KeyError, TypeError, ValueError, AttributeError, InvalidSignature) as error:
            raise KeyFileError(
                f"{file}: not the public file of a site, or it was changed; ask for it again"
            ) from error
        if name in clients:
            raise KeyFileError(f"{file}: there is a site named {name} already")
        clients[name] = {"identity": value["identity"], "transport": value["transport"]}
    value = {"server": {"identity": identity.public_key.hex()}, "clients": clients}
    write_atomic(path, tomli_w.dumps(value).encode())
    return read_roster(path)


def read_roster(path: Path) -> Members:
    """A roster; raises `KeyFileError`."""
    value = read_toml(path)
    try:
        keys = {SERVER: bytes.fromhex(value["server"]["identity"])}
        transport = {}
        for name, client in value["clients"].items():
            keys[name] = bytes.fromhex(client["identity"])
            transport[name] = base64.b64decode(client["transport"], validate=True)
            serialization.load_der_public_key(transport[name])
        if len(set(transport.values())) != len(transport):
            raise ValueError("two clients have the same transport key")
        return Members(Roster(keys), transport)
    except (KeyError, TypeError, ValueError, AttributeError, binascii.Error) as error:
        raise KeyFileError(f"{path}: not a roster: {error}") from error


def read_identity(folder: Path, name: str) -> Identity:
    """The identity in `folder`; raises `KeyFileError`."""
    key = read_private(folder / IDENTITY)
    if not isinstance(key, Ed25519PrivateKey):
        raise KeyFileError(f"{folder / IDENTITY}: not an Ed25519 key")
    return Identity(name, key.private_bytes_raw())


def read_site_keys(folder: Path, name: str) -> SiteKeys:
    """A site's keys; raises `KeyFileError`."""
    transport = read_private(folder / TRANSPORT)
    if not isinstance(transport, ec.EllipticCurvePrivateKey):
        raise KeyFileError(f"{folder / TRANSPORT}: not an elliptic-curve key")
    return SiteKeys(read_identity(folder, name), transport)


def read_certificate(path: Path) -> x509.Certificate:
    """A certificate; raises `KeyFileError`."""
    try:
        with path.open("rb") as file:
            return x509.load_pem_x509_certificate(file.read(_LARGEST_FILE))
    except OSError as error:
        raise KeyFileError(f"{path}: cannot be read: {error.strerror}; see fedtune keys") from error
    except ValueError as error:
        raise KeyFileError(f"{path}: not a certificate in PEM form") from error


def public_der(key: ec.EllipticCurvePrivateKey) -> bytes:
    """The public half, as the roster has it."""
    return key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def check_private(path: Path) -> None:
    """Raise `KeyFileError` unless `path` is a file that its owner alone can read."""
    try:
        status = path.stat()
    except OSError as error:
        raise KeyFileError(f"{path}: cannot be read: {error.strerror}; see fedtune keys") from error
    if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise KeyFileError(f"{path}: others can read this private key; chmod 600 {path}")
    if hasattr(os, "geteuid") and status.st_uid != os.geteuid():
        raise KeyFileError(f"{path}: this private key belongs to another user")


def read_private(path: Path) -> object:
    """The private key in the file `path`; raises `KeyFileError`, also if others can read it."""
    check_private(path)
    try:
        with path.open("rb") as file:
            return serialization.load_pem_private_key(file.read(_LARGEST_FILE), None)
    except (OSError, ValueError, TypeError) as error:
        raise KeyFileError(f"{path}: not a private key in PEM form") from error


def _make_folder(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise KeyFileError(
            f"{folder}: there are files already; keys are never overwritten, take another folder"
        )
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)


def _transport_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


def _private_pem(key: ec.EllipticCurvePrivateKey | Ed25519PrivateKey) -> bytes:
    return key.private_bytes(
        _PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _site_signed(name: str, transport: bytes) -> bytes:
    return transcript("site keys", [name.encode(), transport])


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _host_names(hosts: Sequence[str]) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName([_general_name(host) for host in hosts])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not _HOST.fullmatch(host):
        raise KeyFileError(
            f"--host {host!r}: neither a name in ASCII, without a port, nor an address"
        )
    return x509.DNSName(host)


def _names_of(certificate: x509.Certificate, path: Path) -> x509.SubjectAlternativeName:
    try:
        return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound as error:
        raise KeyFileError(f"{path}: it names no hosts; say them with --host") from error


def _server_certificate(
    names: x509.SubjectAlternativeName,
    key: ec.EllipticCurvePublicKey,
    ca: x509.Certificate,
    authority: ec.EllipticCurvePrivateKey,
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    # One that outlives its authority is good for nothing in that time.
    end = min(now + datetime.timedelta(days=SERVER_DAYS), ca.not_valid_after_utc)
    return (
        _certificate(_name("fedtune server"), ca.subject, key, now, end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(sign_certificates=False), critical=True)
        .add_extension(names, critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()),
            critical=False,
        )
        .sign(authority, hashes.SHA256())
    )


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    now: datetime.datetime,
    end: datetime.datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        # A site whose clock is a little behind accepts it too.
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(end)
    )


def _usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        encipher_only=False,
        decipher_only=False,
    )
