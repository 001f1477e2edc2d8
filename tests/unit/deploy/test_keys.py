"""Keys, certificates and the roster: made once, read strictly, for their owner alone."""

from __future__ import annotations

import datetime
import ipaddress
import stat
import tomllib
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import PolicyBuilder, Store

from fedtune.deploy import keys
from fedtune.errors import ConfigError, KeyFileError
from fedtune.secagg.keys import SERVER


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A server's keys and those of three sites."""
    keys.make_server_keys(tmp_path / "server", ["fed.example.org", "10.0.0.7", "::1"])
    for name in ("a", "b", "c"):
        keys.make_site_keys(tmp_path / name, name)
    return tmp_path


def _public(folder: Path, *names: str) -> list[Path]:
    return [folder / name / keys.PUBLIC for name in names]


def test_the_certificate_is_good_for_its_hosts_and_no_other(folder: Path) -> None:
    """By cryptography's own path building (RFC 5280)."""
    authority = x509.load_pem_x509_certificate((folder / "server/ca.crt").read_bytes())
    leaf = x509.load_pem_x509_certificate((folder / "server/server.crt").read_bytes())
    for host, good in (("fed.example.org", True), ("other.example.org", False)):
        verifier = (
            PolicyBuilder().store(Store([authority])).build_server_verifier(x509.DNSName(host))
        )
        if good:
            assert verifier.verify(leaf, []) == [leaf, authority]
        else:
            with pytest.raises(x509.verification.VerificationError):
                verifier.verify(leaf, [])
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.7", "::1"]
    usage = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]
    basic = leaf.extensions.get_extension_for_class(x509.BasicConstraints).value
    assert not basic.ca


def test_private_keys_are_for_their_owner_alone(folder: Path) -> None:
    private = sorted(folder.rglob("*.key"))
    assert len(private) == 3 + 3 * 2
    assert {stat.S_IMODE(path.stat().st_mode) for path in private} == {0o600}
    public = "".join(path.read_text() for path in folder.rglob("*.toml"))
    for path in private:
        body = [line for line in path.read_text().splitlines() if "-----" not in line]
        assert not any(line in public for line in body)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o606, 0o601])
def test_a_key_that_others_can_read_is_refused(folder: Path, mode: int) -> None:
    (folder / "a" / keys.TRANSPORT).chmod(mode)
    with pytest.raises(KeyFileError, match="others can read"):
        keys.read_site_keys(folder / "a", "a")
    keys.read_site_keys(folder / "b", "b")


