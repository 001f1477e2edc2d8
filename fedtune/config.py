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
from math import inf
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self, TypeVar

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from fedtune.errors import ConfigError
from fedtune.hours import Window
from fedtune.types import Task, digest_of

PRESETS = Path(__file__).parent / "presets"
DEFAULT_PRESET = "hospitals"
UNSET = "unset"
DIRECTIONS, PERTURBATION = 4096, 0.1
RUNGS = 6
BASE_PORT = 9094
# On the packaged data's validation texts 0.001, 0.01 and 0.1 are alike (loss 1.70, 1.70 and 1.72
# after a round of the preset, plain averaging 2.14), and errors of rounding go with 1 / damping.
FISHER_DAMPING = 0.1

LOOKS_AT_EACH = ("median", "krum")

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
    """A packaged name (`all-MiniLM-L6-v2`, `SmolLM2-135M-Instruct`), a Hugging Face folder, a
    folder with one GGUF file, or a hub id."""
    task: Task = "text-classification"
    """`text-classification`: an encoder with a new head says the label of a text. `causal-lm`: a
    decoder says the next token; rows are texts without labels. `visual-question-answering`: a
    decoder behind an image encoder and a connector answers questions about images, out of a
    list."""
    digest: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of its files; unset: any, as long as server and clients have the same. With it, a
    site that has no such model fetches it from the server, once."""
    pooling: Literal["mean", "cls"] = "mean"
    """How token states become one vector per text: their mean, or the first token's. Only for
    `text-classification`."""
    max_length: int = Field(default=128, ge=2, le=8192)
    """Longest text in tokens; longer texts are cut, longer questions refused."""
    placement: Literal["client", "server", "emulator"] = "client"
    """Where the base model is. `server`: it never leaves it, clients send adapted embeddings and
    get gradients. `emulator`: it never leaves the server, and clients train against a smaller one
    that is made of some of its layers. Both only for `visual-question-answering`, see
    docs/nano.md."""
    encoder: Literal["EfficientNet-Lite0"] = "EfficientNet-Lite0"
    """The image encoder, at the client."""
    connector: str | None = None
    """File of the connector between image encoder and base model, made by `fedtune nano
    pretrain-connector`. Unset: one is pretrained on the public part of `easy-vqa`."""
    connector_digest: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of that file; unset: any, as long as server and clients have the same."""


class Split(_Table):
    """What crosses the cut, with `base.placement = "server"`."""

    labels: Literal["server", "client"] = "server"
    """Who knows the answers: the server, which then answers with gradients at once; or only the
    client, which gets scores and sends back their gradient: one exchange more for each step."""
    activations: Literal["float32", "float16", "bfloat16", "int8"] = "float16"
    """How embeddings and their gradients travel."""
    clip: Positive | None = None
    """Scale an embedding down to this L2 norm before it is sent, if it is longer; in the units of
    the base model's embeddings. Unset: no bound. Needs `eta`."""
    eta: float | None = Field(default=None, ge=1e-6, le=1e9)
    """Add noise of density exp(-eta × length) to each embedding that is sent: metric differential
    privacy, eta per unit of distance; less is more noise. One token in one sending has a local
    epsilon of eta × 2 × clip, which adds up over tokens and sendings and has nothing to do with
    `privacy.epsilon`; see docs/nano.md. Unset: no noise. Needs `clip`."""

    @model_validator(mode="after")
    def _noise_has_a_bound(self) -> Self:
        if (self.clip is None) != (self.eta is None):
            missing, given = ("clip", "eta") if self.clip is None else ("eta", "clip")
            raise ValueError(f"split.{given} needs split.{missing}; set both or neither")
        return self


