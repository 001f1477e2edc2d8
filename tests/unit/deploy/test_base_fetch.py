"""A base model from the server: a real SuperLink with TLS, broken lines, and what must not come."""

from __future__ import annotations

import datetime
import hashlib
import json
import secrets
import shutil
import socket
import ssl
import threading
from base64 import b64encode
from collections import namedtuple
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
import tomli_w
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message

from fedtune.base.resolve import BaseFile, digest_base, digest_files, is_base_file, list_base
from fedtune.deploy import base_fetch
from fedtune.deploy.base_fetch import LARGEST_LIST, PREFIX, fetch_base
from fedtune.deploy.keys import (
    AUTHORITY,
    SERVER_CERTIFICATE,
    SERVER_KEY,
    make_roster,
    make_server_keys,
    make_site_keys,
    read_site_keys,
)
from fedtune.deploy.site_files import SiteFiles
from fedtune.deploy.superlink import Doors, SuperLinkProcess
from fedtune.errors import BaseModelError, ServerRefused
from fedtune.flower.network import HEARTBEAT_SECONDS, SignedTime
from fedtune.tls import tls_context

WEIGHTS = bytes(range(256)) * 12_000  # 3 MB


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of the right names; nothing in this file loads them."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "config.json").write_text('{"model_type": "bert"}')
    (folder / "vocab.txt").write_text("a\nb\n")
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "secret.txt").write_text("not a part of the model")
    return folder


class Server:
    """A server that offers a folder as the base model of a digest."""

    def __init__(self, folder: Path, base: Path | None, digest: str) -> None:
        self.folder = folder
        keys = folder / "server"
        if not keys.exists():
            make_server_keys(keys, ["127.0.0.1"])
            make_site_keys(folder / "keys", "a")
        members = make_roster(folder / "roster.toml", keys, [folder / "keys" / "public.toml"])
        doors = Doors(
            "127.0.0.1",
            0,
            keys / SERVER_CERTIFICATE,
            keys / SERVER_KEY,
            None,
            folder / f"{secrets.token_hex(4)}.log",  # several may run at a time
            base,
            digest,
        )
        self.link = SuperLinkProcess(doors, members.transport)

    def site(self, digest: str, port: int = 0) -> SiteFiles:
        """A site without the base model."""
        federation = {
            "base": {"path": "nowhere/at-all/here", "digest": digest},
            "data": {"labels": ["x", "y"]},
        }
        (self.folder / "federation.toml").write_text(tomli_w.dumps(federation))
        site = {"name": "a", "server": f"127.0.0.1:{port or self.link.port}"}
        (self.folder / "client.toml").write_text(tomli_w.dumps({"site": site}))
        return SiteFiles.read(self.folder / "client.toml")

    def fetch(self, files: SiteFiles, keys: str = "keys") -> list[str]:
        said: list[str] = []
        authority = (self.folder / "server" / AUTHORITY).read_bytes()
        transport = read_site_keys(self.folder / keys, "a").transport
        fetch_base(files, authority, transport, said.append)
        return said


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("offers"), base, digest_base(base))
    yield made
    made.link.close()


@pytest.fixture(autouse=True)
def nothing_fetched(server: Server) -> None:
    shutil.rmtree(server.folder / "models", ignore_errors=True)


def test_what_is_fetched_is_the_base_model_and_nothing_else(server: Server, base: Path) -> None:
    digest = digest_base(base)
    files = server.site(digest)
    assert not files.has_base()
    assert "fetching 3 MB" in server.fetch(files)[0]
    folder = server.folder / "models" / digest
    assert list_base(folder) == list_base(base)
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "vocab.txt",
    }
    assert {path.name for path in (server.folder / "models").iterdir()} == {digest}

    # Once: from now on it is found, and nobody is asked.
    again = server.site(digest, port=1)
    assert Path(again.federation.base.path) == folder
    assert server.fetch(again) == []


def test_a_site_that_has_it_does_not_ask(server: Server, base: Path) -> None:
    files = server.site(digest_base(base), port=1)
    text = (server.folder / "client.toml").read_text()
    (server.folder / "client.toml").write_text(f"{text}\n[machine]\nbase = '{base}'\n")
    files = SiteFiles.read(server.folder / "client.toml")
    assert server.fetch(files) == []
    (server.folder / "client.toml").write_text(f"{text}\n[machine]\nbase = '{base}-not'\n")
    with pytest.raises(BaseModelError, match="no such folder"):
        server.fetch(SiteFiles.read(server.folder / "client.toml"))


@pytest.mark.parametrize("runtime", ["ort", "stepgraph"])
def test_a_site_that_trains_on_artifacts_does_not_ask(server: Server, runtime: str) -> None:
    """They hold what it needs of the base model, which may be too large for it."""
    server.site("ab" * 32, port=1)
    with (server.folder / "client.toml").open("a") as file:
        file.write(f"\n[machine]\nruntime = '{runtime}'\n")
    files = SiteFiles.read(server.folder / "client.toml")
    assert not files.has_base()
    assert server.fetch(files) == []
    assert not (server.folder / "models").exists()


