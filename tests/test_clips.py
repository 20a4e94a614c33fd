"""clips.py: every layout of clips, every kind of mask, and what is wrong with a file."""
import itertools
import json
import struct
import threading
import time
import zlib

import imageio.v3 as iio
import numpy as np
import pytest
from helpers import cut, listed, write_davis, write_frames, write_json
from PIL import Image

import clips
from clips import Frame, find_frames
from files import BadInput

# --- finding -----------------------------------------------------------------------------------


def test_davis_2016_lists_name_frames_and_masks_in_their_order(tmp_path):
    root = write_davis(tmp_path / "davis", clips=2, val_clips=1, frames=3)
    file = root / "ImageSets/480p/train.txt"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[::-1]) + "\n\n")  # any order is the list's; an empty line is no frame
    frames = find_frames(root, "train")
    assert [(frame.image, frame.annotation) for frame in frames] == listed(root, "train")
    assert [f"/JPEGImages/480p/{frame.clip}/{frame.name}.jpg" for frame in frames] == [line.split()[0] for line in lines[::-1]]
    assert len(find_frames(root, "val")) == 3


def test_davis_2016_test_set_has_frames_alone(tmp_path):
    root = write_davis(tmp_path / "davis", frames=2)
    file = root / "ImageSets/480p/val.txt"
    file.write_text("".join(line.split()[0] + "\n" for line in file.read_text().splitlines()))
    assert [frame.annotation for frame in find_frames(root, "val")] == [None, None]


def test_davis_2017_lists_name_clips(tmp_path):
    root = tmp_path / "davis"
    for clip in ("cat", "ant"):
        write_frames(root / "JPEGImages/480p" / clip, ["00000.jpg", "00001.jpg"])
    write_frames(root / "Annotations/480p/cat", ["00000.png", "00001.png"])
    write_frames(root / "Annotations/480p/ant", ["00000.png"])  # test-dev: only the first frame is annotated
    (root / "ImageSets/2017").mkdir(parents=True)
    (root / "ImageSets/2017/train.txt").write_text("cat\n")
    (root / "ImageSets/2017/test-dev.txt").write_text("ant\n")
    images, masks = root / "JPEGImages/480p", root / "Annotations/480p"
    assert find_frames(root, "train") == [Frame("cat", f"0000{i}", images / f"cat/0000{i}.jpg", masks / f"cat/0000{i}.png") for i in (0, 1)]
    assert [frame.annotation for frame in find_frames(root, "test-dev")] == [None, None]


def test_where_both_years_name_a_split_2016_counts(tmp_path):
    root = write_davis(tmp_path / "davis", clips=2, frames=2)
    (root / "ImageSets/2017").mkdir()
    (root / "ImageSets/2017/train.txt").write_text(listed(root)[0][0].parent.name + "\n")
    assert len(find_frames(root, "train")) == 4


@pytest.mark.parametrize("split", ["test", None, "../480p/train"])
def test_unknown_split_lists_those_there_are(tmp_path, split):
    root = write_davis(tmp_path / "davis", frames=1)
    with pytest.raises(BadInput, match=r"there are: train, val$"):
        find_frames(root, split)


def write_contest(root, count: int, annotated: bool = True, slash: str = "\\"):
    """Write a contest artifact of `count` frames, its keys in the order of strings, as a data frame saves them."""
    write_frames(root / "raw" / "cat", [f"{i}.jpg" for i in range(count)])
    keys = sorted(map(str, range(count)), reverse=True)
    table = {"raw": {key: f"raw{slash}cat{slash}{key}.jpg" for key in keys}}
    if annotated:
        write_frames(root / "masks" / "cat", [f"{i}.png" for i in range(count)])
        table["annotation"] = {key: f"masks{slash}cat{slash}{key}.png" for key in keys}
    write_json(root / "paths.json", table)
    return root


@pytest.mark.parametrize("slash", ["\\", "/"])
def test_contest_folder_in_the_order_of_integer_keys(tmp_path, slash):
    frames = find_frames(write_contest(tmp_path / "contest", 12, slash=slash))
    assert [frame.name for frame in frames] == [str(i) for i in range(12)]  # not 0, 1, 10, 11, 2
    assert [frame.image for frame in frames] == [tmp_path / f"contest/raw/cat/{i}.jpg" for i in range(12)]
    assert [frame.annotation for frame in frames] == [tmp_path / f"contest/masks/cat/{i}.png" for i in range(12)]
    assert clips.check_frames(frames) == [(32, 40)] * 12


def test_contest_test_set_has_no_annotations(tmp_path):
    frames = find_frames(write_contest(tmp_path / "contest", 2, annotated=False))
    assert [frame.annotation for frame in frames] == [None, None]


