"""A federation of real processes: a server, sites, TLS, masks, kills; and who is not let in."""

from __future__ import annotations

import datetime
import json
import os
import re
import signal
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from deployed import SITES, Federation
from e2e_helpers import (
    Command,
    adapter_bytes,
    read_metrics,
    read_summary,
    wait_gone,
    wait_until,
)
from prometheus_client.parser import text_string_to_metric_families

from fedtune.deploy.keys import make_roster, make_server_keys
from fedtune.secagg.keys import SERVER


@pytest.fixture(scope="module")
def simulated(
    make_federation: Callable[..., Federation], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same federation, simulated on this machine."""
    return make_federation().simulate(tmp_path_factory.mktemp("simulated"))


def test_a_deployed_run_ends_with_the_adapter_of_the_simulated_one(
    make_federation: Callable[..., Federation], simulated: Path
) -> None:
    """Over sockets and TLS, in eight processes, bit for bit; two sites end in between.

    One site is the installed command as a person starts it; that imports torch for seconds.
    """
    federation = make_federation()
    server = federation.server()
    late = federation.client("clinic-1")
    clients = {name: federation.warm_client(name) for name in ("clinic-0", "clinic-2")}
    wait_until(lambda: "round 1: trained" in late.stderr, "a site to have trained")
    # The process that talks to the network holds neither data nor model.
    maps = Path(f"/proc/{late.pid}/maps").read_text()
    assert "libtorch" not in maps
    late.kill()
    # A site whose audit log is not its own any more does nothing more, until it is started again.
    with federation.audit("clinic-2").open("ab") as file:
        file.write(b"?")
    again = federation.warm_client("clinic-1")
    assert clients["clinic-2"].wait() == 1
    assert "somebody else has changed or removed it" in clients["clinic-2"].stderr
    restarted = federation.warm_client("clinic-2")
    scrapes = _scrapes_until_the_end(federation, server)
    assert server.wait() == 0, server.stderr
    for client in (clients["clinic-0"], again, restarted):
        assert client.wait() == 0, client.stderr

    assert adapter_bytes(federation.run) == adapter_bytes(simulated)
    summary = read_summary(federation.run)
    assert (summary["status"], summary["rounds"], summary["masked"]) == ("finished", 3, True)
    assert summary["final"]["accuracy"] == read_summary(simulated)["final"]["accuracy"]
    metrics = read_metrics(federation.run)
    assert [record["round"] for record in metrics] == [1, 2, 3]
    assert all(record["clients"] == list(SITES) for record in metrics)
    _check_scrapes(scrapes, metrics)
    assert server.stdout.startswith("finished: 3 of 3 rounds, accuracy ")
    assert _unexpected(server.stderr) == []
    # Nothing was wrong, but that a site may have been killed in the middle of a request.
    log = (federation.run / "superlink.log").read_text().splitlines()
    assert [line for line in log if not line.rstrip().endswith("ClientDisconnect]")] == []

    # What the server's log says is what happened, and its sites were told its head.
    passport = json.loads((federation.run / "adapter" / "passport.json").read_text())
    entries = federation.verified(SERVER)
    rounds = [details for event, details in entries if event == "round-committed"]
    assert [details["round"] for details in rounds] == [1, 2, 3]
    assert all(details["counted"] == list(SITES) for details in rounds)
    assert rounds[-1]["adapter"] == passport["adapter_digest"]
    assert [details["config"] for event, details in entries if event == "server-started"] == [
        passport["config_digest"]
    ]
    assert entries[-1] == ("run-ended", {"rounds": 3, "status": "finished"})
    [head] = re.findall(r"head of the server's audit log: (\S+)", again.stderr)
    assert head in server.stderr
    assert federation.verify(SERVER, "--head", head)[0] == 0
    # And each site's log what that site was asked, whatever became of its process.
    for name in SITES:
        entries = federation.verified(name)
        started = [details for event, details in entries if event == "site-started"]
        assert len(started) == (1 if name == "clinic-0" else 2)
        assert {details["config"] for details in started} == {passport["config_digest"]}
        assert {details["roster"] for details in started} == {federation.roster.roster.digest.hex()}
        trained = [
            d["round"]
            for event, d in entries
            if event == "request-answered" and d["request"] == "train"
        ]
        assert sorted(set(trained)) == [1, 2, 3]
        assert [details["bytes"] for event, details in entries if event == "torn-line-removed"] == (
            [1] if name == "clinic-2" else []
        )
    assert federation.compare("clinic-2") == {"counted": [1, 2, 3], "agree": True}


def _scrapes_until_the_end(federation: Federation, server: Command) -> list[dict[str, float]]:
    """What `/metrics` says from now on, read by Prometheus' own parser."""
    scrapes = []
    while server.handle.wait(0.03) is None:
        if answer := federation.ask("/metrics"):
            assert answer.status_code == 200
            families = text_string_to_metric_families(answer.text)
            samples = (sample for family in families for sample in family.samples)
            scrapes.append(
                {"".join((s.name, *s.labels.values())): s.value for s in samples if s.value >= 0}
            )
    return scrapes


def _check_scrapes(scrapes: list[dict[str, float]], metrics: list[dict[str, Any]]) -> None:
    """Each says of the rounds that it knows what metrics.jsonl says of them."""
    seen = set()
    for scrape in scrapes:
        committed = int(scrape["fedtune_rounds_committed_total"])
        seen.add(committed)
        known = metrics[:committed]
        assert scrape["fedtune_received_bytes_total"] == sum(r["bytes_up"] for r in known)
        assert scrape["fedtune_sent_bytes_total"] == sum(r["bytes_down"] for r in known)
        assert scrape["fedtune_round_seconds_count"] == committed
        seconds, trained = (sum(r[key] for r in known) for key in ("seconds", "train_seconds"))
        assert scrape["fedtune_round_seconds_sum"] == pytest.approx(seconds)
        assert scrape["fedtune_train_seconds_total"] == pytest.approx(trained)
        assert scrape["fedtune_round"] in (committed, committed + 1)
        assert scrape["fedtune_clients_registered"] == len(SITES)
        connected = sum(scrape[f"fedtune_client_connected{name}"] for name in SITES)
        assert connected == scrape["fedtune_clients_connected"]
    assert {1, 2} <= seen
    assert max(scrape["fedtune_clients_connected"] for scrape in scrapes) == len(SITES)


def _unexpected(text: str) -> list[str]:
    """Lines of a server that are none of those that a person should see in a whole run."""
    known = re.compile(
        r"note: loading the base model |listening at |/health and /metrics at http://127|"
        r"note: head of the server's audit log: |going on after round |"
        r"\d of 3 clients are connected|waiting for clients, |round \d/3: |"
        r"note: round \d: .* trying again"  # on a slow machine, after a site was killed
    )
    return [line for line in text.splitlines() if not known.match(line)]


def test_a_server_that_is_killed_goes_on(
    make_federation: Callable[..., Federation], simulated: Path
) -> None:
    """Once before anything was committed, once in the middle of the second round."""
    federation = make_federation()
    server = federation.server()
    clients = [federation.warm_client(name) for name in SITES]
    for moment in ("round 1: trained", "round 2: trained"):
        wait_until(lambda m=moment: m in clients[0].stderr, moment)
        server = federation.restart_server(server)
    assert server.wait() == 0, server.stderr
    for client in clients:
        assert client.wait() == 0, client.stderr
    assert adapter_bytes(federation.run) == adapter_bytes(simulated)
    assert "going on after round 1" in server.stderr
    entries = federation.verified(SERVER)
    rounds = [details["round"] for event, details in entries if event == "round-committed"]
    assert rounds == [1, 2, 3]
    resumed = [d["resumed-after-round"] for event, d in entries if event == "server-started"]
    assert resumed == [0, 0, 1]


def test_who_comes_and_goes_is_told_and_so_is_the_end_of_the_network(
    make_federation: Callable[..., Federation],
) -> None:
    federation = make_federation()
    server = federation.server()
    wait_until(lambda: federation.health().get("state") == "waiting", "the server to wait")
    assert federation.health()["missing"] == list(SITES)
    guests = [federation.warm_client(name) for name in SITES[:2]]
    wait_until(lambda: federation.health()["connected"] == list(SITES[:2]), "two sites")
    workers = [worker for guest in guests for worker in guest.workers()]
    assert len(workers) == 2
    os.killpg(guests[0].pid, signal.SIGTERM)  # as a service manager does
    guests[1].interrupt()
    assert [guest.wait() for guest in guests] == [0, 130]
    for guest in guests:
        assert [line.split()[1] for line in guest.stderr.splitlines()][-1] == "stopped"
        assert len(guest.stderr.splitlines()) == 3, guest.stderr
    wait_gone(workers)
    wait_until(lambda: federation.health()["missing"] == list(SITES), "both sites to be gone")
    assert "\n0 of 3 clients are connected, not clinic-0" in server.stderr

    [link] = server.workers()
    os.kill(link, signal.SIGSTOP)
    answer = federation.ask("/health")
    os.kill(link, signal.SIGCONT)
    assert answer is not None
    assert answer.status_code == 503
    assert answer.json()["reason"] == "Flower's SuperLink does not answer"
    wait_until(lambda: federation.health()["status"] == "ok", "the server to be well again")
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
    stranger = federation.warm_client("clinic-8")
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
    unknown, distrusting = federation.warm_client("clinic-9"), federation.warm_client("clinic-0")
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
            headers={"content-type": "application/protobuf"},
        )
        assert unsigned.status_code == 401
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
    late = federation.warm_client("clinic-0")
    assert late.wait() == 1
    assert "certificate has expired" in late.stderr
    [link] = server.workers()
    os.killpg(server.pid, signal.SIGTERM)  # as a service manager does: to all of its processes
    assert server.wait() == -signal.SIGTERM
    assert server.stderr.endswith(f"go on with: fedtune server {folder / 'federation.toml'}\n")
    wait_gone([link])


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
    client = federation.warm_client("clinic-0")
    assert client.wait() == 2
    assert "others can read this private key" in client.stderr
    assert "chmod 600" in client.stderr