class Emulator(_Table):
    """What clients train against with `base.placement = "emulator"`."""

    layers: int | None = Field(default=None, ge=3)
    """How many of the decoder's layers it has, fewer than all; the first and the last are always
    among them. Unset: half of them."""
    share: bool = True
    """Whether a kept layer also stands at the places of the removed ones that are like it (CRaSh,
    arXiv 2310.15477). It then computes as much as the whole decoder; without, less."""
    path: str | None = None
    """The folder that `fedtune nano emulator` made. Unset: one is made of the public questions of
    `easy-vqa`, or of the `public.csv` in a folder of clients."""
    digest: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of its manifest; unset: any, as long as server and clients have the same."""


class Adapter(_Table):
    """What is trained and travels."""

    kind: Literal["lora", "nano", "ladder"] = "lora"
    """The adapter family. `nano`: bottlenecks on the inputs of a language model (FedNano), for
    `visual-question-answering`. `ladder`: for the same, a small network beside the language model,
    fed with what its layers make of an example, which is computed once (Sung et al. 2022)."""
    rank: int = Field(default=8, ge=1, le=1024)
    """Rank r of the LoRA matrices, or width of a NanoAdapter's bottleneck or of a ladder."""
    output_rank: int | None = Field(default=None, ge=1, le=1024)
    """`nano`: width of a bottleneck on the language model's output, too, which is then a state of
    which the client makes the scores (gray-box tuning, Levy et al. 2025); with the base model at
    the server it needs `split.labels = "client"`. Unset: none."""
    rungs: int = Field(default=RUNGS, ge=2, le=256)
    """`ladder`: after how many of the language model's layers its state is taken; they are evenly
    spread, and the last layer is one of them."""
    alpha: Positive = 16.0
    """LoRA scaling: the update is multiplied by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the LoRA matrices, in training."""
    targets: tuple[str, ...] = ()
    """Names of the modules that get LoRA matrices; empty: peft's choice for the architecture."""
    private: tuple[Annotated[str, Field(pattern=r"^[^.\s]+(\.[^.\s]+)*$")], ...] = ()
    """Tensors that are trained at each client and never leave it, by parts of their names between
    dots: `nano_text`, `classifier`, `layer.5`, `lora_B`. The server sees neither them nor their
    sum; see docs/personalization.md. Empty: everything is shared."""


class Data(_Table):
    """What the clients train on, when one machine simulates them all."""

    source: str = Field(default="icd10", min_length=1)
    """`icd10` or `easy-vqa` (packaged), a folder with one sub-folder per client, or one file."""
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
    """Column of the label; not read for `base.task = "causal-lm"`."""
    labels: tuple[str, ...] = ()
    """The labels, in the order of the model's outputs; empty: all that occur, sorted."""


class Train(_Table):
    """Local training at a client, in one round."""

    method: Literal["backprop", "forward-only"] = "backprop"
    """`forward-only` computes no gradients (MeZO, Malladi et al. 2023): a step compares the losses
    of two forward passes, and what travels is one number per direction, not the adapter. It takes
    many more steps, and a learning rate of its own; see docs/forward-only.md."""
    directions: int = Field(default=DIRECTIONS, ge=1, le=1_000_000)
    """`forward-only`: in how many random directions the adapter can move; so many values travel."""
    perturbation: Positive = PERTURBATION
    """`forward-only`: how far along a direction the two losses are taken, as a length in the
    adapter's space."""
    probes: int = Field(default=1, ge=1, le=65_536)
    """`forward-only` with `base.placement = "server"`: along how many directions a step looks. The
    server says the gradient at the cut, once a step; each direction costs two passes of the
    client's half."""
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
    proximal: NotNegative = 0.0
    """FedProx (Li et al. 2020): pull each step back towards the received adapter, by so much times
    the distance. 0 is none."""
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

    @model_validator(mode="after")
    def _method_is_possible(self) -> Self:
        if self.method == "backprop":
            if (self.directions, self.perturbation) != (DIRECTIONS, PERTURBATION):
                raise ValueError(
                    "train.directions and train.perturbation are for train.method = forward-only"
                )
            return self
        if self.optimizer != "sgd" or self.weight_decay:
            raise ValueError(
                "train.method = forward-only is plain SGD: set train.optimizer = sgd, with a "
                "train.lr for it, and leave out train.weight-decay"
            )
        if self.proximal:
            raise ValueError(
                "train.proximal adds to gradients, and train.method = forward-only has none; leave "
                "it out"
            )
        if self.max_grad_norm is not None:
            raise ValueError(
                "train.method = forward-only has no gradient that train.max-grad-norm could clip; "
                "leave it out, and lower train.lr if training diverges"
            )
        if self.precision != "float32":
            raise ValueError(
                f"train.method = forward-only compares losses that differ in their fourth digit, "
                f"and train.precision = {self.precision} has three: set it to float32"
            )
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

    rule: Literal["fedavg", "fisher", "median", "krum"] = "fedavg"
    """`fedavg`: the weighted mean of the updates (McMahan et al. 2017). `fisher`: each value by how
    much it matters to a client, its Fisher information (Matena and Raffel 2022); sends twice as
    much, see docs/concepts.md. `median`: of each value (Yin et al. 2018). `krum`: the update
    nearest to the others (Blanchard et al. 2017). The last two look at single updates: not together
    with `secagg.enabled` or `update.bits`."""
    fisher_damping: float = Field(default=FISHER_DAMPING, gt=0, le=1)
    """`fisher`: how far weights are drawn towards all the same, 1 being plain averaging. A value
    that a client's training never touched has no weight from it at all. Less needs more
    `update.bits`."""
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

    @model_validator(mode="after")
    def _damping_has_a_use(self) -> Self:
        if self.rule != "fisher" and self.fisher_damping != FISHER_DAMPING:
            raise ValueError("aggregate.fisher-damping is for aggregate.rule = fisher")
        return self


