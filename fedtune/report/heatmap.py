"""Who holds which labels: the table of counts behind the report's heat map."""

from __future__ import annotations

from dataclasses import dataclass

from fedtune.records import Summary
from fedtune.report.comparison import largest
from fedtune.report.words import printable

MOST_CLIENTS = 24
MOST_LABELS = 30


@dataclass(frozen=True)
class Cell:
    """Examples of one label at one client."""

    count: int
    strength: float  # 0 to 1: the share of the client's examples, by the largest share of all


@dataclass(frozen=True)
class HeatMap:
    """Labels down, clients across; most frequent label first."""

    clients: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    hidden_clients: int
    hidden_labels: int  # summed up in the last row


def heat_map(summary: Summary) -> HeatMap | None:
    """The label counts of the largest clients; None when there is nothing to show."""
    clients = largest(summary.per_client, MOST_CLIENTS)
    totals = [sum(c.label_counts[i] for c in clients) for i in range(len(summary.labels))]
    if not any(totals):
        return None
    order = sorted(range(len(totals)), key=lambda index: -totals[index])
    shown, hidden = order[:MOST_LABELS], order[MOST_LABELS:]
    counts = [(summary.labels[i], [c.label_counts[i] for c in clients]) for i in shown]
    if hidden:
        rest = [sum(c.label_counts[i] for i in hidden) for c in clients]
        counts.append((f"{len(hidden)} other labels", rest))
    # Shares, not counts: a small client's case mix must be as visible as a large one's.
    sizes = [max(sum(c.label_counts), 1) for c in clients]
    top = max(n / size for _, row in counts for n, size in zip(row, sizes, strict=True))
    return HeatMap(
        clients=tuple(printable(c.name) for c in clients),
        rows=tuple(
            (
                printable(label),
                tuple(Cell(n, n / size / top) for n, size in zip(row, sizes, strict=True)),
            )
            for label, row in counts
        ),
        hidden_clients=len(summary.per_client) - len(clients),
        hidden_labels=len(hidden),
    )
