"""Videos: read frame by frame, whole or not at all; written as a GIF or an MP4.

ffmpeg is run here, since imageio-ffmpeg, which brings it, does not look at its exit status.
"""
import io
import os
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence

from vos.images import PIXELS_LIMIT, image_file
from vos.inputs import BadInput, opened
from vos.outputs import CannotWrite

VIDEOS = {".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".gif", ".apng"}
SIDE = 480  # pixels of the longest side of a video that is written


def read_video(path: Path) -> Iterator[np.ndarray]:
    """Yield the frames of a video as uint8 [H, W, 3], in order, none doubled, turned as it says.

    Raises BadInput naming the file when it is no video, is cut short, or needs a missing ffmpeg.
    """
    if path.suffix.lower() not in (".gif", ".apng"):
        yield from read_with_ffmpeg(path)
        return
    with image_file(path) as animation, opened(path) as file:
        file.seek(-8, os.SEEK_END)
        if not file.read().endswith((b";", b"IEND\xaeB`\x82")):  # GIF's and PNG's last bytes
            raise BadInput(f"{path}: is cut short; expected a whole video")
        for image in ImageSequence.Iterator(animation):
            yield np.array(image.convert("RGB"))


def read_with_ffmpeg(path: Path) -> Iterator[np.ndarray]:
    """As `read_video`. Refuses pipes, which ffmpeg would wait for, and lists of other files."""
    source = ["-protocol_whitelist", "file", "-format_whitelist", "mov,matroska,avi",
              "-max_pixels", str(PIXELS_LIMIT), "-i", f"file:{path}", "-map", "0:V:0"]
    frames = ["-fps_mode", "passthrough", "-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24"]
    command = [find_ffmpeg(str(path)), "-nostdin", "-v", "error", "-xerror", *source, *frames,
               "pipe:1"]
    with opened(path), tempfile.TemporaryFile() as log, subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log) as process:
        assert process.stdout is not None
        try:
            while process.stdout.readline() == b"P6\n":  # a PPM a frame: kind, size, 255, pixels
                width, height = map(int, process.stdout.readline().split())
                process.stdout.readline()
                pixels = process.stdout.read(height * width * 3)
                if len(pixels) == height * width * 3:
                    yield np.frombuffer(pixels, np.uint8).reshape(height, width, 3).copy()
            status = process.wait()
        finally:
            process.kill()
        log.seek(0)
        said = " ".join(log.read().decode("utf-8", "replace").split())[-300:]
    if status or "ended prematurely" in said:
        raise BadInput(f"{path}: cannot be decoded as a whole video ({said}); expected at most "
                       f"{PIXELS_LIMIT:,} pixels a frame; copy it anew, or pass a folder of frames")


def find_ffmpeg(purpose: str = "--video mp4") -> str:
    """Return the path of ffmpeg. Raises BadInput, saying what it is for, where there is none."""
    try:
        import imageio_ffmpeg
        return imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise BadInput(f"{purpose}: expected ffmpeg, found none; run `pip install imageio-ffmpeg`, "
                       "or use a GIF, or a folder of frames") from error


def check_video(kind: str) -> None:
    """Raise BadInput when this machine cannot write videos of `kind`: "gif" or "mp4"."""
    if kind == "mp4":
        find_ffmpeg()


def write_video(path: Path, images: Iterable[np.ndarray], fps: float, kind: str) -> None:
    """Write images, uint8 [H, W, 3], as a looping "gif" or an "mp4" of at most SIDE pixels a side.

    All take the size of the first. Raises CannotWrite when ffmpeg fails, else OSError.
    """
    if kind == "mp4":
        write_mp4(path, same_sized(images), fps)
        return
    first, *rest = same_sized(images)
    memory = io.BytesIO()  # Pillow, given a file, does not notice a disk that takes only a part
    first.save(memory, "GIF", save_all=True, append_images=rest, duration=1000 / fps, loop=0)
    path.write_bytes(memory.getvalue())


def same_sized(images: Iterable[np.ndarray]) -> Iterator[Image.Image]:
    """Yield the images, all of the size of the first, its longest side at most SIDE."""
    size = None
    for image in images:
        picture = Image.fromarray(image)
        if size is None:
            picture.thumbnail((SIDE, SIDE))
            size = picture.size
        yield picture.resize(size, Image.Resampling.BILINEAR)


def write_mp4(path: Path, pictures: Iterable[Image.Image], fps: float) -> None:
    """Write an MP4 by way of a temporary file of raw pixels; an odd side gets a black line more."""
    with tempfile.TemporaryFile() as raw:
        for picture in pictures:
            raw.write(picture.tobytes())
        raw.seek(0)
        source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{picture.width}x{picture.height}",
                  "-r", str(fps), "-i", "pipe:0", "-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2"]
        command = [find_ffmpeg(), "-y", "-v", "error", *source, "-pix_fmt", "yuv420p",
                   "-f", "mp4", f"file:{path}"]
        done = subprocess.run(command, stdin=raw, stderr=subprocess.PIPE)
    if done.returncode:
        said = " ".join(done.stderr.decode("utf-8", "replace").split())[-300:]
        raise CannotWrite(f"{path}: cannot be written ({said})")