@pytest.mark.parametrize("table, words", [
    ({"annotation": {"0": "a.png"}}, "'raw'"),
    ({"raw": {"0": "a.jpg", "2": "b.jpg"}}, "keys 0 to 1"),
    ({"raw": {"0": "a.jpg", "01": "b.jpg"}}, "keys 0 to 1"),
    ({"raw": {"0": 3}}, "other than paths"),
    ({"raw": ["a.jpg"]}, "found something else"),
    (["a.jpg"], "found something else"),
    ({"raw": {"0": "a.jpg", "1": "b.jpg"}, "annotation": {"0": "a.png"}}, "2 frames but 1 annotations"),
    ({"raw": {}}, "no frames"),
])
def test_contest_table_that_is_none_is_refused(tmp_path, table, words):
    write_json(tmp_path / "paths.json", table)
    with pytest.raises(BadInput, match=words) as caught:
        find_frames(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("path", ["../secret.jpg", "a/../../secret.jpg", "..\\secret.jpg", "/etc/passwd", "\\etc\\passwd", "C:\\secret.jpg",
                                  "C:secret.jpg", "", "a\0b.jpg"])
@pytest.mark.parametrize("column", ["raw", "annotation"])
def test_contest_paths_stay_in_their_folder(tmp_path, path, column):
    write_json(tmp_path / "paths.json", {"raw": {"0": "a.jpg"}, "annotation": {"0": "a.png"}, column: {"0": path}})
    with pytest.raises(BadInput, match="leaves its folder"):
        find_frames(tmp_path)


def test_davis_lists_stay_in_their_folder(tmp_path):
    root = write_davis(tmp_path / "davis", frames=1)
    for line in ("/../x.jpg /../x.png", "../../etc"):
        (root / "ImageSets/480p/train.txt").write_text(line)
        with pytest.raises(BadInput, match=r"train\.txt"):
            find_frames(root, "train")


def test_folder_of_clip_folders_in_natural_order(tmp_path):
    for clip in ("clip10", "clip2"):
        write_frames(tmp_path / clip, ["f10.png", "f9.png", "F1.PNG"])
    (tmp_path / "clip2" / "._f1.png").write_bytes(b"what a Mac leaves")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no frame")
    frames = find_frames(tmp_path)
    assert [(frame.clip, frame.name) for frame in frames] == [
        (clip, name) for clip in ("clip2", "clip10") for name in ("F1", "f9", "f10")]
    assert all(frame.annotation is None and frame.number is None for frame in frames)


def test_folder_of_frames_in_natural_order(tmp_path):
    write_frames(tmp_path / "walk", [f"frame{i}.jpg" for i in (10, 2, 1, 100)])
    frames = find_frames(tmp_path / "walk")
    assert [(frame.clip, frame.name) for frame in frames] == [("walk", f"frame{i}") for i in (1, 2, 10, 100)]


def test_folder_without_frames_is_refused(tmp_path):
    with pytest.raises(BadInput, match="holds no frames"):
        find_frames(tmp_path)
    with pytest.raises(BadInput, match="no such folder or video"):
        find_frames(tmp_path / "missing")
    (tmp_path / "notes.txt").write_text("no video")
    with pytest.raises(BadInput, match=r"notes\.txt: expected a folder or a video"):
        find_frames(tmp_path / "notes.txt")


def greys(count: int, step: int = 20, size: tuple[int, int] = (48, 64)) -> np.ndarray:
    """Frames [N, H, W, 3] of one grey each."""
    return np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None] * step, (count, *size, 3)).copy()


def check_video(file, count: int, tolerance: int) -> None:
    frames = find_frames(file)
    assert [(frame.clip, frame.name, frame.number, frame.annotation) for frame in frames] == [
        (file.stem, f"{i:05d}", i, None) for i in range(count)]
    assert clips.check_frames(frames) == [(48, 64)] * count
    read = np.stack(list(clips.read_images(frames)))
    assert read.dtype == np.uint8 and np.abs(read.astype(int) - greys(count)).max() <= tolerance
    for wanted in ([3, 4], [0, 2, 3, 9]):  # a later start, and gaps
        some = [image[0, 0, 0] for image in clips.read_images([frames[i] for i in wanted])]
        assert np.abs(np.array(some, int) - 20 * np.array(wanted)).max() <= tolerance


def test_gif_video(tmp_path):
    iio.imwrite(tmp_path / "walk.gif", greys(10))
    check_video(tmp_path / "walk.gif", 10, tolerance=0)


