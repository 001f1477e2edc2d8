"""The site's end of Flower's network. With `runtime`, every use of a Flower internal for it.

`tests/unit/flower/test_network.py` holds Flower to what is assumed. A site speaks the Fleet API
as Flower's SuperNode does, but runs only what is installed: it has no code that could fetch or
load an app bundle.
"""

from __future__ import annotations

import datetime
import email.utils
import json
import ssl
from base64 import b64encode
from collections.abc import Callable

import httpx
from cryptography.hazmat.primitives.asymmetric import ec

from fedtune.errors import FedtuneError, ServerRefused, ServerUnreachable
from fedtune.flower import internals

from flwr.app import Array, Message  # isort: skip
from flwr.app.message import remove_content_from_message  # isort: skip
from flwr.common.constant import TIMESTAMP_HEADER  # isort: skip
from flwr.common.serde import message_from_proto, message_to_proto  # isort: skip
from flwr.proto.fleet_pb2 import (  # isort: skip
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest  # isort: skip
from flwr.proto.message_pb2 import (  # isort: skip
    ConfirmMessageReceivedRequest,
    ObjectTree,
)
from flwr.proto.node_pb2 import Node as ProtoNode  # isort: skip
from flwr.supercore.constant import (  # isort: skip
    FLEET_HTTP_PUBLIC_KEY_HEADER,
    FLEET_HTTP_SIGNATURE_HEADER,
)
from flwr.supercore.inflatable.inflatable_object import (  # isort: skip
    InflatableObject,
    get_all_nested_objects,
    get_object_body,
    get_object_tree,
    get_object_type_from_object_content,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (  # isort: skip
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (  # isort: skip
    ObjectPushError,
    inflate_object_from_contents,
    pull_objects,
    push_objects,
)
from flwr.supercore.interceptors.http.utils import add_headers  # isort: skip
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message  # isort: skip
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext  # isort: skip
from flwr.supernode.fleet_http_client import FleetHttpClient  # isort: skip

HEARTBEAT_SECONDS = 10.0  # Flower's least; a site that is silent for twice as long is offline

LARGEST_RESPONSE = 16 << 20  # Flower sends objects in pieces of 5 MiB
_PIECE = 5 << 20
_OBJECTS = 16  # of a message, besides the pieces of its content
LARGEST_INLINE = 256 << 10  # bytes of content that go with the head of a message


class _SignedTime:
    """Signs the time, as Flower wants it of a node; by the server's clock, if they differ."""

    def __init__(self, key: ec.EllipticCurvePrivateKey) -> None:
        self._key = key
        self._public = b64encode(public_key_to_bytes(key.public_key())).decode("ascii")
        self.offset = datetime.timedelta()

    def now(self) -> datetime.datetime:
        """The time, by the server's clock if it was asked for."""
        return datetime.datetime.now(datetime.UTC) + self.offset

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        response = self._send(context, call_next)
        if response.status_code == httpx.codes.UNAUTHORIZED and self._follow(response):
            response = self._send(context, call_next)
        return response

    def _send(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        now = self.now().isoformat()
        signature = sign_message(self._key, now.encode("ascii"))
        headers = {
            FLEET_HTTP_PUBLIC_KEY_HEADER: self._public,
            TIMESTAMP_HEADER: now,
            FLEET_HTTP_SIGNATURE_HEADER: b64encode(signature).decode("ascii"),
        }
        for name in headers:
            context.request.headers.pop(name, None)
        add_headers(context.request, headers)
        return call_next(context)

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
        self, address: str, authority: bytes, key: ec.EllipticCurvePrivateKey, largest: int
    ) -> None:
        """`authority` is the PEM certificate that vouches for the server at `address`.

        Messages of more than `largest` bytes are refused before they are fetched.
        """
        self._largest = largest
        self._time = _SignedTime(key)
        self._public_key = public_key_to_bytes(key.public_key())
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_verify_locations(cadata=authority.decode("ascii"))
        self._client = FleetHttpClient(
            f"https://{address}", interceptors=[self._time], verify=context, timeout=30.0
        )
        # Called when the head of a response is there and nothing of its body.
        self._client._client.event_hooks["response"] = [_bounded]
        self._node = ProtoNode(node_id=0)

    @property
    def clock_offset(self) -> float:
        """Seconds by which the server's clock is ahead, where it was asked for."""
        return self._time.offset.total_seconds()

    def activate(self) -> None:
        """Say that this site is there; raises `ServerRefused` or `ServerUnreachable`."""
        request = ActivateNodeRequest(
            public_key=self._public_key, heartbeat_interval=HEARTBEAT_SECONDS
        )
        try:
            with translated():
                self._node = ProtoNode(node_id=self._client.ActivateNode(request).node_id)
        except ServerRefused as error:
            if not isinstance(error.__cause__, httpx.HTTPStatusError):
                raise
            raise ServerRefused(
                "the server does not let this site connect: its roster has no such transport key. "
                "Is public.toml with the operator, and the server started with the new roster?"
            ) from error

    def beat(self) -> None:
        """Say that this site is still there."""
        request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_SECONDS)
        with translated():
            if not self._client.SendNodeHeartbeat(request).success:
                raise ServerRefused("the server does not know this connection any more")

    def pull(self) -> Message | None:
        """The next message for this site, whole, if there is one."""
        with translated():
            response = self._client.PullMessages(PullMessagesRequest(node=self._node))
            if not response.messages_list:
                return None
            head = message_from_proto(response.messages_list[0])
            run_id = head.metadata.run_id
            message = whole(
                head,
                response.message_object_trees[0],
                make_pull_object_fn_protobuf(self._client.PullObject, self._node, run_id),
                self._largest,
            )
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
            push_parts(objects, push, set(response.objects_to_push))

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


def _bounded(response: httpx.Response) -> None:
    length = response.headers.get("content-length", "")
    if not length.isdigit() or int(length) > LARGEST_RESPONSE:
        raise ServerRefused(f"the server's answer has {length or 'any number of'} bytes")


def parts_of(message: Message) -> tuple[Message, ObjectTree, dict[str, InflatableObject]]:
    """What is sent of a message: its head, the tree of its objects, and the objects.

    Flower sends each of a message's five or more objects by a request of its own. The content of
    a small message goes with its head, and one object stands for all.
    """
    content = message.content.array_records.values() if message.has_content() else ()
    if sum(len(array.data) for record in content for array in record.values()) <= LARGEST_INLINE:
        tree = ObjectTree(object_id=message.object_id)
        return message, tree, {message.object_id: message}
    head = remove_content_from_message(message)
    return head, get_object_tree(message), get_all_nested_objects(message)


def push_parts(
    objects: dict[str, InflatableObject], push: Callable[[str, bytes], None], missing: set[str]
) -> None:
    inline = len(objects) == 1
    try:
        push_objects(objects, push, object_ids_to_push=missing, max_concurrent_pushes=1)
    except ObjectPushError:
        if not inline:
            raise
        # Its message was seen, taken and crossed off already: the content was with the head.


def whole(head: Message, tree: ObjectTree, pull: Callable[[str], bytes], largest: int) -> Message:
    """The message of a head that was pulled, and of its objects if it came without content.

    Raises `ServerRefused` for one that would have more than about `largest` bytes, before it is
    fetched or put together: pieces can be named many times over.
    """
    if not tree.children:
        return head
    ids = [item.object_id for item in iterate_object_tree(tree)]
    pieces = 1 + largest // _PIECE
    if len(ids) > _OBJECTS + pieces:
        raise ServerRefused(f"a message of {len(ids)} pieces, when the largest has {pieces}")
    contents = pull_objects(ids, pull, max_time=120.0, initial_backoff=0.02, backoff_cap=0.5)
    for content in contents.values():
        if get_object_type_from_object_content(content) == Array.__qualname__:
            named = len(json.loads(get_object_body(content, Array))["arraychunk_ids"])
            if named > pieces:
                raise ServerRefused(f"a message of {named} pieces, when the largest has {pieces}")
    found = inflate_object_from_contents(head.metadata.message_id, contents)
    if not isinstance(found, Message):
        raise ServerRefused(f"the other side sent a {type(found).__name__}, not a message")
    found.__dict__["_metadata"] = head.metadata
    return found


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
            raise ServerRefused(
                f"the server answers {status}: {error.response.text[:200]}"
            ) from error
        if isinstance(error, Exception) and not isinstance(error, FedtuneError):
            # Flower raises anything for content that is not what it expects.
            raise ServerRefused(
                f"the other side's answer makes no sense: {type(error).__name__}: {error}"
            ) from error
