"""Keys, certificates and the roster: there, private, and made for each other."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from fedtune.config import Listen
from fedtune.deploy.doctor.findings import Examination, Verdict
from fedtune.deploy.keys import (
    AUTHORITY,
    AUTHORITY_KEY,
    IDENTITY,
    SERVER_CERTIFICATE,
    SERVER_KEY,
    TRANSPORT,
    Members,
    check_private,
    read_certificate,
    read_identity,
    read_private,
    read_roster,
)
from fedtune.deploy.site_files import SiteFiles
from fedtune.errors import KeyFileError
from fedtune.secagg.keys import SERVER

WARN_DAYS = 30
_MAKE_KEYS = "see fedtune keys in docs/deployment.md"


@dataclass(frozen=True)
class SiteCredentials:
    """What of a site's keys is in order; None: it is not."""

    members: Members | None
    transport: ec.EllipticCurvePrivateKey | None
    authority: bytes | None  # PEM


def examine_site_keys(examination: Examination, files: SiteFiles) -> SiteCredentials:
    """A site's private keys, its roster, and the certificate that vouches for the server."""
    examination.begin("keys")
    folder = files.find(files.config.site.keys)
    _private(examination, [folder / IDENTITY, folder / TRANSPORT])
    members = examination.run("roster", lambda: _site_roster(files))
    transport = None
    if members is None:
        examination.skip("keys in the roster", "there is no roster", "solve that first")
    else:
        transport = examination.run("keys in the roster", lambda: _listed(files), _MAKE_KEYS)
    path = files.find(files.config.site.certificate)
    authority = examination.run("authority", lambda: _authority(path), "ask the operator for it")
    pem = authority.public_bytes(Encoding.PEM) if authority is not None else None
    return SiteCredentials(members, transport, pem)


def examine_server_keys(examination: Examination, folder: Path, listen: Listen) -> Members | None:
    """The server's private keys, its certificate and authority, and the roster."""
    examination.begin("keys")
    keys = folder / Path(listen.keys).expanduser()
    # The authority's key is wanted for new certificates only, and may be kept elsewhere.
    optional = [keys / AUTHORITY_KEY] if (keys / AUTHORITY_KEY).exists() else []
    _private(examination, [keys / IDENTITY, keys / SERVER_KEY, *optional])
    path = folder / Path(listen.roster).expanduser()
    members = examination.run("roster", lambda: _server_roster(path, keys), _MAKE_KEYS)
    authority = examination.run("authority", lambda: _authority(keys / AUTHORITY), _MAKE_KEYS)
    if authority is None:
        examination.skip("certificate", "there is no authority to check it", "solve that first")
    else:
        examination.run(
            "certificate", lambda: _certificate(keys, authority, listen.host), _MAKE_KEYS
        )
    return members


def _private(examination: Examination, paths: Iterable[Path]) -> None:
    for path in paths:
        examination.run("private key", partial(_checked, path), _MAKE_KEYS)


def _checked(path: Path) -> Verdict[None]:
    check_private(path)
    return Verdict("ok", f"only its owner can read {path.name}")


def _site_roster(files: SiteFiles) -> Verdict[Members]:
    members = files.members()
    digest, pinned = members.roster.digest.hex(), files.config.policy.roster_digest
    text = f"{members.roster.clients} sites, digest {digest}"
    if pinned is None:
        return Verdict(
            "warning",
            f"{text}, and nothing says that it is the right one",
            "compare it with what the operator says on another way than the file, and set "
            "policy.roster-digest to it",
            value=members,
        )
    if pinned != digest:
        words = f"{text}, but policy.roster-digest is {pinned}"
        return Verdict("problem", words, "ask the operator which is right, by telephone")
    return Verdict("ok", f"{text}, as policy.roster-digest says", value=members)


def _listed(files: SiteFiles) -> Verdict[ec.EllipticCurvePrivateKey]:
    keys = files.keys()
    words = f"the roster has both keys of {files.config.site.name}"
    return Verdict("ok", words, value=keys.transport)


def _server_roster(path: Path, keys: Path) -> Verdict[Members]:
    members = read_roster(path)
    if members.roster.keys[SERVER] != read_identity(keys, SERVER).public_key:
        raise KeyFileError(f"{path}: made for another server; make it with fedtune keys roster")
    digest = members.roster.digest.hex()
    return Verdict("ok", f"{members.roster.clients} sites, digest {digest}", value=members)


def _authority(path: Path) -> Verdict[x509.Certificate]:
    certificate = read_certificate(path)
    try:
        authority = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (x509.ExtensionNotFound, ValueError):
        authority = False
    if not authority:
        return Verdict(
            "problem",
            f"{path.name} is not the certificate of an authority",
            "it is called ca.crt in the server's keys",
        )
    return _dates(certificate, path.name)


def _certificate(keys: Path, authority: x509.Certificate, host: str) -> Verdict[x509.Certificate]:
    path = keys / SERVER_CERTIFICATE
    certificate, key = read_certificate(path), read_private(keys / SERVER_KEY)
    public = getattr(key, "public_key", lambda: None)()
    if public != certificate.public_key():
        words = f"{path.name} was made for another key than {SERVER_KEY}"
        return Verdict("problem", words, "put back the pair that was made together")
    try:
        certificate.verify_directly_issued_by(authority)
    except (InvalidSignature, ValueError, TypeError):
        words = f"{path.name} is not signed by {AUTHORITY}: sites will not trust it"
        return Verdict("problem", words, "put back the pair that was made together")
    names = _names_of(certificate)
    dates = _dates(certificate, f"{path.name}, for {', '.join(names) or 'no name'},")
    if dates.status == "ok" and not _anywhere(host) and host not in names:
        return Verdict(
            "warning",
            f"{path.name} is for {', '.join(names) or 'no name'}, but the server listens at {host}",
            "sites must use one of those names; make the certificate for more with --host",
        )
    return dates


def _dates(certificate: x509.Certificate, name: str) -> Verdict[x509.Certificate]:
    now = datetime.datetime.now(datetime.UTC)
    left = (certificate.not_valid_after_utc - now) / datetime.timedelta(days=1)
    numbers = {"days_left": left}
    if certificate.not_valid_before_utc > now:
        begins = certificate.not_valid_before_utc.date()
        words = f"{name} is not valid before {begins}, and this machine's clock says {now.date()}"
        return Verdict("problem", words, "set this machine's clock", numbers)
    if left < 0:
        words = f"{name} has expired on {certificate.not_valid_after_utc.date()}"
        return Verdict("problem", words, _RENEW, numbers)
    if left < WARN_DAYS:
        return Verdict("warning", f"{name} ends in {left:.0f} days", _RENEW, numbers, certificate)
    return Verdict("ok", f"{name} is valid for {left:.0f} days", "", numbers, certificate)


_RENEW = "the operator renews it with fedtune keys certificate; compare this machine's clock too"


def _names_of(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [
        *names.get_values_for_type(x509.DNSName),
        *map(str, names.get_values_for_type(x509.IPAddress)),
    ]


def _anywhere(host: str) -> bool:
    """Whether a server that listens at `host` listens at all of its addresses."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False
