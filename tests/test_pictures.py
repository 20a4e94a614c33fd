"""Overlays and curves: which pixels change, what the drawing says."""
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from vos import pictures


def test_overlay_changes_the_fill_and_the_outline_and_nothing_else():
    frame = np.random.default_rng(0).integers(0, 256, (40, 61, 3), np.uint8)
    before, mask = frame.copy(), np.zeros((40, 61), bool)
    mask[10:30, 10:30] = True
    prediction = np.roll(mask, 25, axis=1)
    picture = pictures.overlay(frame, prediction, mask)
    assert picture.dtype == np.uint8 and np.array_equal(frame, before)
    outside = ~(prediction | mask)
    assert np.array_equal(picture[outside], frame[outside])
    assert (picture[10, 10:30] == pictures.OUTLINE).all()
    assert (picture[10:30, 29] == pictures.OUTLINE).all()
    assert np.array_equal(picture[15:25, 15:25], frame[15:25, 15:25])  # outlined, not filled
    assert np.array_equal(picture[20, 45], np.round(0.4 * frame[20, 45] + 0.6 * pictures.FILL))


def test_outline_stays_off_the_frame_border():
    """A mask that the frame cuts has no edge there; a full one, and an empty one, have none."""
    frame, nothing = np.full((40, 61, 3), 99, np.uint8), np.zeros((40, 61), bool)
    assert np.array_equal(pictures.overlay(frame, nothing, ~nothing), frame)
    assert np.array_equal(pictures.overlay(frame, nothing, nothing), frame)
    mask = nothing.copy()
    mask[:, :20] = True
    picture = pictures.overlay(frame, nothing, mask)
    assert (picture[:, 19] == pictures.OUTLINE).all() and (picture[:, :15] == 99).all()


def curves(tmp_path, *logs: list[dict], **names) -> tuple[list[str], list[tuple]]:
    """Return the texts, and the color and points of each line, of the curves of logs."""
    pictures.write_curves(tmp_path / "curves.svg", *logs, **names)
    tree, svg = ElementTree.parse(tmp_path / "curves.svg"), "{http://www.w3.org/2000/svg}"
    lines = [(line.attrib["stroke"], line.attrib["points"]) for line in tree.iter(f"{svg}polyline")]
    return ["".join(text.itertext()) for text in tree.iter(f"{svg}text")], lines


def test_curves_have_numbers_on_their_axes_and_lines_where_measured(tmp_path):
    rows = [{"step": 0, "loss": 2.0}, {"step": 10, "loss": 1.0, "val_iou": 0.25}]
    texts, lines = curves(tmp_path, rows)
    assert texts == ["Loss", "0", "1", "2", "Validation IoU", "0", "0.5", "1", "step 0", "step 10"]
    assert [points for _, points in lines] == ["60.0 40.0 700.0 110.0", "700.0 345.0"]


def test_logs_of_one_run_share_a_color_and_each_run_is_named(tmp_path):
    rows = [{"step": 0, "loss": 2.0}, {"step": 5, "loss": 1.0}]
    texts, lines = curves(tmp_path, rows, rows[:1], rows, names=["<a>", "<a>", "b"])
    colors = [color for color, _ in lines]
    assert texts[8:] == ["\u25a0 <a>", "\u25a0 b", "step 0", "step 5"] and len(lines) == 6
    assert colors[0] == colors[1] == colors[3] != colors[2] == colors[5]


@pytest.mark.parametrize("logs", [[], [[{"step": 0, "loss": 0.0}]]])
def test_curves_of_next_to_nothing_are_drawn_too(tmp_path, logs):
    texts, lines = curves(tmp_path, *logs)
    assert len(texts) == 10 and len(lines) == 2 * len(logs)
