"""Run a job: rounds over the in-process grid, then evaluation, references and results."""

from __future__ import annotations

import base64
import importlib.metadata
import math
import resource
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from flwr.serverapp import Grid

from fedtune.config import OPEN_POLICY, Config, Policy
from fedtune.errors import JobError, RunFolderError, TooFewClients
from fedtune.export.peft_folder import Passport, write_adapter
from fedtune.files import write_atomic, write_json
from fedtune.flower.grid import LocalGrid
from fedtune.flower.internals import quiet
from fedtune.flower.observer import Failure, Observer
from fedtune.flower.pool import Pool
from fedtune.flower.strategy import FederatedFineTuning
from fedtune.records import (
    ClientSummary,
    Cut,
    Reference,
    RoundRecord,
    Sample,
    Score,
    Status,
    Summary,
)
from fedtune.report.progress import Progress
from fedtune.round import federation as rounds
from fedtune.round.masked import Authority
from fedtune.round.server import GlobalState
from fedtune.simulation import folder as names
from fedtune.simulation.cut_account import account, least_bytes
from fedtune.simulation.dropout import Dropout
from fedtune.simulation.folder import CONNECTOR, RunFolder
from fedtune.simulation.job import Job, JobClient
from fedtune.simulation.references import ReferenceResult, check_references, run_references
from fedtune.simulation.sites import Sites, needs_sites
from fedtune.simulation.workers import COMMON_TEST, evaluate, make_pool
from fedtune.train.trainer import Evaluation
from fedtune.types import Float32Vector, Manifest, digest_of, sha256_hex

RETRY_SECONDS = 5.0


@dataclass(frozen=True)
class Options:
    """How to run a job; none of it changes the result."""

    workers: int | None = None
    wire: bool = False
    references: bool = False
    policy: Policy = OPEN_POLICY
    dropout: Dropout | None = None
    patience: float | None = None  # see `FederatedFineTuning.run`


@dataclass(frozen=True)
class Outcome:
    """What a run left behind; `error` says why it failed."""

    path: Path
    summary: Summary
    records: tuple[RoundRecord, ...]
    adapter: Float32Vector
    error: JobError | None = None


def create_run(job: Job, path: Path, references: bool) -> RunFolder:
    """The folder of a new run of `job`."""
    check_references(job.config, references)
    initial = job.initial()
    rule_state = rounds.make_rule(job.config, len(initial)).init(len(initial))
    identity = {
        "run_id": secrets.token_hex(16),
        "references": "yes" if references else "no",
        **_digests(job),
    }
    return RunFolder.create(path, job.config, identity, GlobalState(initial, rule_state))


def check_same_job(job: Job, run: RunFolder) -> None:
    """Raise `RunFolderError` if base, data or configuration are not what the run began with."""
    identity = run.journal.identity()
    for key, now in _digests(job).items():
        if identity.get(key) != now:
            words = key.removesuffix("_digest").replace("_", " ")
            raise RunFolderError(
                f"{run.path}: the {words} is not the one that this run began with; "
                "start a new run instead"
            )


class Parties(Protocol):
    """Who takes part: the server's key and the roster, and what is known of clients' accounts."""

    @property
    def authority(self) -> Authority: ...

    def epsilon(self, run_id: str, delta: float) -> float | None:
        """Unit "record": the most that any site has spent; None if only they know."""

    def close(self) -> None: ...