class Update(_Table):
    """The steps that an update goes through before it leaves a client."""

    compress: Literal["none", "float16"] = "none"
    """`float16` halves what a client sends; not together with `bits`."""
    clip: Positive | None = None
    """Scale an update down to this L2 norm if it is longer; unset: no bound. Needs `bits`."""
    bits: int | None = Field(default=None, ge=9, le=30)
    """Round an update to integers of so many bits, `clip` being the largest; unset: no rounding."""
    example_cap: int = Field(default=1000, ge=1, le=2**32)
    """With `bits` and weighting by examples, a client counts as at most so many."""

    @model_validator(mode="after")
    def _steps_fit_together(self) -> Self:
        if (self.clip is None) != (self.bits is None):
            missing, given = ("clip", "bits") if self.clip is None else ("bits", "clip")
            raise ValueError(f"update.{given} needs update.{missing}; set both or neither")
        if self.bits is not None and self.compress != "none":
            raise ValueError(
                f"update.compress = {self.compress} and update.bits = {self.bits}: take one of "
                "them; --set update.bits=unset --set update.clip=unset takes the other"
            )
        return self


class SecAgg(_Table):
    """Secure aggregation: the server learns the sum of a round's updates, no single one."""

    enabled: bool = False
    """Whether updates are masked. Needs `update.clip` and `update.bits`."""
    threshold: float = Field(default=2 / 3, ge=0.5, lt=1)
    """More than this share of a round's clients must still be there at the end."""
    colluding: float = Field(default=0.25, ge=0, lt=0.5)
    """Share of all clients that may be in league with the server without harm to others. They may
    all be in one round, so a federation that draws few clients of many must count on few."""
    neighbours: int | None = Field(default=None, ge=2)
    """With how many others a client masks; unset: with all. Even; saves time from about 100
    clients per round on, and withstands fewer colluders."""
    stage_timeout: Positive = 60.0
    """Seconds that a client has for an answer that needs no training."""

    @model_validator(mode="after")
    def _neighbours_are_even(self) -> Self:
        if self.neighbours is not None and self.neighbours % 2:
            raise ValueError(f"neighbours must be even, got {self.neighbours}")
        return self


class Privacy(_Table):
    """Differential privacy: what the result may tell about one record, or about one client."""

    unit: Literal["none", "record", "client"] = "none"
    """Whose presence is hidden. `record`: one training example, by noise in the training of each
    client. `client`: all of one client's data, by noise that clients add up under masks."""
    epsilon: Positive | None = None
    """The budget: a round that would exceed it is refused. Unset: no limit, only accounting."""
    delta: Fraction = 1e-5
    """Probability of the exception that epsilon allows."""
    noise_multiplier: Positive | None = None
    """Standard deviation of the noise in units of the clip norm; unset: the least with which all
    rounds fit into `epsilon`."""
    example_clip: Positive = 1.0
    """Unit `record`: each example's gradient is scaled down to this L2 norm."""

    @model_validator(mode="after")
    def _noise_is_settled(self) -> Self:
        if self.unit == "none" and (self.epsilon or self.noise_multiplier):
            raise ValueError("privacy.unit = none has no noise; set it to record or client")
        if self.unit != "none" and not (self.epsilon or self.noise_multiplier):
            raise ValueError("set privacy.epsilon, privacy.noise-multiplier, or both")
        return self


