"""The end of a run on a terminal: every client, the references, and where things are."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedtune.records import Cut, Summary
from fedtune.report import words
from fedtune.report.comparison import REFERENCE_WORDS, Pair, compare, largest
from fedtune.report.cut_noise import cut_noise
from fedtune.report.headline import headline

MOST_CLIENTS = 40  # a longer table scrolls the headline away; the HTML report has all
_NAME_WIDTH = 24
_THINGS = (
    ("report.html", "the report"),
    ("adapter", "the adapter"),
    ("summary.json", "all numbers"),
)


def print_summary(
    summary: Summary,
    console: Console,
    run_folder: Path,
    resume_hint: str = "fedtune simulate --resume",
) -> None:
    """Print the result of a run; readable at 80 columns and without colours.

    Call it last: it names those of the run folder's things that exist by then. `resume_hint` is
    the command that, followed by the folder, continues a run that did not finish.
    """
    console.print(Text(words.printable(headline(summary)), style="bold"))
    console.print(_client_table(summary))
    hidden = len(summary.per_client) - MOST_CLIENTS
    if hidden > 0:
        console.print(Text(f"(the {MOST_CLIENTS} largest; {hidden} more are in report.html)"))
    if summary.references:
        console.print(_reference_table(summary))
    if summary.epsilon is not None:
        spent = f"privacy spent: epsilon {summary.epsilon:.3g} for {summary.epsilon_unit}"
        console.print(Text(words.printable(spent)))
    _print_cut_noise(console, summary.cut)
    for warning in summary.warnings:
        console.print(Text(f"warning: {words.printable(warning)}", style="yellow"))
    _print_things(console, run_folder)
    if summary.status != "finished":
        _print_path(console, "continue with:", f"{resume_hint} {run_folder}")


def print_ending(summary: Summary, console: Console, run_folder: Path) -> None:
    """Print how a deployed run ended: its server knows too little of the clients for a table."""
    parts = [f"{summary.rounds} of {words.plural(summary.planned_rounds, 'round')}"]
    if summary.final is not None and summary.final.accuracy is not None:
        parts.append(f"accuracy {words.percent(summary.final.accuracy)}")
    elif summary.final is not None and summary.final.loss is not None:
        parts.append(f"loss {words.loss(summary.final.loss)}")
    parts.append(words.duration(summary.seconds))
    console.print(Text(f"{summary.status}: {', '.join(parts)}", style="bold"))
    if summary.cut is not None:
        console.print(Text(_cut_words(summary, summary.cut)), soft_wrap=True)
    _print_cut_noise(console, summary.cut)
    for client in summary.per_client:
        if client.rounds_failed:
            failed = f"{words.printable(client.name)} failed in {client.rounds_failed} of them"
            console.print(Text(failed, style="yellow"), soft_wrap=True)
    _print_things(console, run_folder)


def _cut_words(summary: Summary, cut: Cut) -> str:
    """The two kinds of traffic, side by side."""
    each = max(1, cut.examples)
    return (
        f"adapters: {words.size(summary.bytes_up_per_client_round)} up and "
        f"{words.size(summary.bytes_down_per_client_round)} down per client and round; "
        f"activations ({cut.encoding}): {words.size(cut.bytes_up / each)} up and "
        f"{words.size(cut.bytes_down / each)} down per trained example, at least "
        f"{words.size(cut.floor / each)} together"
    )


def _print_cut_noise(console: Console, cut: Cut | None) -> None:
    if text := cut_noise(cut):
        console.print(Text(text))


def _print_things(console: Console, run_folder: Path) -> None:
    for name, meaning in _THINGS:
        if (run_folder / name).exists():
            _print_path(console, f"{meaning}:", f"{run_folder / name}")


def _print_path(console: Console, what: str, path: str) -> None:
    # soft_wrap: a path broken over two lines cannot be copied.
    console.print(Text(f"{what:<14} {words.printable(path)}"), soft_wrap=True)


def _client_table(summary: Summary) -> Table:
    comparison = compare(summary)
    with_alone = bool(comparison.gains)
    noun = words.noun_of(client.name for client in summary.per_client)
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column(noun, max_width=_NAME_WIDTH)
    both = with_alone and comparison.own_mix
    titles = ["examples"]
    if both:
        titles += [
            "alone\nall",
            "gain\nall",
            "accuracy\nown mix",
            "alone\nown mix",
            "gain\nown mix",
        ]
    else:
        titles += ["labels", "accuracy"] * bool(summary.labels)
        titles += ["own mix"] * comparison.own_mix + ["alone", "gain"] * with_alone
    for title in titles:
        table.add_column(title, justify="right")
    table.add_column("failed\nrounds", justify="right")
    shown = set(map(id, largest(summary.per_client, MOST_CLIENTS)))
    for pair in comparison.pairs:
        if id(pair.client) in shown:
            table.add_row(*_cells(pair, len(summary.labels), comparison.own_mix, with_alone))
    notes = []
    if comparison.own_mix:
        notes.append(f"own mix: accuracy with each label weighted as the {noun} sees it")
        if with_alone:
            notes.append("all: all cases alike; alone: trained without the others; gain: points")
    if comparison.personal:
        notes.append(f"each {noun} with its own private part")
    table.caption, table.caption_justify = "; ".join(notes) or None, "left"
    return table


def _cells(pair: Pair, labels: int, own_mix: bool, with_alone: bool) -> list[Text]:
    client = pair.client
    held = sum(number > 0 for number in client.label_counts)
    cells = [
        words.shortened(client.name, _NAME_WIDTH),
        words.count(client.examples),
    ]
    if own_mix and with_alone:  # no room for labels; the common accuracy is in the headline
        cells += [words.percent(client.local_accuracy), words.points(pair.plain_gain)]
    elif labels:
        cells += [f"{held}/{labels}", words.percent(client.reached)]
    if own_mix:
        cells.append(words.percent(pair.federated))
    if with_alone:
        cells += [words.percent(pair.alone), words.points(pair.gain)]
    cells.append(str(client.rounds_failed))
    # Text, not str: rich would read markup out of a client's name.
    return [Text(cell) for cell in cells]


def _reference_table(summary: Summary) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("compared with")
    for title in ("accuracy", "loss", "time"):
        table.add_column(title, justify="right")
    rows: list[tuple[str, float | None, float | None, float]] = [
        (
            REFERENCE_WORDS.get(reference.name, words.printable(reference.name)),
            reference.accuracy,
            reference.loss,
            reference.seconds,
        )
        for reference in summary.references
    ]
    if summary.final is not None:
        rows.insert(
            0, ("federated", summary.final.accuracy, summary.final.loss, summary.train_seconds)
        )
    for name, accuracy, loss, seconds in rows:
        cells = (name, words.percent(accuracy), words.loss(loss), words.duration(seconds))
        table.add_row(*map(Text, cells))
    return table
