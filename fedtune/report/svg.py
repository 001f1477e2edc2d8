"""matplotlib figures as SVG that lives inside an HTML page and follows its colours."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which colour-blind people can tell apart. matplotlib draws with these
# light-theme values; in the SVG each becomes a CSS variable, so the page can answer dark mode.
COLOURS = {
    "ink": "#1c2330",
    "muted": "#5b6474",
    "grid": "#dde1e8",
    "blue": "#0072b2",
    "orange": "#d55e00",
    "green": "#008f68",
    "purple": "#aa4499",
}
_WIDTH = 5.2  # inches; the SVG scales, and this keeps its 11 points readable on a phone
_POINTS = 72
_STYLE = {
    # Real text: it can be searched and read aloud, and the browser has the glyphs of any script.
    "svg.fonttype": "none",
    "svg.hashsalt": "fedtune",  # the same run gives the same bytes
    "font.size": 11,
    "axes.labelsize": 11,
    "axes.edgecolor": COLOURS["muted"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": COLOURS["grid"],
    "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "legend.frameon": False,
    "text.parse_math": False,  # a client may be called "$\\frac"
}


def draw(paint: Callable[[Axes], None], height: float = 3.1) -> str:
    """The SVG element of a figure with one pair of axes, filled by `paint`; `height` in inches."""
    import matplotlib.style
    from matplotlib.figure import Figure

    # Starts from the defaults: a person's own matplotlibrc must not change the report.
    with matplotlib.style.context(["default", _STYLE]):
        # Figure, not pyplot: no global state and no window system.
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        paint(figure.add_subplot())
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return _embeddable(buffer.getvalue(), height)


def _embeddable(document: str, height: float) -> str:
    """The `<svg>` of a stand-alone document, without what only a file of its own needs."""
    body = document[document.index(">", document.index("<svg")) + 1 :]
    # Several figures share one page: only ids that are referred to may stay, the others repeat.
    used = set(re.findall(r"#([A-Za-z]\w*)", body))
    body = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", body)
    for name, value in COLOURS.items():
        body = body.replace(value, f"var(--{name}, {value})")
    box = f"0 0 {_WIDTH * _POINTS:g} {height * _POINTS:g}"
    return f'<svg viewBox="{box}" aria-hidden="true" focusable="false">{body.strip()}'
