"""The site's end of Flower's network. With `runtime`, every use of a Flower internal for it.

`tests/unit/flower/test_network.py` holds Flower to what is assumed. A site speaks the Fleet API
as Flower's SuperNode does, but runs only what is installed: it has no code that could fetch or
load an app bundle.
"""

from __future__ import annotations

import datetime
import email.utils
from base64 import b64encode
from collections.abc import Generator
from contextlib import suppress

import httpx
from cryptography.hazmat.primitives.asymmetric import ec

from fedtune.errors import FedtuneError, ServerRefused, ServerUnreachable
from fedtune.flower import internals
from fedtune.flower.pieces import NotThereYet, Tell, parts_of, send_objects, whole
from fedtune.tls import tls_context

from flwr.app import Message  # isort: skip
from flwr.common.constant import TIMESTAMP_HEADER  # isort: skip
from flwr.common.serde import message_from_proto, message_to_proto  # isort: skip
from flwr.proto.fleet_pb2 import (  # isort: skip
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest  # isort: skip
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree  # isort: skip
from flwr.proto.node_pb2 import Node as ProtoNode  # isort: skip
from flwr.supercore.constant import (  # isort: skip
    FLEET_HTTP_PUBLIC_KEY_HEADER,
    FLEET_HTTP_SIGNATURE_HEADER,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (  # isort: skip
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message  # isort: skip
from flwr.supernode.fleet_http_client import FleetHttpClient  # isort: skip

HEARTBEAT_SECONDS = 10.0  # Flower's least; a site that is silent for twice as long is offline

PATIENCE_SECONDS = 120.0  # for which a piece of a message is tried again
# Of Flower's ApiErrorCode, whose package imports a web framework for servers.
INVALID_HEARTBEAT_INTERVAL, NODE_ACTIVATION_FAILED = 2003, 2004
LARGEST_RESPONSE = 16 << 20  # Flower sends objects in pieces of 5 MiB
NOT_LET_IN = (
    "the server does not let this site connect: its roster has no such transport key. "
    "Is public.toml with the operator, and the server started with the new roster?"
)


class SignedTime(httpx.Auth):
    """Signs the time, as Flower wants it of a node; by the server's clock, if they differ."""

    def __init__(self, key: ec.EllipticCurvePrivateKey) -> None:
        self._key = key
        self._public = b64encode(public_key_to_bytes(key.public_key())).decode("ascii")
        self.offset = datetime.timedelta()

    def now(self) -> datetime.datetime:
        """The time, by the server's clock if it was asked for."""
        return datetime.datetime.now(datetime.UTC) + self.offset

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """Sign a request, and once more if the server's clock is another."""
        self._sign(request)
        response = yield request
        if response.status_code == httpx.codes.UNAUTHORIZED and self._follow(response):
            self._sign(request)
            yield request

    def _sign(self, request: httpx.Request) -> None:
        now = self.now().isoformat()
        signature = sign_message(self._key, now.encode("ascii"))
        request.headers[FLEET_HTTP_PUBLIC_KEY_HEADER] = self._public
        request.headers[TIMESTAMP_HEADER] = now
        request.headers[FLEET_HTTP_SIGNATURE_HEADER] = b64encode(signature).decode("ascii")

    def _follow(self, response: httpx.Response) -> bool:
        """Take over the server's time; whether that makes a difference worth another try."""
        try:
            theirs = email.utils.parsedate_to_datetime(response.headers["date"])
        except (KeyError, ValueError):
            return False
        found = theirs - datetime.datetime.now(datetime.UTC)
        differs = abs(found - self.offset) > datetime.timedelta(seconds=30)
        self.offset = found
        return differs


class NodeConnection:
    """A site's end of the connection; not for several threads, but for `beat`."""

    def __init__(
        self,
        address: str,
        authority: bytes,
        key: ec.EllipticCurvePrivateKey,
        largest: int,
        tell: Tell = lambda _done, _total: None,
        timeout: float = 30.0,
    ) -> None:
        """`authority` is the PEM certificate that vouches for the server at `address`.

        Messages of more than `largest` bytes are refused before they are fetched. `tell` hears
        how far a message that comes in pieces, or goes, has got. The other side may be silent
        for `timeout` seconds.
        """
        self._largest, self._tell = largest, tell
        self._coming: tuple[Message, ObjectTree] | None = None
        self._time = SignedTime(key)
        self._public_key = public_key_to_bytes(key.public_key())
        self._client = FleetHttpClient(f"https://{address}", verify=tls_context(authority))
        self._client._client.auth = self._time
        # TLS counts a piece of 5 MiB as one write, however slow the line.
        patience = max(timeout, PATIENCE_SECONDS)
        self._client._client.timeout = httpx.Timeout(timeout, write=patience)
        # Called when the head of a response is there and nothing of its body.
        self._client._client.event_hooks["response"] = [_bounded]
        self._node = ProtoNode(node_id=0)

    @property
    def clock_offset(self) -> float:
        """Seconds by which the server's clock is ahead, where it was asked for."""
        return self._time.offset.total_seconds()

    def activate(self) -> None:
        """Say that this site is there; raises `ServerRefused` or `ServerUnreachable`."""
        self._coming = None
        request = ActivateNodeRequest(
            public_key=self._public_key, heartbeat_interval=HEARTBEAT_SECONDS
        )
        try:
            with translated():
                self._node = ProtoNode(node_id=self._client.ActivateNode(request).node_id)
        except ServerRefused as error:
            if not isinstance(error.__cause__, httpx.HTTPStatusError):
                raise
            raise ServerRefused(NOT_LET_IN) from error

    def is_admitted(self) -> bool:
        """Whether the server would let this site connect; changes nothing there.

        A site that is connected stays so: Flower looks for the key, then refuses a heartbeat
        that it does not accept, and only then would it begin a new connection.
        Raises `ServerRefused` or `ServerUnreachable`.
        """
        request = ActivateNodeRequest(public_key=self._public_key, heartbeat_interval=0.0)
        try:
            with translated():
                self._client.ActivateNode(request)
        except ServerRefused as error:
            code = _flower_code(error.__cause__)
            if code == INVALID_HEARTBEAT_INTERVAL:
                return True
            if code == NODE_ACTIVATION_FAILED:
                return False
            raise
        raise ServerRefused("the server accepts any heartbeat; it is not a fedtune server")

    def beat(self) -> None:
        """Say that this site is still there."""
        request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_SECONDS)
        with translated():
            if not self._client.SendNodeHeartbeat(request).success:
                raise ServerRefused("the server does not know this connection any more")

    def pull(self) -> Message | None:
        """The next message for this site, whole, if there is one."""
        with translated():
            if self._coming is None:
                response = self._client.PullMessages(PullMessagesRequest(node=self._node))
                if not response.messages_list:
                    return None
                head = message_from_proto(response.messages_list[0])
                self._coming = head, response.message_object_trees[0]
            head, tree = self._coming
            run_id = head.metadata.run_id
            pull = make_pull_object_fn_protobuf(self._client.PullObject, self._node, run_id)
            try:
                message = whole(head, tree, pull, self._largest, PATIENCE_SECONDS, self._tell)
            except NotThereYet:
                return None
            except BaseException:
                self._coming = None
                raise
            self._coming = None
            if tree.children:
                self._client.ConfirmMessageReceived(
                    ConfirmMessageReceivedRequest(
                        node=self._node, run_id=run_id, message_object_id=head.metadata.message_id
                    )
                )
        internals.become_task(run_id, self._node.node_id)  # the answer is made in its name
        return message

    def push(self, answer: Message, seconds: float) -> None:
        """Send an answer."""
        # When it expires stays the same. An answer that was made, by a clock that is ahead, after
        # its question had expired would not be taken.
        now, metadata = self._time.now().timestamp(), answer.metadata
        metadata.ttl, metadata.created_at = metadata.created_at + metadata.ttl - now, now
        internals.set_message_id(answer, answer.object_id)
        head, tree, objects = parts_of(answer)
        request = PushMessagesRequest(
            node=self._node,
            messages_list=[message_to_proto(head)],
            message_object_trees=[tree],
            clientapp_runtime_list=[seconds],
        )
        with translated():
            response = self._client.PushMessages(request)
            push = make_push_object_fn_protobuf(
                self._client.PushObject, self._node, answer.metadata.run_id, response.session_id
            )
            missing = set(response.objects_to_push)
            send_objects(objects, missing, push, PATIENCE_SECONDS, self._tell)

    def leave(self) -> None:
        """Say that this site goes; nothing is raised if nobody hears it."""
        try:
            with translated():
                self._client.DeactivateNode(DeactivateNodeRequest(node_id=self._node.node_id))
        except (ServerRefused, ServerUnreachable):
            pass

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


def _flower_code(error: BaseException | None) -> int | None:
    """Flower's number of what a request failed of."""
    if not isinstance(error, httpx.HTTPStatusError):
        return None
    try:
        code = error.response.json()["code"]
    except (ValueError, KeyError, TypeError):
        return None
    return code if isinstance(code, int) else None


def _bounded(response: httpx.Response) -> None:
    length = response.headers.get("content-length", "")
    if not length.isdigit() or int(length) > LARGEST_RESPONSE:
        raise ServerRefused(f"the server's answer has {length or 'any number of'} bytes")


class translated:
    """What goes wrong on the way, as errors that say what an operator can do."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, httpx.ConnectError) and "CERTIFICATE_VERIFY_FAILED" in str(error):
            why = str(error).partition("certificate verify failed: ")[2].partition(" (_ssl")[0]
            raise ServerRefused(
                f"the server's certificate is not accepted ({why}); compare site.certificate with "
                "the operator's ca.crt, and the clocks"
            ) from error
        if isinstance(error, httpx.TransportError):
            raise ServerUnreachable(f"{type(error).__name__}: {error}") from error
        if isinstance(error, httpx.HTTPStatusError):
            status = error.response.status_code
            if status in (502, 503, 504):
                raise ServerUnreachable(f"the server answers {status}") from error
            why = ""
            with suppress(httpx.ResponseNotRead):
                why = f": {error.response.text[:200]}"
            raise ServerRefused(f"the server answers {status}{why}") from error
        if isinstance(error, Exception) and not isinstance(error, FedtuneError):
            # Flower raises anything for content that is not what it expects.
            raise ServerRefused(
                f"the other side's answer makes no sense: {type(error).__name__}: {error}"
            ) from error
