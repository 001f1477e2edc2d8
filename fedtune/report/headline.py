"""The result in sentences for somebody who sees such a report for the first time."""

from __future__ import annotations

import math
from statistics import fmean

from fedtune.records import Reference, Summary
from fedtune.report.comparison import compare
from fedtune.report.words import loss, noun_of, percent, plural

_NOTHING = 0.0005  # differences that would be shown as 0.0 points


def headline(summary: Summary) -> str:
    """One short paragraph: the result, what it is compared with, whom it helps.

    It says so too when federating does not help, when nothing was compared, and when the run did
    not finish.
    """
    sentences = (_status(summary), _federated(summary), _references(summary), _verdict(summary))
    return " ".join(sentence for sentence in sentences if sentence)


def _status(summary: Summary) -> str:
    if summary.status == "finished":
        return ""
    word = "failed" if summary.status == "failed" else "was interrupted"
    return f"This run {word} after {summary.rounds} of {plural(summary.planned_rounds, 'round')}."


def _federated(summary: Summary) -> str:
    clients = _clients(summary, len(summary.per_client))
    final = summary.final
    if final is not None and _finite(final.accuracy):
        reached = percent(final.accuracy)
    elif final is not None and not summary.labels and _finite(final.loss):
        reached = f"a loss of {loss(final.loss)}"
    else:
        return f"No accuracy was measured for the model that {clients} trained together."
    # "final" is of the last round that was evaluated, not always of the last round.
    after = f"after {plural(final.round, 'round')}"
    if own := _personal(summary):
        # Not the last round's score: that is with clients' parts if it is on their own test sets.
        shared = fmean(c.accuracy for c in summary.per_client if c.accuracy is not None)
        noun = noun_of(client.name for client in summary.per_client)
        return (
            f"Federated: with its own private part a {noun} reaches {percent(fmean(own))} "
            f"{after}, on average ({percent(min(own))} to {percent(max(own))}); what {clients} "
            f"share reaches {percent(shared)} with the part that all began with."
        )
    return f"Federated: {clients} together reach {reached} {after}."


def _personal(summary: Summary) -> list[float]:
    """The clients' accuracies with their private parts, where the adapter has such."""
    known = (client.personal_accuracy for client in summary.per_client)
    return [accuracy for accuracy in known if accuracy is not None and _finite(accuracy)]


def _references(summary: Summary) -> str:
    """What the other ways reach; empty without a federated accuracy or without references."""
    federated = summary.final.accuracy if summary.final else None
    if own := _personal(summary):
        federated = fmean(own)
    if federated is None or not _finite(federated):
        return ""
    by_name = {ref.name: ref for ref in summary.references if _finite(ref.accuracy)}
    parts = []
    if centralized := by_name.get("centralized"):
        parts.append(
            f"centralized training on all data in one place reaches "
            f"{percent(centralized.accuracy)}{_distance(centralized.accuracy - federated)}"
        )
    if alone := _alone(summary, by_name.get("local-only")):
        parts.append(alone)
    linear = by_name.get("linear-head")
    if linear is not None and linear.accuracy >= federated:
        parts.append(f"a linear head on the frozen base already reaches {percent(linear.accuracy)}")
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _alone(summary: Summary, reference: Reference | None) -> str:
    noun = noun_of(client.name for client in summary.per_client)
    known = [c.local_accuracy for c in summary.per_client if c.local_accuracy is not None]
    alone = [accuracy for accuracy in known if _finite(accuracy)]
    if not alone:
        alone = [reference.accuracy] if reference else []
    if not alone:
        return ""
    low, high = (f"{100 * bound:.0f}" for bound in (min(alone), max(alone)))
    return f"a {noun} alone reaches {low if low == high else f'{low}–{high}'} %"


def _verdict(summary: Summary) -> str:
    comparison = compare(summary)
    if not comparison.gains:
        return "Whether federating helps cannot be said: no model was trained alone to compare."
    clients = _clients(summary, len(comparison.gains))
    if not comparison.own_mix:
        return f"Federating helps {_share(comparison.gains)} {clients}."
    return (
        f"On all cases alike federating helps {_share(comparison.plain_gains)} {clients}; on the "
        f"cases that each sees itself, {_share(comparison.gains)} {len(comparison.gains)}."
    )


def _share(gains: tuple[float, ...]) -> str:
    helped = sum(gain > 0 for gain in gains)
    if not helped:
        return "none of the"
    return f"{'only ' if 2 * helped < len(gains) else ''}{helped} of"


def _distance(difference: float) -> str:
    if abs(difference) < _NOTHING:
        return ", the same"
    return f", {100 * abs(difference):.1f} points {'more' if difference > 0 else 'less'}"


def _clients(summary: Summary, number: int) -> str:
    return plural(number, noun_of(client.name for client in summary.per_client))


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