class _Cutter:
    """Carries bytes to a port, and cuts each connection after so many from there."""

    def __init__(self, port: int, after: int) -> None:
        self._port, self._after, self.carried, self.cuts = port, after, 0, 0
        self._door = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._door.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            near = self._door.accept()[0]
            far = socket.create_connection(("127.0.0.1", self._port))
            threading.Thread(target=self._carry, args=(near, far, 1 << 40), daemon=True).start()
            threading.Thread(target=self._carry, args=(far, near, self._after), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, left: int) -> None:
        with suppress(OSError):
            while left > 0 and (data := source.recv(min(left, 65536))):
                left -= len(data)
                sink.sendall(data)
                self.carried += len(data)
            self.cuts += left <= 0
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def test_a_broken_line_costs_only_what_was_lost(
    server: Server, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_fetch, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(base_fetch, "PIECE", 1 << 16)
    cutter = _Cutter(server.link.port, 700_000)
    digest = digest_base(base)
    server.fetch(server.site(digest, cutter.port))
    assert digest_base(server.folder / "models" / digest) == digest
    assert cutter.cuts >= 3
    # What was in flight when a connection broke comes twice, and handshakes cost a little.
    assert cutter.carried < len(WEIGHTS) + (cutter.cuts + 1) * 100_000


def test_a_fetch_that_was_ended_goes_on_where_it_was(server: Server, base: Path) -> None:
    digest = digest_base(base)
    begun = server.folder / "models" / f"{digest}.part"
    begun.mkdir(parents=True)
    (begun / "model.safetensors").write_bytes(WEIGHTS[:-1000])
    cutter = _Cutter(server.link.port, 1 << 40)
    server.fetch(server.site(digest, cutter.port))
    assert cutter.carried < 50_000
    assert digest_base(server.folder / "models" / digest) == digest


def test_a_file_that_is_not_the_agreed_one_is_not_kept(server: Server, base: Path) -> None:
    digest = digest_base(base)
    begun = server.folder / "models" / f"{digest}.part"
    begun.mkdir(parents=True)
    (begun / "model.safetensors").write_bytes(b"\xff" * 1000)
    with pytest.raises(BaseModelError, match="not what base"):
        server.fetch(server.site(digest))
    assert not (begun / "model.safetensors").exists()
    assert not (server.folder / "models" / digest).exists()
    server.fetch(server.site(digest))
    assert digest_base(server.folder / "models" / digest) == digest


def test_another_model_is_refused_before_anything_is_written(
    server: Server, base: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(base, other)
    (other / "config.json").write_text('{"model_type": "gpt2"}')
    digest = digest_base(base)
    liar = Server(server.folder, other, digest)
    try:
        with pytest.raises(ServerRefused, match=f"{digest_base(other)}, base.digest is {digest}"):
            liar.fetch(liar.site(digest))
    finally:
        liar.link.close()
    assert not (server.folder / "models").exists()


def test_what_is_not_offered(server: Server, base: Path) -> None:
    with pytest.raises(ServerRefused, match=r"machine\.base"):
        server.fetch(server.site("0" * 64))
    nothing = Server(server.folder, None, "")
    try:
        with pytest.raises(ServerRefused, match=r"server\.offer-base"):
            nothing.fetch(nothing.site(digest_base(base)))
    finally:
        nothing.link.close()


def test_whoever_is_not_in_the_roster_gets_nothing(server: Server, base: Path) -> None:
    if not (server.folder / "other-keys").exists():
        make_site_keys(server.folder / "other-keys", "a")
    with pytest.raises(ServerRefused, match="no such transport key"):
        server.fetch(server.site(digest_base(base)), "other-keys")
    context = tls_context((server.folder / "server" / AUTHORITY).read_bytes())
    url = f"https://127.0.0.1:{server.link.port}{PREFIX}{digest_base(base)}"
    with httpx.Client(verify=context) as http:
        for path in ("", "/model.safetensors"):
            assert http.get(f"{url}{path}").status_code == 401
    key = read_site_keys(server.folder / "keys", "a").transport
    with httpx.Client(verify=context, auth=SignedTime(key)) as http:
        assert http.get(f"{url}/vocab.txt").text == "a\nb\n"
        for path in ("/secret.txt", "/../secret.txt", "/%2e%2e%2flog", "/..%2f..%2flog", "/"):
            assert http.get(f"{url}{path}").status_code in (307, 404), path
        assert http.post(url, content=b"").status_code == 405


def signed(
    key: ec.EllipticCurvePrivateKey,
    owner: ec.EllipticCurvePrivateKey,
    time: datetime.datetime,
    said: datetime.datetime | None = None,
) -> dict[str, str]:
    """Headers that speak for `owner` and were signed by `key`; another time may be `said`."""
    signature = sign_message(key, time.isoformat().encode())
    return {
        FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(public_key_to_bytes(owner.public_key())).decode(),
        FLEET_HTTP_SIGNATURE_HEADER: b64encode(signature).decode(),
        TIMESTAMP_HEADER: (said or time).isoformat(),
    }


def test_nobody_speaks_for_a_site_without_its_key(server: Server, base: Path) -> None:
    """Its public key is known to others, and so may be what it signed some minutes ago."""
    key = read_site_keys(server.folder / "keys", "a").transport
    other = ec.generate_private_key(ec.SECP384R1())
    now = datetime.datetime.now(datetime.UTC)
    minutes = datetime.timedelta(minutes=1)
    good = signed(key, key, now)
    bad = {
        "another's signature": signed(other, key, now),
        "of another time": signed(key, key, now - minutes, said=now),
        "of long ago": signed(key, key, now - 6 * minutes),
        "of the future": signed(key, key, now + minutes),
        "no signature": good | {FLEET_HTTP_SIGNATURE_HEADER: ""},
        "none at all": {},
        "another's key": signed(other, other, now),
    }
    offer = f"{PREFIX}{digest_base(base)}"
    public = public_key_to_bytes(key.public_key())
    activate = ActivateNodeRequest(public_key=public, heartbeat_interval=HEARTBEAT_SECONDS)
    content = {"content-type": "application/protobuf"}
    authority = (server.folder / "server" / AUTHORITY).read_bytes()
    address = f"https://127.0.0.1:{server.link.port}"

    def answers(headers: dict[str, str]) -> list[int]:
        """To what the base model's files are, to one of them, and to being a site."""
        return [
            http.get(offer, headers=headers).status_code,
            http.get(f"{offer}/vocab.txt", headers=headers).status_code,
            http.post(
                "/v1/fleet/activate-node",
                content=activate.SerializeToString(),
                headers=content | headers,
            ).status_code,
        ]

    with httpx.Client(verify=tls_context(authority), base_url=address) as http:
        assert answers(good) == [200, 200, 200]
        found = {name: answers(headers) for name, headers in bad.items()}
    assert found == {name: [401, 401, 401] for name in bad}


class Liar:
    """A server that the site's authority vouches for, and that says whatever it likes."""

    def __init__(self, folder: Path, answers: dict[str, bytes]) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()  # no length: it ends when the connection does
                with suppress(OSError):
                    self.wfile.write(answers[self.path])

            def log_message(self, *_arguments: object) -> None:
                pass

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / SERVER_CERTIFICATE, folder / SERVER_KEY)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self) -> Liar:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def lie(server: Server, files: list[BaseFile], content: bytes = b"", more: bytes = b"") -> str:
    """Why a site refuses a list of files that has the agreed digest, with that content."""
    digest = digest_files(files)
    listed = json.dumps([asdict(file) for file in files]).encode() + more
    answers = {f"{PREFIX}{digest}": listed}
    answers |= {f"{PREFIX}{digest}/{file.name}": content for file in files}
    with Liar(server.folder / "server", answers) as liar:
        with pytest.raises(ServerRefused) as refused:
            server.fetch(server.site(digest, liar.port))
        return str(refused.value)


