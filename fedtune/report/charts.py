"""The charts of the HTML report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedtune.records import RoundRecord, Summary
from fedtune.report import words
from fedtune.report.comparison import Comparison, Pair, largest
from fedtune.report.svg import COLOURS, draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_CLIENTS = 24
_NAME_WIDTH = 18
# Line styles as well as colours: told apart also in a black-and-white print.
_REFERENCE_STYLES = {
    "centralized": ("green", "--"),
    "local-only": ("orange", "-."),
    "linear-head": ("purple", ":"),
}


@dataclass(frozen=True)
class Chart:
    """A picture and what it says in words."""

    title: str
    svg: str
    alt: str


def accuracy_chart(summary: Summary, rounds: Sequence[RoundRecord]) -> Chart | None:
    """Accuracy by round with the references as level lines; None when none was measured."""
    points = _points([(r.round, r.accuracy) for r in rounds])
    if not points:
        return None
    references = [r for r in summary.references if math.isfinite(r.accuracy)]

    def paint(axes: Axes) -> None:
        xs, ys = [x for x, _ in points], [100 * y for _, y in points]
        axes.plot(xs, ys, "o-", color=COLOURS["blue"], label="federated", lw=2.2, ms=5)
        for reference in references:
            colour, dashes = _REFERENCE_STYLES.get(reference.name, ("muted", ":"))
            label = f"{words.shortened(reference.name, 20)} {words.percent(reference.accuracy)}"
            axes.axhline(
                100 * reference.accuracy, color=COLOURS[colour], ls=dashes, lw=1.8, label=label
            )
        axes.set_ylabel("accuracy, %")
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, 0), min(high, 100.5))
        _round_axis(axes)

    (first, start), (last, end) = points[0], points[-1]
    alt = f"Accuracy: {words.percent(start)} in round {first}, {words.percent(end)} in round {last}"
    alt += "".join(f"; {r.name} {words.percent(r.accuracy)}" for r in references)
    return Chart("Accuracy by round", draw(paint), words.printable(f"{alt}."))


def loss_chart(rounds: Sequence[RoundRecord]) -> Chart | None:
    """Training and evaluation loss by round; None when there is neither."""
    train = _points([(r.round, r.train_loss) for r in rounds])
    evaluated = _points([(r.round, r.loss) for r in rounds])
    if not train and not evaluated:
        return None
    lines = (
        ("training, at the clients", train, "orange", "s--"),
        ("evaluation", evaluated, "blue", "o-"),
    )

    def paint(axes: Axes) -> None:
        for label, points, colour, style in lines:
            if points:
                xs, ys = zip(*points, strict=True)
                axes.plot(xs, ys, style, color=COLOURS[colour], label=label, lw=2, ms=5)
        axes.set_ylabel("loss")
        _round_axis(axes)

    said = [
        f"{label}: {points[0][1]:.3f} in round {points[0][0]}, "
        f"{points[-1][1]:.3f} in round {points[-1][0]}"
        for label, points, _, _ in lines
        if points
    ]
    return Chart("Loss by round", draw(paint), f"Loss, {'; '.join(said)}.")


def clients_charts(comparison: Comparison, noun: str) -> list[Chart]:
    """Bars for each client, federated beside alone: on all cases alike and on its own mix."""
    charts = [_clients_chart(comparison.pairs, noun, ", own case mix" * comparison.own_mix)]
    if comparison.own_mix and comparison.gains:
        plain = tuple(
            Pair(pair.client, pair.client.reached, pair.client.local_accuracy)
            for pair in comparison.pairs
        )
        charts.insert(0, _clients_chart(plain, noun, ", all cases alike"))
    return [chart for chart in charts if chart]


def _clients_chart(everybody: Sequence[Pair], noun: str, measure: str) -> Chart | None:
    """Bars for the largest clients; None when no accuracy is known."""
    shown = set(map(id, largest(tuple(p.client for p in everybody), MOST_CLIENTS)))
    pairs = [p for p in everybody if id(p.client) in shown and p.federated is not None]
    if not pairs:
        return None
    with_alone = any(p.gain is not None for p in everybody)
    bar = 0.38 if with_alone else 0.6

    def paint(axes: Axes) -> None:
        series = [("federated", "blue", [p.federated for p in pairs], -bar / 2)]
        if with_alone:
            series.append(("alone", "orange", [p.alone for p in pairs], bar / 2))
        else:
            series[0] = (*series[0][:3], 0.0)
        for label, colour, values, shift in series:
            ys = [index + shift for index, value in enumerate(values) if value is not None]
            xs = [100 * value for value in values if value is not None]
            bars = axes.barh(ys, xs, bar, color=COLOURS[colour], label=label)
            axes.bar_label(bars, fmt="%.1f", padding=4, fontsize=10)
        names = [words.shortened(p.client.name, _NAME_WIDTH) for p in pairs]
        axes.set_yticks(range(len(pairs)), names)
        axes.tick_params(axis="y", length=0, labelcolor=COLOURS["ink"])
        axes.invert_yaxis()
        axes.set_xlim(0, 108)  # the numbers of full bars need their place too
        axes.set_xticks(range(0, 101, 20))
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("accuracy, %")
        _legend(axes)

    values = [
        f"{p.client.name} {words.percent(p.federated)}"
        + (f" against {words.percent(p.alone)} alone" if with_alone else "")
        for p in pairs
    ]
    title = f"Accuracy at each {noun}{measure}"
    if len(pairs) < len(everybody):
        title += f" (the {len(pairs)} largest)"
    height = 1.1 + (0.5 if with_alone else 0.34) * len(pairs)
    return Chart(title, draw(paint, height), words.printable(f"{'; '.join(values)}."))


def sizes_chart(summary: Summary, noun: str) -> Chart:
    """How many clients have how many examples."""
    sizes = [client.examples for client in summary.per_client]

    def paint(axes: Axes) -> None:
        axes.hist(sizes, bins=min(20, len(sizes)), color=COLOURS["blue"], rwidth=0.92)
        axes.set_xlabel(f"examples at a {noun}")
        axes.set_ylabel(f"{noun}s")
        _whole_numbers(axes, "y")

    low, high = words.count(min(sizes)), words.count(max(sizes))
    alt = f"{words.plural(len(sizes), noun)} with {low} to {high} examples each."
    return Chart(f"Size of the {noun}s", draw(paint, 2.8), alt)


def traffic_charts(rounds: Sequence[RoundRecord]) -> tuple[Chart, ...]:
    """Bytes in each round, and all bytes so far; empty without rounds."""
    if not rounds:
        return ()
    numbers = [r.round for r in rounds]
    up, down = [r.bytes_up for r in rounds], [r.bytes_down for r in rounds]
    sent, received = _running(up), _running(down)

    def each(axes: Axes) -> None:
        unit, scale = _unit(max(*up, *down))
        for label, values, colour, shift in (
            ("up, to the server", up, "blue", -0.2),
            ("down, to the clients", down, "green", 0.2),
        ):
            xs = [number + shift for number in numbers]
            axes.bar(
                xs, [value / scale for value in values], 0.38, color=COLOURS[colour], label=label
            )
        axes.set_ylabel(f"{unit}, all clients")
        axes.grid(visible=False, axis="x")
        _round_axis(axes)

    def total(axes: Axes) -> None:
        unit, scale = _unit(sent[-1] + received[-1])
        ups, downs = ([value / scale for value in values] for values in (sent, received))
        # Bars, not areas: an area over a single round would be invisible.
        axes.bar(numbers, ups, 0.8, color=COLOURS["blue"], label="up")
        axes.bar(numbers, downs, 0.8, bottom=ups, color=COLOURS["green"], label="down")
        axes.set_ylabel(f"{unit} so far")
        axes.grid(visible=False, axis="x")
        _round_axis(axes)

    last = f"{words.size(up[-1])} up and {words.size(down[-1])} down in round {numbers[-1]}."
    both = f"{words.size(sent[-1])} up and {words.size(received[-1])} down in all rounds together."
    return (
        Chart("Traffic by round", draw(each, 3.0), last),
        Chart("Traffic so far", draw(total, 3.0), both),
    )


def _points(pairs: Sequence[tuple[int, float | None]]) -> list[tuple[int, float]]:
    return [(x, y) for x, y in pairs if y is not None and math.isfinite(y)]


def _running(values: Sequence[int]) -> list[int]:
    return [sum(values[: index + 1]) for index in range(len(values))]


def _unit(largest_value: float) -> tuple[str, float]:
    """One unit for a whole axis, so that its numbers stay short."""
    units = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
    return next((unit for unit in units if largest_value >= unit[1]), ("bytes", 1.0))


def _round_axis(axes: Axes) -> None:
    axes.set_xlabel("round")
    _whole_numbers(axes, "x")
    _legend(axes)


def _whole_numbers(axes: Axes, which: str) -> None:
    from matplotlib.ticker import MaxNLocator

    # Rounds and clients are counted: no tick may say 2.5.
    locator = MaxNLocator(integer=True, min_n_ticks=1)
    (axes.xaxis if which == "x" else axes.yaxis).set_major_locator(locator)


def _legend(axes: Axes) -> None:
    # Above the axes, where it can cover no data.
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2, borderaxespad=0.2)
