"""Videos: read frame by frame, whole or not at all, and written, with ffmpeg's status heeded."""
import itertools
import os
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence

from vos.images import PIXELS_LIMIT, image_file, write_image
from vos.inputs import BadInput, opened
from vos.outputs import CannotWrite

VIDEOS = {".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".gif", ".apng"}
SIDE = 480  # pixels of the longest side of a video that is written


def read_video(path: Path) -> Iterator[np.ndarray]:
    """Yield all frames of a video once, uint8 [H, W, 3], turned as it says. Raises BadInput."""
    if path.suffix.lower() in (".gif", ".apng"):
        with image_file(path) as animation, opened(path) as file:
            file.seek(-8, os.SEEK_END)
            if not file.read().endswith((b";", b"IEND\xaeB`\x82")):  # GIF's and PNG's last bytes
                raise BadInput(f"{path}: is cut short; expected a whole video")
            for image in ImageSequence.Iterator(animation):
                yield np.array(image.convert("RGB"))
        return

    # imageio-ffmpeg overlooks ffmpeg's exit status; ffmpeg, unless told, opens lists of other files
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


def write_video(path: Path, images: Iterable[np.ndarray], fps: float, kind: str) -> None:
    """Write images, uint8 [H, W, 3], as a looping "gif" or an "mp4", the first's size for all."""
    pictures = map(Image.fromarray, images)
    first = next(pictures)
    first.thumbnail((SIDE, SIDE))
    rest = (picture.resize(first.size, Image.Resampling.BILINEAR) for picture in pictures)
    if kind == "gif":
        write_image(path, np.asarray(first), format="GIF", save_all=True, append_images=list(rest),
                    duration=1000 / fps, loop=0)
        return

    with tempfile.TemporaryFile() as raw:
        for picture in itertools.chain([first], rest):
            raw.write(picture.tobytes())
        raw.seek(0)
        source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{first.width}x{first.height}",
                  "-r", str(fps), "-i", "pipe:0", "-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2"]  # even
        command = [find_ffmpeg(), "-y", "-v", "error", *source, "-pix_fmt", "yuv420p",
                   "-f", "mp4", f"file:{path}"]
        done = subprocess.run(command, stdin=raw, stderr=subprocess.PIPE)
    if done.returncode:
        said = " ".join(done.stderr.decode("utf-8", "replace").split())[-300:]
        raise CannotWrite(f"{path}: cannot be written ({said})")
