"""The loss picture: (step, loss of each layer) points in, one SVG file's text out, readable in light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 340, 56, 150, 34, 40
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito, told apart by all
WINDOW = 9  # points: the bold line is their median


def loss_picture(title: str, layers: Sequence[str], history: Sequence[Sequence[float]]) -> str:
    """Losses over steps, the axis from 0 to a little above the most that the last nine tenths show, or 1."""
    points = np.array(history, float)  # (n, 1 + layers)
    steps, losses = points[:, 0], points[:, 1:]
    top = 1.05 * max(1.0 if losses.min() > 0.5 else 0.0, float(losses[len(losses) // 10 :].max()))

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / steps[-1]

    def y(loss: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * min(loss, top) / top

    parts = [f'<text x="{LEFT}" y="20" font-weight="bold">{escape(title)}: loss over steps</text>']
    for tick in np.linspace(0, top, 5):
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="#8886"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.2f}</text>')
    for tick in np.linspace(0, steps[-1], 5):
        parts.append(f'<text x="{x(tick):.1f}" y="{HEIGHT - 16}" text-anchor="middle">{tick:.0f}</text>')
    for i, layer in enumerate(layers):
        colour = COLOURS[i % len(COLOURS)]
        smooth = [np.median(losses[max(0, j - WINDOW // 2) : j + WINDOW // 2 + 1, i]) for j in range(len(losses))]
        for values, style in ((losses[:, i], 'stroke-opacity="0.3"'), (smooth, 'stroke-width="2"')):
            path = " ".join(f"{x(step):.1f},{y(float(value)):.1f}" for step, value in zip(steps, values))
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" {style}/>')
        place = HEIGHT - BOTTOM - 18 * (len(layers) - i)
        parts.append(f'<text x="{WIDTH - RIGHT + 10}" y="{place}" fill="{colour}">{escape(layer)} {smooth[-1]:.3f}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="system-ui, sans-serif" '
        'font-size="12" fill="currentColor"><style>svg{color:#222;background:#fff}'
        "@media(prefers-color-scheme:dark){svg{color:#ddd;background:#111}}</style>"
        + "".join(parts) + "</svg>\n"
    )  # fmt: skip
