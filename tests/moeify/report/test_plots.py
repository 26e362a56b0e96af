from __future__ import annotations

import math
import re

from moeify.report.plots import line, load_heat, share_heat


def test_each_cell_is_drawn_once_in_the_color_of_its_number() -> None:
    plot = load_heat("x", ("layer", ["0", "1"]), ("expert", ["0", "1", "2"]), [[1, 0, 8], [1, 100, 0.125]])
    drawn = {key: re.findall(r"M(\d) (\d)h", d) for key, d in re.findall(r'class="q(\d+)" d="([^"]*)"', plot.paths)}
    assert drawn == {"12": [("0", "0"), ("0", "1")], "0": [("1", "0"), ("2", "1")], "23": [("2", "0"), ("1", "1")]}
    assert re.findall(r'class="idle" d="M([\d.]+) ([\d.]+)l', plot.paths)[0][0].startswith("1.")
    assert plot.cells == [["1.00", "0.00", "8.00"], ["1.00", "100.00", "0.12"]]


def test_shares_have_no_crosses_and_a_scale_of_their_own() -> None:
    plot = share_heat("x", ("layer", ["0"]), ("expert", ["0", "1"]), [[0.0, 0.02]], 0.02)
    assert "idle" not in plot.paths and 'class="q0"' in plot.paths and 'class="q23"' in plot.paths
    assert "idle" not in share_heat("x", ("layer", ["0"]), ("expert", ["0"]), [[0.0]], 0.0).paths


def test_many_columns_share_their_labels() -> None:
    names = [str(n) for n in range(128)]
    plot = load_heat("x", ("layer", ["0"]), ("expert", names), [[1.0] * 128])
    assert [name for name, _ in plot.marks] == names[::16] and sum(span for _, span in plot.marks) == 128


def test_a_curve_leaves_out_what_is_not_known() -> None:
    drawn = line("loss", [1, 2, 3, 5], [4.0, None, math.nan, 2.0])
    assert drawn and drawn.path == "M0 0L100 100" and (drawn.first_step, drawn.last_step) == (1, 5)
    assert (drawn.low, drawn.high, drawn.last) == ("2", "4", "2")
    assert line("loss", [1, 2], [None, 1.0]) is None
    flat = line("idle", [1, 2], [0.0, 0.0])
    assert flat and flat.path == "M0 100L100 100"
