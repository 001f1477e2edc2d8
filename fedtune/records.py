"""What a run leaves behind: the records that metrics.jsonl and summary.json hold.

The JSON keys are exactly the field names, and every tuple is a list. JSON knows no NaN and no
infinity: a float that is not finite is written as null. It is read back as None where the field
allows None and as NaN elsewhere, so a diverged run can still be reported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, TypeAdapter, ValidationError

from fedtune.errors import RunFolderError

Status = Literal["finished", "failed", "interrupted"]
# A float that is always there. Null in JSON stands for "not finite", see the module docstring.
Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]


class Record:
    """Base of the records: a dataclass to and from a dict of plain JSON values."""

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return {name: _plain(getattr(self, name)) for name in _names(type(self))}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The record that `data` holds; keys of other versions of fedtune are ignored.

        Raises `RunFolderError` when a key is missing or holds a value of the wrong kind.
        """
        try:
            record: Self = _adapter(cls).validate_python(data)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "the whole record"
            raise RunFolderError(f"not a {cls.__name__}: {where}: {first['msg']}") from error
        return record


@dataclass(frozen=True)
class RoundRecord(Record):
    """One round, as one line of metrics.jsonl."""

    round: int
    train_loss: float | None  # mean over clients, weighted by examples
    loss: float | None  # on the evaluation set; None when this round was not evaluated
    accuracy: float | None
    clients: tuple[str, ...]  # those whose update was counted
    failed: dict[str, str]  # client name -> reason
    bytes_up: int  # all clients together, this round
    bytes_down: int
    seconds: Number
    train_seconds: Number
    late: dict[str, str] = field(default_factory=dict)  # left after its update was in: reason


@dataclass(frozen=True)
class Score(Record):
    """How good the federated model was after one round."""

    round: int
    loss: float | None
    accuracy: float | None


@dataclass(frozen=True)
class ClientSummary(Record):
    """One client over the whole run.

    "Own mix" accuracies are weighted by the client's own label frequencies: what the model is
    worth for the cases that this client really sees.
    """

    name: str
    examples: int
    label_counts: tuple[int, ...]  # in the order of Summary.labels
    rounds_completed: int
    rounds_failed: int
    accuracy: float | None  # the federated model on the common test set, or on the client's own;
    # of an adapter with a private part: with the one that all clients began with
    own_mix_accuracy: float | None
    local_accuracy: float | None  # trained alone with the same budget; only with references
    local_own_mix_accuracy: float | None
    personal_accuracy: float | None = None  # with the client's own private part of the adapter
    personal_own_mix_accuracy: float | None = None

    @property
    def reached(self) -> float | None:
        """Accuracy of what the client ends up with: with its private part, if it has one."""
        return self.accuracy if self.personal_accuracy is None else self.personal_accuracy

    @property
    def reached_own_mix(self) -> float | None:
        """The same on its own mix."""
        own = self.personal_own_mix_accuracy
        return self.own_mix_accuracy if own is None else own


@dataclass(frozen=True)
class Reference(Record):
    """A model to compare with: "centralized", "local-only", "linear-head" or "base".

    Or, where clients train on an emulator, what the adapter is worth there ("emulator"), and what
    the emulator is without one ("emulator-base").
    """

    name: str
    accuracy: Number
    loss: float | None
    seconds: Number
    sample_steps: int


@dataclass(frozen=True)
class Sample(Record):
    """A question of the common test set: what the base model said, and the federated one."""

    question: str
    answer: str
    before: str
    after: str
    image: str  # a PNG, base64


@dataclass(frozen=True)
class Cut(Record):
    """What passed between clients and a base model that they do not hold, without headers.

    Bytes are of trained examples, up (embeddings) and down (gradients); `floor` is the least for
    so many tokens in this encoding. Evaluations are counted apart. `clip` and `eta` are the noise
    on embeddings, if there is any; its ε are of metric differential privacy and have nothing to do
    with `Summary.epsilon`.
    """

    encoding: str
    labels_at: str
    examples: int
    tokens: int
    bytes_up: int
    bytes_down: int
    floor: int
    evaluated: int
    evaluation_bytes: int
    clip: float | None = None  # L2 norm
    eta: float | None = None  # per unit of distance
    token_epsilon: float | None = None  # local, of one token in one release: eta * 2 * clip
    passes: float | None = None  # how often an example was sent in training: mean of one client,
    sendings: int | None = None  # and at most; both where it was most often
    example_epsilon: float | None = None  # token_epsilon * sendings * tokens of a mean example


@dataclass(frozen=True)
class Summary(Record):
    """The whole run, as summary.json."""

    name: str
    status: Status
    rounds: int
    planned_rounds: int
    seed: int
    final: Score | None
    best: Score | None
    labels: tuple[str, ...]
    per_client: tuple[ClientSummary, ...]
    references: tuple[Reference, ...]
    bytes_up_per_client_round: int
    bytes_down_per_client_round: int
    bytes_up: int
    bytes_down: int
    seconds: Number
    train_seconds: Number
    peak_rss_mb: Number
    masked: bool  # whether the server saw only sums of updates
    epsilon: float | None
    epsilon_unit: str  # words: whose presence it is about, and at which delta
    config_digest: str
    base: str  # words
    base_digest: str
    adapter: str  # words, such as "LoRA r=8 on query, value + classifier"
    adapter_parameters: int
    data: str  # words
    evaluation: str  # words: "1,021 texts of common test set", "clients' own test sets"
    warnings: tuple[str, ...]
    versions: dict[str, str]
    samples: tuple[Sample, ...] = ()
    cut: Cut | None = None


def _plain(value: Any) -> Any:
    """`value` in the types of JSON."""
    if is_dataclass(value):
        return {name: _plain(getattr(value, name)) for name in _names(type(value))}
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _names(cls: type[Any]) -> tuple[str, ...]:
    return tuple(field.name for field in fields(cls))


_adapters: dict[type[Any], TypeAdapter[Any]] = {}


def _adapter(cls: type[Any]) -> TypeAdapter[Any]:
    # Built at the first use: those who only write records should not pay for it.
    if cls not in _adapters:
        _adapters[cls] = TypeAdapter(cls)
    return _adapters[cls]
