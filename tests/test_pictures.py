"""Overlays, sheets, videos and curves: which pixels change, what is on disk, what the drawing says."""
import base64
import importlib.util
import math
import sys
import xml.etree.ElementTree as ElementTree

import imageio.v3 as iio
import numpy as np
import pytest

import pictures
import sample
from files import BadInput

SVG = "{http://www.w3.org/2000/svg}"


def square(height: int = 40, width: int = 61) -> np.ndarray:
    """Return a mask [H, W] bool of a 20x20 square."""
    mask = np.zeros((height, width), bool)
    mask[10:30, 10:30] = True
    return mask


def test_overlay_changes_the_fill_and_the_outline_and_nothing_else():
    frame = np.random.default_rng(0).integers(0, 256, (40, 61, 3), np.uint8)
    before, prediction, mask = frame.copy(), np.roll(square(), 25, axis=1), square()
    picture = pictures.overlay(frame, prediction, mask)
    assert picture.shape == frame.shape and picture.dtype == np.uint8
    assert np.array_equal(frame, before)  # the caller's frame is left alone
    outside = ~(prediction | mask)
    assert np.array_equal(picture[outside], frame[outside])
    assert (picture[10, 10:30] == pictures.OUTLINE).all() and (picture[10:30, 29] == pictures.OUTLINE).all()
    assert np.array_equal(picture[15:25, 15:25], frame[15:25, 15:25])  # the truth is outlined, not filled
    expected = np.round(0.4 * frame[20, 45] + 0.6 * pictures.FILL)
    assert np.array_equal(picture[20, 45], expected)


def test_overlay_without_masks_is_the_frame():
    frame = np.full((8, 9, 3), 7, np.uint8)
    assert np.array_equal(pictures.overlay(frame), frame)
    assert np.array_equal(pictures.overlay(frame, np.zeros((8, 9), bool), np.zeros((8, 9), bool)), frame)


def test_overlay_refuses_a_mask_of_another_size():
    with pytest.raises(ValueError, match="prediction"):
        pictures.overlay(np.zeros((8, 9, 3), np.uint8), np.zeros((9, 8), bool))


def test_outline_stays_off_the_frame_border():
    """A mask that the frame cuts has no edge there; a full one has none at all."""
    frame, mask = np.full((40, 61, 3), 99, np.uint8), np.zeros((40, 61), bool)
    assert np.array_equal(pictures.overlay(frame, mask=~mask), frame)
    mask[:, :20] = True
    picture = pictures.overlay(frame, mask=mask)
    assert (picture[:, 19] == pictures.OUTLINE).all() and (picture[:, :15] == 99).all()


def luminance(colour: np.ndarray) -> float:
    """Return the relative luminance of an sRGB colour [3] uint8, as WCAG 2 defines it."""
    share = colour / 255
    return float(np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4) @ (0.2126, 0.7152, 0.0722))


def test_the_two_colours_differ_in_lightness_too():
    """So that a reader who sees no hue at all tells them apart."""
    assert (luminance(pictures.OUTLINE) + 0.05) / (luminance(pictures.FILL) + 0.05) > 2


@pytest.mark.parametrize("height, width, longest, expected", [(480, 854, 480, (270, 480)), (854, 480, 480, (480, 270)),
                                                              (100, 7, 10, (10, 1)), (30, 40, 48, (30, 40)), (900, 1, 30, (30, 1))])
def test_shrink_keeps_the_proportions_and_never_enlarges(height, width, longest, expected):
    image = np.full((height, width, 3), (10, 200, 255), np.uint8)
    small = pictures.shrink(image, longest)
    assert small.shape == (*expected, 3) and small.dtype == np.uint8
    assert (small == (10, 200, 255)).all()


@pytest.mark.parametrize("old, new", [(12, 4), (7, 3), (5, 5), (10, 9), (3, 1)])
def test_average_is_the_mean_over_what_each_pixel_covers(old, new):
    """Against the plain way: repeat every pixel `new` times, then average runs of `old`."""
    values = np.random.default_rng(old).integers(0, 256, (old, 4, 3), np.uint8)
    slow = values.repeat(new, axis=0).reshape(new, old, 4, 3).mean(axis=1)
    assert np.allclose(pictures.average(values, new, axis=0), slow)
    assert np.allclose(pictures.average(values.transpose(1, 0, 2), new, axis=1), slow.transpose(1, 0, 2))


