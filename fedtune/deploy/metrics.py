"""The state of a server in the words of Prometheus."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator, Mapping
from typing import get_args

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from fedtune.deploy.status import ROUND_SECONDS, Snapshot, Totals
from fedtune.flower.observer import Failure
from fedtune.split.counters import SplitStatus
from fedtune.wire.split import Reason

CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics(Collector):
    """Each scrape is made of one snapshot; nothing of it is kept in the process's own registry.

    Names of clients are labels because they are the roster's. Nothing that came over the network
    becomes one.
    """

    def __init__(
        self,
        snapshot: Callable[[], Snapshot],
        certificates: Mapping[str, float],
        base: Callable[[], SplitStatus] | None = None,
    ) -> None:
        """`certificates` end at these times (seconds since 1970); `base` is of a base model."""
        self._snapshot, self._certificates, self._base = snapshot, certificates, base
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def text(self) -> bytes:
        """The answer to a scrape."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """See `Collector`."""
        now = self._snapshot()
        version = importlib.metadata.version("fedtune")
        build = GaugeMetricFamily(
            "fedtune_build_info", "The installed fedtune; always 1.", labels=["version"]
        )
        build.add_metric([version], 1)
        yield build
        yield from _gauges(now)
        yield from _counters(now)
        yield _round_seconds(now.totals)
        if self._base is not None:
            yield from _base_model(self._base())
        ends = GaugeMetricFamily(
            "fedtune_certificate_not_after_seconds",
            "When a certificate ends, in seconds since 1970.",
            labels=["certificate"],
        )
        for name, end in self._certificates.items():
            ends.add_metric([name], end)
        yield ends


def _gauges(now: Snapshot) -> Iterator[Metric]:
    for name, words, value in (
        ("round", "The round that is under way, or else the last one; 0: none yet.", now.round),
        ("rounds_planned", "Rounds of the whole run.", now.planned),
        ("clients_registered", "Clients in the roster.", len(now.clients)),
        ("clients_connected", "Clients that are connected.", len(now.connected)),
        ("clients_waited_for", "Clients whose answer is awaited.", len(now.waiting_for)),
        (
            "last_commit_timestamp_seconds",
            "When this server committed a round for the last time, or else when it began.",
            now.committed_at or now.began_at,
        ),
    ):
        yield GaugeMetricFamily(f"fedtune_{name}", words, value)
    if now.epsilon is not None:
        yield GaugeMetricFamily(
            "fedtune_epsilon_spent", "Epsilon of the sums opened in this run.", now.epsilon
        )
    connected = GaugeMetricFamily(
        "fedtune_client_connected", "Whether a client is connected.", labels=["client"]
    )
    for client in now.clients:
        connected.add_metric([client], client in now.connected)
    yield connected


def _counters(now: Snapshot) -> Iterator[Metric]:
    totals = now.totals
    for name, words, value in (
        ("rounds_committed", "Rounds in the journal.", totals.committed),
        ("rounds_lost", "Rounds in the journal that came to nothing.", totals.lost),
        ("received_bytes", "Answers of clients in committed rounds.", totals.bytes_up),
        ("sent_bytes", "Requests to clients in committed rounds.", totals.bytes_down),
        (
            "train_seconds",
            "Training of all clients in committed rounds, as they say.",
            totals.train_seconds,
        ),
    ):
        yield CounterMetricFamily(f"fedtune_{name}", words, value)
    failures = CounterMetricFamily(
        "fedtune_client_failures",
        "Requests in rounds that a client did not answer, since this server began.",
        labels=["reason"],
    )
    for failure in get_args(Failure):
        failures.add_metric([failure], now.failures[failure])
    yield failures


def _base_model(now: SplitStatus) -> Iterator[Metric]:
    for name, words, value in (
        ("batches", "Batches that the base model has computed.", now.batches),
        ("requests", "Requests of clients in them.", now.requests),
        ("examples", "Examples in them.", now.examples),
        ("queue_seconds", "How long requests have waited for their batch.", now.queue_seconds),
    ):
        yield CounterMetricFamily(f"fedtune_base_{name}", words, value)
    refused = CounterMetricFamily(
        "fedtune_base_not_answered",
        "Requests to the base model without a result.",
        labels=["reason"],
    )
    for reason in Reason:
        refused.add_metric([reason.name.lower()], now.not_answered.get(reason, 0))
    yield refused
    received = CounterMetricFamily(
        "fedtune_base_received_bytes",
        "Embeddings, labels and gradients from a client.",
        labels=["client"],
    )
    sent = CounterMetricFamily(
        "fedtune_base_sent_bytes", "Losses, scores and gradients to a client.", labels=["client"]
    )
    for client, traffic in now.traffic.items():
        received.add_metric([client], traffic.up)
        sent.add_metric([client], traffic.down)
    yield received
    yield sent


def _round_seconds(totals: Totals) -> Metric:
    counts = {str(bound): n for bound, n in zip(ROUND_SECONDS, totals.at_most, strict=True)}
    counts["+Inf"] = totals.committed
    return HistogramMetricFamily(
        "fedtune_round_seconds",
        "How long committed rounds took.",
        buckets=[(bound, float(number)) for bound, number in counts.items()],
        sum_value=totals.seconds,
    )