class Simulation(Observer):
    """One run of one job in one folder."""

    def __init__(
        self,
        job: Job,
        run: RunFolder,
        options: Options,
        progress: Progress,
        on_round: Callable[[RoundRecord], None] | None = None,
        grid: Grid | None = None,
        parties: Parties | None = None,
        watchers: Sequence[Observer] = (),
    ) -> None:
        """`grid` carries the messages; by default this machine's own workers answer them.

        `parties` are by default simulated sites whose memories are in the run's folder. The
        `watchers` are told what happens, after the run's own files were written.
        """
        if parties is None and (needs_sites(job.config) or options.policy != OPEN_POLICY):
            names_of_clients = [client.name for client in job.clients]
            parties = Sites(run.path / names.SITES, names_of_clients, options.policy)
        check_references(job.config, options.references)
        self._parties = parties
        self._job = job
        self._run = run
        self._options = options
        self._progress = progress
        self._on_round = on_round
        self._grid = grid
        self._watchers = watchers
        self._federation = rounds.Federation(
            job.config,
            job.manifest,
            job.base_digest,
            run.journal,
            parties.authority if parties and job.config.secagg.enabled else None,
        )
        # Before anything is trained: without workers it is this process's own model that is.
        wanted = options.references or job.shown
        self._initial = job.adapter_at(job.initial()) if wanted else None
        self._references: dict[str, ReferenceResult] = {}
        self._final: dict[int, Evaluation] = {}
        self._personal: dict[int, Evaluation] = {}
        self._before: Evaluation | None = None
        self._emulated: dict[str, Evaluation] = {}
        self._refused: list[str] = []

    def execute(self) -> Outcome:
        """Run what is left of the run and write its results.

        After Ctrl-C (`KeyboardInterrupt`) results so far are written and the exception goes on.
        A job that fails is in the outcome; its results so far are written too.
        """
        try:
            return self._execute()
        finally:
            self._close_parties()

    def _execute(self) -> Outcome:
        quiet()
        self._run.rewrite_metrics()
        self._close_parties()  # an open database must not go through a fork
        status: Status = "finished"
        error: JobError | None = None
        simulated = self._parties if isinstance(self._parties, Sites) else None
        pool = make_pool(self._job, self._options.workers, self._options.wire, simulated)
        try:
            self._rounds(pool)
            self._score(pool)
        except JobError as failure:
            status, error = "failed", failure
        except KeyboardInterrupt:
            self._write("interrupted")
            raise
        finally:
            pool.close()
            self._progress.finished()
        return self._write(status, error)

    def client_joined(self, name: str) -> None:
        """See `Observer`."""
        for watcher in self._watchers:
            watcher.client_joined(name)

    def client_left(self, name: str) -> None:
        """See `Observer`."""
        for watcher in self._watchers:
            watcher.client_left(name)

    def client_refused(self, node: int, reason: str) -> None:
        """See `Observer`."""
        self._refused.append(f"node {node} was refused: {reason}")
        self._progress.note(self._refused[-1])
        for watcher in self._watchers:
            watcher.client_refused(node, reason)

    def waiting(self, found: int, wanted: int) -> None:
        """See `Observer`."""
        self._progress.waiting(found, wanted)
        for watcher in self._watchers:
            watcher.waiting(found, wanted)

    def round_running(
        self, round_number: int, stage: str, waiting_for: Sequence[str], total: int
    ) -> None:
        """See `Observer`."""
        self._progress.round_running(round_number, stage, waiting_for, total)
        for watcher in self._watchers:
            watcher.round_running(round_number, stage, waiting_for, total)

    def client_failed(self, name: str, failure: Failure) -> None:
        """See `Observer`."""
        for watcher in self._watchers:
            watcher.client_failed(name, failure)

    def round_lost(self, reason: str) -> None:
        """See `Observer`."""
        self._refused.append(f"{reason}; the adapter stays as it was")
        self._progress.note(self._refused[-1])
        for watcher in self._watchers:
            watcher.round_lost(reason)

    def round_committed(self, record: RoundRecord) -> None:
        """See `Observer`."""
        self._run.append_metrics(record)
        left = self._federation.rounds_left
        recent = [r.seconds for r in self._run.journal.records()[-3:]]
        self._progress.round_done(record, left * sum(recent) / len(recent))
        if self._on_round:
            self._on_round(record)
        for watcher in self._watchers:
            watcher.round_committed(record)

    def _close_parties(self) -> None:
        if self._parties is not None:
            self._parties.close()

    def _rounds(self, pool: Pool) -> None:
        job = self._job
        if not self._federation.rounds_left:
            return
        score = (lambda adapter: self._common_score(pool, adapter)) if job.test else None
        absences = self._options.dropout.absent if self._options.dropout else None
        strategy = FederatedFineTuning(self._federation, self, score, absences)
        grid = self._grid or LocalGrid(pool, len(job.clients))
        while True:
            try:
                return strategy.run(grid, len(job.clients), self._options.patience)
            except TooFewClients as error:
                # Simulated clients do not come back; others may.
                if self._options.patience is None:
                    raise
                self._progress.note(f"{error}; trying again")
                time.sleep(RETRY_SECONDS)

    def _common_score(self, pool: Pool, adapter: Float32Vector) -> rounds.Score:
        found = evaluate(pool, self._job, self._job.adapter_at(adapter))
        self._final = {COMMON_TEST: found}
        return rounds.Score(found.loss, found.accuracy)

    def _score(self, pool: Pool) -> None:
        """Evaluate the final adapter where it is not yet, and train the references."""
        job, adapter = self._job, self._job.adapter_at(self._federation.adapter)
        if job.test:
            if not self._final:
                self._final[COMMON_TEST] = evaluate(pool, job, adapter)
        else:
            for place, client in enumerate(job.clients):
                if client.test is not None:
                    self._final[place] = evaluate(pool, job, adapter, place)
        for place, own in self._personal_adapters().items():
            where = COMMON_TEST if job.test else place
            self._personal[place] = evaluate(pool, job, own, where)
        if self._initial is not None and job.shown:
            self._before = evaluate(pool, job, self._initial)
            if job.plugged is not None:
                for name, vector in (("emulator", adapter), ("emulator-base", self._initial)):
                    self._emulated[name] = evaluate(pool, job, vector, emulated=True)
        if self._initial is not None and self._options.references:
            running = self._progress.references_running
            self._references = run_references(pool, job, self._initial, running)

    def _personal_adapters(self) -> dict[int, Float32Vector]:
        """The final adapter with the private part of each client that can be tested."""
        job, sites, shared = self._job, self._parties, self._federation.adapter
        if job.parts is None or not isinstance(sites, Sites):
            return {}
        run_id, rounds = self._federation.run_id, self._federation.round
        found = {}
        for place, client in enumerate(job.clients):
            own = sites.private_part(client.name, run_id, rounds)
            if own is not None and (job.test or client.test is not None):
                found[place] = job.parts.join(shared, own)
        sites.close()  # an open database must not go through a fork
        return found

    def _write(self, status: Status, error: JobError | None = None) -> Outcome:
        from fedtune.report.html import render_html
        from fedtune.report.tensorboard import write_events

        job, path = self._job, self._run.path
        number, state = self._run.journal.last_state()
        records = self._run.journal.records()
        summary = self._summary(status, records, error)
        adapter = job.adapter_at(state.adapter)
        manifest, shared = job.adapter.manifest, adapter
        if job.parts:  # the rest of it is the seed's, and no client's
            manifest, shared = job.parts.shared, state.adapter
        passport, peft_config = self._passport(number, manifest, shared), job.adapter.peft_config
        beside = {CONNECTOR: job.connector} if job.connector else {}
        write_adapter(path / names.ADAPTER, manifest, shared, peft_config, passport, beside)
        write_json(path / names.SUMMARY, summary.to_json())
        write_atomic(path / names.REPORT, render_html(summary, records).encode())
        write_events(path / names.TENSORBOARD, records)
        return Outcome(path, summary, tuple(records), adapter, error)

    def _summary(
        self, status: Status, records: list[RoundRecord], error: JobError | None
    ) -> Summary:
        job = self._job
        scores = [Score(r.round, r.loss, r.accuracy) for r in records if r.loss is not None]
        best = max(scores, key=lambda s: (s.accuracy or 0.0, -(s.loss or 0.0)), default=None)
        counted = sum(len(r.clients) for r in records)
        asked = counted + sum(len(r.failed) for r in records)
        up, down = sum(r.bytes_up for r in records), sum(r.bytes_down for r in records)
        failure = (f"the run failed: {error}",) if error else ()
        clients = tuple(
            self._client(place, client, records) for place, client in enumerate(job.clients)
        )
        return Summary(
            name=self._run.path.name,
            status=status,
            rounds=len(records),
            planned_rounds=job.config.rounds.count,
            seed=job.config.seed,
            final=scores[-1] if scores else None,
            best=best,
            labels=job.labels,
            per_client=clients,
            references=self._reference_records(),
            bytes_up_per_client_round=up // counted if counted else 0,
            bytes_down_per_client_round=down // asked if asked else 0,
            bytes_up=up,
            bytes_down=down,
            seconds=sum(r.seconds for r in records),
            train_seconds=sum(r.train_seconds for r in records),
            peak_rss_mb=_peak_rss_mb(),
            masked=job.config.secagg.enabled,
            epsilon=self._epsilon(),
            epsilon_unit=_unit_words(job.config),
            config_digest=job.config.digest,
            base=job.base_name,
            base_digest=job.base_digest,
            adapter=job.adapter_words,
            adapter_parameters=job.adapter.manifest.size,
            data=job.data_words,
            evaluation=_evaluation_words(job) + _with_whose_part(job),
            warnings=(*job.warnings, *self._refused, *failure),
            versions=_versions(),
            samples=self._samples(),
            cut=cut_record(job, clients),
        )

    def _samples(self) -> tuple[Sample, ...]:
        """What the report shows of the test set, once both models have been evaluated on it."""
        job, after = self._job, self._final.get(COMMON_TEST)
        if self._before is None or after is None or job.test is None:
            return ()
        # Evaluations are in order of length.
        place = np.argsort(np.argsort(job.test.lengths, kind="stable"), kind="stable")
        return tuple(
            Sample(
                shown.question,
                job.labels[after.labels[place[shown.row]]],
                job.labels[self._before.predictions[place[shown.row]]],
                job.labels[after.predictions[place[shown.row]]],
                base64.b64encode(shown.image).decode(),
            )
            for shown in job.shown
        )

    def _client(self, place: int, client: JobClient, records: list[RoundRecord]) -> ClientSummary:
        federated = self._final.get(COMMON_TEST if self._job.test else place)
        personal = self._personal.get(place)
        alone = self._references.get(f"alone:{place}")
        mix = client.label_counts
        return ClientSummary(
            name=client.name,
            examples=len(client.train),
            label_counts=tuple(int(count) for count in mix),
            rounds_completed=sum(client.name in r.clients for r in records),
            rounds_failed=sum(client.name in r.failed for r in records),
            accuracy=federated.accuracy if federated else None,
            own_mix_accuracy=self._own_mix(federated, mix),
            local_accuracy=alone.evaluation.accuracy if alone else None,
            local_own_mix_accuracy=self._own_mix(alone.evaluation if alone else None, mix),
            personal_accuracy=personal.accuracy if personal else None,
            personal_own_mix_accuracy=self._own_mix(personal, mix),
        )

    def _own_mix(
        self, found: Evaluation | None, mix: np.ndarray[tuple[int], np.dtype[np.int64]]
    ) -> float | None:
        """Accuracy weighted by a client's own label frequencies; its own test set has them."""
        if found is None or self._job.test is None or not len(found.labels):
            return found.accuracy if found else None
        return own_mix_accuracy(found, mix)

    def _reference_records(self) -> tuple[Reference, ...]:
        alone = [r for name, r in self._references.items() if name.startswith("alone:")]
        found = [
            Reference(name, _accuracy(r), r.evaluation.loss, r.seconds, r.sample_steps)
            for name, r in self._references.items()
            if not name.startswith("alone:")
        ]
        if self._before is not None:
            base = self._before
            found.append(Reference("base", base.accuracy or 0.0, base.loss, 0.0, 0))
        for name, result in self._emulated.items():
            found.append(Reference(name, result.accuracy or 0.0, result.loss, 0.0, 0))
        if alone:
            accuracy = float(np.mean([_accuracy(r) for r in alone]))
            loss = float(np.mean([r.evaluation.loss for r in alone]))
            seconds, steps = sum(r.seconds for r in alone), sum(r.sample_steps for r in alone)
            found.insert(1, Reference("local-only", accuracy, loss, seconds, steps))
        return tuple(found)

    def _epsilon(self) -> float | None:
        """What was spent so far, by the unit of the configuration."""
        if self._job.config.privacy.unit == "record" and self._parties is not None:
            run_id = self._run.journal.identity()["run_id"]
            return self._parties.epsilon(run_id, self._job.config.privacy.delta)
        return self._federation.epsilon

    def _passport(self, number: int, manifest: Manifest, adapter: Float32Vector) -> Passport:
        job, config = self._job, self._job.config
        return Passport(
            base=job.base_name,
            base_digest=job.base_digest,
            manifest_digest=manifest.digest,
            config_digest=config.digest,
            adapter_digest=sha256_hex(adapter.astype("<f4").tobytes()),
            labels=job.labels,
            pooling=config.base.pooling,
            max_length=config.base.max_length,
            rounds=number,
            clients=len(job.clients),
            rule=config.aggregate.rule,
            method=config.train.method,
            directions=job.directions.count if job.directions else None,
            seed=config.seed,
            epsilon=self._epsilon(),
            epsilon_unit=_unit_words(config),
            fedtune_version=importlib.metadata.version("fedtune"),
            emulator=job.emulator,
        )