def test_contact_sheet_places_images_in_rows():
    images = [np.full((10 + index, 20, 3), 50 * index + 5, np.uint8) for index in range(5)]
    sheet = pictures.contact_sheet(images, columns=2, gap=3)
    assert sheet.shape == (3 * (14 + 3) + 3, 2 * (20 + 3) + 3, 3)
    assert (sheet[3:13, 3:23] == 5).all() and (sheet[3:14, 26:46] == 55).all() and (sheet[37:51, 3:23] == 205).all()
    assert (sheet[:3] == 24).all() and (sheet[37:, 26:] == 24).all()
    assert pictures.contact_sheet(images[:1], columns=4, gap=0).shape == (10, 20, 3)


def test_jpeg_uri_decodes_to_the_picture():
    frame = sample.make_clip(0, 1, 64, 91)[0][0]
    head, data = pictures.jpeg_uri(frame).split(",")
    assert head == "data:image/jpeg;base64"
    back = iio.imread(base64.b64decode(data), extension=".jpg")
    assert back.shape == frame.shape and np.abs(back.astype(int) - frame).mean() < 15


# --- videos ------------------------------------------------------------------------------------


def overlays(frames: int, height: int, width: int) -> list[np.ndarray]:
    images, masks = sample.make_clip(1, frames, height, width)
    return [pictures.overlay(image, mask, np.roll(mask, 3, axis=1)) for image, mask in zip(images, masks)]


def test_gif_holds_every_frame_in_its_colours(tmp_path):
    images = overlays(6, 80, 123)
    pictures.write_video(tmp_path / "clip.gif", iter(images), fps=10, kind="gif")
    back = iio.imread(tmp_path / "clip.gif", index=None)
    assert back.shape == (6, 80, 123, 3)
    assert np.abs(back.astype(int) - np.stack(images)).mean() < 8
    assert (back == pictures.OUTLINE).all(axis=-1).any(axis=(1, 2)).sum() == 5  # exact in all frames but the one without the object
    meta = iio.immeta(tmp_path / "clip.gif", index=0)
    assert meta["duration"] == 100 and meta["loop"] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["clip.gif"]


def test_gif_of_a_large_frame_is_shrunk(tmp_path):
    pictures.write_video(tmp_path / "clip.gif", [np.zeros((700, 960, 3), np.uint8)], fps=10, kind="gif")
    assert iio.imread(tmp_path / "clip.gif", index=0).shape[:2] == (350, 480)


def test_palette_holds_few_colours_exactly():
    colours = np.array([[0, 0, 0], [255, 255, 255], [250, 3, 120]], np.uint8)
    palette = pictures.choose_palette(colours.repeat(50, axis=0), 16)
    assert {tuple(colour) for colour in palette} == {tuple(colour) for colour in (*colours, pictures.FILL, pictures.OUTLINE)}


def test_nearest_colour_is_the_nearest():
    rng = np.random.default_rng(0)
    palette = rng.integers(0, 256, (20, 3), np.uint8)
    nearest = pictures.nearest_colour(palette)
    for red, green, blue in rng.integers(0, 32, (50, 3)):
        distance = ((palette.astype(float) - np.array([red, green, blue]) * 8 - 3.5) ** 2).sum(axis=1)
        assert distance[nearest[red, green, blue]] == distance.min()


def test_a_video_that_fails_leaves_nothing(tmp_path):
    def images():
        yield np.zeros((8, 8, 3), np.uint8)
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError):
        pictures.write_video(tmp_path / "clip.gif", images(), 10, "gif")
    assert not list(tmp_path.iterdir())


def test_mp4_without_its_plugin_is_one_clear_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for attempt in (lambda: pictures.check_video("mp4"), lambda: pictures.write_video(tmp_path / "a.mp4", [], 10, "mp4")):
        with pytest.raises(BadInput) as raised:
            attempt()
        message = str(raised.value)
        assert "pip install imageio-ffmpeg" in message and "--video gif" in message and "\n" not in message
    pictures.check_video("gif")
    pictures.check_video("none")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(importlib.util.find_spec("imageio_ffmpeg") is None, reason="imageio-ffmpeg is not installed (it is optional)")
def test_mp4_of_odd_sides(tmp_path):
    import imageio_ffmpeg

    pictures.write_video(tmp_path / "clip.mp4", iter(overlays(6, 81, 123)), fps=10, kind="mp4")
    reader = imageio_ffmpeg.read_frames(str(tmp_path / "clip.mp4"))
    assert next(reader)["size"] == (124, 82)
    assert len(list(reader)) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]


