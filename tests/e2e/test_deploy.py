"""A federation of real processes: a server, sites, TLS, masks, kills; and who is not let in."""

from __future__ import annotations

import datetime
import os
import signal
import ssl
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from deployed import SITES, Federation, port_is_free
from e2e_helpers import adapter_bytes, read_metrics, read_summary, wait_until

from fedtune.deploy.keys import make_roster, make_server_keys


@pytest.fixture(scope="module")
def simulated(
    make_federation: Callable[..., Federation], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same federation, simulated on this machine."""
    return make_federation().simulate(tmp_path_factory.mktemp("simulated"))


def test_a_deployed_run_ends_with_the_adapter_of_the_simulated_one(
    make_federation: Callable[..., Federation], simulated: Path
) -> None:
    """Over sockets and TLS, in eight processes, bit for bit; one site is killed in between."""
    federation = make_federation()
    server = federation.server()
    clients = {name: federation.client(name) for name in SITES}
    late = clients["clinic-1"]
    wait_until(lambda: "round 1: trained" in late.stderr, "a site to have trained")
    # The process that talks to the network holds neither data nor model.
    maps = Path(f"/proc/{late.pid}/maps").read_text()
    assert "libtorch" not in maps
    late.kill()
    again = federation.client("clinic-1")
    assert server.wait() == 0, server.stderr
    for name in ("clinic-0", "clinic-2"):
        assert clients[name].wait() == 0, clients[name].stderr
    assert again.wait() == 0, again.stderr

    assert adapter_bytes(federation.run) == adapter_bytes(simulated)
    summary = read_summary(federation.run)
    assert (summary["status"], summary["rounds"], summary["masked"]) == ("finished", 3, True)
    assert summary["final"]["accuracy"] == read_summary(simulated)["final"]["accuracy"]
    metrics = read_metrics(federation.run)
    assert [record["round"] for record in metrics] == [1, 2, 3]
    assert all(record["clients"] == list(SITES) for record in metrics)


def test_a_server_that_is_killed_goes_on(
    make_federation: Callable[..., Federation], simulated: Path
) -> None:
    """Once before anything was committed, once in the middle of the second round."""
    federation = make_federation()
    server = federation.server()
    clients = [federation.client(name) for name in SITES]
    for moment in ("round 1: trained", "round 2: trained"):
        wait_until(lambda m=moment: m in clients[0].stderr, moment)
        server.kill()
        wait_until(lambda: port_is_free(federation.port), "Flower's process to end too")
        server = federation.server()
    assert server.wait() == 0, server.stderr
    for client in clients:
        assert client.wait() == 0, client.stderr
    assert adapter_bytes(federation.run) == adapter_bytes(simulated)
    assert "going on after round 1" in server.stderr


def test_a_server_whose_network_has_ended_says_so(
    make_federation: Callable[..., Federation],
) -> None:
    server = make_federation().server()
    wait_until(lambda: "listening at" in server.stderr, "the server to listen")
    [link] = server.workers()
    os.kill(link, signal.SIGKILL)
    assert server.wait() == 1
    assert "Flower's SuperLink has ended; see" in server.stderr
    assert "Traceback" not in server.stderr


def test_who_is_not_let_in_is_told_why(make_federation: Callable[..., Federation]) -> None:
    federation = make_federation()
    folder = federation.folder
    train = folder / "sites" / "clinic-0" / "train.jsonl"
    public = [folder / "sites" / name / "keys" / "public.toml" for name in SITES]

    # Not in the roster that it has: it does not even try.
    federation.make_site("clinic-8", train)
    stranger = federation.client("clinic-8")
    assert stranger.wait() == 2
    assert "there is no clinic-8 in it" in stranger.stderr

    # In a roster of its own: the server does not know it.
    guest = federation.make_site("clinic-9", train)
    site = folder / "sites" / "clinic-9"
    make_roster(site / "roster.toml", folder / "server-keys", [*public, guest])
    _edit(site / "client.toml", str(folder / "roster.toml"), "roster.toml")

    # Another authority vouches for the server, or the right one did until yesterday.
    make_server_keys(folder / "other-keys", ["localhost", "127.0.0.1"])
    _edit(
        folder / "sites" / "clinic-0" / "client.toml",
        str(folder / "server-keys" / "ca.crt"),
        str(folder / "other-keys" / "ca.crt"),
    )
    server = federation.server()
    wait_until(lambda: "listening at" in server.stderr, "the server to listen")
    unknown, distrusting = federation.client("clinic-9"), federation.client("clinic-0")
    assert unknown.wait() == 1
    assert "its roster has no such transport key" in unknown.stderr
    assert distrusting.wait() == 1
    assert "the server's certificate is not accepted" in distrusting.stderr
    for command in (stranger, unknown, distrusting):
        assert "Traceback" not in command.stderr

    # Of Flower's doors only those for sites are open, and not even all of them.
    context = ssl.create_default_context(cafile=str(folder / "server-keys" / "ca.crt"))
    with httpx.Client(verify=context) as http:
        address = f"https://localhost:{federation.port}"
        for path in (
            "/v1/control/start-run",
            "/v1/control/list-runs",
            "/v1/control/register-node",
            "/v1/runtime/acquire-task",
            "/v1/runtime/pull-messages",
            "/v1/fleet/register-node",
            "/v1/fleet/get-fab",
            "/docs",
            "/openapi.json",
            "/",
        ):
            assert http.post(address + path, content=b"").status_code == 404, path
        unsigned = http.post(
            f"{address}/v1/fleet/pull-messages",
            content=b"",
            headers={"content-type": "application/x-protobuf"},
        )
        assert unsigned.status_code in (400, 401, 415, 422)
        endless = http.post(f"{address}/v1/fleet/pull-messages", content=iter([b"a", b"b"]))
        assert endless.status_code == 413
    server.interrupt()
    assert server.wait() == 130
    assert "go on with: fedtune server" in server.stderr

    _expire(folder / "server-keys")
    _edit(
        folder / "sites" / "clinic-0" / "client.toml",
        str(folder / "other-keys" / "ca.crt"),
        str(folder / "server-keys" / "ca.crt"),
    )
    server = federation.server()
    wait_until(lambda: "listening at" in server.stderr, "the server to listen again")
    late = federation.client("clinic-0")
    assert late.wait() == 1
    assert "certificate has expired" in late.stderr
    server.kill()


def _edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def _expire(keys: Path) -> None:
    """Sign the server's certificate anew, with an end that lies in the past."""
    authority = serialization.load_pem_private_key((keys / "ca.key").read_bytes(), None)
    old = x509.load_pem_x509_certificate((keys / "server.crt").read_bytes())
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(old.subject)
        .issuer_name(old.issuer)
        .public_key(old.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=30))
        .not_valid_after(now - datetime.timedelta(days=1))
    )
    for extension in old.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    certificate = builder.sign(authority, hashes.SHA256())
    (keys / "server.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


def test_a_key_that_others_can_read_is_not_used(
    make_federation: Callable[..., Federation],
) -> None:
    federation = make_federation()
    key = federation.folder / "sites" / "clinic-0" / "keys" / "identity.key"
    assert key.stat().st_mode & 0o777 == 0o600
    key.chmod(0o644)
    client = federation.client("clinic-0")
    assert client.wait() == 2
    assert "others can read this private key" in client.stderr
    assert "chmod 600" in client.stderr