def cut_record(job: Job, per_client: Sequence[ClientSummary]) -> Cut | None:
    """What has passed the cut, if there is one."""
    if job.meter is None or job.config.base.placement != "server":
        return None
    found, split = job.meter.traffic, job.config.split
    return Cut(
        encoding=split.activations,
        labels_at=job.config.labels_at,
        examples=found.trained,
        tokens=found.tokens,
        bytes_up=found.up,
        bytes_down=found.down,
        floor=least_bytes(job.config, found, job.cut_width),
        evaluated=found.evaluated,
        evaluation_bytes=found.evaluation_bytes,
        **account(job.config, found, per_client),
    )


def _accuracy(reference: ReferenceResult) -> float:
    accuracy = reference.evaluation.accuracy
    return math.nan if accuracy is None else accuracy


def own_mix_accuracy(
    found: Evaluation, mix: np.ndarray[tuple[int], np.dtype[np.int64]]
) -> float | None:
    """Accuracy on a test set reweighted to the label frequencies `mix` (int64 `[labels]`).

    Σ_c mix_c · recall_c / Σ_c mix_c over the labels c that the test set has; None if none.
    """
    mix = np.pad(mix, (0, max(0, int(found.labels.max()) + 1 - len(mix))))
    totals = np.bincount(found.labels, minlength=len(mix))
    right = np.bincount(found.labels[found.predictions == found.labels], minlength=len(mix))
    seen = totals > 0
    weight = mix[seen].sum()
    if not weight:
        return None
    return float((mix[seen] * right[seen] / totals[seen]).sum() / weight)