# --- curves ------------------------------------------------------------------------------------


def drawing(rows: list[dict], title: str = "Training") -> ElementTree.Element:
    """Return the parsed SVG: parsing fails on anything that is not well-formed."""
    return ElementTree.fromstring(pictures.curves(rows, title))


def points(svg: ElementTree.Element, kind: str) -> list[tuple[float, float]]:
    (line,) = (line for line in svg.iter(f"{SVG}polyline") if line.get("class") == kind)
    return [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]


def test_curves_places_every_measurement():
    rows = [{"step": 0, "loss": 1.0, "seconds": 0.5}, {"step": 50, "loss": 0.5, "seconds": 10.5, "val_iou": 0.25},
            {"step": 100, "loss": 0.0, "seconds": 20.5, "val_iou": 1.0}]
    svg = drawing(rows)
    (x0, y0), (x1, y1), (x2, y2) = points(svg, "loss")
    assert x0 == pictures.LEFT and x2 == pictures.WIDTH - pictures.RIGHT and x1 == (x0 + x2) / 2
    assert y2 - y0 == pictures.PANEL and y1 == (y0 + y2) / 2  # up is more
    (_, low), (_, high) = points(svg, "iou")
    assert low - high == 0.75 * pictures.PANEL
    words = ["".join(text.itertext()) for text in svg.iter(f"{SVG}text")]
    assert "00.5 s" in words and "10020 s" in words  # each step with the time it was reached at


def test_curves_says_in_words_what_it_draws():
    svg = drawing([{"step": 0, "loss": 0.7}, {"step": 9, "loss": 0.25, "val_iou": 0.5}], "a < b & c")
    assert svg.get("role") == "img"
    assert svg.find(f"{SVG}title").text == "a < b & c"
    described = svg.find(f"{SVG}desc").text
    assert "0.7 at step 0" in described and "0.25 at step 9" in described and "IoU: 0.5 at step 9" in described


@pytest.mark.parametrize("rows", [
    [],
    [{"step": 0, "loss": 0.7}],
    [{"step": 0, "loss": 0.0}, {"step": 1, "loss": 0.0}],
    [{"step": 3, "val_iou": 0.1}],
    [{"step": 0, "loss": -0.5}, {"step": 7, "loss": 1e6}],
])
def test_curves_of_little_or_odd_data_stay_inside_the_drawing(rows):
    svg = drawing(rows)
    height = float(svg.get("height"))
    for kind in ("loss", *(["iou"] if any("val_iou" in row for row in rows) else [])):
        for x, y in points(svg, kind) if any("loss" in row or kind == "iou" for row in rows) else []:
            assert pictures.LEFT <= x <= pictures.WIDTH - pictures.RIGHT and 0 <= y <= height


def test_curves_leave_out_what_is_not_finite():
    rows = [{"step": step, "loss": loss} for step, loss in enumerate([1.0, math.nan, math.inf, 0.5, None])]
    svg = drawing(rows)
    assert len(points(svg, "loss")) == 2 and "nan" not in ElementTree.tostring(svg, "unicode")


@pytest.mark.parametrize("low, high", [(0, 1), (0, 0.73), (0, 101), (0, 3), (0, 1e-6), (0, 12345), (-2, 7), (0, 0)])
def test_ticks_are_round_and_cover_the_range(low, high):
    found = pictures.ticks(low, high)
    steps = np.diff(found)
    assert 3 <= len(found) <= 8 and found[0] == low and found[-1] >= high
    assert np.allclose(steps, steps[0]) and f"{steps[0]:e}"[0] in "125"


@pytest.mark.parametrize("size", [(1, 1), (7, 13), (48, 80)])
def test_grey_pictures_come_back_as_they_were_written(tmp_path, size):
    rng = np.random.default_rng(0)
    for pixels in (rng.integers(0, 256, size, dtype=np.uint8), np.zeros(size, np.uint8), np.full(size, 255, np.uint8)):
        pictures.write_grey(tmp_path / "grey.png", pixels)
        with iio.imopen(tmp_path / "grey.png", "r", plugin="pillow") as file:
            assert file.metadata(exclude_applied=False)["mode"] == "L"
            np.testing.assert_array_equal(file.read(), pixels)
