from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Context(_message.Message):
    __slots__ = ("run_id", "round", "base_digest", "manifest_digest", "config_digest")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CONFIG_DIGEST_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    round: int
    base_digest: bytes
    manifest_digest: bytes
    config_digest: bytes
    def __init__(self, run_id: _Optional[str] = ..., round: _Optional[int] = ..., base_digest: _Optional[bytes] = ..., manifest_digest: _Optional[bytes] = ..., config_digest: _Optional[bytes] = ...) -> None: ...

class HelloRequest(_message.Message):
    __slots__ = ("wire_version", "run_id")
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    wire_version: int
    run_id: str
    def __init__(self, wire_version: _Optional[int] = ..., run_id: _Optional[str] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("wire_version", "context", "client", "train_examples", "test_examples")
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    TRAIN_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    TEST_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    wire_version: int
    context: Context
    client: str
    train_examples: int
    test_examples: int
    def __init__(self, wire_version: _Optional[int] = ..., context: _Optional[_Union[Context, _Mapping]] = ..., client: _Optional[str] = ..., train_examples: _Optional[int] = ..., test_examples: _Optional[int] = ...) -> None: ...

class TrainRequest(_message.Message):
    __slots__ = ("wire_version", "context", "adapter")
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    wire_version: int
    context: Context
    adapter: bytes
    def __init__(self, wire_version: _Optional[int] = ..., context: _Optional[_Union[Context, _Mapping]] = ..., adapter: _Optional[bytes] = ...) -> None: ...

class TrainReply(_message.Message):
    __slots__ = ("wire_version", "context", "update", "examples", "loss", "train_seconds")
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    TRAIN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    wire_version: int
    context: Context
    update: bytes
    examples: int
    loss: float
    train_seconds: float
    def __init__(self, wire_version: _Optional[int] = ..., context: _Optional[_Union[Context, _Mapping]] = ..., update: _Optional[bytes] = ..., examples: _Optional[int] = ..., loss: _Optional[float] = ..., train_seconds: _Optional[float] = ...) -> None: ...

class EvaluateRequest(_message.Message):
    __slots__ = ("wire_version", "context", "adapter")
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    wire_version: int
    context: Context
    adapter: bytes
    def __init__(self, wire_version: _Optional[int] = ..., context: _Optional[_Union[Context, _Mapping]] = ..., adapter: _Optional[bytes] = ...) -> None: ...

class EvaluateReply(_message.Message):
    __slots__ = ("wire_version", "context", "examples", "correct", "loss_sum")
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    CORRECT_FIELD_NUMBER: _ClassVar[int]
    LOSS_SUM_FIELD_NUMBER: _ClassVar[int]
    wire_version: int
    context: Context
    examples: int
    correct: int
    loss_sum: float
    def __init__(self, wire_version: _Optional[int] = ..., context: _Optional[_Union[Context, _Mapping]] = ..., examples: _Optional[int] = ..., correct: _Optional[int] = ..., loss_sum: _Optional[float] = ...) -> None: ...
