"""The report's charts, as SVG whose colours come from the page's style sheet, so that they follow light and dark."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

IMAGINED_CLASS, TRUE_CLASS = "imagined", "true"
_TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)
_CHARACTER_WIDTH = 6.4  # of the scatter's labels, user units

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


@dataclass(frozen=True)
class Point:
    """A point of the scatter: success rates in [0, 1] and their intervals."""

    label: str
    imagined: float
    true: float
    imagined_interval: tuple[float, float] = (0.0, 1.0)
    true_interval: tuple[float, float] = (0.0, 1.0)

    @property
    def title(self) -> str:
        """What a reader sees who rests on the point."""
        return f"{self.label}: imagined {100 * self.imagined:.0f}%, true {100 * self.true:.0f}%"


def forest(rows: Sequence[tuple[str, float, Sequence[float]]], width: float = 320, row_height: float = 15) -> str:
    """Draw success rates with their intervals on a 0..1 axis, one under the other.

    Args:
        rows: (CSS class, rate, (low, high)), one or two of them.
        width: user units.
        row_height: user units a row.

    Returns:
        An SVG element.
    """
    height, pad = row_height * len(rows) + 8, 7

    def x(rate: float) -> float:
        return pad + rate * (width - 2 * pad)

    parts = [_line("grid", x(tick), 0, x(tick), height) for tick in _TICKS]
    for i, (name, rate, (low, high)) in enumerate(rows):
        y = 4 + row_height * (i + 0.5)
        parts += [_line(f"whisker {name}", x(low), y, x(high), y), _marker(name, x(rate), y, 4.6)]
    label = "; ".join(f"{name} {_range(rate, interval)}" for name, rate, interval in rows)
    return _svg("forest", width, height, label, f"<title>{escape(label)}</title>{''.join(parts)}")


def scatter(policies: Sequence[Point], cells: Sequence[Point], size: float = 440) -> str:
    """Draw imagined (across) against true success (up): policies with intervals and names, cells as dots.

    Args:
        policies: one point a policy.
        cells: one point a (policy, task) cell.
        size: width and height in user units.

    Returns:
        An SVG element.
    """
    left, bottom, margin = 46, 42, 14

    def x(rate: float) -> float:
        return left + rate * (size - left - margin)

    def y(rate: float) -> float:
        return size - bottom - rate * (size - bottom - margin)

    parts = []
    for tick in _TICKS:
        parts += [_line("grid", x(tick), y(0), x(tick), y(1)), _line("grid", x(0), y(tick), x(1), y(tick))]
        parts += [_text("tick", x(tick), y(0) + 16, f"{100 * tick:.0f}", "middle")]
        parts += [_text("tick", x(0) - 7, y(tick) + 3.5, f"{100 * tick:.0f}", "end")]
    parts += [_line("diagonal", x(0), y(0), x(1), y(1))]
    parts += [_text("axis", x(0.5), size - 5, "imagined success, %", "middle")]
    parts += [_text("axis", -y(0.5), 12, "true success, %", "middle", ' transform="rotate(-90)"')]
    parts += [_circle("cell", x(cell.imagined), y(cell.true), 3, cell.title) for cell in cells]
    for point in policies:
        px, py = x(point.imagined), y(point.true)
        (low, high), (down, up) = point.imagined_interval, point.true_interval
        parts += [_line("cross", x(low), py, x(high), py), _line("cross", px, y(down), px, y(up))]
    anchors = [(x(point.imagined), y(point.true)) for point in policies]
    parts += [_circle("policy", *anchor, 5.5, p.title) for p, anchor in zip(policies, anchors, strict=True)]
    labels = [point.label for point in policies]
    for label, place in zip(labels, _placed(anchors, labels, (x(0), y(1), x(1), y(0))), strict=True):
        parts.append(_text("name", *place[:2], label, place[2]))
    return _svg("scatter", size, size, "Imagined against true success", "".join(parts))


def _svg(name: str, width: float, height: float, label: str, content: str) -> str:
    box = f'viewBox="0 0 {width:g} {height:g}"'
    return f'<svg class="{name}" {box} role="img" aria-label="{escape(label)}">{content}</svg>'


def _line(name: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{name}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(name: str, x: float, y: float, text: str, anchor: str, more: str = "") -> str:
    return f'<text class="{name}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(text)}</text>'


def _circle(name: str, x: float, y: float, radius: float, title: str) -> str:
    return f'<circle class="{name}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}"><title>{escape(title)}</title></circle>'


def _marker(name: str, x: float, y: float, radius: float) -> str:
    """Draw a disc for imagined and a diamond for true, so that colour is not the only difference."""
    if name == IMAGINED_CLASS:
        return f'<circle class="marker {name}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}"/>'
    r = radius * 1.2
    corners = f"{x:.1f},{y - r:.1f} {x + r:.1f},{y:.1f} {x:.1f},{y + r:.1f} {x - r:.1f},{y:.1f}"
    return f'<polygon class="marker {name}" points="{corners}"/>'


def _range(rate: float, interval: Sequence[float]) -> str:
    return f"{100 * rate:.0f}% ({100 * interval[0]:.0f} to {100 * interval[1]:.0f})"


def _placed(
    anchors: Sequence[tuple[float, float]], labels: Sequence[str], bounds: Box
) -> Iterator[tuple[float, float, str]]:
    """Place labels beside their points, one after the other, where they cover least: (x, y, text-anchor)."""
    taken: list[Box] = [(px - 7, py - 7, px + 7, py + 7) for px, py in anchors]
    for (px, py), label in zip(anchors, labels, strict=True):
        width, height = _CHARACTER_WIDTH * len(label), 12.0
        options = []
        for distance in (11, 20, 32):
            for dx, dy in ((1, 0), (-1, 0), (0.7, -1), (-0.7, -1), (0.7, 1), (-0.7, 1), (0, -1.3), (0, 1.3)):
                cx, cy = px + dx * distance, py + dy * distance
                anchor = "start" if dx > 0 else "end" if dx < 0 else "middle"
                start = cx - {"start": 0, "end": width, "middle": width / 2}[anchor]
                box = (start, cy - height / 2, start + width, cy + height / 2)
                outside = width * height - _overlap(box, bounds)
                cost = 5 * outside + sum(_overlap(box, other) for other in taken) + distance
                options.append((cost, len(options), (cx, cy + 4, anchor), box))
        _, _, place, box = min(options)
        taken.append(box)
        yield place


def _overlap(a: Box, b: Box) -> float:
    across, down = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return across * down if across > 0 and down > 0 else 0.0
