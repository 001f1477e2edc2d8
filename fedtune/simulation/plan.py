"""What `fedtune privacy plan` answers: which noise for an epsilon, which epsilon for a noise."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fedtune.config import Config, load_config, load_preset
from fedtune.errors import ConfigError, UsageError
from fedtune.privacy.accountant import Ledger
from fedtune.round.terms import client_release, make_terms, record_release


@dataclass(frozen=True)
class PlanRequest:
    """The flags of `fedtune privacy plan`."""

    preset: str = "hospitals"
    config: Path | None = None
    unit: str | None = None
    epsilon: float | None = None
    delta: float | None = None
    noise_multiplier: float | None = None
    rounds: int | None = None
    clients: int | None = None
    examples: int = 400
    parameters: int = 100_000
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Noise and epsilon of a whole run.

    `noise_to_signal` compares, unit "client", the length of the noise in the sum with that of
    the longest sum of updates; above 1 the noise is the larger. The noise is in `values` values:
    the adapter's, or with forward-only training one per direction. None for unit "record".
    """

    unit: str
    epsilon: float
    delta: float
    noise_multiplier: float
    rounds: int
    clients: int
    noise_to_signal: float | None
    values: int | None
    sampling_rate: float | None
    steps: int | None


def plan(request: PlanRequest, as_json: bool) -> int:
    """Print the plan; raises `ConfigError` if no noise reaches the epsilon."""
    if importlib.util.find_spec("dp_accounting") is None:
        raise UsageError("not installed: dp-accounting; pip install 'fedtune[privacy]'")
    found = make_plan(request)
    if as_json:
        print(json.dumps(asdict(found)))
    else:
        _show(found, request)
    return 0


def make_plan(request: PlanRequest) -> Plan:
    """The plan of a configuration with the request's changes."""
    config = _config(request)
    clients = request.clients or config.rounds.clients_per_round or config.data.clients or 8
    rounds, delta = config.rounds.count, config.privacy.delta
    if config.privacy.unit == "client":
        # Who asks for a number of clients asks for a federation of so many.
        terms = make_terms(config, request.clients or config.data.clients or clients)
        terms.check(clients)
        values = config.values_sent(request.parameters)
        release = client_release(config, values, 1)
        noise = math.sqrt(release.variance) / release.l2
        epsilon = Ledger([release] * rounds).epsilon(delta)
        # If all stay to the end, all their shares of the noise are in the sum.
        excess = clients / (terms.fewest_survivors(clients) - terms.colluders_of(clients))
        ratio = noise * math.sqrt(values * excess) / clients
        return Plan("client", epsilon, delta, noise, rounds, clients, ratio, values, None, None)
    record = record_release(config, request.examples, 1)
    epsilon = Ledger([record] * rounds).epsilon(delta)
    return Plan(
        "record",
        epsilon,
        delta,
        record.noise_multiplier,
        rounds,
        clients,
        None,
        None,
        record.sampling_rate,
        record.steps,
    )


def _config(request: PlanRequest) -> Config:
    if request.examples < 1 or request.parameters < 1:
        raise ConfigError("--examples and --parameters must be at least 1")
    given = {
        "privacy.unit": request.unit,
        "privacy.epsilon": request.epsilon,
        "privacy.delta": request.delta,
        "privacy.noise-multiplier": request.noise_multiplier,
        "rounds.count": request.rounds,
    }
    if request.unit == "client":
        given["aggregate.weighting"] = "uniform"
    overrides = [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]
    overrides += request.settings
    load = load_config(request.config, overrides) if request.config else None
    config = load or load_preset(request.preset, overrides)
    if config.privacy.unit == "none":
        raise ConfigError("privacy.unit = none; say --unit client or --unit record")
    return config


def _show(found: Plan, request: PlanRequest) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    record = found.unit == "record"
    hides = "one training example, added or removed" if record else "all data of one client"
    table.add_row("hides", hides)
    table.add_row("epsilon", f"{found.epsilon:.3f} after {found.rounds} rounds, at {found.delta:g}")
    table.add_row("noise multiplier", f"{found.noise_multiplier:.4f}")
    if found.noise_to_signal is not None:
        table.add_row(
            "noise / signal",
            f"{found.noise_to_signal:.2f}: the noise in {found.values:,} values against the "
            f"longest sum of {found.clients} updates",
        )
        if found.noise_to_signal > 1:
            table.add_row("", "more clients, fewer parameters or a larger epsilon are needed")
    if found.sampling_rate is not None:
        table.add_row(
            "training",
            f"{found.steps} steps per round, each example in a batch with probability "
            f"{found.sampling_rate:.4f} ({request.examples:,} examples)",
        )
    Console().print(table)