class Config(_Table):
    """One federation."""

    seed: int = Field(default=0, ge=0, lt=2**32)
    """Drives partition, initialisation, sampling and batches; never anything secret."""
    base: Base = Base()
    split: Split = Split()
    emulator: Emulator = Emulator()
    adapter: Adapter = Adapter()
    data: Data = Data()
    train: Train = Train()
    rounds: Rounds = Rounds()
    aggregate: Aggregate = Aggregate()
    update: Update = Update()
    secagg: SecAgg = SecAgg()
    privacy: Privacy = Privacy()

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

    @model_validator(mode="after")
    def _labels_fit_the_task(self) -> Self:
        if self.base.task == "causal-lm" and self.data.labels:
            raise ValueError(
                "data.labels is for base.task = text-classification, or for questions; leave it out"
            )
        if self.base.task != "text-classification" and self.base.pooling != "mean":
            raise ValueError("base.pooling is for base.task = text-classification; leave it out")
        return self

    @model_validator(mode="after")
    def _adapter_fits_the_task(self) -> Self:
        vision = self.base.task == "visual-question-answering"
        kind = self.adapter.kind
        if vision != (kind != "lora"):
            raise ValueError(
                "adapter.kind = nano or ladder and base.task = visual-question-answering go "
                "together: set both or neither"
            )
        if vision and (self.adapter.dropout or self.adapter.targets):
            key = "adapter.dropout" if self.adapter.dropout else "adapter.targets"
            raise ValueError(f"{key} is for adapter.kind = lora; leave it out")
        if vision and self.privacy.unit == "record":
            raise ValueError(
                f"privacy.unit = record is not built for adapter.kind = {kind}; use privacy.unit = "
                "client"
            )
        if not vision and self.base.placement != "client":
            raise ValueError(
                f"base.placement = {self.base.placement} is for base.task = "
                "visual-question-answering; leave it out"
            )
        if self.emulator != Emulator() and self.base.placement != "emulator":
            raise ValueError(
                "the keys of [emulator] are for base.placement = emulator; set it, or leave them "
                "out"
            )
        if self.split.eta is not None and self.base.placement != "server":
            raise ValueError(
                "split.clip and split.eta protect what is sent to a base model at the server: set "
                "base.placement = server, or leave them out"
            )
        return self

    @model_validator(mode="after")
    def _outputs_fit_the_adapter(self) -> Self:
        adapter = self.adapter
        if adapter.kind != "nano" and adapter.output_rank is not None:
            raise ValueError("adapter.output-rank is for adapter.kind = nano; leave it out")
        if adapter.kind != "ladder" and adapter.rungs != RUNGS:
            raise ValueError("adapter.rungs is for adapter.kind = ladder; leave it out")
        if self.base.placement == "emulator" and self.rungs:
            raise ValueError(
                "an emulator answers with scores, of which adapter.output-rank and adapter.kind = "
                "ladder have no use; set base.placement = server, or leave them out"
            )
        if self.base.placement != "server" or not self.rungs:
            return self
        if adapter.kind == "nano" and self.split.labels != "client":
            raise ValueError(
                "adapter.output-rank leaves the scores to the client, so the server cannot compute "
                "a loss: set split.labels = client"
            )
        if self.train.method == "forward-only":
            raise ValueError(
                "train.method = forward-only with base.placement = server uses the gradient at the "
                "cut, on which adapter.output-rank and adapter.kind = ladder have no bearing; use "
                "train.method = backprop"
            )
        return self

    @model_validator(mode="after")
    def _privacy_is_possible(self) -> Self:
        rule = self.aggregate.rule
        if rule in LOOKS_AT_EACH and (self.secagg.enabled or self.update.bits is not None):
            raise ValueError(
                f"aggregate.rule = {rule} needs to see single updates, and with secagg.enabled or "
                "update.bits there is only their sum; use fedavg, with server-momentum or "
                "server-optimizer = adam if it is to be steadier, or fisher"
            )
        if rule in LOOKS_AT_EACH and self.aggregate.weighting != "uniform":
            raise ValueError(
                f"aggregate.rule = {rule} weighs all alike: aggregate.weighting must be uniform"
            )
        if self.secagg.enabled and self.update.bits is None:
            raise ValueError(
                "secagg.enabled needs integers: set update.clip and update.bits, as in the preset"
            )
        if self.secagg.enabled and (self.rounds.min_clients or 3) < 3:
            raise ValueError("rounds.min-clients must be at least 3 with secagg.enabled")
        if self.privacy.unit == "client":
            if not self.secagg.enabled:
                raise ValueError(
                    "privacy.unit = client needs secagg.enabled = true: the server would see "
                    "each update under its own small share of the noise"
                )
            if self.aggregate.weighting != "uniform":
                raise ValueError(
                    "privacy.unit = client needs aggregate.weighting = uniform: an exact count of "
                    "examples would tell of a client"
                )
        if self.privacy.unit == "record" and self.train.method == "forward-only":
            raise ValueError(
                "privacy.unit = record adds its noise to gradients, and train.method = "
                "forward-only has none; use privacy.unit = client, or train.method = backprop"
            )
        if self.privacy.unit == "record" and self.train.proximal:
            raise ValueError("train.proximal is not built for privacy.unit = record; leave it out")
        if self.privacy.unit == "record" and self.train.max_grad_norm is not None:
            raise ValueError(
                "train.max-grad-norm would clip noisy gradients; privacy.example-clip clips already"
            )
        return self

    @model_validator(mode="after")
    def _fisher_information_is_to_be_had(self) -> Self:
        if self.aggregate.rule != "fisher":
            return self
        if self.train.method == "forward-only":
            raise ValueError(
                "aggregate.rule = fisher weighs by squared gradients, and train.method = "
                "forward-only has none; use fedavg, or train.method = backprop"
            )
        if self.privacy.unit == "record":
            raise ValueError(
                "aggregate.rule = fisher sends squared gradients of examples, and the noise of "
                "privacy.unit = record is not in them; use fedavg"
            )
        if self.privacy.unit == "client":
            # It would be private: the clip bounds both halves of what travels together. But where
            # the noise exceeds the divisor, the quotient is anything.
            raise ValueError(
                "aggregate.rule = fisher divides one sum by another, and the noise of "
                "privacy.unit = client would drown the divisor; use fedavg"
            )
        return self

    @model_validator(mode="after")
    def _probes_are_in_front_of_a_cut(self) -> Self:
        if self.train.probes != 1 and not self.slopes_at_the_cut:
            raise ValueError(
                "train.probes is for train.method = forward-only with base.placement = server; "
                "leave it out"
            )
        return self

    @model_validator(mode="after")
    def _two_passes_are_of_one_model(self) -> Self:
        if self.train.method == "forward-only" and self.adapter.dropout:
            raise ValueError(
                "train.method = forward-only compares two passes, and adapter.dropout would make "
                "them two models; set it to 0"
            )
        if self.train.method == "forward-only" and self.adapter.private:
            raise ValueError(
                "train.method = forward-only moves the whole adapter along each direction, and no "
                "part of it can stay behind as adapter.private; use train.method = backprop"
            )
        if self.train.method == "forward-only" and self.split.eta is not None:
            raise ValueError(
                "train.method = forward-only compares two passes, and the noise of split.eta is "
                "another in each; use train.method = backprop"
            )
        return self

    def values_trained(self, adapter: int) -> int:
        """How many values are trained of an adapter of so many: what the server sends and keeps."""
        return self.train.directions if self.train.method == "forward-only" else adapter

    def values_sent(self, adapter: int) -> int:
        """How many values a client sends, of an adapter of so many or of what is trained of it."""
        trained = self.values_trained(adapter)
        return 2 * trained if self.aggregate.rule == "fisher" else trained

    @property
    def rungs(self) -> int:
        """How many states of an example the base model answers with; 0: with scores."""
        if self.adapter.kind == "ladder":
            return self.adapter.rungs
        return int(self.adapter.output_rank is not None)

    @property
    def labels_at(self) -> Literal["server", "client"]:
        """Who knows the answers: a ladder is trained where they are, whatever `split` says."""
        return "client" if self.adapter.kind == "ladder" else self.split.labels

    @property
    def slopes_at_the_cut(self) -> bool:
        """Whether training without gradients uses those that the base model has."""
        return self.train.method == "forward-only" and self.base.placement == "server"

    @property
    def has_labels(self) -> bool:
        """Whether the task has classes or answers to choose from."""
        return self.base.task != "causal-lm"

    @property
    def lacks_labels(self) -> bool:
        """Whether the parties could not agree on what the model's outputs mean."""
        return self.has_labels and not self.data.labels

    @property
    def label_column(self) -> str | None:
        """The column of the labels, or None for a task without."""
        return self.data.label_column if self.base.task == "text-classification" else None

    @property
    def digest(self) -> str:
        """SHA-256 of what server and clients must agree on.

        Left out: where data and base model lie (the base has a digest of its own) and how fast a
        machine computes.
        """
        own: Any = {
            "base": {"path", "connector"},
            "emulator": {"path"},
            "data": True,
            "train": {"device", "threads"},
        }
        value = self.model_dump(mode="json", exclude=own)
        value["labels"] = self.data.labels
        return digest_of(value)

    def to_toml(self) -> str:
        """This configuration as a TOML file; keys that are unset are left out."""
        return tomli_w.dumps(self.model_dump(mode="json", by_alias=True, exclude_none=True))


