from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
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

class Envelope(_message.Message):
    __slots__ = ("wire_version", "kind", "sender", "session", "body", "signature")
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    SENDER_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    BODY_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    wire_version: int
    kind: int
    sender: str
    session: bytes
    body: bytes
    signature: bytes
    def __init__(self, wire_version: _Optional[int] = ..., kind: _Optional[int] = ..., sender: _Optional[str] = ..., session: _Optional[bytes] = ..., body: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Invite(_message.Message):
    __slots__ = ("context", "attempt", "adapter_digest", "roster_digest")
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ROSTER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    context: Context
    attempt: int
    adapter_digest: bytes
    roster_digest: bytes
    def __init__(self, context: _Optional[_Union[Context, _Mapping]] = ..., attempt: _Optional[int] = ..., adapter_digest: _Optional[bytes] = ..., roster_digest: _Optional[bytes] = ...) -> None: ...

class Advert(_message.Message):
    __slots__ = ("client", "sealing_key", "masking_key", "commitment", "signature")
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    SEALING_KEY_FIELD_NUMBER: _ClassVar[int]
    MASKING_KEY_FIELD_NUMBER: _ClassVar[int]
    COMMITMENT_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    client: str
    sealing_key: bytes
    masking_key: bytes
    commitment: bytes
    signature: bytes
    def __init__(self, client: _Optional[str] = ..., sealing_key: _Optional[bytes] = ..., masking_key: _Optional[bytes] = ..., commitment: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Cohort(_message.Message):
    __slots__ = ("adverts",)
    ADVERTS_FIELD_NUMBER: _ClassVar[int]
    adverts: _containers.RepeatedCompositeFieldContainer[Advert]
    def __init__(self, adverts: _Optional[_Iterable[_Union[Advert, _Mapping]]] = ...) -> None: ...

class SealedShares(_message.Message):
    __slots__ = ("sealed",)
    SEALED_FIELD_NUMBER: _ClassVar[int]
    sealed: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, sealed: _Optional[_Iterable[bytes]] = ...) -> None: ...

class MaskedTrainRequest(_message.Message):
    __slots__ = ("adapter", "sharers", "sealed")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    SHARERS_FIELD_NUMBER: _ClassVar[int]
    SEALED_FIELD_NUMBER: _ClassVar[int]
    adapter: bytes
    sharers: _containers.RepeatedScalarFieldContainer[int]
    sealed: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, adapter: _Optional[bytes] = ..., sharers: _Optional[_Iterable[int]] = ..., sealed: _Optional[_Iterable[bytes]] = ...) -> None: ...

class MaskedUpdate(_message.Message):
    __slots__ = ("values", "train_seconds", "voucher")
    VALUES_FIELD_NUMBER: _ClassVar[int]
    TRAIN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    VOUCHER_FIELD_NUMBER: _ClassVar[int]
    values: bytes
    train_seconds: float
    voucher: bytes
    def __init__(self, values: _Optional[bytes] = ..., train_seconds: _Optional[float] = ..., voucher: _Optional[bytes] = ...) -> None: ...

class Survivors(_message.Message):
    __slots__ = ("places", "vouchers")
    PLACES_FIELD_NUMBER: _ClassVar[int]
    VOUCHERS_FIELD_NUMBER: _ClassVar[int]
    places: _containers.RepeatedScalarFieldContainer[int]
    vouchers: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, places: _Optional[_Iterable[int]] = ..., vouchers: _Optional[_Iterable[bytes]] = ...) -> None: ...

class SurvivorsSignature(_message.Message):
    __slots__ = ("signature",)
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    signature: bytes
    def __init__(self, signature: _Optional[bytes] = ...) -> None: ...

class Unmasking(_message.Message):
    __slots__ = ("signers", "signatures")
    SIGNERS_FIELD_NUMBER: _ClassVar[int]
    SIGNATURES_FIELD_NUMBER: _ClassVar[int]
    signers: _containers.RepeatedScalarFieldContainer[int]
    signatures: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, signers: _Optional[_Iterable[int]] = ..., signatures: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Reveal(_message.Message):
    __slots__ = ("self_masks", "masking_keys")
    SELF_MASKS_FIELD_NUMBER: _ClassVar[int]
    MASKING_KEYS_FIELD_NUMBER: _ClassVar[int]
    self_masks: _containers.RepeatedScalarFieldContainer[bytes]
    masking_keys: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, self_masks: _Optional[_Iterable[bytes]] = ..., masking_keys: _Optional[_Iterable[bytes]] = ...) -> None: ...