def test_mp4_video(tmp_path):
    pytest.importorskip("imageio_ffmpeg", reason="imageio-ffmpeg, which reads mp4, is not installed")
    iio.imwrite(tmp_path / "walk.mp4", greys(10), plugin="FFMPEG", fps=10, macro_block_size=16, output_params=["-crf", "1"])
    check_video(tmp_path / "walk.mp4", 10, tolerance=4)


def test_video_that_is_none_is_refused(tmp_path):
    (tmp_path / "walk.gif").write_bytes(b"GIF89a and then nothing")
    with pytest.raises(BadInput, match=r"walk\.gif: cannot be decoded"):
        find_frames(tmp_path / "walk.gif")


# --- masks -------------------------------------------------------------------------------------

OBJECT = np.zeros((5, 11), bool)
OBJECT[1:4, 2:9] = True
GREY = OBJECT.astype(np.uint8)


def palette(indices: np.ndarray, colours: list[int]) -> Image.Image:
    image = Image.frombytes("P", indices.shape[::-1], indices.tobytes())
    image.putpalette(colours)
    return image


def with_alpha(pixels: np.ndarray, alpha: int) -> np.ndarray:
    return np.concatenate([pixels if pixels.ndim == 3 else pixels[..., None], np.full((*pixels.shape[:2], 1), alpha, np.uint8)], axis=2)


red = np.zeros((*OBJECT.shape, 3), np.uint8)
red[OBJECT] = (200, 0, 0)
TWO = GREY.copy()
TWO[2, 3:5] = 2  # a second object of the same clip
FADED = np.where(OBJECT, 128, 127).astype(np.uint8)  # a smoothed edge: 127 is background, 128 foreground
MASKS = {
    "L 0/255": Image.fromarray(GREY * 255),
    "L 0/1": Image.fromarray(GREY),
    "L 127/128": Image.fromarray(FADED),
    "LA 0/255": Image.fromarray(with_alpha(GREY * 255, 255), "LA"),
    "LA 0/1": Image.fromarray(with_alpha(GREY, 255), "LA"),
    "LA transparent": Image.fromarray(with_alpha(GREY * 255, 0), "LA"),
    "RGB 0/255": Image.fromarray(np.repeat(GREY[..., None] * 255, 3, axis=2)),
    "RGB 0/1": Image.fromarray(np.repeat(GREY[..., None], 3, axis=2)),
    "RGB red": Image.fromarray(red),
    "RGBA 0/255": Image.fromarray(with_alpha(np.repeat(GREY[..., None] * 255, 3, axis=2), 255)),
    "RGBA red": Image.fromarray(with_alpha(red, 255)),
    "1-bit": Image.fromarray(OBJECT),
    "P dark red": palette(GREY, [0, 0, 0, 100, 0, 0]),  # DAVIS 2017's first colour is (128, 0, 0): below 128 once grey
    "P two objects": palette(TWO, [0, 0, 0, 128, 0, 0, 0, 128, 0]),
    "P bright background": palette(GREY, [255, 255, 255, 10, 10, 10]),
    "P index 255": palette(GREY * 255, [0, 0, 0] * 255 + [255, 255, 255]),
}


@pytest.mark.parametrize("kind", MASKS)
def test_every_kind_of_mask(tmp_path, kind):
    MASKS[kind].save(tmp_path / "mask.png")
    mask = clips.read_mask(tmp_path / "mask.png")
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, OBJECT)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "1"])
def test_empty_mask_of_every_kind(tmp_path, mode):
    Image.new("L", (7, 5)).convert(mode).save(tmp_path / "mask.png")
    mask = clips.read_mask(tmp_path / "mask.png")
    assert mask.shape == (5, 7) and mask.dtype == bool and not mask.any()


def test_16_bit_mask_is_refused(tmp_path):
    Image.fromarray(np.full((4, 4), 65535, np.uint16)).save(tmp_path / "mask.png")
    with pytest.raises(BadInput, match=r"mask\.png: expected an 8-bit mask"):
        clips.read_mask(tmp_path / "mask.png")


def test_packed_masks_are_resized_to_the_nearest_pixel(tmp_path):
    rng = np.random.default_rng(0)
    masks = [rng.random(size) < 0.5 for size in ((20, 30), (10, 15), (33, 21))]
    frames = []
    for number, mask in enumerate(masks):
        Image.fromarray(mask).save(tmp_path / f"{number}.png")
        frames.append(Frame("cat", str(number), tmp_path / f"{number}.jpg", tmp_path / f"{number}.png"))
    packed = list(clips.read_packed_masks(frames, (20, 30)))
    for mask, bits in zip(masks, packed):
        assert bits.dtype == np.uint8 and bits.shape == (20, 4)
        height, width = mask.shape
        nearest = [[mask[int((y + 0.5) * height / 20), int((x + 0.5) * width / 30)] for x in range(30)] for y in range(20)]
        np.testing.assert_array_equal(np.unpackbits(bits, axis=1, count=30).astype(bool), nearest)


