"""The server's end of Flower's network. With `network`, every use of a Flower internal for it."""

from __future__ import annotations

import base64
import os
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from starlette.exceptions import HTTPException
from starlette.requests import Request

from fedtune.flower import internals
from fedtune.flower.envelope import CLIENT_REFUSED
from fedtune.flower.network import translated
from fedtune.flower.pieces import NotThereYet, parts_of, send_objects, whole

from flwr.app import Error, Message  # isort: skip
from flwr.app.message import make_message  # isort: skip
from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, ErrorCode  # isort: skip
from flwr.common.serde import message_from_proto, message_to_proto  # isort: skip
from flwr.proto.fleet_pb2 import ActivateNodeRequest  # isort: skip
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree  # isort: skip
from flwr.proto.runtime_pb2 import (  # isort: skip
    PullAppMessagesRequest,
    PushAppMessagesRequest,
)
from flwr.supercore.constant import (  # isort: skip
    FLEET_HTTP_PUBLIC_KEY_HEADER,
    FLWR_IN_MEMORY_DB_NAME,
    NOOP_FEDERATION_ID,
    TaskType,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (  # isort: skip
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor  # isort: skip
from flwr.supercore.object_store import NoObjectInStoreError  # isort: skip
from flwr.supercore.primitives.asymmetric import public_key_to_bytes  # isort: skip
from flwr.supercore.run import Run  # isort: skip
from flwr.supercore.runtime import RuntimeHttpClient  # isort: skip
from flwr.superlink.grid import HttpGrid  # isort: skip
from flwr.superlink.routers.fleet.node_auth import authenticate_node  # isort: skip

FLEET = "/v1/fleet/"
RUNTIME = "/v1/runtime/"
# Registering is the operator's: the roster says who may connect.
_CLOSED = ("/v1/fleet/register-node", "/v1/fleet/unregister-node", "/v1/fleet/get-fab")
LARGEST_REQUEST = 16 << 20  # Flower sends objects in pieces of 5 MiB

Scope = MutableMapping[str, Any]
ASGI = Callable[..., Awaitable[None]]


def is_unavailable(answer: Message) -> bool:
    """Whether Flower answers in a client's place, because it is not connected."""
    return answer.has_error() and answer.error.code == ErrorCode.NODE_UNAVAILABLE


@dataclass(frozen=True)
class RunTicket:
    """What it takes to send messages in a run of a SuperLink."""

    run_id: int
    token: str


class RuntimeGrid(HttpGrid):
    """The server's end: sends and receives in one run of a SuperLink on this machine."""

    def __init__(
        self,
        address: str,
        ticket: RunTicket,
        largest: int,
        looked: Callable[[frozenset[str]], None] = lambda _names: None,
    ) -> None:
        """Answers of more than `largest` bytes are refused before they are put together.

        `looked` is told the names of who is connected, about every second while someone waits.
        """
        self._largest, self._looked = largest, looked
        self._coming: list[tuple[Message, ObjectTree]] = []
        super().__init__(address, insecure=True, token=ticket.token)
        self.set_run(Run.create_empty(ticket.run_id))
        self._run_id = ticket.run_id
        internals.become_task(ticket.run_id, internals.SERVER_NODE)

    def _connect(self) -> None:
        # Without Flower's retries: they go on for ever if its process has ended, and end this
        # one by a signal if the token is not accepted.
        self._client = RuntimeHttpClient.from_server_address(
            self._addr, True, None, [RuntimeTokenHttpInterceptor(token=self._token)]
        )
        # This machine's own loopback is never behind the proxy that its environment names.
        self._client._client = httpx.Client(timeout=30.0, trust_env=False)

    def activations(self) -> dict[int, str]:
        """Who is connected, and since when (ISO 8601); raises `ServerUnreachable`."""
        with translated():
            nodes = list(self.get_nodes())
        self._looked(frozenset(node.name for node in nodes))
        return {node.node_id: node.last_activated_at for node in nodes}

    def get_node_ids(self) -> list[int]:
        """Who is connected; raises `ServerUnreachable`."""
        return list(self.activations())

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages; their ids. Raises `ServerUnreachable` or `ServerRefused`."""
        ids: list[str] = []
        for message in messages:
            internals.set_message_id(message, message.object_id)
            head, tree, objects = parts_of(message)
            request = PushAppMessagesRequest(
                messages_list=[message_to_proto(head)], message_object_trees=[tree]
            )
            with translated():
                response = self._runtime_client.PushMessages(request)
                push = make_push_object_fn_protobuf(
                    self._runtime_client.PushObject, self.node, self._run_id, response.session_id
                )
                send_objects(objects, set(response.objects_to_push), push, 0.0, _quietly)
            ids += response.message_ids
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The answers that are there whole; as Flower's own, but without its pauses.

        Nobody who sends only the head of an answer, or is slow, keeps others waiting.
        """
        asked = set(message_ids)
        with translated():
            # Flower gives the head of an answer once.
            begun = {head.metadata.reply_to_message_id for head, _ in self._coming}
            request = PullAppMessagesRequest(message_ids=asked - begun)
            response = self._runtime_client.PullMessages(request)
            heads = zip(response.messages_list, response.message_object_trees, strict=True)
            self._coming += [(message_from_proto(head), tree) for head, tree in heads]
            answers, coming = [], []
            for head, tree in self._coming:
                if head.metadata.reply_to_message_id not in asked:
                    continue  # nobody waits for it any more
                if (answer := self._whole(head, tree)) is None:
                    coming.append((head, tree))
                else:
                    answers.append(answer)
            self._coming = coming
        return answers

    def _whole(self, head: Message, tree: ObjectTree) -> Message | None:
        pull = make_pull_object_fn_protobuf(
            self._runtime_client.PullObject, self.node, self._run_id
        )
        message_id = head.metadata.message_id
        try:
            answer = whole(head, tree, pull, self._largest, 0.0, _quietly)
        except NotThereYet:
            return None
        except httpx.HTTPError:
            raise
        except Exception as error:  # whatever Flower finds wrong with a client's content
            # That client has failed, and no other.
            reason = f"an answer that cannot be taken: {type(error).__name__}: {error}"
            answer = make_message(head.metadata, error=Error(CLIENT_REFUSED, reason))
        if tree.children:
            self._runtime_client.ConfirmMessageReceived(
                ConfirmMessageReceivedRequest(
                    node=self.node, run_id=self._run_id, message_object_id=message_id
                )
            )
        return answer


def _quietly(done: int, total: int) -> None:
    """Between two processes of one machine nobody waits for long."""


class SuperLink:
    """Flower's SuperLink in this process, without the doors that nobody needs.

    Its state begins anew with each start: what a federation must not forget is in the journal.
    """

    def __init__(self, database: Path | None) -> None:
        """Messages are held in memory, or in the SQLite file `database`, which is slower."""
        if database is not None:
            for file in (database, *database.parent.glob(f"{database.name}-*")):
                file.unlink(missing_ok=True)
        os.environ["FLWR_DATABASE"] = str(database or FLWR_IN_MEMORY_DB_NAME)
        from flwr.superlink.main import create_app  # over a second

        self._app: Any = create_app()
        self._app.state.enable_supernode_auth = True
        # Nobody holds it: tasks are claimed in this process only.
        self._app.state.superexec_auth_secret = os.urandom(32)
        self._state: Any = self._app.state.linkstate_factory.state()
        self._task = 0
        activate = self._state.activate_node

        def take_over(node_id: int, heartbeat_interval: float) -> bool:
            # A site that was killed comes back before its silence was noticed.
            self._state.deactivate_node(node_id)
            found: bool = activate(node_id, heartbeat_interval)
            return found

        self._state.activate_node = take_over
        self._keep_small_messages_whole()

    def _keep_small_messages_whole(self) -> None:
        """Let a message without objects be one: its content is with its head.

        Flower asks for an object of each message, and to hear that it was received: that is half
        of all requests.
        """
        store = self._app.state.linkstate_factory.objectstore_factory.store()
        register, find = self._state.preregister_object_tree, store.get_object_tree

        def register_objects(tree: ObjectTree, session_id: str) -> list[str]:
            if tree.children:
                missing: list[str] = register(tree, session_id)
                return missing
            self._state._cleanup_push_session(session_id, cleanup_messages=False)
            return []

        def find_objects(object_id: str) -> ObjectTree:
            try:
                found: ObjectTree = find(object_id)
            except NoObjectInStoreError:
                return ObjectTree(object_id=object_id)
            return found

        self._state.preregister_object_tree = register_objects
        store.get_object_tree = find_objects

    def register(self, clients: Mapping[str, bytes]) -> None:
        """Let clients connect, by name and public key (DER, SubjectPublicKeyInfo)."""
        for name, der in clients.items():
            key = serialization.load_der_public_key(der)
            if not isinstance(key, ec.EllipticCurvePublicKey):
                raise TypeError(f"the transport key of {name} is not an elliptic-curve key")
            self._state.create_node(
                NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, public_key_to_bytes(key), 0, name=name
            )

    def begin_run(self) -> RunTicket:
        """A run in which messages can be sent until `alive` was not called for long."""
        run_id = self._state.create_run(
            None, None, None, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP
        )
        self._task = self._state.get_run_info(run_ids=[run_id])[0].primary_task_id
        token = self._state.claim_task(self._task)
        if token is None or not self._state.activate_task(self._task):
            raise RuntimeError("Flower does not start a run")
        return RunTicket(run_id, token)

    def alive(self) -> bool:
        """Keep the run going."""
        found: bool = self._state.acknowledge_task_heartbeat(self._task)
        return found

    def knows(self, request: Request) -> bool:
        """Whether a request has the signed time of a site that may connect."""
        try:
            public_key = base64.b64decode(request.headers.get(FLEET_HTTP_PUBLIC_KEY_HEADER, ""))
            # What Flower checks the signer of: for other requests, its node.
            request.state.protobuf_request = ActivateNodeRequest(public_key=public_key)
            authenticate_node(request)
        except (HTTPException, ValueError):
            return False
        return self._state.get_node_id_by_public_key(public_key) is not None

    @property
    def for_sites(self) -> ASGI:
        """What sites can reach."""
        return _only(self._app, FLEET, _CLOSED)

    @property
    def for_server(self) -> ASGI:
        """What the server's own process can reach, with its token."""
        return _only(self._app, RUNTIME, ())


def _only(app: ASGI, prefix: str, closed: tuple[str, ...]) -> ASGI:
    async def filtered(scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        path, length = scope["path"], dict(scope["headers"]).get(b"content-length", b"")
        if not path.startswith(prefix) or path in closed:
            await _answer(send, 404, b"not here\n")
        elif not length.isdigit() or int(length) > LARGEST_REQUEST:
            # Without a length there is no end to it: none of ours is sent in that way.
            await _answer(send, 413, b"too large, or of no length\n")
        else:
            await app(scope, receive, send)

    return filtered


async def _answer(send: Any, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