def test_keys_are_never_overwritten(folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(KeyFileError, match="never overwritten"):
        keys.make_site_keys(folder / "a", "a")
    with pytest.raises(KeyFileError, match="never overwritten"):
        keys.make_server_keys(folder / "server", ["x"])
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_roster_has_the_public_keys_of_all(folder: Path) -> None:
    members = keys.make_roster(folder / "roster.toml", folder / "server", _public(folder, *"abc"))
    assert list(members.roster.keys) == [SERVER, "a", "b", "c"]
    for name in "abc":
        own = keys.read_site_keys(folder / name, name)
        assert members.roster.keys[name] == own.identity.public_key
        assert members.transport[name] == keys.public_der(own.transport)
    server = keys.read_identity(folder / "server", SERVER)
    assert members.roster.keys[SERVER] == server.public_key
    again = keys.read_roster(folder / "roster.toml")
    assert again.roster.digest == members.roster.digest
    assert again.transport == members.transport
    # Another site, another roster.
    fewer = keys.make_roster(folder / "fewer.toml", folder / "server", _public(folder, *"ab"))
    assert fewer.roster.digest != members.roster.digest


@pytest.mark.parametrize("key", ["name", "identity", "transport", "signature"])
def test_a_public_file_that_was_changed_is_refused(folder: Path, key: str) -> None:
    """A site proves that it holds the identity, and binds name and transport key to it."""
    one, other = (path.read_text() for path in _public(folder, "a", "b"))
    theirs = tomllib.loads(other)[key]
    lines = [f'{key} = "{theirs}"' if line.startswith(key) else line for line in one.splitlines()]
    changed = folder / "changed.toml"
    changed.write_text("\n".join(lines))
    with pytest.raises(KeyFileError, match="it was changed"):
        keys.make_roster(folder / "roster.toml", folder / "server", [changed])
    assert not (folder / "roster.toml").exists()


def test_a_site_is_in_a_roster_once(folder: Path) -> None:
    with pytest.raises(KeyFileError, match="there is a site named a already"):
        keys.make_roster(folder / "roster.toml", folder / "server", _public(folder, "a", "a"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[server]\n",
        '[server]\nidentity = "00"\n[clients]\n',
        f'[server]\nidentity = "{"00" * 32}"\n',
        f'[server]\nidentity = "{"00" * 32}"\nclients = 3\n',
        f'[server]\nidentity = "{"00" * 32}"\n[clients.a]\nidentity = "{"11" * 32}"\n',
        f'[server]\nidentity = "{"00" * 32}"\n[clients.a]\nidentity = "{"11" * 32}"\n'
        'transport = "AAAA"\n',
    ],
)
def test_what_is_no_roster_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "roster.toml"
    path.write_text(text)
    with pytest.raises(KeyFileError, match="not a roster"):
        keys.read_roster(path)


def test_what_cannot_be_read_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        keys.read_roster(folder / "missing.toml")
    (folder / "a" / keys.IDENTITY).write_bytes(b"not a key")
    with pytest.raises(KeyFileError, match="not a private key"):
        keys.read_identity(folder / "a", "a")
    (folder / "b" / keys.IDENTITY).unlink()
    with pytest.raises(KeyFileError, match="see fedtune keys"):
        keys.read_identity(folder / "b", "b")
    # An elliptic-curve key where an identity belongs, and the other way round.
    identity, transport = folder / "c" / keys.IDENTITY, folder / "c" / keys.TRANSPORT
    spare = identity.read_bytes()
    identity.write_bytes(transport.read_bytes())
    with pytest.raises(KeyFileError, match="not an Ed25519 key"):
        keys.read_identity(folder / "c", "c")
    transport.write_bytes(spare)
    with pytest.raises(KeyFileError, match="not an elliptic-curve key"):
        keys.read_site_keys(folder / "c", "c")


@pytest.mark.parametrize("name", ["", "a\nb", "x" * 257, "\x07"])
def test_names_of_sites_can_be_printed(tmp_path: Path, name: str) -> None:
    with pytest.raises(KeyFileError, match="is no name"):
        keys.make_site_keys(tmp_path / "keys", name)
    assert not (tmp_path / "keys").exists()


def test_transport_keys_are_of_the_curve_that_flower_knows(folder: Path) -> None:
    found = keys.read_site_keys(folder / "a", "a").transport
    assert isinstance(found.curve, ec.SECP384R1)


def _pem(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def _accepted(folder: Path, host: x509.GeneralName, when: datetime.datetime) -> bool:
    """Whether a site that has the authority's certificate takes the server's, by RFC 5280."""
    assert isinstance(host, (x509.DNSName, x509.IPAddress))
    authority, leaf = _pem(folder / "ca.crt"), _pem(folder / "server.crt")
    builder = PolicyBuilder().store(Store([authority])).time(when)
    try:
        builder.build_server_verifier(host).verify(leaf, [])
    except x509.verification.VerificationError:
        return False
    return True


def test_a_certificate_is_renewed_by_the_same_authority(folder: Path) -> None:
    """Sites that have ca.crt accept it, for the same hosts or for others, for longer."""
    server = folder / "server"
    before = {path.name: path.read_bytes() for path in server.iterdir()}
    name, other = x509.DNSName("fed.example.org"), x509.DNSName("new.example.org")
    address = x509.IPAddress(ipaddress.ip_address("10.0.0.7"))
    now = datetime.datetime.now(datetime.UTC)

    renewed = keys.renew_certificate(server)
    after = {path.name: path.read_bytes() for path in server.iterdir()}
    assert {key for key in before if before[key] != after[key]} == {"server.crt"}
    assert set(after) == set(before)
    assert _pem(server / "server.crt") == renewed
    assert _accepted(server, name, now)
    assert _accepted(server, address, now)
    assert _accepted(server, name, now + datetime.timedelta(days=396))
    assert not _accepted(server, name, now + datetime.timedelta(days=398))
    private = serialization.load_pem_private_key(after["server.key"], None)
    assert private.public_key() == renewed.public_key()

    keys.renew_certificate(server, ["new.example.org"])
    assert _accepted(server, other, now)
    assert not _accepted(server, name, now)
    # It is by the authority of this federation, and by no other that bears the same name.
    keys.make_server_keys(folder / "another", ["new.example.org"])
    (server / "ca.crt").write_bytes((folder / "another" / "ca.crt").read_bytes())
    assert not _accepted(server, other, now)


def test_a_certificate_does_not_outlive_its_authority(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "AUTHORITY_DAYS", 30)
    keys.make_server_keys(folder / "short", ["fed.example.org"])
    end = _pem(folder / "short" / "ca.crt").not_valid_after_utc
    assert keys.renew_certificate(folder / "short").not_valid_after_utc == end
    monkeypatch.setattr(keys, "AUTHORITY_DAYS", 0)
    keys.make_server_keys(folder / "over", ["fed.example.org"])
    with pytest.raises(KeyFileError, match="expired"):
        keys.renew_certificate(folder / "over")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("ca.key", None, "cannot be read"),
        ("ca.key", "another", "not the key of"),
        ("ca.key", b"no key", "not a private key"),
        ("ca.crt", None, "cannot be read"),
        ("ca.crt", b"no certificate", "not a certificate"),
        ("server.key", None, "cannot be read"),
        ("server.crt", None, "cannot be read"),
        ("server.crt", b"no certificate", "not a certificate"),
        ("server.crt", "ca.crt", "names no hosts"),
    ],
)
def test_a_certificate_is_not_renewed_from_files_that_do_not_fit(
    folder: Path, name: str, content: bytes | str | None, words: str
) -> None:
    server = folder / "server"
    if content is None:
        (server / name).unlink()
    elif content == "another":
        keys.make_server_keys(folder / "another", ["fed.example.org"])
        (server / name).write_bytes((folder / "another" / name).read_bytes())
    elif isinstance(content, str):
        (server / name).write_bytes((server / content).read_bytes())
    else:
        (server / name).write_bytes(content)
    before = {path: path.read_bytes() for path in server.iterdir()}
    with pytest.raises(KeyFileError, match=words):
        keys.renew_certificate(server)
    assert {path: path.read_bytes() for path in server.iterdir()} == before


@pytest.mark.parametrize("host", ["", "a b", "ü.example.org", "fed.example.org:9092", "x" * 300])
def test_what_is_no_host_is_refused(folder: Path, host: str) -> None:
    with pytest.raises(KeyFileError, match="--host"):
        keys.make_server_keys(folder / "new", [host])
    assert not (folder / "new").exists()
    with pytest.raises(KeyFileError, match="--host"):
        keys.renew_certificate(folder / "server", ["fed.example.org", host])


def test_a_long_host_name_is_as_good_as_a_short_one(folder: Path) -> None:
    host = ".".join(["x" * 60] * 4)
    keys.make_server_keys(folder / "long", [host])
    now = datetime.datetime.now(datetime.UTC)
    assert _accepted(folder / "long", x509.DNSName(host), now)