# --- what is wrong with a file -----------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("share", [0, 0.3, 0.97])
def test_truncated_image_is_named(tmp_path, suffix, share):
    file = tmp_path / f"frame{suffix}"
    iio.imwrite(file, np.random.default_rng(0).integers(0, 255, (64, 80, 3), dtype=np.uint8))
    assert clips.check_frames([Frame("cat", "frame", file, None)]) == [(64, 80)]
    cut(file, share)
    with pytest.raises(BadInput, match=rf"frame\{suffix}: cannot be decoded"):
        clips.check_frames([Frame("cat", "frame", file, None)])
    with pytest.raises(BadInput, match=rf"frame\{suffix}: cannot be decoded"):
        clips.read_image(file)


def test_bytes_behind_the_end_of_an_image_do_no_harm(tmp_path):
    file = tmp_path / "frame.jpg"
    iio.imwrite(file, np.zeros((16, 16, 3), np.uint8))
    file.write_bytes(file.read_bytes() + bytes(200))
    assert clips.check_frames([Frame("cat", "frame", file, None)]) == [(16, 16)]


def test_decompression_bomb_is_refused_before_it_goes_off(tmp_path):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    data = zlib.compress(bytes(1_000_000))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))
    for read in (clips.read_image, clips.read_mask, clips.image_size):
        with pytest.raises(BadInput, match=r"bomb\.png"):
            read(tmp_path / "bomb.png")


def test_check_finds_what_does_not_fit_together(tmp_path):
    root = write_davis(tmp_path / "davis", clips=2, frames=2)
    frames = find_frames(root, "train")
    assert clips.check_frames(frames) == [(96, 128)] * 4
    with pytest.raises(BadInput, match=f"{frames[1].image}: has no annotation, though 3 other frames have"):
        clips.check_frames([frames[0], frames[1]._replace(annotation=None), *frames[2:]])
    iio.imwrite(frames[3].annotation, np.zeros((96, 127), np.uint8))
    with pytest.raises(BadInput, match=f"{frames[3].annotation}: is 127 x 96 but its frame .* is 128 x 96"):
        clips.check_frames(frames)
    frames[3].annotation.unlink()
    with pytest.raises(BadInput, match=f"{frames[3].annotation}: no such file; it is the annotation of {frames[3].image}"):
        clips.check_frames(frames)


def test_frames_of_other_sizes_are_no_error(tmp_path):
    small, large = write_frames(tmp_path / "a", ["0.png"], (32, 40))[0], write_frames(tmp_path / "b", ["0.png"], (50, 33))[0]
    assert clips.check_frames([Frame("a", "0", small, small), Frame("b", "0", large, large)]) == [(32, 40), (50, 33)]


# --- all frames at once ------------------------------------------------------------------------


def test_threads_keep_the_order_and_run_no_further_than_asked():
    started, lock = [], threading.Lock()

    def work(item: int) -> int:
        with lock:
            started.append(item)
        time.sleep(0.002 * (item % 3))
        return item * item

    results = clips.in_threads(work, itertools.count(), threads=3, ahead=5)
    assert [next(results) for _ in range(20)] == [i * i for i in range(20)]
    results.close()
    assert max(started) < 20 + 5


def test_an_error_in_a_thread_reaches_the_reader(tmp_path):
    files = write_frames(tmp_path, [f"{i}.png" for i in range(8)])
    cut(files[5])
    images = clips.read_images([Frame("cat", file.stem, file, None) for file in files], threads=2, ahead=3)
    assert [next(images)[0, 0, 0] for _ in range(5)] == [0, 10, 20, 30, 40]
    with pytest.raises(BadInput, match=r"5\.png"):
        next(images)


def test_missing_frame_is_black_in_a_picture(tmp_path):
    file, = write_frames(tmp_path, ["0.png"])
    iio.imwrite(file, np.full((32, 40, 3), 7, np.uint8))
    assert (clips.read_image_or_black(Frame("cat", "0", file, None), (32, 40)) == 7).all()
    for frame, size in ((Frame("cat", "0", file, None), (16, 20)), (Frame("cat", "0", tmp_path / "gone.png", None), (16, 20))):
        black = clips.read_image_or_black(frame, size)
        assert black.shape == (16, 20, 3) and not black.any()


def test_paths_json_reads_back_what_was_written(tmp_path):
    (tmp_path / "paths.json").write_text(json.dumps({"raw": {str(i): f"{i}.jpg" for i in reversed(range(30))}}))
    assert clips.read_paths(tmp_path / "paths.json") == {"raw": [f"{i}.jpg" for i in range(30)]}
