"""One sentence about the noise on what passed the cut."""

from __future__ import annotations

from fedtune.records import Cut


def cut_noise(cut: Cut | None) -> str | None:
    """What the noise is and what it comes to; None without noise."""
    if cut is None or cut.clip is None or cut.eta is None:
        return None
    text = (
        f"noise on embeddings (metric differential privacy): clip {cut.clip:g}, eta {cut.eta:g}; "
        f"local epsilon {_large(cut.token_epsilon or 0.0)} for one token, sent once"
    )
    if cut.sendings and cut.passes and cut.example_epsilon:
        text += (
            f", {_large(cut.example_epsilon)} for all tokens of an example over the run, "
            f"sent up to {cut.sendings} times ({cut.passes:.2g} on average)"
        )
    return f"{text}. It is about what a token is, not about whether a record or client took part"


def _large(value: float) -> str:
    """Three digits, and no exponent."""
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if rounded >= 100 else f"{rounded:g}"
