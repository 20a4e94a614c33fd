"""clips.py: every layout of clips, what does not fit together, frames and masks in their order."""
import argparse
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vos import clips, images
from vos.clips import Frame, decide_meaning, find_frames
from vos.inputs import BadInput


def write(path: Path, level: int = 0, size: tuple[int, int] = (32, 40)) -> Path:
    """Write a grey image file of one level."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), level, np.uint8)).save(path)
    return path


def names(frames) -> list[str]:
    return [f"{frame.clip}/{frame.name}" for frame in frames]


@pytest.fixture
def davis(tmp_path):
    """A DAVIS root of two clips of two frames, listed in both years' ways."""
    lines = []
    for clip, number in itertools.product(("cat", "ant"), (1, 0)):
        write(tmp_path / f"JPEGImages/480p/{clip}/0000{number}.jpg")
        write(tmp_path / f"Annotations/480p/{clip}/0000{number}.png")
        place = f"480p/{clip}/0000{number}"
        lines.append(f"/JPEGImages/{place}.jpg /Annotations/{place}.png")
    for name, text in (("480p/train", "\n".join(lines) + "\n\n"), ("2017/train", "ant\n"),
                       ("2017/new", "cat\n"), ("480p/bare", lines[0].split()[0])):
        (tmp_path / f"ImageSets/{name}.txt").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"ImageSets/{name}.txt").write_text(text)
    return tmp_path


def test_davis_lists_of_both_years(davis):
    frames = find_frames(davis, "train")  # both years name it: 2016's counts, in its order
    assert names(frames) == ["cat/00001", "cat/00000", "ant/00001", "ant/00000"]
    assert frames[2].annotation == davis / "Annotations/480p/ant/00001.png"
    assert names(find_frames(davis, "new")) == ["cat/00000", "cat/00001"]
    assert find_frames(davis, "new")[1].annotation == davis / "Annotations/480p/cat/00001.png"
    assert find_frames(davis, "bare")[0].annotation is None
    (davis / "Annotations/480p/cat/00001.png").unlink()  # test-dev: the first frame's mask alone
    assert [frame.annotation for frame in find_frames(davis, "new")] == [None, None]


def test_what_is_no_split_and_lists_of_something_else_are_refused(davis):
    for split in ("test", None, "../480p/train"):
        with pytest.raises(BadInput, match=r"there are: bare, new, train$"):
            find_frames(davis, split)
    (davis / "JPEGImages/480p/dog").mkdir()
    for line in ("/../x.jpg /../x.png", "../../etc", "/a b/0.jpg /c", "", "ant\ndog"):
        (davis / "ImageSets/480p/train.txt").write_text(line)
        with pytest.raises(BadInput):
            find_frames(davis, "train")


def contest(root: Path, raw, annotation=None) -> Path:
    table = {"raw": raw} if annotation is None else {"raw": raw, "annotation": annotation}
    root.mkdir(exist_ok=True)
    (root / "paths.json").write_text(json.dumps(table))
    return root


def test_contest_folder_in_the_order_of_integer_keys(tmp_path):
    keys = sorted(map(str, range(12)), reverse=True)  # as a data frame saves them
    raw = {key: f"raw\\cat\\{key}.jpg" for key in keys}
    masks = {key: f"masks/cat/{key}.png" for key in keys}
    frames = find_frames(contest(tmp_path, raw, masks))
    for i, frame in enumerate(frames):
        paths = tmp_path / f"raw/cat/{i}.jpg", tmp_path / f"masks/cat/{i}.png"
        assert frame == Frame("cat", str(i), *paths)
    assert find_frames(contest(tmp_path, raw))[0] == Frame("cat", "0", tmp_path / "raw/cat/0.jpg")


