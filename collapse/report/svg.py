"""Charts without matplotlib, for pages that stand alone."""

import itertools


def chart(title: str, lines: dict[str, list[float]]) -> str:
    """An inline SVG with a line for each side, from 0 to the largest value, against 0, 1, 2, ..."""
    top = max(itertools.chain(*lines.values(), [0])) or 1
    last = max(1, *(len(values) - 1 for values in lines.values()))
    shown = ""
    for (side, values), color, x in zip(lines.items(), ("#888", "#d33"), (510, 560), strict=True):
        points = (
            f"{50 + 540 * i / last:.1f},{220 - 190 * v / top:.1f}" for i, v in enumerate(values)
        )
        shown += f'<polyline points="{" ".join(points)}" fill="none" stroke="{color}" '
        shown += f'stroke-width="2"/><text x="{x}" y="16" fill="{color}">{side}</text>'
    return (
        f'<h2>{title}</h2><svg viewBox="0 0 620 250" font-size="13" fill="currentColor">{shown}'
        '<path d="M50 25V220H595" fill="none" stroke="#999"/>'
        f'<text x="5" y="34">{top:.3g}</text><text x="5" y="224">0</text>'
        f'<text x="47" y="240">0</text><text x="575" y="240">{last}</text></svg>'
    )
