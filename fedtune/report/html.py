"""The report of a run as one HTML page that needs nothing but itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedtune.records import RoundRecord, Score, Summary
from fedtune.report import charts, words
from fedtune.report.comparison import REFERENCE_WORDS, compare
from fedtune.report.cut_noise import cut_noise
from fedtune.report.headline import headline
from fedtune.report.heatmap import heat_map

if TYPE_CHECKING:
    from jinja2 import Environment

_NO_BREAK_SPACE = "\u00a0"


@dataclass(frozen=True)
class Tile:
    """One key figure."""

    label: str
    value: str
    hint: str = ""


def render_html(summary: Summary, rounds: Sequence[RoundRecord]) -> str:
    """The whole page. It loads nothing, runs nothing, and trusts no name that clients chose."""
    comparison = compare(summary)
    noun = words.noun_of(client.name for client in summary.per_client)
    many = len(summary.per_client) > charts.MOST_CLIENTS
    progress = (charts.accuracy_chart(summary, rounds), charts.loss_chart(rounds))
    return (
        _environment()
        .get_template("report.html.jinja")
        .render(
            summary=summary,
            noun=noun,
            headline=headline(summary),
            tiles=_tiles(summary),
            progress_charts=[chart for chart in progress if chart],
            clients_charts=charts.clients_charts(comparison, noun),
            sizes_chart=charts.sizes_chart(summary, noun) if many else None,
            heat_map=heat_map(summary),
            traffic_charts=charts.traffic_charts(rounds),
            comparison=comparison,
            reference_words=REFERENCE_WORDS,
            **_cut(summary),
            cut_noise=cut_noise(summary.cut),
            failures=[(r.round, name, why) for r in rounds for name, why in r.failed.items()],
        )
    )


def _cut(summary: Summary) -> dict[str, float]:
    """Bytes of activations for each trained example."""
    cut = summary.cut
    if cut is None:
        return {"cut_up": 0.0, "cut_down": 0.0, "cut_floor": 0.0}
    each = max(1, cut.examples)
    return {
        "cut_up": cut.bytes_up / each,
        "cut_down": cut.bytes_down / each,
        "cut_floor": cut.floor / each,
    }


def _accuracy(score: Score | None) -> str:
    return words.percent(score.accuracy if score else None)


def _loss(score: Score | None) -> str:
    return words.loss(score.loss if score else None)


def _tiles(summary: Summary) -> list[Tile]:
    final, best = summary.final, summary.best
    # A task without classes has no accuracy.
    title, shown = ("Accuracy", _accuracy) if summary.labels else ("Loss", _loss)
    tiles = [
        Tile(title, shown(final), f"best {shown(best)} in round {best.round}" if best else ""),
        Tile("Rounds", f"{summary.rounds} of {summary.planned_rounds}", summary.status),
        Tile(
            "Adapter",
            words.count(summary.adapter_parameters),
            "trained parameters",
        ),
        Tile(
            "Upload",
            words.size(summary.bytes_up_per_client_round),
            f"per client and round; {words.size(summary.bytes_down_per_client_round)} down",
        ),
        Tile(
            "Traffic, all rounds",
            words.size(summary.bytes_up + summary.bytes_down),
            f"{words.size(summary.bytes_up)} up, {words.size(summary.bytes_down)} down",
        ),
        Tile(
            "Time",
            words.duration(summary.seconds),
            f"{words.duration(summary.train_seconds)} of it training",
        ),
        Tile("Peak memory", _memory(summary.peak_rss_mb)),
    ]
    if summary.masked:
        tiles.append(Tile("The server saw", "sums only", "no single update"))
    else:
        tiles.append(Tile("The server saw", "each update", "nothing was masked"))
    if summary.epsilon is not None:
        tiles.append(Tile("Privacy spent", f"ε = {summary.epsilon:.2f}", summary.epsilon_unit))
    return tiles


def _memory(megabytes: float) -> str:
    return words.size(megabytes * 1e6) if math.isfinite(megabytes) else words.MISSING


def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("fedtune.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": lambda value: words.percent(value).replace(" ", _NO_BREAK_SPACE),
        "points": lambda value: words.points(value).replace("-", "\N{MINUS SIGN}"),
        "loss": words.loss,
        "count": words.count,
        "duration": words.duration,
        "size": words.size,
        "printable": words.printable,
    }
    return environment
