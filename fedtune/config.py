"""The configuration of a federation, typed; the only reader of configuration files.

Keys are kebab-case in TOML (`batch-size`) and snake_case in Python. Unknown keys, wrong
types and values out of range are refused with one line each. The reference in
`docs/configuration.md` is generated from the descriptions below.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from fedtune.errors import ConfigError
from fedtune.types import digest_of

PRESETS = Path(__file__).parent / "presets"
DEFAULT_PRESET = "hospitals"

Fraction = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Table(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        populate_by_name=True,
        alias_generator=lambda name: name.replace("_", "-"),
        use_attribute_docstrings=True,
    )


class Base(_Table):
    """The pretrained model that nobody changes."""

    path: str = Field(default="all-MiniLM-L6-v2", min_length=1)
    """A packaged name (`all-MiniLM-L6-v2`), a Hugging Face folder, or a hub id."""
    pooling: Literal["mean", "cls"] = "mean"
    """How token states become one vector per text: their mean, or the first token's."""
    max_length: int = Field(default=128, ge=2, le=8192)
    """Longest text in tokens; longer texts are cut."""


class Adapter(_Table):
    """What is trained and travels."""

    kind: Literal["lora"] = "lora"
    """The adapter family."""
    rank: int = Field(default=8, ge=1, le=1024)
    """Rank r of the LoRA matrices."""
    alpha: Positive = 16.0
    """LoRA scaling: the update is multiplied by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the LoRA matrices, in training."""
    targets: tuple[str, ...] = ()
    """Names of the modules that get LoRA matrices; empty: peft's choice for the architecture."""


class Data(_Table):
    """What the clients train on, when one machine simulates them all."""

    source: str = Field(default="icd10", min_length=1)
    """`icd10` (packaged), a folder with one sub-folder per client, or one file."""
    partition: str | None = None
    """How one body of data is divided: `iid`, `dirichlet:ALPHA`, `column:NAME`, `shards:N`.
    Unset: `iid`; not allowed for a folder of clients, which is divided already."""
    clients: int | None = Field(default=None, ge=1, le=100_000)
    """How many clients; unset: what the data says, else 8."""
    test_fraction: Fraction = 0.2
    """Share of a file's rows that is held out as the common test set."""
    min_examples: int = Field(default=1, ge=1)
    """A partition that leaves a client with fewer training examples is refused."""
    text_column: str = Field(default="text", min_length=1)
    """Column of the text."""
    label_column: str = Field(default="label", min_length=1)
    """Column of the label."""
    labels: tuple[str, ...] = ()
    """The labels, in the order of the model's outputs; empty: all that occur, sorted."""


class Train(_Table):
    """Local training at a client, in one round."""

    steps: int = Field(default=20, ge=1, le=1_000_000)
    """Optimizer steps per client and round."""
    batch_size: int = Field(default=8, ge=1, le=65_536)
    """Examples per optimizer step."""
    lr: Positive = 2e-3
    """Learning rate of the first round."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """How the learning rate falls over the rounds (not within one)."""
    final_lr_fraction: float = Field(default=0.1, ge=0, le=1)
    """Learning rate of the last round as a fraction of `lr`, unless the schedule is constant."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """The client's optimizer; its state starts afresh each round."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay of AdamW; L2 penalty of SGD."""
    max_grad_norm: Positive | None = None
    """Clip each step's gradient to this L2 norm; unset: no clipping."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:N` or `mps`. Each machine's own business: not agreed upon."""
    precision: Literal["float32", "bf16"] = "float32"
    """`bf16` computes under autocast; the adapter and its optimizer stay in float32."""
    threads: int = Field(default=1, ge=1, le=1024)
    """Threads per client on a CPU. Clients run in parallel, one per core, so 1 is fastest for
    small batches. Each machine's own business: not agreed upon."""

    @model_validator(mode="after")
    def _device_is_known(self) -> Self:
        name, _, index = self.device.partition(":")
        if name not in {"auto", "cpu", "cuda", "mps"} or (
            ":" in self.device and (name != "cuda" or not index.isdecimal())
        ):
            raise ValueError("device must be auto, cpu, cuda, cuda:N or mps")
        return self


class Rounds(_Table):
    """How many rounds, and with whom."""

    count: int = Field(default=10, ge=1, le=1_000_000)
    """Number of rounds."""
    clients_per_round: int | None = Field(default=None, ge=1)
    """Clients drawn for each round; unset: all of them."""
    min_clients: int | None = Field(default=None, ge=1)
    """The run fails if fewer updates than this arrive in a round; unset: half of those drawn."""
    timeout: Positive = 600.0
    """Seconds after which a client that has not answered is left out of the round."""
    evaluate_every: int = Field(default=1, ge=0)
    """Evaluate after every so many rounds and after the last; 0: only after the last."""


class Aggregate(_Table):
    """How updates become the next global adapter."""

    rule: Literal["fedavg"] = "fedavg"
    """`fedavg`: the mean of the updates (McMahan et al. 2017)."""
    weighting: Literal["examples", "uniform"] = "examples"
    """What a client's update counts: its training examples, or each the same."""
    server_optimizer: Literal["sgd", "adam"] = "sgd"
    """Treats the mean update as a gradient (Reddi et al. 2021); sgd with rate 1 and momentum 0
    is plain averaging."""
    server_lr: Positive = 1.0
    """Learning rate of the server optimizer."""
    server_momentum: float = Field(default=0.0, ge=0, lt=1)
    """Momentum of sgd; the first moment's decay of adam."""
    server_beta2: float = Field(default=0.99, ge=0, lt=1)
    """Decay of adam's second moment."""
    server_epsilon: Positive = 1e-3
    """Adam's degree of adaptivity (tau in Reddi et al.)."""


