"""Ratios as a picture: one SVG of horizontal bars, without scripts, readable on light and dark pages."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

_WIDTH: Final = 980
_LABEL: Final = 410
"""Room for the names, in the same unit as the width."""
_TOLD: Final = 230
_ROW: Final = 26
_TOP: Final = 48
_BETTER, _WORSE = "#2a7f62", "#b4661c"


@dataclass(frozen=True, slots=True)
class Bar:
    """One comparison."""

    name: str
    ratio: float
    """Ours over the floor's."""
    told: str
    """Both numbers, in words."""
    more_is_better: bool = False

    @property
    def better(self) -> bool:
        """Whether ours is at least as good."""
        return self.ratio >= 1 if self.more_is_better else self.ratio <= 1


def ratios(bars: Sequence[Bar], title: str) -> str:
    """Bars on one scale from 0, with a line at 1; green where ours is at least as good as the floor."""
    most = max([1.0, *(bar.ratio for bar in bars)])
    height = _TOP + _ROW * len(bars) + 10
    room = _WIDTH - _LABEL - _TOLD

    def x(ratio: float) -> float:
        return _LABEL + room * ratio / most

    rows = []
    for number, bar in enumerate(bars):
        y = _TOP + _ROW * number
        better = " (more is better)" if bar.more_is_better else ""
        rows.append(
            f'<text x="{_LABEL - 8}" y="{y + 15}" text-anchor="end">{html.escape(bar.name + better)}</text>'
            f'<rect x="{_LABEL}" y="{y + 3}" width="{x(bar.ratio) - _LABEL:.1f}" height="{_ROW - 9}" rx="2" '
            f'fill="{_BETTER if bar.better else _WORSE}"/>'
            f'<text x="{_WIDTH - _TOLD + 12}" y="{y + 15}">{bar.ratio:.2f} × '
            f'<tspan fill="#8a8a8a">{html.escape(bar.told)}</tspan></text>'
        )
    line = (
        f'<line x1="{x(1):.1f}" x2="{x(1):.1f}" y1="{_TOP - 4}" y2="{height - 8}" stroke="#888" stroke-dasharray="3 3"/>'
        f'<text x="{x(1):.1f}" y="{_TOP - 10}" text-anchor="middle">1 ×</text>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" role="img">'
        f"<title>{html.escape(title)}</title>"
        "<style>text{font:12px system-ui,sans-serif;fill:#24292f}"
        "@media(prefers-color-scheme:dark){text{fill:#d0d7de}}</style>"
        f'<text x="8" y="18" style="font-weight:600;font-size:14px">{html.escape(title)}</text>'
        f"{line}{''.join(rows)}</svg>\n"
    )
