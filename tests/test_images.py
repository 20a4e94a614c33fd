"""images.py: what is no frame; what every kind of mask means. Frames as shown: see fuzz.py."""
import os

import numpy as np
import pytest
from PIL import Image

from vos import clips, images
from vos.inputs import BadInput

OBJECT = np.zeros((5, 11), bool)
OBJECT[1:4, 2:9] = True
GREY = OBJECT.astype(np.uint8)


def test_decompression_bomb_is_refused_by_its_header(tmp_path):
    Image.new("1", (9_000, 9_000)).save(tmp_path / "bomb.png")
    for read in (images.read_image, clips.mask_values):
        with pytest.raises(BadInput, match=r"bomb\.png: .*81000000 pixels.* limit of 64000000"):
            read(tmp_path / "bomb.png")


def test_a_mask_is_written_as_any_reader_reads_it(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (37, 53), np.uint8).cumsum(1, np.uint8)
    images.write_mask(tmp_path / "a.png", pixels)
    with Image.open(tmp_path / "a.png") as image:
        assert (image.format, image.mode) == ("PNG", "L")
        np.testing.assert_array_equal(image, pixels)


def test_what_is_no_image_file_is_named_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "script.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (tmp_path / "empty.jpg").touch()
    for name in ("pipe.jpg", "folder.jpg", "script.jpg", "empty.jpg", "gone.jpg"):
        for read in (images.read_image, clips.mask_values):
            with pytest.raises(BadInput, match=rf"^.*{name}.*\Z"):  # in one line
                read(tmp_path / name)


def palette(indices: np.ndarray, colours: list[int]) -> Image.Image:
    image = Image.frombytes("P", indices.shape[::-1], indices.astype(np.uint8).tobytes())
    image.putpalette(colours)
    return image


def colour(*rgb: int) -> np.ndarray:
    return GREY[..., None] * np.array(rgb, np.uint8)


def ramp(*values: int) -> np.ndarray:
    """Values in the first row, which is background in OBJECT, and OBJECT as 255."""
    pixels = GREY * 255
    pixels[0, :len(values)] = values
    return pixels


with_alpha = np.dstack([GREY * 255, np.full_like(GREY, 255)])
two = GREY.copy()
two[2, 3:5] = 2
void = two.copy()
void[0] = 255
DAVIS = [0, 0, 0, 128, 0, 0, 0, 128, 0]
GREYS = [level for level in range(256) for _ in range(3)]
MASKS = {
    "1-bit": [Image.fromarray(OBJECT)],
    "0 and 255": [Image.fromarray(GREY * 255)],
    "0 and 1": [Image.fromarray(GREY)],
    "labels": [Image.fromarray(two), Image.fromarray(GREY * 3)],
    "soft edges": [Image.fromarray(np.where(OBJECT, 128, 127).astype(np.uint8)),
                   Image.fromarray(GREY * 255)],
    "a dark frame of soft edges": [Image.fromarray(ramp(3, 90)), Image.fromarray(GREY * 200)],
    "one with alpha": [Image.fromarray(GREY * 255), Image.fromarray(with_alpha)],
    "transparent": [Image.fromarray(with_alpha * np.array([1, 0], np.uint8))],
    "grey as colour": [Image.fromarray(np.dstack([ramp(90, 127)] * 3))],
    "colours": [Image.fromarray(colour(200, 0, 0)), Image.fromarray(colour(9, 9, 9))],
    "dim colours": [Image.fromarray(colour(0, 64, 0)), Image.fromarray(colour(64, 0, 128))],
    "indexed": [palette(GREY, DAVIS), palette(two, DAVIS)],
    "indexed 255": [palette(GREY * 255, [0] * 765 + [9, 9, 9])],
    "void": [palette(void, DAVIS + [0] * 756 + [224, 224, 192]), palette(GREY, DAVIS)],
    "grey with a palette": [palette(ramp(90, 127), GREYS)],
    "two kinds": [palette(GREY, DAVIS), Image.fromarray(GREY * 255), Image.fromarray(OBJECT)],
}


def save(folder, pictures, suffix: str = "png") -> list:
    files = [folder / f"{number}.{suffix}" for number in range(len(pictures))]
    for file, picture in zip(files, pictures):
        picture.save(file)
    return files


@pytest.mark.parametrize("kind", MASKS)
def test_every_kind_of_mask(tmp_path, kind):
    pictures = MASKS[kind]
    files = save(tmp_path, pictures)
    empty = tmp_path / "empty.png"
    Image.new(pictures[0].mode, OBJECT.shape[::-1]).save(empty)
    meaning = clips.decide_meaning([*files, empty])
    assert not clips.read_mask(empty, meaning).any()
    for file in files:
        mask = clips.read_mask(file, meaning)
        assert mask.dtype == bool
        np.testing.assert_array_equal(mask, OBJECT)
    assert ("void" in str(meaning)) == (kind == "void") and "\n" not in str(meaning)


REFUSED = {
    "128 alone": ([Image.fromarray(GREY * 128)], "brightest is 128"),
    "labels beside 255": ([Image.fromarray(GREY * 255), Image.fromarray(GREY)],
                          r"1\.png.* value 1;.* 255 .*0\.png"),
    "index 0 white": ([palette(GREY, [255, 255, 255, 9, 9, 9])], "index 0"),
    "alpha alone": ([Image.fromarray(np.dstack([GREY * 0, GREY * 255]))], "alpha"),
    "alpha of black": ([Image.fromarray(np.dstack([GREY * 0] * 3 + [GREY * 255]))], "alpha"),
    "16 bits": ([Image.fromarray(GREY.astype(np.uint16) * 65535)], "8-bit"),
    "cmyk": ([Image.new("CMYK", (11, 5))], "mode CMYK"),
    "blurred colours": ([Image.fromarray(colour(200, 0, 0))], "mode RGB in a JPEG"),
}
SUFFIXES = {"cmyk": "tif", "blurred colours": "jpg"}


@pytest.mark.parametrize("kind", REFUSED)
def test_masks_that_may_mean_two_things_are_refused(tmp_path, kind):
    pictures, words = REFUSED[kind]
    files = save(tmp_path, pictures, SUFFIXES.get(kind, "png"))
    with pytest.raises(BadInput, match=words) as caught:
        clips.decide_meaning(files)
    assert str(tmp_path) in str(caught.value)
