from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DescribeRequest(_message.Message):
    __slots__ = ("wire_version",)
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    wire_version: int
    def __init__(self, wire_version: _Optional[int] = ...) -> None: ...

class Description(_message.Message):
    __slots__ = ("wire_version", "federation_digest", "base_digest", "answers_digest", "width", "answers", "encoding", "examples", "tokens", "message_bytes", "rungs")
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    FEDERATION_DIGEST_FIELD_NUMBER: _ClassVar[int]
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ANSWERS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    RUNGS_FIELD_NUMBER: _ClassVar[int]
    wire_version: int
    federation_digest: bytes
    base_digest: bytes
    answers_digest: bytes
    width: int
    answers: int
    encoding: str
    examples: int
    tokens: int
    message_bytes: int
    rungs: int
    def __init__(self, wire_version: _Optional[int] = ..., federation_digest: _Optional[bytes] = ..., base_digest: _Optional[bytes] = ..., answers_digest: _Optional[bytes] = ..., width: _Optional[int] = ..., answers: _Optional[int] = ..., encoding: _Optional[str] = ..., examples: _Optional[int] = ..., tokens: _Optional[int] = ..., message_bytes: _Optional[int] = ..., rungs: _Optional[int] = ...) -> None: ...

class FromClient(_message.Message):
    __slots__ = ("introduction", "request", "upstream")
    INTRODUCTION_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    UPSTREAM_FIELD_NUMBER: _ClassVar[int]
    introduction: Introduction
    request: Request
    upstream: Upstream
    def __init__(self, introduction: _Optional[_Union[Introduction, _Mapping]] = ..., request: _Optional[_Union[Request, _Mapping]] = ..., upstream: _Optional[_Union[Upstream, _Mapping]] = ...) -> None: ...

class FromServer(_message.Message):
    __slots__ = ("challenge", "welcome", "answer", "refusal")
    CHALLENGE_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    challenge: Challenge
    welcome: Welcome
    answer: Answer
    refusal: Refusal
    def __init__(self, challenge: _Optional[_Union[Challenge, _Mapping]] = ..., welcome: _Optional[_Union[Welcome, _Mapping]] = ..., answer: _Optional[_Union[Answer, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ...) -> None: ...

class Challenge(_message.Message):
    __slots__ = ("nonce",)
    NONCE_FIELD_NUMBER: _ClassVar[int]
    nonce: bytes
    def __init__(self, nonce: _Optional[bytes] = ...) -> None: ...

class Introduction(_message.Message):
    __slots__ = ("name", "roster_digest", "terms_digest", "signature")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROSTER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TERMS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    name: str
    roster_digest: bytes
    terms_digest: bytes
    signature: bytes
    def __init__(self, name: _Optional[str] = ..., roster_digest: _Optional[bytes] = ..., terms_digest: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Request(_message.Message):
    __slots__ = ("number", "kind", "patience", "lengths", "labels", "embeddings")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    PATIENCE_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    number: int
    kind: int
    patience: int
    lengths: bytes
    labels: bytes
    embeddings: bytes
    def __init__(self, number: _Optional[int] = ..., kind: _Optional[int] = ..., patience: _Optional[int] = ..., lengths: _Optional[bytes] = ..., labels: _Optional[bytes] = ..., embeddings: _Optional[bytes] = ...) -> None: ...

class Upstream(_message.Message):
    __slots__ = ("number", "patience", "gradient")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    PATIENCE_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_FIELD_NUMBER: _ClassVar[int]
    number: int
    patience: int
    gradient: bytes
    def __init__(self, number: _Optional[int] = ..., patience: _Optional[int] = ..., gradient: _Optional[bytes] = ...) -> None: ...

class Answer(_message.Message):
    __slots__ = ("number", "values", "gradient")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_FIELD_NUMBER: _ClassVar[int]
    number: int
    values: bytes
    gradient: bytes
    def __init__(self, number: _Optional[int] = ..., values: _Optional[bytes] = ..., gradient: _Optional[bytes] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("number", "reason")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    number: int
    reason: int
    def __init__(self, number: _Optional[int] = ..., reason: _Optional[int] = ...) -> None: ...