@pytest.mark.parametrize("raw, annotation, words", [
    ({"0": "a/0.jpg", "1": "a/1.jpg"}, {"0": "a.png"}, r"2 frames \(raw\) but 1 annotations"),
    ({}, None, "0 frames"),
    ({"0": "../a.jpg"}, None, "no path in its folder"),
    ({"0": "a.jpg"}, {"0": "C:a.jpg"}, "no path in its folder"),
    ({"0": "a/0.jpg", "1": "a/0.jpg"}, None, "2 times"),
    ({"0": "a/x/0.jpg", "1": "b/x/0.jpg"}, None, "clip 'x', frame '0', 2 times"),
])
def test_contest_tables_that_do_not_add_up_are_refused(tmp_path, raw, annotation, words):
    with pytest.raises(BadInput, match=words) as caught:
        find_frames(contest(tmp_path, raw, annotation))
    assert str(tmp_path) in str(caught.value)


def test_folders_of_frames_in_natural_order(tmp_path, monkeypatch):
    for clip, name in itertools.product(("clip10", "clip2"), ("f10.png", "f9.png", "F1.PNG")):
        write(tmp_path / clip / name)
    (tmp_path / "clip2/._f1.png").write_bytes(b"what a Mac leaves")
    (tmp_path / "notes.txt").write_text("no frame")
    expected = [f"{clip}/{name}" for clip in ("clip2", "clip10") for name in ("F1", "f9", "f10")]
    assert names(find_frames(tmp_path)) == expected
    monkeypatch.chdir(tmp_path / "clip2")
    assert names(find_frames(Path("."))) == expected[:3]


@pytest.mark.parametrize("name", ["a:b", "a\\b", "\udcff", "x" * 201])
def test_names_that_cannot_name_results_are_refused(tmp_path, name):
    write(tmp_path / f"good/{name}.png")
    with pytest.raises(BadInput, match="expected names"):
        find_frames(tmp_path / "good")


def test_what_holds_no_frames_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no video")
    for data, words in ((tmp_path, "holds no frames"), (tmp_path / "gone", "expected a DAVIS root"),
                        (tmp_path / "notes.txt", "or a video")):
        with pytest.raises(BadInput, match=words):
            find_frames(data)


def test_masks_are_paired_by_clip_and_frame(tmp_path):
    for clip, number in itertools.product("ab", "01"):
        write(tmp_path / f"frames/{clip}/{number}.jpg")
    mask = write(tmp_path / "masks/b/1.png")
    frames = find_frames(tmp_path / "frames", masks=tmp_path / "masks")
    assert [frame.annotation for frame in frames] == [None, None, None, mask]
    one = find_frames(tmp_path / "frames/b", masks=tmp_path / "masks/b")  # one clip needs no folder
    assert [frame.annotation for frame in one] == [None, mask]
    for stray, words in (("b/7.png", r"7\.png: fits no frame; .*a/0\.png"),
                         ("b/1.bmp", "masks: clip 'b', frame '1', 2 times")):
        file = write(tmp_path / "masks" / stray)
        with pytest.raises(BadInput, match=words):
            find_frames(tmp_path / "frames", masks=tmp_path / "masks")
        file.unlink()
    images.write_animation(tmp_path / "b.gif", [np.zeros((32, 40, 3), np.uint8)] * 2, 10)
    with pytest.raises(BadInput, match=r"b\.gif: expected a folder"):
        find_frames(tmp_path / "frames/b", masks=tmp_path / "b.gif")
    mask.unlink()
    for folder in ("masks", "gone"):
        with pytest.raises(BadInput, match=folder):
            find_frames(tmp_path / "frames", masks=tmp_path / folder)


def test_check_finds_what_does_not_fit_together(davis):
    frames = find_frames(davis, "train")
    frames[0] = frames[0]._replace(annotation=None)  # some frames may be unlabelled
    write(frames[1].image, size=(20, 30))  # and of another size
    write(frames[1].annotation, size=(20, 30))
    assert clips.check_frames(frames) == [(32, 40), (20, 30), (32, 40), (32, 40)]
    write(frames[3].annotation, size=(32, 39))
    words = f"{frames[3].annotation}: is 39 x 32 but its frame {frames[3].image} is 40 x 32"
    with pytest.raises(BadInput, match=words):
        clips.check_frames(frames)
    frames[3].annotation.unlink()
    with pytest.raises(BadInput, match=f"{frames[3].annotation}: no such file"):
        clips.check_frames(frames)


