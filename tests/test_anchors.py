"""Anchors: nearest that shows enough ground, per swath; weights sum to one and never depend on the window."""

import json

import numpy as np

from pipeline.anchors import INTERPOLATE, AnchorMap, Candidate, build_map, choose

ALL = np.ones((40, 60), bool)


def _candidate(layer, days_off, clear, swath=0, fails=False, footprint=ALL) -> Candidate:
    return Candidate(layer, days_off, clear, swath, fails, footprint)


def test_the_nearest_that_shows_enough_ground_and_passes_the_check_is_the_anchor():
    candidates = [
        _candidate(0, -9, 0.9),
        _candidate(1, 0, 0.95, fails=True),
        _candidate(2, 2, 0.1),
        _candidate(3, -4, 0.4),
        _candidate(4, 4, 0.6),
        _candidate(5, 40, 1.0, swath=7),
    ]
    assert [c.layer for c in choose(candidates, min_clear=0.2, max_days=16)] == [4]
    assert [c.layer for c in choose(candidates, min_clear=0.2, max_days=60)] == [4, 5]
    assert choose(candidates, min_clear=0.99, max_days=16) == []


def _halves() -> AnchorMap:
    left, right = ALL.copy(), ALL.copy()
    left[:, 35:] = False
    right[:, :20] = False
    chosen = choose(
        [_candidate(3, 1, 0.9, 1, footprint=left), _candidate(5, -2, 0.9, 2, footprint=right)],
        min_clear=0.2,
        max_days=9,
    )
    return build_map(chosen, anywhere=ALL, cell_px=8, row0=-5, col0=100, blend_cells=6)


def test_weights_sum_to_one_and_go_over_in_a_strip():
    anchors = _halves()
    assert anchors.layers == (3, 5)
    np.testing.assert_allclose(anchors.weights.sum(axis=0), 1, atol=1e-6)
    row = anchors.weights[0, 10]
    assert (row[:27] == 1).all()
    assert (np.diff(row[26:36]) <= 0).all()
    assert row[34] == 0  # a cell at the edge may miss data
    assert 0 < row[31] < 1


def test_outside_every_footprint_is_interpolation():
    left = ALL.copy()
    left[:, 30:] = False
    anchors = build_map([_candidate(2, 0, 1, footprint=left)], anywhere=ALL, cell_px=4, row0=0, col0=0, blend_cells=5)
    assert anchors.layers == (2, INTERPOLATE)
    assert anchors.weights[1, 0, 59] == 1
    empty = build_map([], anywhere=ALL[:1, :1], cell_px=4, row0=0, col0=0, blend_cells=5)
    assert empty.layers == (INTERPOLATE,)


def test_there_is_no_strip_where_nothing_lies_beyond():
    left = ALL.copy()
    left[:, 30:] = False
    anchors = build_map([_candidate(2, 0, 1, footprint=left)], anywhere=left, cell_px=4, row0=0, col0=0, blend_cells=5)
    assert anchors.layers == (2,)
    assert (anchors.weights == 1).all()


def test_a_pixel_s_weight_never_depends_on_the_window():
    anchors = _halves()
    whole = dict(anchors.at(-40, 800, 320, 480))
    assert set(whole) == {3, 5}
    for top, left, height, width in [(0, 0, 50, 70), (13, 241, 100, 120), (101, 199, 33, 200)]:
        part = dict(anchors.at(-40 + top, 800 + left, height, width))
        for layer, weight in whole.items():
            cut = weight[top : top + height, left : left + width]
            np.testing.assert_array_equal(part.get(layer, np.zeros_like(cut)), cut)
    assert (whole[3][:, :150] == 1).all()
    assert [layer for layer, _ in anchors.at(-40, 800, 64, 64)] == [3]


def test_a_frozen_map_is_the_same_map():
    anchors = _halves()
    again = AnchorMap.from_dict(json.loads(json.dumps(anchors.to_dict())))
    np.testing.assert_array_equal(again.weights, anchors.weights)
    assert (again.layers, again.cell_px, again.row0, again.col0) == (anchors.layers, 8, -5, 100)