Document = TypeVar("Document", bound=_Table)


class Policy(_Table):
    """What a site demands of any federation before it takes part, whatever the server wishes."""

    require_masking: bool = True
    """Take part only where the server sees sums."""
    min_cohort: int = Field(default=3, ge=1)
    """Fewest updates in a sum that this site's own may be part of."""
    min_threshold: float = Field(default=2 / 3, ge=0, lt=1)
    """Least `secagg.threshold`."""
    min_colluding: float = Field(default=0.0, ge=0, lt=0.5)
    """Least `secagg.colluding`."""
    require_privacy: Literal["none", "record", "client"] = "none"
    """The unit of differential privacy that must be on; `none`: any or none."""
    max_epsilon: Positive | None = None
    """Most epsilon that this site spends, over all runs of one unit together, at their delta."""
    max_delta: Fraction = 1e-3
    """Largest delta at which an epsilon counts."""
    min_noise: Positive | None = None
    """Least noise multiplier, where there is noise."""
    max_token_epsilon: float = Field(default=0.0, ge=0)
    """Most local epsilon (2 · `split.clip` · `split.eta`) of a token that goes to a base model at
    the server; 0: none may go, inf: embeddings may go as they are. See docs/nano.md."""
    base_digests: tuple[str, ...] = ()
    """Base models on which it trains (SHA-256); empty: the one that it has."""
    rules: tuple[str, ...] = ()
    """Aggregation rules that it accepts; empty: any."""
    max_update_norm: Positive | None = None
    """Largest `update.clip`."""
    share_metrics: Literal["never", "sum", "each"] = "sum"
    """Whether losses, scores and example counts may leave: not at all, only as part of a masked
    sum, or on their own."""
    report_failures: bool = False
    """Whether the server may learn that training failed here, and why. If not, a site whose
    training fails takes part with an update of zeros, and says so in its own log."""
    roster_digest: str | None = None
    """The roster (SHA-256) that it was told of from outside; unset: the one that it has."""


