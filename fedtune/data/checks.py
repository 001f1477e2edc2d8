"""What a person should know about the data before a run: one line each, nothing is refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from fedtune.data.examples import ClientData, TextExamples
from fedtune.data.naming import listed, quoted

LONG_TEXT = 20_000


def warnings_about(
    labels: Sequence[str], clients: Sequence[ClientData], test: TextExamples | None
) -> tuple[str, ...]:
    """The warnings about this data, in a fixed order."""
    return (
        *_missing_labels(labels, clients),
        *_single_label(labels, clients),
        *_duplicates(clients),
        *_long_texts(clients, test),
        *_untrained_labels(labels, clients, test),
        *_leaks(clients, test),
    )


def _missing_labels(labels: Sequence[str], clients: Sequence[ClientData]) -> Iterator[str]:
    held = {client.name: len(np.unique(client.train.labels)) for client in clients}
    some = [f"{name}: {count}" for name, count in held.items() if count < len(labels)]
    if some:
        yield (
            f"{len(some)} of {len(clients)} clients hold only some of the {len(labels)} labels "
            f"({listed(some)})"
        )


def _single_label(labels: Sequence[str], clients: Sequence[ClientData]) -> Iterator[str]:
    if not labels:
        return
    single = [
        f"{client.name}: {quoted(labels[client.train.labels[0]])}"
        for client in clients
        if len(np.unique(client.train.labels)) == 1
    ]
    if single:
        yield f"{len(single)} of {len(clients)} clients hold one label only ({listed(single)})"


def _duplicates(clients: Sequence[ClientData]) -> Iterator[str]:
    def repeated(train: TextExamples) -> int:
        return len(train) - len(set(zip(train.texts, train.labels.tolist(), strict=True)))

    count = sum(repeated(client.train) for client in clients)
    if count:
        yield f"{count} training rows repeat a row of the same client"


def _long_texts(clients: Sequence[ClientData], test: TextExamples | None) -> Iterator[str]:
    everything = [*(client.train for client in clients), *_tests(clients, test)]
    count = sum(len(text) > LONG_TEXT for examples in everything for text in examples.texts)
    if count:
        yield (
            f"{count} texts are longer than {LONG_TEXT:,} characters; the tokenizer will cut them"
        )


def _untrained_labels(
    labels: Sequence[str], clients: Sequence[ClientData], test: TextExamples | None
) -> Iterator[str]:
    trained = {label for client in clients for label in client.train.labels.tolist()}
    tested = {label for examples in _tests(clients, test) for label in examples.labels.tolist()}
    untrained = [quoted(labels[label]) for label in sorted(tested - trained)]
    if untrained:
        yield f"{len(untrained)} test labels are trained by no client ({listed(untrained)})"


def _leaks(clients: Sequence[ClientData], test: TextExamples | None) -> Iterator[str]:
    trained = {text for client in clients for text in client.train.texts}
    count = sum(text in trained for examples in _tests(clients, test) for text in examples.texts)
    if count:
        yield f"{count} test rows have a text that is also trained on; the test is too easy"


def _tests(clients: Sequence[ClientData], test: TextExamples | None) -> list[TextExamples]:
    return [
        examples
        for examples in (test, *(client.test for client in clients))
        if examples is not None
    ]