def test_a_mask_has_the_size_of_its_frame_as_shown(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 32)).save(tmp_path / "0.jpg", exif=exif)
    Image.new("L", (32, 40)).save(tmp_path / "0.png", exif=exif)  # masks are not turned
    frame = Frame("a", "0", tmp_path / "0.jpg", tmp_path / "0.png")
    assert clips.check_frames([frame]) == [(40, 32)]


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("share", [0, 0.3, 0.97])
def test_cut_file_is_named_before_long_work(tmp_path, suffix, share):
    file = tmp_path / f"0{suffix}"
    images.write_image(file, np.random.default_rng(0).integers(0, 255, (64, 80), dtype=np.uint8))
    whole = file.read_bytes()
    file.write_bytes(whole + bytes(200))  # bytes behind the end do no harm
    other = write(tmp_path / "1.png", 0, (64, 80))
    assert clips.check_frames([Frame("a", "0", file, other)]) == [(64, 80)]
    file.write_bytes(whole[:int(len(whole) * share)])
    for frame in (Frame("a", "0", file), Frame("a", "0", other, file)):
        with pytest.raises(BadInput, match=rf"0\{suffix}: cannot be decoded"):
            clips.check_frames([frame])


def test_a_video_is_read_forwards_with_gaps_views_and_masks(tmp_path):
    greys = [np.full((48, 64, 3), 20 * number, np.uint8) for number in range(10)]
    images.write_animation(tmp_path / "walk.gif", greys, 10)
    mask = write(tmp_path / "masks/00003.png", 255, (48, 64))
    frames = find_frames(tmp_path / "walk.gif", masks=tmp_path / "masks")
    assert names(frames) == [f"walk/{number:05d}" for number in range(10)]
    assert [frame.annotation for frame in frames] == [None] * 3 + [mask] + [None] * 6
    assert clips.check_frames(frames) == [(48, 64)] * 10
    wanted = [frames[i] for i in (3, 4, 9)] + [frames[i]._replace(view="zoom2") for i in (0, 0, 2)]
    read = list(clips.read_images(wanted))
    assert [image[0, 0, 0] // 20 for image in read] == [3, 4, 9, 0, 0, 2]
    assert [image.shape[:2] for image in read] == [(48, 64)] * 3 + [(24, 32)] * 3
    packed = list(clips.read_packed_masks(frames, decide_meaning([mask]), (48, 64)))
    assert [bits.any() for bits in packed] == [frame.annotation is not None for frame in frames]
    with pytest.raises(BadInput, match=r"walk\.gif: is shorter.* frame 10"):
        list(clips.read_images([frames[0]._replace(number=10)]))


def test_views_show_the_middle_or_the_frame_amid_its_reflections():
    frame = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    assert clips.show(frame, "") is frame
    np.testing.assert_array_equal(clips.show(frame, "zoom2"), frame[1:4, 2:6])
    assert clips.show(frame[:1, :1], "zoom2").shape == (1, 1, 3)
    for zoom, rows, columns in (("zoom0.5", (3, 3), (5, 4)), ("zoom0.25", (9, 9), (14, 13))):
        padded = np.pad(frame, [rows, columns, (0, 0)], mode="symmetric")
        np.testing.assert_array_equal(clips.show(frame, zoom), padded)


def test_a_frame_is_shrunk_to_means_and_a_mask_to_some_of_its_pixels():
    stripes = np.tile(np.array([0, 255], np.uint8), (64, 60))
    frame = clips.resize(np.dstack([stripes] * 3), (32, 60))
    assert frame.shape == (32, 60, 3) and np.abs(frame[:, 1:-1].astype(int) - 127).max() <= 1
    mask = clips.resize(stripes > 0, (32, 60))
    assert mask.shape == (32, 60) and mask.dtype == bool and len(np.unique(mask)) == 1


@pytest.mark.parametrize("text", ["", "zoom2,", "zoom", "zoom0.2", "zoom5", "zoom-2", "flip"])
def test_other_views_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected zoom"):
        clips.parse_views(text)
    assert clips.parse_views("zoom0.7,zoom1.5") == ["zoom0.7", "zoom1.5"]
