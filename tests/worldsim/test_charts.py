import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from worldsim.charts import Point, forest, scatter


def test_forest_places_rates_on_the_axis():
    root = ElementTree.fromstring(forest([("imagined", 0.5, (0.25, 0.75)), ("true", 1.0, (0.5, 1.0))], width=214))
    circle, polygon = root.find("circle"), root.find("polygon")
    assert circle is not None and polygon is not None
    assert float(circle.get("cx", "")) == pytest.approx(7 + 0.5 * 200)
    low, high = (
        float(line.get(key, "")) for line in root.findall("line[@class='whisker imagined']") for key in ("x1", "x2")
    )
    assert (low, high) == pytest.approx((57, 157))
    corners = [float(pair.split(",")[0]) for pair in polygon.get("points", "").split()]
    assert np.mean(corners) == pytest.approx(207)
    assert "imagined 50% (25 to 75); true 100% (50 to 100)" in root.get("aria-label", "")


def test_scatter_has_imagined_across_and_true_up():
    svg = scatter([Point("a", 0.0, 0.0), Point("b", 1.0, 0.5)], [Point("a, t", 0.2, 0.9)], size=400)
    circles = {c.find("title").text.split(":")[0]: c for c in ElementTree.fromstring(svg).findall("circle")}  # ty: ignore
    x = {name: float(circle.get("cx", "")) for name, circle in circles.items()}
    y = {name: float(circle.get("cy", "")) for name, circle in circles.items()}
    assert x["a"] < x["a, t"] < x["b"]
    assert y["a"] > y["b"] > y["a, t"]
    assert x["a, t"] == pytest.approx(x["a"] + 0.2 * (x["b"] - x["a"]), abs=0.1)


def test_labels_do_not_cover_each_other():
    rng = np.random.default_rng(0)
    points = [Point(f"policy-{k:02d}", *np.clip(0.08 * k + rng.normal(0, 0.02, 2), 0, 1)) for k in range(12)]
    texts = re.findall(r'<text class="name" x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)">', scatter(points, []))
    assert len(texts) == 12
    boxes = []
    for x, y, anchor in texts:
        left = float(x) - {"start": 0, "end": 9 * 6.4, "middle": 4.5 * 6.4}[anchor]
        boxes.append((left, float(y) - 10, left + 9 * 6.4, float(y) + 2))
    for i, a in enumerate(boxes):
        assert a[0] > 40 and a[2] < 432
        for b in boxes[:i]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_names_are_escaped():
    svg = scatter([Point("<script>", 0.5, 0.5)], [])
    assert "<script>" not in svg
    ElementTree.fromstring(svg)
