"""The HTML report: right numbers, nothing from outside, no trust in names."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_samples import CHAPTERS, sample_rounds, sample_summary

from fedtune.report.heatmap import MOST_LABELS, heat_map
from fedtune.report.html import render_html

EVIL = "<script>alert(1)</script>\"'$\\frac{&\x07\n"


class Page(HTMLParser):
    """Tags, attributes, ids, table rows and visible text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.labels: list[str] = []
        self.rows: list[list[str]] = []
        self._cell = False
        self._texts: list[str] = []
        self.feed(text)
        self.text = " ".join(" ".join(self._texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), name
            if name == "id":
                self.ids.append(value or "")
            elif name in ("src", "href", "xlink:href", "srcset", "action"):
                self.links.append(value or "")
            elif name == "aria-label":
                self.labels.append(value or "")
        if tag == "tr":
            self.rows.append([])
        self._cell = tag in ("td", "th")
        if self._cell:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        self._texts.append(data)
        if self._cell:
            self.rows[-1][-1] += data.strip().replace("\u00a0", " ")


@pytest.fixture(scope="module")
def html() -> str:
    return render_html(sample_summary(), sample_rounds())


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_nothing_comes_from_outside(html: str, page: Page) -> None:
    assert "http:" not in html
    assert "https:" not in html
    assert "url(" not in re.sub(r"url\(#\w+\)", "", html)
    assert "@import" not in html
    assert not {"script", "link", "iframe", "img", "object"} & set(page.tags)
    assert all(link.startswith("#") for link in page.links)


def test_links_inside_the_charts_hit_exactly_one_element(html: str, page: Page) -> None:
    used = {link[1:] for link in page.links} | set(re.findall(r"url\(#(\w+)\)", html))
    assert used <= set(page.ids)


def test_every_client_row_shows_its_record(page: Page) -> None:
    rows = {row[0]: row for row in page.rows if row and row[0].startswith("hospital-")}
    for client in sample_summary().per_client:
        own, alone = client.own_mix_accuracy, client.local_own_mix_accuracy
        assert own is not None
        assert alone is not None
        plain = client.local_accuracy
        assert plain is not None
        assert rows[client.name] == [
            client.name,
            str(client.examples),
            f"{sum(n > 0 for n in client.label_counts)} of 21",
            "68.1 %",
            f"{100 * plain:.1f} %",
            f"{100 * (0.681 - plain):+.1f}",
            f"{100 * own:.1f} %",
            f"{100 * alone:.1f} %",
            f"{100 * (own - alone):+.1f}",
            str(client.rounds_completed),
            str(client.rounds_failed),
        ]


def test_heat_map_shows_every_count(page: Page) -> None:
    rows = {row[0]: row[1:] for row in page.rows if row}
    for index, label in enumerate(CHAPTERS):
        counts = [client.label_counts[index] for client in sample_summary().per_client]
        assert rows[label] == [str(count) if count else "·" for count in counts]


@pytest.mark.parametrize(
    "text",
    [
        "Federated: 8 hospitals together reach 68.1 % after 10 rounds.",
        "396.5 kB",
        "98,709",
        "LoRA r=8 on query, value + classifier",
        "1,021 texts of common test set",
        "c0ffee",
        "torch 2.10.0",
        "out of memory",
        "centralized 72.5 %",
    ],
)
def test_page_says(text: str, page: Page) -> None:
    assert text in page.text


def test_charts_are_told_in_words(page: Page) -> None:
    accuracy = next(label for label in page.labels if label.startswith("Accuracy: "))
    assert "41.2 % in round 1" in accuracy
    assert "68.1 % in round 10" in accuracy
    assert any("hospital-4 72.0 % against 58.6 % alone" in label for label in page.labels)
    assert any("31.3 MB up and 31.7 MB down" in label for label in page.labels)
    assert page.tags.count("svg") == 6


def test_names_labels_and_reasons_are_escaped_everywhere() -> None:
    summary = sample_summary()
    evil = replace(summary.per_client[0], name=EVIL)
    summary = replace(
        summary,
        name=EVIL,
        labels=(EVIL, *CHAPTERS[1:]),
        per_client=(evil, *summary.per_client[1:]),
        references=(replace(summary.references[0], name=EVIL), *summary.references[1:]),
        base=EVIL,
        base_digest=EVIL,
        adapter=EVIL,
        data=EVIL,
        evaluation=EVIL,
        config_digest=EVIL,
        warnings=(EVIL,),
        versions={EVIL: EVIL},
    )
    rounds = [replace(sample_rounds()[0], failed={EVIL: EVIL})]
    html = render_html(summary, rounds)
    page = Page(html)
    assert "script" not in page.tags
    assert "<script" not in html
    assert "<script>alert(1)</script>" in page.text  # shown as what it is
    assert "\x07" not in html


@pytest.mark.parametrize("references", [True, False])
@pytest.mark.parametrize("rounds", [0, 1])
def test_unfinished_runs_have_a_page_too(rounds: int, references: bool) -> None:
    summary = replace(
        sample_summary(references=references),
        status="failed",
        rounds=rounds,
        final=None,
        best=None,
        seconds=float("nan"),
        peak_rss_mb=float("nan"),
        versions={},
    )
    page = Page(render_html(summary, sample_rounds(rounds)))
    assert f"failed after {rounds} of 10 rounds" in page.text
    assert not re.search(r"\bnan\b", page.text)
    assert "None" not in page.text
    assert ("gain" in page.rows[0] or any("gain" in row for row in page.rows)) == references


def test_a_run_without_clients_or_labels_has_a_page() -> None:
    summary = replace(sample_summary(), per_client=(), labels=(), references=())
    assert "Who holds what" not in Page(render_html(summary, [])).text


def test_many_clients_are_summarised_but_all_in_the_table() -> None:
    page = Page(render_html(sample_summary(60), sample_rounds(1)))
    table = [row for row in page.rows if row and re.fullmatch(r"hospital-\d+", row[0])]
    assert len(table) == 60
    assert "Size of the hospitals" in page.text
    assert "The 24 largest of 60 hospitals are shown." in page.text
    heat = next(row for row in page.rows if row[0] == "label")
    assert len(heat) == 25


def test_heat_map_sums_up_the_rarest_labels() -> None:
    summary = sample_summary()
    count = 50
    clients = tuple(
        replace(c, label_counts=tuple(range(1, count + 1)), examples=count)
        for c in summary.per_client
    )
    labels = tuple(f"label {n}" for n in range(count))
    view = heat_map(replace(summary, labels=labels, per_client=clients))
    assert view is not None
    assert view.rows[0][0] == "label 49"
    assert len(view.rows) == MOST_LABELS + 1
    assert view.rows[-1][0] == "20 other labels"
    assert view.rows[-1][1][0].count == sum(range(1, 21))
    assert sum(cells[0].count for _, cells in view.rows) == sum(range(1, count + 1))
    assert max(cell.strength for _, cells in view.rows for cell in cells) == 1


def test_same_run_gives_the_same_bytes(html: str) -> None:
    assert render_html(sample_summary(), sample_rounds()) == html


def test_every_colour_follows_the_theme(html: str, tmp_path: Path) -> None:
    # A colour in a chart that is no variable would be invisible on one of the two themes.
    charts = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))
    bare = re.findall(r"(?<!, )#[0-9a-f]{6}\b", charts)
    assert bare == []
