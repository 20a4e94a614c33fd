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


def curves(tmp_path, rows: list[dict]) -> tuple[list[str], list[str]]:
    """Return the texts and the paths of the lines of a run's curves."""
    pictures.write_curves(tmp_path / "curves.svg", rows)
    tree = ElementTree.parse(tmp_path / "curves.svg")
    lines = [path.attrib["d"] for path in tree.iter("{http://www.w3.org/2000/svg}path")]
    return [text.text or "" for text in tree.iter("{http://www.w3.org/2000/svg}text")], lines


def test_curves_have_numbers_on_their_axes_and_lines_where_measured(tmp_path):
    rows = [{"step": 0, "loss": 2.0}, {"step": 5, "val_iou": None, "loss": None},
            {"step": 10, "loss": 1.0, "val_iou": 0.25}]
    texts, lines = curves(tmp_path, rows)
    assert texts == ["Loss", "0", "1", "2", "Validation IoU", "0", "0.5", "1", "step 0",
                     "step 10"]
    assert lines[3] == "M60.0 40.0h0L700.0 110.0h0"
    assert lines[7] == "M700.0 345.0h0"


@pytest.mark.parametrize("rows", [[{"step": 3}], [{"step": 0, "loss": float("nan")}],
                                  [{"step": 0, "loss": 0.0}, {"step": 1, "loss": 0.0}]])
def test_curves_of_next_to_nothing_are_drawn_too(tmp_path, rows):
    texts, lines = curves(tmp_path, rows)
    assert len(texts) == 10 and "nan" not in "".join(lines)
