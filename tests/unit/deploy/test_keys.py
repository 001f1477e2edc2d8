"""Keys, certificates and the roster: made once, read strictly, for their owner alone."""

from __future__ import annotations

import stat
import tomllib
from pathlib import Path

import pytest
from cryptography import x509
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
