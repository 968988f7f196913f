from __future__ import annotations

import math
import re
import xml.dom.minidom

import pytest

from kinema.demo.chart import line_chart, running_mean


def test_a_curve_stays_inside_its_frame_and_is_valid_xml() -> None:
    points = [(float(s), 2.0 / s) for s in range(1, 60)]
    svg = line_chart(points, x_label="step", y_label="loss <L1>")
    xml.dom.minidom.parseString(svg)
    for curve in re.findall(r"points='([^']+)'", svg):
        for pair in curve.split():
            x, y = map(float, pair.split(","))
            assert 0 <= x <= 560
            assert 0 <= y <= 240


def test_the_running_mean_starts_at_the_first_value() -> None:
    mean = running_mean([(0, 4.0), (1, 4.0), (2, 8.0)])
    assert mean[0] == (0, pytest.approx(4.0))
    assert mean[1][1] == pytest.approx(4.0)
    assert 4.0 < mean[2][1] < 8.0


def test_points_that_are_no_numbers_are_left_out() -> None:
    assert "nan" not in line_chart(
        [(1, math.nan), (2, 1.0), (3, 0.5)], x_label="step", y_label="loss"
    )
    assert "Too few" in line_chart([(1, 1.0)], x_label="step", y_label="loss")
