"""Numbers in words, and the headline's sentences."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
from report_samples import REFERENCES, sample_rounds, sample_summary

from fedtune.records import Score, Summary
from fedtune.report import words
from fedtune.report.comparison import compare, largest
from fedtune.report.headline import headline
from fedtune.report.html import render_html


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (words.percent, 0.681, "68.1 %"),
        (words.percent, 1.0, "100.0 %"),
        (words.percent, None, "–"),
        (words.percent, math.nan, "–"),
        (words.points, 0.213, "+21.3"),
        (words.points, -0.05, "-5.0"),
        (words.points, -0.0001, "0.0"),
        (words.size, 999, "999 B"),
        (words.size, 3_145_728, "3.1 MB"),
        (words.size, 999_960, "1.0 MB"),
        (words.size, 2e15, "2000.0 TB"),
        (words.duration, 0.42, "0.4 s"),
        (words.duration, 59.6, "1 min 0 s"),
        (words.duration, 185, "3 min 5 s"),
        (words.duration, 3599.7, "1 h 0 min"),
        (words.duration, 8040, "2 h 14 min"),
        (words.loss, 1.2344, "1.234"),
        (words.loss, math.nan, "nan"),
        (words.printable, "a\x1b[2J\nb", "a�[2J�b"),
        (words.noun_of, ["hospital-1", "hospital-2"], "hospital"),
        (words.noun_of, ["hospital-1", "phone-2"], "site"),
        (words.noun_of, ["client_1"], "site"),
        (words.noun_of, ["<b>-1"], "site"),
        (words.noun_of, [], "site"),
    ],
)
def test_words(function: Callable[[object], str], value: object, text: str) -> None:
    assert function(value) == text


def with_gains(summary: Summary, gains: list[float]) -> Summary:
    """`summary` whose clients gain as said, on their own case mix."""
    clients = zip(summary.per_client, gains, strict=True)
    return replace(
        summary,
        per_client=tuple(
            replace(c, own_mix_accuracy=0.5, local_own_mix_accuracy=0.5 - gain)
            for c, gain in clients
        ),
    )


def test_headline_of_a_good_run() -> None:
    assert headline(sample_summary()) == (
        "Federated: 8 hospitals together reach 68.1 % after 10 rounds. "
        "Centralized training on all data in one place reaches 72.5 %, 4.4 points more; "
        "a hospital alone reaches 27–47 %. "
        "On all cases alike federating helps 8 of 8 hospitals; "
        "on the cases that each sees itself, 8 of 8."
    )


@pytest.mark.parametrize(
    ("helped", "verdict"),
    [
        (8, "8 of 8"),
        (4, "4 of 8"),
        (3, "only 3 of 8"),
        (0, "none of the 8"),
    ],
)
def test_headline_counts_whom_it_helps(helped: int, verdict: str) -> None:
    # A client that neither gains nor loses is not helped.
    gains = [0.1] * helped + [0.0, -0.1] * 4
    text = headline(with_gains(sample_summary(), gains[:8]))
    assert text.endswith(f"on the cases that each sees itself, {verdict}.")


@pytest.mark.parametrize(
    ("change", "said", "unsaid"),
    [
        ({"status": "failed", "rounds": 3}, "failed after 3 of 10 rounds", "nan"),
        ({"status": "interrupted", "rounds": 0, "final": None}, "No accuracy", "None"),
        ({"final": Score(4, math.nan, math.nan)}, "No accuracy", "nan"),
        ({"final": Score(10, 1.0, 0.8)}, "72.5 %, 7.5 points less", "linear head"),
        ({"final": Score(10, 1.0, 0.5)}, "linear head on the frozen base already", "less"),
        ({"references": REFERENCES[2:]}, "A hospital alone reaches 27–47 %", "entralized"),
        ({"per_client": ()}, "cannot be said", "helps 0"),
    ],
)
def test_headline_is_honest(change: dict[str, object], said: str, unsaid: str) -> None:
    text = headline(replace(sample_summary(), **change))  # type: ignore[arg-type]
    assert said in text
    assert unsaid not in text


def test_headline_without_references_claims_no_help() -> None:
    text = headline(sample_summary(references=False))
    assert "68.1 %" in text
    assert "cannot be said" in text
    assert "all cases" not in text


def test_clients_without_own_mix_are_compared_on_the_plain_accuracy() -> None:
    summary = sample_summary()
    plain = tuple(
        replace(c, own_mix_accuracy=None, local_own_mix_accuracy=None) for c in summary.per_client
    )
    comparison = compare(replace(summary, per_client=plain))
    assert not comparison.own_mix
    assert comparison.gains[0] == pytest.approx(0.681 - 0.27)
    assert "case mix" not in headline(replace(summary, per_client=plain))


def test_what_is_reached_with_private_parts_is_told_apart_from_what_is_shared() -> None:
    summary = sample_summary()
    own = tuple(
        replace(c, personal_accuracy=0.3 + n / 100, personal_own_mix_accuracy=0.9)
        for n, c in enumerate(summary.per_client)
    )
    personal = replace(summary, per_client=own)
    comparison = compare(personal)
    assert comparison.personal
    assert not compare(summary).personal
    assert [pair.federated for pair in comparison.pairs] == [0.9] * 8
    assert comparison.plain_gains[0] == pytest.approx(0.3 - 0.27)
    text = headline(personal)
    assert "33.5 % after 10 rounds, on average (30.0 % to 37.0 %)" in text
    assert "share reaches 68.1 % with the part that all began with" in text
    assert "72.5 %, 39.0 points more" in text  # than the mean of what they end up with
    said = "ends up with: what is shared, with its own private part"
    assert said in render_html(personal, sample_rounds())
    assert said not in render_html(summary, sample_rounds())


def test_largest_keeps_the_order() -> None:
    clients = sample_summary(30).per_client
    kept = largest(clients, 24)
    assert [c for c in clients if c in kept] == list(kept)
    assert min(c.examples for c in kept) >= sorted(c.examples for c in clients)[6]
