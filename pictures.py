"""Pictures of masks: overlays, contact sheets, videos, and the curves of a training run. No scores are computed here.

Everything takes and returns NumPy arrays; words are left to HTML and SVG, so no font is needed.

The colours are blue and orange of Okabe and Ito's palette. They differ in lightness as well as in
hue and keep apart for readers with any of the common colour-vision deficiencies, unlike red and green.
"""
import base64
import html
import importlib.util
import math
import struct
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import imageio.v3 as iio
import numpy as np

from files import BadInput, whole_file, write_text

FILL = np.array([0, 114, 178], np.uint8)  # the prediction: Okabe-Ito blue, #0072B2
OUTLINE = np.array([230, 159, 0], np.uint8)  # the truth: Okabe-Ito orange, #E69F00
OPACITY = 0.6
VIDEO_KINDS = ("gif", "mp4", "none")
VIDEO_SIDE = 480  # pixels, the longest side
GIF_COLOURS = 128  # for a whole video: a third less to store than 256, and hard to tell apart


# --- overlays and sheets -----------------------------------------------------------------------


def overlay(frame: np.ndarray, prediction: np.ndarray | None = None, mask: np.ndarray | None = None) -> np.ndarray:
    """Return `frame` with the prediction filled translucent blue and the truth outlined orange.

    frame: [H, W, 3] uint8. prediction, mask: [H, W] bool, or None to leave it out. Returns uint8 [H, W, 3], a copy.
    The outline lies inside the mask and stays visible when the picture is shown a few hundred pixels wide.
    Raises ValueError when the shapes disagree.
    """
    height, width = frame.shape[:2]
    for name, array in (("prediction", prediction), ("mask", mask)):
        if array is not None and array.shape != (height, width):
            raise ValueError(f"{name}: expected shape {(height, width)} like the frame, found {array.shape}")
    picture, thickness = frame.copy(), max(1, round(min(height, width) / 120))
    if prediction is not None:
        picture[prediction] = np.round((1 - OPACITY) * frame[prediction] + OPACITY * FILL)
        picture[prediction & ~erode(prediction, max(1, thickness // 2))] = FILL  # an edge, to stand out on sky and water
    if mask is not None:
        inner = erode(mask, thickness)
        picture[inner & ~erode(inner, max(1, thickness // 2))] = 0  # a dark edge, to stand out on bright frames
        picture[mask & ~inner] = OUTLINE
    return picture


def erode(mask: np.ndarray, pixels: int) -> np.ndarray:
    """Return `mask` [H, W] bool less what is within `pixels` steps (up, down, left, right) of its outside.

    What lies beyond the frame counts as inside, so that a mask cut by the frame has no edge there.
    """
    for _ in range(pixels):
        padded = np.pad(mask, 1, constant_values=True)
        mask = mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask


def shrink(image: np.ndarray, longest: int) -> np.ndarray:
    """Return `image` [H, W, 3] uint8 with its longest side at most `longest` pixels, by averaging areas."""
    height, width = image.shape[:2]
    scale = longest / max(height, width)
    if scale >= 1:
        return image
    rows = average(image, max(1, round(height * scale)), axis=0)
    return np.round(average(rows, max(1, round(width * scale)), axis=1)).astype(np.uint8)


def average(image: np.ndarray, new: int, axis: int) -> np.ndarray:
    """Return `image` with `new` pixels along `axis`, float64, each the mean of what it covers of the old ones.

    Running sums, read between pixels too, rather than a matrix product: that would wake every BLAS thread for each frame.
    """
    old = image.shape[axis]
    image = np.moveaxis(image, axis, 0).astype(np.float64)
    sums = np.concatenate([np.zeros_like(image[:1]), np.cumsum(image, axis=0)])  # [old + 1, ...]
    edges = np.linspace(0, old, new + 1)
    whole = np.minimum(edges.astype(int), old - 1)
    part = (edges - whole).reshape(-1, *[1] * (image.ndim - 1))
    return np.moveaxis(np.diff(sums[whole] + part * image[whole], axis=0) * (new / old), 0, axis)


def contact_sheet(images: Sequence[np.ndarray], columns: int, gap: int = 4) -> np.ndarray:
    """Return one picture of `images` (uint8 [H, W, 3] each, sizes may differ) in rows of `columns`, `gap` dark pixels apart.

    Each cell is as large as the largest image; a smaller one sits at its top left.
    """
    if not images:
        raise ValueError("a contact sheet of no images")
    columns = min(columns, len(images))
    height, width = (max(image.shape[axis] for image in images) + gap for axis in (0, 1))
    sheet = np.full((-(-len(images) // columns) * height + gap, columns * width + gap, 3), 24, np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * height + gap, index % columns * width + gap
        sheet[top:top + image.shape[0], left:left + image.shape[1]] = image
    return sheet


def jpeg_uri(image: np.ndarray, quality: int = 80) -> str:
    """Return `image` [H, W, 3] uint8 as a data URI of a JPEG."""
    data = iio.imwrite("<bytes>", image, extension=".jpg", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(data).decode("ascii")


def write_grey(path: Path, pixels: np.ndarray) -> None:
    """Write uint8 [H, W] as an 8-bit grey PNG (mode L).

    Each row is stored as its difference from the one above (filter "up"), and runs are packed: masks are nearly flat.
    Less than half imageio's time a frame. Source: the PNG specification, ISO/IEC 15948.
    """
    height, width = pixels.shape
    rows = np.empty((height, 1 + width), np.uint8)
    rows[:, 0] = 2  # the filter of each row
    rows[0, 1:] = pixels[0]
    np.subtract(pixels[1:], pixels[:-1], out=rows[1:, 1:])  # modulo 256, as the filter wants
    packer = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_RLE)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", packer.compress(rows.tobytes()) + packer.flush()), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks))


# --- videos ------------------------------------------------------------------------------------


def check_video(kind: str) -> None:
    """Raise BadInput when this machine cannot write videos of `kind`, one of VIDEO_KINDS. Call it before long work."""
    if kind == "mp4" and importlib.util.find_spec("imageio_ffmpeg") is None:
        raise BadInput("--video mp4: imageio's ffmpeg plugin is not installed; pip install imageio-ffmpeg, or pass --video gif")


def write_video(path: Path, images: Iterable[np.ndarray], fps: float, kind: str) -> None:
    """Write `images` (uint8 [H, W, 3], all of one size) to `path` as a looping GIF or an MP4, whole or not at all.

    Frames are shrunk to VIDEO_SIDE. A GIF is put together in memory (0.4 MB a frame); an MP4 is written as it comes.
    """
    check_video(kind)
    small = (shrink(image, VIDEO_SIDE) for image in images)
    with whole_file(path) as temporary:
        if kind == "gif":
            write_gif(temporary, list(small), fps)
        elif kind == "mp4":
            write_mp4(temporary, small, fps)
        else:
            raise ValueError(f"a video of kind {kind!r}: expected gif or mp4")


def write_gif(path: Path, images: Sequence[np.ndarray], fps: float) -> None:
    """Write `images` (uint8 [H, W, 3], all of one size) to `path` as a looping GIF of GIF_COLOURS colours.

    One palette for all frames, found once, takes a tenth of the time that Pillow takes to find one for each.
    """
    pixels = np.concatenate([image.reshape(-1, 3) for image in images])
    palette = choose_palette(pixels[::max(1, len(pixels) // 20_000)], GIF_COLOURS)
    nearest = nearest_colour(palette)
    indices = [nearest[tuple(np.moveaxis(image >> 3, -1, 0))] for image in images]
    data = iio.imwrite("<bytes>", indices, extension=".gif", plugin="pillow", mode="P", palette=palette.tobytes(),
                       duration=1000 / fps, loop=0)
    path.write_bytes(data)  # as clips.write_image does, and why


def choose_palette(pixels: np.ndarray, count: int) -> np.ndarray:
    """Return [at most count, 3] uint8: the overlay's two colours, then what stands for `pixels` [K, 3] uint8.

    The pixels are cut in two again and again, the set of the largest spread first, at its mean; each set gives its mean colour.
    """
    boxes = [pixels.astype(np.float64)]
    spreads = [boxes[0].var(axis=0) * len(pixels)]  # each box's spread along red, green and blue
    while len(boxes) < count - 2:
        widest = int(np.max(spreads, axis=1).argmax())
        if not spreads[widest].any():  # fewer colours than asked for: every box holds one
            break
        box, axis = boxes.pop(widest), spreads.pop(widest).argmax()
        above = box[:, axis] > box[:, axis].mean()
        for half in (box[above], box[~above]):
            boxes.append(half)
            spreads.append(half.var(axis=0) * len(half))
    return np.stack([FILL, OUTLINE, *(np.round(box.mean(axis=0)).astype(np.uint8) for box in boxes)])


def nearest_colour(palette: np.ndarray) -> np.ndarray:
    """Return uint8 [32, 32, 32]: the index in `palette` [K, 3] uint8 of the colour nearest to each RGB of 5 bits a channel."""
    levels = np.arange(32, dtype=np.float32) * 8 + 3.5
    best, nearest = np.full((32, 32, 32), np.inf, np.float32), np.zeros((32, 32, 32), np.uint8)
    for index, (red, green, blue) in enumerate(palette.astype(np.float32)):
        distance = (levels - red)[:, None, None] ** 2 + (levels - green)[:, None] ** 2 + (levels - blue) ** 2
        closer = distance < best
        best[closer], nearest[closer] = distance[closer], index
    return nearest


def write_mp4(path: Path, images: Iterable[np.ndarray], fps: float) -> None:
    """Write `images` (uint8 [H, W, 3], all of one size) to `path` as an MP4, one by one. Needs imageio-ffmpeg."""
    import imageio_ffmpeg

    writer = None
    for image in images:
        image = even_sided(image)
        if writer is None:  # the container is named, since the name of a temporary file does not tell it
            writer = imageio_ffmpeg.write_frames(str(path), image.shape[1::-1], fps=fps, macro_block_size=1, output_params=["-f", "mp4"])
            writer.send(None)
        writer.send(np.ascontiguousarray(image))
    if writer is not None:
        writer.close()


def even_sided(image: np.ndarray) -> np.ndarray:
    """Return `image` [H, W, 3] with its last row or column repeated where a side is odd: H.264 wants even sides."""
    height, width = image.shape[:2]
    return np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


# --- curves of a run ---------------------------------------------------------------------------


WIDTH, LEFT, RIGHT, PANEL = 720, 70, 20, 200  # of the drawing, in SVG units, which are pixels at full size
CURVES_STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #222 }
  .title { font-weight: 600 } .grid { stroke: #ddd } .axis { stroke: #777 } svg { background: #fff }
  .loss { stroke: #0072B2; fill: #0072B2 } .iou { stroke: #C77700; fill: #C77700 } polyline { stroke-width: 2 }
  @media (prefers-color-scheme: dark) {
    text { fill: #eee } .grid { stroke: #444 } .axis { stroke: #999 } svg { background: #181818 }
    .loss { stroke: #56B4E9; fill: #56B4E9 } .iou { stroke: #E69F00; fill: #E69F00 }
  }
""".strip("\n")


def write_curves(path: Path, rows: Sequence[dict], title: str = "Training") -> None:
    """Write the curves of a run to `path`, an SVG file that any browser opens; see `curves`."""
    write_text(path, curves(rows, title))


def curves(rows: Sequence[dict], title: str = "Training") -> str:
    """Return an SVG drawing of a run's loss, and of its validation IoU where measured, against steps and seconds.

    rows: a run's log.jsonl, dicts with `step`, and any of `loss`, `val_iou` and `seconds` (since the start).
    Values that are missing or not finite are left out of the line. Stands alone, light or dark as the reader's system is.
    """
    losses, ious = series(rows, "loss"), series(rows, "val_iou")
    last = max((step for step, _ in losses + ious), default=1)
    steps = [step for step in ticks(0, max(1, last)) if step == int(step)]
    values = [0, *(loss for _, loss in losses)]
    panels = [draw_panel("Loss", "loss", losses, ticks(min(values), max(values)), steps, 40)]
    if ious:
        panels.append(draw_panel("Validation IoU", "iou", ious, [0, 0.2, 0.4, 0.6, 0.8, 1], steps, 40 + PANEL + 50))
    bottom = 40 + len(panels) * (PANEL + 50) - 50
    height = bottom + 70
    across = [place(step, steps, LEFT, WIDTH - RIGHT) for step in steps]
    labels = "".join(step_label(x, bottom + 20, f"{step:g}", seconds_at(step, rows)) for x, step in zip(across, steps))
    caption = "step, and the time since the start" if series(rows, "seconds") else "step"
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img"
  aria-labelledby="title desc">
<title id="title">{html.escape(title)}</title>
<desc id="desc">{describe(losses, "Loss")} {describe(ious, "Validation IoU")}</desc>
<style>
{CURVES_STYLE}
</style>
{"".join(panels)}{labels}<text x="{LEFT}" y="{height - 10}">{caption}</text>
</svg>
"""


def series(rows: Sequence[dict], key: str) -> list[tuple[float, float]]:
    """Return (step, value) of the rows whose `key` is a finite number."""
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None and math.isfinite(row[key])]


def ticks(low: float, high: float) -> list[float]:
    """Return 3 to 8 round numbers, evenly spaced, from `low` to at or just above `high`."""
    span = (high - low) or 1.0
    rough = span / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    return [round(low + i * step, 12) for i in range(math.ceil(span / step - 1e-9) + 1)]


def place(value: float, scale: Sequence[float], start: float, end: float) -> float:
    """Return where `value` lies between `start` and `end` on an axis whose ticks are `scale`."""
    return start + (value - scale[0]) / (scale[-1] - scale[0]) * (end - start)


def draw_panel(title: str, kind: str, points: list[tuple[float, float]], values: list[float], steps: list[float], top: int) -> str:
    """Return SVG of one chart: `points` (step, value) over ticks `values` up and `steps` across, its top edge at `top`."""
    bottom, right = top + PANEL, WIDTH - RIGHT
    parts = [f'<text class="title" x="{LEFT}" y="{top - 14}">{title}</text>\n']
    for value in values:
        y = place(value, values, bottom, top)
        kind_of_line = "axis" if value == values[0] else "grid"
        parts.append(f'<line class="{kind_of_line}" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
                     f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>\n')
    places = [(place(step, steps, LEFT, right), place(value, values, bottom, top)) for step, value in points]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts.append(f'<polyline class="{kind}" style="fill: none" points="{line}"/>\n')
    if len(places) <= 40:  # few enough to tell apart
        parts += [f'<circle class="{kind}" r="3" cx="{x:.1f}" cy="{y:.1f}"/>\n' for x, y in places]
    return "".join(parts)


def step_label(x: float, y: float, step: str, seconds: str) -> str:
    """Return SVG of a tick's label below a chart: the step, and under it the time."""
    return f'<text x="{x:.1f}" y="{y}" text-anchor="middle">{step}<tspan x="{x:.1f}" dy="18">{seconds}</tspan></text>\n'


def seconds_at(step: float, rows: Sequence[dict]) -> str:
    """Return the time at which a run reached `step`, such as "1.5 s", or nothing where its log does not say."""
    known = series(rows, "seconds")
    if not known or not known[0][0] <= step <= known[-1][0]:
        return ""
    seconds = float(np.interp(step, *np.array(known, float).T))
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def describe(points: list[tuple[float, float]], name: str) -> str:
    """Return a sentence on where a line starts and ends, for those who do not see it."""
    if not points:
        return f"{name}: not measured."
    (first, start), (last, end) = points[0], points[-1]
    values = [value for _, value in points]
    return f"{name}: {start:.3g} at step {first:g}, {end:.3g} at step {last:g}; lowest {min(values):.3g}, highest {max(values):.3g}."
