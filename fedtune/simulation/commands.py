"""What `fedtune simulate` and `fedtune report` do; neither needs torch to be refused."""

from __future__ import annotations

import importlib.util
import json
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from fedtune.config import (
    DEFAULT_PRESET,
    OPEN_POLICY,
    Config,
    load_config,
    load_policy,
    load_preset,
)
from fedtune.errors import ConfigError, RunFolderError, UsageError
from fedtune.files import write_atomic
from fedtune.records import RoundRecord, Summary
from fedtune.report.html import render_html
from fedtune.report.progress import make_progress
from fedtune.report.tables import print_summary
from fedtune.simulation.dropout import STAGES, Dropout
from fedtune.simulation.folder import METRICS, REPORT, SUMMARY, RunFolder, check_new, free_path

RUNS = Path("runs")
# Keys of a preset that say how its own data is divided; other data is divided anew.
OF_THE_DATA = ("data.partition", "data.clients", "data.min-examples")


@dataclass(frozen=True)
class SimulateRequest:
    """The flags of `fedtune simulate`."""

    preset: str | None = None
    config: Path | None = None
    data: str | None = None
    base: str | None = None
    partition: str | None = None
    clients: int | None = None
    rounds: int | None = None
    seed: int | None = None
    settings: tuple[str, ...] = ()
    out: Path | None = None
    resume: Path | None = None
    references: bool = False
    wire: bool = False
    drop: float = 0.0
    drop_at: str = "train"
    policy: Path | None = None
    workers: int | None = None


def simulate(request: SimulateRequest, as_json: bool) -> int:
    """Run or continue a simulation and show it; raises `UsageError` before anything is written."""
    _require_packages()
    progress = make_progress(quiet=as_json)
    if request.drop_at not in STAGES:
        raise ConfigError(f"--drop-at {request.drop_at}: one of {', '.join(STAGES)}")
    if not 0 <= request.drop < 1:
        raise ConfigError(f"--drop {request.drop}: a share of the clients, from 0 to below 1")
    policy = load_policy(request.policy) if request.policy else OPEN_POLICY
    with ExitStack() as stack:
        run = None
        if request.resume:
            _refuse_with_resume(request)
            run = stack.enter_context(RunFolder.open(request.resume))
            config = run.config
            references = request.references or run.journal.identity().get("references") == "yes"
        else:
            config = resolve_config(request)
            references = request.references
            if request.out:
                check_new(request.out)
        if request.drop and not config.secagg.enabled and request.drop_at != "train":
            raise ConfigError(f"--drop-at {request.drop_at} is a stage of secure aggregation")
        # Only now the imports that take seconds: wrong flags are told at once.
        from fedtune.simulation.jobs import make_job
        from fedtune.simulation.run import Options, Simulation, check_same_job, create_run

        if config.base.task == "visual-question-answering":
            progress.note("loading the model; features of images are computed the first time")
        job = make_job(config)
        if run is None:
            path = request.out or free_path(RUNS, _name(request))
            run = stack.enter_context(create_run(job, path, references))
        else:
            check_same_job(job, run)
        progress.started(
            [
                f"{len(job.clients)} clients, {config.rounds.count} rounds: {job.data_words}",
                f"base {job.base_name}, {job.adapter_words}, "
                f"{job.manifest.size:,} parameters travel",
            ],
            config.rounds.count,
        )
        for warning in job.warnings:
            progress.note(warning)
        dropout = Dropout(request.drop, request.drop_at, config.seed) if request.drop else None
        options = Options(request.workers, request.wire, references, policy, dropout)
        try:
            outcome = Simulation(job, run, options, progress).execute()
        except KeyboardInterrupt:
            progress.finished()
            resume = f"fedtune simulate --resume {run.path}"
            print(f"\nfedtune: interrupted; go on with: {resume}", file=sys.stderr)
            return 130
    _show(outcome.summary, outcome.path, as_json)
    if outcome.error:
        print(f"fedtune: the run failed: {outcome.error}", file=sys.stderr)
        return 1
    return 0


def report(path: Path, as_json: bool) -> int:
    """Print the tables of a run and write its report again; returns the exit code."""
    try:
        text = (path / SUMMARY).read_text(encoding="utf-8")
        summary = Summary.from_json(json.loads(text))
        lines = (path / METRICS).read_text(encoding="utf-8").splitlines()
        records = [RoundRecord.from_json(json.loads(line)) for line in lines]
    except (OSError, ValueError, RunFolderError) as error:
        raise RunFolderError(f"{path}: not the folder of a finished run: {error}") from error
    write_atomic(path / REPORT, render_html(summary, records).encode())
    _show(summary, path, as_json)
    return 0


def _require_packages() -> None:
    """Raise `UsageError` now for what would be missing after hours of training."""
    wanted = ("torch", "transformers", "peft", "jinja2", "matplotlib", "tensorboard")
    if missing := [name for name in wanted if importlib.util.find_spec(name) is None]:
        raise UsageError(f"not installed: {', '.join(missing)}; pip install 'fedtune[simulate]'")


def resolve_config(request: SimulateRequest) -> Config:
    """The configuration that the flags name; raises `ConfigError`."""
    if request.preset and request.config:
        raise ConfigError("--preset and --config: give one of them")
    overrides = [*_overrides(request), *request.settings]
    if request.config:
        return load_config(request.config, overrides)
    return load_preset(
        request.preset or DEFAULT_PRESET, overrides, OF_THE_DATA * bool(request.data)
    )


def _overrides(request: SimulateRequest) -> list[str]:
    """Flags as `table.key=value`; JSON strings are TOML strings."""
    flags = {
        "data.source": request.data,
        "base.path": request.base,
        "data.partition": request.partition,
        "data.clients": request.clients,
        "rounds.count": request.rounds,
        "seed": request.seed,
    }
    return [f"{key}={json.dumps(value)}" for key, value in flags.items() if value is not None]


def _refuse_with_resume(request: SimulateRequest) -> None:
    given = {
        "--preset": request.preset,
        "--config": request.config,
        "--data": request.data,
        "--base": request.base,
        "--partition": request.partition,
        "--clients": request.clients,
        "--rounds": request.rounds,
        "--seed": request.seed,
        "--set": request.settings or None,
        "--out": request.out,
    }
    wrong = [flag for flag, value in given.items() if value is not None]
    if wrong:
        raise ConfigError(f"--resume continues a run as it was begun; leave out {', '.join(wrong)}")


def _name(request: SimulateRequest) -> str:
    if request.data:
        return Path(request.data).stem or "run"
    if request.config:
        return request.config.stem
    return request.preset or DEFAULT_PRESET


def _show(summary: Summary, path: Path, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"run": str(path), **summary.to_json()}, ensure_ascii=False))
    else:
        print_summary(summary, Console(), path)