def _digests(job: Job) -> dict[str, str]:
    data = {
        "labels": job.labels,
        "clients": [[c.name, len(c.train), [int(n) for n in c.label_counts]] for c in job.clients],
    }
    return {
        "base_model_digest": job.base_digest,
        "adapter_manifest_digest": job.manifest.digest,
        "configuration_digest": job.config.digest,
        "data_digest": digest_of(data),
    }


def _unit_words(config: Config) -> str:
    """What the epsilon of a run is about."""
    at = f"at delta {config.privacy.delta:g}"
    return {
        "none": "none: this adapter was not trained under differential privacy",
        "record": f"one training example of one client, added or removed, {at}; "
        "the number of examples of each client is taken to be known",
        "client": f"all data of one client, against none, {at}",
    }[config.privacy.unit]


def _evaluation_words(job: Job) -> str:
    if job.test is not None:
        return f"{len(job.test):,} rows of a common test set that no client trains on"
    if any(client.test is not None for client in job.clients):
        return "clients' own test sets"
    return "none: there is no test set"


def _with_whose_part(job: Job) -> str:
    """With which private part the scores of rounds are, where it is not shared."""
    if job.parts is None:
        return ""
    if job.test is not None:
        return "; rounds and `accuracy` with the private part that all began with"
    return "; rounds with each client's private part, `accuracy` with the one all began with"


def _peak_rss_mb() -> float:
    """Largest resident set of any one process of this run, in MiB (shared pages included)."""
    unit = 1024 if sys.platform == "linux" else 1024 * 1024
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(w).ru_maxrss for w in who) / unit


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in ("fedtune", "torch", "transformers", "peft", "flwr", "numpy"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