# Whoever simulates is server and all sites in one: there is nobody to keep a secret from.
OPEN_POLICY = Policy(
    require_masking=False,
    min_cohort=1,
    min_threshold=0.0,
    share_metrics="each",
    max_delta=0.5,
    max_token_epsilon=inf,
    report_failures=True,
)


class Site(_Table):
    """Who this site is, and where its files lie; paths are relative to the file itself."""

    name: str = Field(default="", max_length=256)
    """The site's name in the roster."""
    server: str = ""
    """Host and port of the server, as in `fedtune.example.org:9092`."""
    base_server: str = ""
    """Host and port where the base model is, with `base.placement = "server"`; empty: the host of
    `server`, port 9094."""
    federation: str = "federation.toml"
    """The federation's configuration. The site agrees to it by having it here."""
    roster: str = "roster.toml"
    """Public keys of all parties. It must not come through the server."""
    certificate: str = "ca.crt"
    """The certificate of the authority that vouches for the server."""
    keys: str = "keys"
    """Folder of this site's private keys, made by `fedtune keys site`."""
    memory: str = "site.db"
    """What the site remembers: its part in each round, the privacy it has spent, and the private
    part of its adapter."""
    audit: str = "audit.jsonl"
    """The site's audit log, see `fedtune audit verify`."""


class SiteData(_Table):
    """The site's own data."""

    train: str = "train.csv"
    """Rows to train on: CSV, JSON lines or Parquet."""
    test: str | None = None
    """Rows to evaluate on, if the policy lets scores leave; unset: none."""


class Machine(_Table):
    """What differs from machine to machine and not from federation to federation."""

    base: str | None = None
    """Where the base model lies here; unset: as in the federation's configuration."""
    models: str = "models"
    """Folder for a base model that is fetched from the server."""
    device: str = "auto"
    """As `train.device`; without PyTorch, `auto` is the CPU."""
    threads: int = Field(default=1, ge=1, le=1024)
    """As `train.threads`."""
    runtime: Literal["torch", "ort", "stepgraph"] = "torch"
    """What trains: PyTorch; ONNX Runtime's training build; or any ONNX Runtime. The last two need
    artifacts, see `fedtune edge build`, and no PyTorch, see docs/edge.md. With `base.placement =
    "server"`: `torch` or `stepgraph`."""
    artifacts: str = "artifacts"
    """Folder of the artifacts."""
    artifacts_digest: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of their manifest.json, which `fedtune edge build` prints; it should come on another
    way than they. Unset: whatever is there, as long as it is whole."""
    kit: str = "kit"
    """`base.placement = "server"` or `"emulator"`: the folder that `fedtune nano kit` made."""
    kit_digest: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of its kit.json, which that command prints; unset: whatever is there, if whole."""
    precision: Literal["float32", "int8"] = "float32"
    """Of the frozen weights, without PyTorch: `int8` takes a quarter of the memory for them."""
    max_memory_mb: int | None = Field(default=None, ge=1)
    """Most memory (in 1,000,000 bytes) of the training process, without PyTorch: batches go through
    in parts, and texts are cut if need be. Unset: whole batches."""
    moments: str | None = None
    """File in which AdamW's moments are kept from round to round, without PyTorch. Unset: they
    start afresh each round."""

    @model_validator(mode="after")
    def _keys_are_of_the_runtime(self) -> Self:
        if self.runtime != "torch" and self.base is not None:
            raise ValueError(
                f'machine.base is for machine.runtime = "torch"; with "{self.runtime}" the '
                "artifacts hold the base model"
            )
        for key in ("artifacts_digest", "max_memory_mb", "moments"):
            if self.runtime == "torch" and getattr(self, key) is not None:
                name = key.replace("_", "-")
                raise ValueError(f'machine.{name} is for machine.runtime = "ort" or "stepgraph"')
        if self.runtime == "torch" and self.precision != "float32":
            raise ValueError('machine.precision is for machine.runtime = "ort" or "stepgraph"')
        return self