@pytest.mark.parametrize(
    ("name", "size"), [("../keys/identity.key", 4), ("run.py", 4), ("model.safetensors", -1)]
)
def test_what_is_no_file_of_a_model_is_not_written(server: Server, name: str, size: int) -> None:
    """Also where the federation's own configuration has the digest of it."""
    before = (server.folder / "keys" / "identity.key").read_bytes()
    content = b"evil"
    file = BaseFile(name, size, hashlib.sha256(content).hexdigest())
    assert lie(server, [file], content) == f"{name!r} is no file of a base model"
    assert not (server.folder / "models").exists()
    assert (server.folder / "keys" / "identity.key").read_bytes() == before


def test_a_file_without_end_does_not_fill_the_disk(server: Server) -> None:
    content = bytes(5_000_000)
    file = BaseFile("model.safetensors", 1000, hashlib.sha256(content).hexdigest())
    assert lie(server, [file], content) == "model.safetensors: longer than the server said"
    assert sum(path.stat().st_size for path in (server.folder / "models").rglob("*.s*")) <= 1000


def test_a_list_without_end_is_not_read(server: Server) -> None:
    file = BaseFile("model.safetensors", 4, hashlib.sha256(b"good").hexdigest())
    assert "has no end" in lie(server, [file], b"good", more=b" " * (2 * LARGEST_LIST))


def test_a_disk_that_is_too_small_is_told_before(
    server: Server, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(base_fetch.shutil, "disk_usage", lambda _: usage(9, 9, 1_000_000))
    with pytest.raises(BaseModelError, match="1 MB are free, the base model needs 3 MB"):
        server.fetch(server.site(digest_base(base)))


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/x.safetensors", ".safetensors", "x.bin", "a b.safetensors", ""]
)
def test_names_that_are_no_files_of_a_model(name: str) -> None:
    assert not is_base_file(name)


def test_names_that_are() -> None:
    names = ("config.json", "model.safetensors", "model-00001-of-00002.safetensors")
    assert all(is_base_file(name) for name in names)