class Update(_Table):
    """The steps that an update goes through before it leaves a client."""

    compress: Literal["none", "float16"] = "none"
    """`float16` halves what a client sends."""


class Config(_Table):
    """One federation."""

    seed: int = Field(default=0, ge=0, lt=2**32)
    """Drives partition, initialisation, sampling and batches; never anything secret."""
    base: Base = Base()
    adapter: Adapter = Adapter()
    data: Data = Data()
    train: Train = Train()
    rounds: Rounds = Rounds()
    aggregate: Aggregate = Aggregate()
    update: Update = Update()

    @model_validator(mode="after")
    def _cohort_is_large_enough(self) -> Self:
        rounds = self.rounds
        for name, limit in (
            ("rounds.clients-per-round", rounds.clients_per_round),
            ("data.clients", self.data.clients),
        ):
            if rounds.min_clients and limit and rounds.min_clients > limit:
                raise ValueError(
                    f"rounds.min-clients = {rounds.min_clients} can never be reached "
                    f"with {name} = {limit}; lower it"
                )
        if (
            rounds.clients_per_round
            and self.data.clients
            and rounds.clients_per_round > self.data.clients
        ):
            raise ValueError(
                f"rounds.clients-per-round = {rounds.clients_per_round} is more than "
                f"data.clients = {self.data.clients}; lower it"
            )
        return self

    @property
    def digest(self) -> str:
        """SHA-256 of what server and clients must agree on.

        Left out: where data and base model lie (the base has a digest of its own) and how fast a
        machine computes.
        """
        own: Any = {"base": {"path"}, "data": True, "train": {"device", "threads"}}
        value = self.model_dump(mode="json", exclude=own)
        value["labels"] = self.data.labels
        return digest_of(value)

    def to_toml(self) -> str:
        """This configuration as a TOML file; keys that are unset are left out."""
        return tomli_w.dumps(self.model_dump(mode="json", by_alias=True, exclude_none=True))


def preset_names() -> list[str]:
    """Names of the packaged presets."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def load_preset(name: str, overrides: Sequence[str] = (), without: Sequence[str] = ()) -> Config:
    """A packaged preset with `table.key=value` overrides applied; raises `ConfigError`.

    `without` names keys of the preset that are left out first.
    """
    if name not in preset_names():
        raise ConfigError(f"there is no preset '{name}'; there is: {', '.join(preset_names())}")
    text = (PRESETS / f"{name}.toml").read_text()
    return parse_config(text, f"preset {name}", overrides, without)


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """A configuration file with `table.key=value` overrides applied; raises `ConfigError`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    return parse_config(text, str(path), overrides)


def parse_config(
    text: str, origin: str, overrides: Sequence[str] = (), without: Sequence[str] = ()
) -> Config:
    """Configuration from TOML text; `origin` names it in errors. Raises `ConfigError`."""
    try:
        value = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{origin}: not valid TOML: {error}") from error
    for key in without:
        table, _, name = key.partition(".")
        value.get(table, {}).pop(name, None)
    for override in overrides:
        _apply(value, override)
    try:
        return Config.model_validate_json(_json(value), by_alias=True, by_name=False)
    except ValidationError as error:
        lines = "; ".join(_describe(detail) for detail in error.errors())
        raise ConfigError(f"{origin}: {lines}") from error


def _json(value: Mapping[str, Any]) -> str:
    """TOML values as JSON, in which pydantic's strict mode takes a list for a tuple."""
    return json.dumps(value, default=str)


def _apply(value: dict[str, Any], override: str) -> None:
    """Set `table.key=value` in a parsed TOML document."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {override}: write it as table.key=value")
    parsed: Any = text.strip()  # a bare word is a string, so that no shell quoting is needed
    try:
        document = tomllib.loads(f"value = {text}")
        parsed = document["value"] if len(document) == 1 else parsed
    except tomllib.TOMLDecodeError:
        pass
    for key in keys[:-1]:
        table = value.setdefault(key, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {override}: '{key}' is a value, not a table")
        value = table
    value[keys[-1]] = parsed


def _describe(detail: ErrorDetails) -> str:
    """One validation error as `table.key: what is wrong`."""
    location = [str(part) for part in detail["loc"]]
    where = ".".join(location)
    if detail["type"] == "extra_forbidden":
        known = dict(known_keys())
        hint = _nearest(where, list(known))
        return f"{where}: unknown key{hint}"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] != "value_error":
        message = f"{message[0].lower()}{message[1:]}, got {detail['input']!r}"
    return f"{where}: {message}" if where else message


def _nearest(key: str, known: list[str]) -> str:
    """A hint at the known key that is most like `key`: in its table, else by its last part."""
    table, _, tail = key.rpartition(".")
    tables = sorted({name.rpartition(".")[0] for name in known} - {""})
    if table and table not in tables and (match := difflib.get_close_matches(table, tables, 1)):
        table = match[0]
    here = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == table}
    if not table:
        here |= {name: f"[{name}]" for name in tables}
    anywhere = {name.rpartition(".")[2]: name for name in known}
    for names, cutoff in ((here, 0.6), (anywhere, 0.7)):
        if match := difflib.get_close_matches(tail.replace("_", "-"), list(names), 1, cutoff):
            return f"; did you mean {names[match[0]]}?"
    return f"; known here: {', '.join(here) or 'no key'}"


def known_keys() -> Iterator[tuple[str, str]]:
    """Every key as (`table.key`, description), in the order of the reference."""
    for name, field in Config.model_fields.items():
        table = field.annotation
        if isinstance(table, type) and issubclass(table, _Table):
            for key, inner in table.model_fields.items():
                yield f"{name}.{key.replace('_', '-')}", " ".join((inner.description or "").split())
        else:
            yield name, " ".join((field.description or "").split())