class Conditions(_Table):
    """When this machine takes part: while all that is set here holds. Only on Linux."""

    hours: tuple[str, ...] = ()
    """Local times, of which one must be: `22:00-06:00`, or on some days, by which it begins,
    `sat,sun 00:00-24:00`. Empty: any."""
    min_battery: float | None = Field(default=None, ge=0, le=1)
    """Least charge of the battery, also while it charges; 1 is full. A machine without a battery
    is on mains, and fulfils this."""
    mains_only: bool = False
    """Whether the machine must not run on its battery."""
    max_load: Positive | None = None
    """Most load per core, as an average of the last minute, without what the site's own training
    adds to it."""
    max_temperature: float | None = Field(default=None, gt=-273.15, allow_inf_nan=False)
    """Most °C of the hottest thermal zone."""
    min_free_memory_mb: int | None = Field(default=None, ge=1)
    """Least memory (in 1,000,000 bytes) that programs could have without swapping; what the site's
    own training holds counts as free."""
    sysfs: str = "/sys"
    """Where the kernel's readings of batteries and temperatures are."""

    @model_validator(mode="after")
    def _hours_are_windows(self) -> Self:
        for text in self.hours:
            try:
                Window.parse(text)
            except ValueError as error:
                raise ValueError(f"conditions.hours: {error}") from error
        return self


class ClientConfig(_Table):
    """One site, as in its client.toml."""

    site: Site = Site()
    data: SiteData = SiteData()
    machine: Machine = Machine()
    conditions: Conditions = Conditions()
    policy: Policy = Policy()


class Listen(_Table):
    """Where the server listens, and where its files lie, relative to the file itself."""

    host: str = "0.0.0.0"  # noqa: S104  # a server is there to be reached
    """Address to listen at."""
    port: int = Field(default=9092, ge=0, le=65535)
    """Port to listen at; 0: a free one."""
    keys: str = "server-keys"
    """Folder of the server's private keys, made by `fedtune keys server`."""
    roster: str = "roster.toml"
    """Public keys of all parties, made by `fedtune keys roster`."""
    run: str = "run"
    """Folder of the run."""
    test: str | None = None
    """Rows on which the server evaluates the global adapter; unset: none."""
    base: str | None = None
    """Where the base model lies here; unset: as in the federation's configuration."""
    offer_base: bool = True
    """Whether sites can fetch the base model here, if `base.digest` is set and `base.placement` is
    `client`."""
    base_port: int = Field(default=BASE_PORT, ge=0, le=65535)
    """Port of the base model, with `base.placement = "server"`; 0: a free one."""
    patience: Positive = 60.0
    """Seconds that the first round waits for clients that are not connected yet, once there are
    enough of them."""
    status: str = ""
    """Address and port of `/health` and of `/metrics` for Prometheus, as in `127.0.0.1:9093`;
    empty: none. There is no password, and names of sites are in them: keep it on this machine."""

    @model_validator(mode="after")
    def _status_is_an_address(self) -> Self:
        host, _, port = self.status.rpartition(":")
        if self.status and not (host and port.isascii() and port.isdigit() and int(port) < 65536):
            raise ValueError(
                f"server.status must be an address and a port, as in 127.0.0.1:9093, "
                f"got {self.status!r}"
            )
        return self

    @property
    def status_address(self) -> tuple[str, int] | None:
        """Host and port of `status`."""
        host, _, port = self.status.rpartition(":")
        return (host.strip("[]"), int(port)) if self.status else None


