"""Videos: every frame once, the right way up, or a refusal; GIFs that play."""
import os
import subprocess

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image

from vos import clips, images
from vos.inputs import BadInput


@pytest.fixture
def ffmpeg(tmp_path):
    """A function that runs ffmpeg in tmp_path."""
    package = pytest.importorskip("imageio_ffmpeg", reason="needs pip install imageio-ffmpeg")

    def run(*arguments):
        command = [package.get_ffmpeg_exe(), "-y", "-v", "error", *map(str, arguments)]
        subprocess.run(command, check=True, cwd=tmp_path)
    return run


def greys(count: int, size: tuple[int, int] = (48, 64)) -> list[np.ndarray]:
    """Frames uint8 [H, W, 3], each of one grey: 0, 20, 40 ..."""
    return [np.full((*size, 3), 20 * number, np.uint8) for number in range(count)]


def levels(path) -> list[int]:
    """The middle pixel of every frame, in steps of 20."""
    return [round(image[image.shape[0] // 2, image.shape[1] // 2, 0] / 20)
            for image in clips.read_video(path)]


def count(path) -> tuple[int, tuple[int, ...]]:
    """How many frames a video has, and the (H, W) of them all."""
    frames = list(clips.read_video(path))
    assert len({frame.shape for frame in frames}) == 1
    return len(frames), frames[0].shape[:2]


NOISE = ("-f", "lavfi", "-i", "testsrc2=s=128x96:r=10:d=4", "-pix_fmt", "yuv420p")


def test_frames_of_a_variable_rate_come_once_each(tmp_path, ffmpeg):
    iio.imwrite(tmp_path / "even.mp4", greys(6), fps=10)
    ffmpeg("-i", "even.mp4", "-vf", "setpts='N*N/TB/4'", "-fps_mode", "passthrough", "odd.mp4")
    assert levels(tmp_path / "odd.mp4") == list(range(6))


def test_a_portrait_video_stands_upright(tmp_path, ffmpeg):
    image = np.zeros((64, 96, 3), np.uint8)
    image[:, :32] = 255  # the left third of what the sensor saw
    iio.imwrite(tmp_path / "flat.mp4", [image] * 3, fps=10)
    ffmpeg("-display_rotation", 90, "-i", "flat.mp4", "-c", "copy", "tall.mp4")
    frame = next(clips.read_video(tmp_path / "tall.mp4"))
    assert count(tmp_path / "tall.mp4") == (3, (96, 64)) and frame.shape == (96, 64, 3)
    assert frame[80:].min() > 200 and frame[:56].max() < 50  # left is down


@pytest.mark.parametrize("name", [
    "a.mp4", "fast.mp4", "a.mkv", "a.avi", "a.webm", "a.gif", "a.apng"])
def test_half_a_video_is_refused(tmp_path, ffmpeg, name):
    fast = ("-movflags", "+faststart") if name == "fast.mp4" else ()
    ffmpeg(*NOISE[:-2] if name[2:] in ("gif", "apng") else NOISE, *fast, name)
    path = tmp_path / name
    whole = path.read_bytes()
    assert count(path) == (40, (96, 128))
    for share in (0.5, 0.8):
        path.write_bytes(whole[:int(len(whole) * share)])
        with pytest.raises(BadInput, match=name) as caught:
            count(path)
        assert "\n" not in str(caught.value)


def test_a_gif_loops_and_cut_between_two_frames_is_refused(tmp_path):
    images.write_animation(tmp_path / "a.gif", greys(5), 10)
    with Image.open(tmp_path / "a.gif") as file:
        assert (file.info["loop"], file.info["duration"], file.n_frames) == (0, 100, 5)
    whole = (tmp_path / "a.gif").read_bytes()
    (tmp_path / "a.gif").write_bytes(whole[:whole.rindex(b"\x21\xf9\x04")])
    with pytest.raises(BadInput, match=r"a\.gif: is cut short"):
        count(tmp_path / "a.gif")


def test_a_list_of_other_files_opens_none_of_them(tmp_path, ffmpeg):
    ffmpeg(*NOISE, "secret.ts")
    hls = "#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\nsecret.ts\n#EXT-X-ENDLIST\n"
    for text in (hls, "ffconcat version 1.0\nfile secret.ts\n"):
        for name in ("list.mp4", "list.mkv"):
            (tmp_path / name).write_text(text)
            with pytest.raises(BadInput, match=name):
                count(tmp_path / name)
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(BadInput, match="no regular file"):
        count(tmp_path / "pipe.mp4")


def test_frames_too_large_are_refused(tmp_path, ffmpeg, monkeypatch):
    ffmpeg(*NOISE, "a.mp4")
    monkeypatch.setattr(clips, "PIXELS_LIMIT", 128 * 96)
    assert count(tmp_path / "a.mp4")[0] == 40
    monkeypatch.setattr(clips, "PIXELS_LIMIT", 128 * 96 - 1)
    with pytest.raises(BadInput, match=r"a\.mp4.*at most 12,287 pixels"):
        count(tmp_path / "a.mp4")


def test_without_ffmpeg_a_video_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "imageio_ffmpeg", None)
    (tmp_path / "a.mp4").write_bytes(b"\0" * 99)
    with pytest.raises(BadInput, match="pip install imageio-ffmpeg"):
        count(tmp_path / "a.mp4")


def test_what_is_written_reads_back_shrunk_and_of_the_size_of_the_first(tmp_path):
    frames = [*greys(9, (511, 1001)), np.full((30, 30, 3), 180, np.uint8)]
    images.write_animation(tmp_path / "a.gif", frames, 10)
    assert count(tmp_path / "a.gif") == (10, (245, 480))
    assert levels(tmp_path / "a.gif") == list(range(10))