class Limits(_Table):
    """How much a server of a base model takes at a time, and for how long it waits.

    Sizes are in bytes, times in seconds.
    """

    examples: int = Field(default=64, ge=1)
    """Most examples of a request."""
    tokens: int = Field(default=256, ge=1)
    """Most tokens of an example, its image's among them."""
    message_bytes: int = Field(default=16 << 20, ge=1 << 10, le=1 << 30)
    """Largest message of a client; larger ones are refused before they are read."""
    requests: int = Field(default=2, ge=1)
    """Requests of one client that wait, are computed, or whose second step is awaited."""
    queue_bytes: int = Field(default=256 << 20, ge=1)
    """Embeddings of all clients that wait, decoded."""
    batch_examples: int = Field(default=64, ge=1)
    """Most examples of a batch, unless one request has more."""
    batch_tokens: int = Field(default=16_384, ge=1)
    """Most tokens of a batch, filled up to its longest example, unless one request has more."""
    kept_examples: int = Field(default=256, ge=1)
    """Examples of batches whose graph is kept because a client's second step is awaited."""
    window: float = Field(default=0.003, ge=0)
    """How long a batch waits for clients that have asked within `busy`."""
    busy: Positive = 1.0
    """How long a client counts as busy after it has asked."""
    upstream: Positive = 10.0
    """For how long a client's second step is awaited."""
    patience: Positive = 300.0
    """For how long a request may wait at most, whatever its client says."""
    handshake: Positive = 10.0
    """How long a new connection may take to say who it is."""
    write: Positive = 30.0
    """How long a client may take to take an answer."""
    strangers: int = Field(default=32, ge=1)
    """Connections at a time that have not said yet who they are."""

    @model_validator(mode="after")
    def _a_batch_can_be_kept(self) -> Self:
        if self.kept_examples < max(self.batch_examples, self.examples):
            raise ValueError("limits.kept-examples must be at least as large as one batch")
        return self


class ServerConfig(_Table):
    """The server's own file, `server.toml`, beside the federation's."""

    server: Listen = Listen()
    limits: Limits = Limits()


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


def load_config(
    path: Path, overrides: Sequence[str] = (), values: Mapping[str, object] = MappingProxyType({})
) -> Config:
    """A configuration file with `table.key=value` overrides applied; raises `ConfigError`.

    `values` of `table.key` are taken as they are, whatever is in a string; None: the file's own.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    return parse_config(text, str(path), overrides, values=values)


def load_client(path: Path) -> ClientConfig:
    """A site's file; raises `ConfigError`."""
    return _validate(ClientConfig, read_toml(path), str(path))


def load_server(path: Path) -> ServerConfig:
    """The server's own file; raises `ConfigError`."""
    return _validate(ServerConfig, read_toml(path), str(path))


def load_policy(path: Path) -> Policy:
    """The `[policy]` of a site's file; raises `ConfigError`."""
    return load_client(path).policy


def read_toml(path: Path) -> dict[str, Any]:
    """What a TOML file says; raises `ConfigError`."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error


def parse_config(
    text: str,
    origin: str,
    overrides: Sequence[str] = (),
    without: Sequence[str] = (),
    values: Mapping[str, object] = MappingProxyType({}),
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
    for key, own in values.items():
        table, _, name = key.partition(".")
        if own is not None and isinstance(value.setdefault(table, {}), dict):
            value[table][name] = own
    return _validate(Config, value, origin)


def _validate(kind: type[Document], value: Mapping[str, Any], origin: str) -> Document:
    try:
        return kind.model_validate_json(_json(value), by_alias=True, by_name=False)
    except ValidationError as error:
        known = [key for key, _ in known_keys(kind)]
        lines = "; ".join(_describe(detail, known) for detail in error.errors())
        raise ConfigError(f"{origin}: {lines}") from error


def _json(value: Mapping[str, Any]) -> str:
    """TOML values as JSON, in which pydantic's strict mode takes a list for a tuple."""
    return json.dumps(value, default=str)


def _apply(value: dict[str, Any], override: str) -> None:
    """Set `table.key=value` in a parsed TOML document; `table.key=unset` takes the key out."""
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
    if parsed == UNSET:
        value.pop(keys[-1], None)
    else:
        value[keys[-1]] = parsed


def _describe(detail: ErrorDetails, known: list[str]) -> str:
    """One validation error as `table.key: what is wrong`."""
    location = [str(part) for part in detail["loc"]]
    where = ".".join(location)
    if detail["type"] == "extra_forbidden":
        hint = _nearest(where, known)
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


def known_keys(kind: type[BaseModel] = Config) -> Iterator[tuple[str, str]]:
    """Every key as (`table.key`, description), in the order of the reference."""
    for name, field in kind.model_fields.items():
        table = field.annotation
        if isinstance(table, type) and issubclass(table, _Table):
            for key, inner in table.model_fields.items():
                yield f"{name}.{key.replace('_', '-')}", " ".join((inner.description or "").split())
        else:
            yield name, " ".join((field.description or "").split())
