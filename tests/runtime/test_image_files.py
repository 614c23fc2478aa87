"""Image files: the right pixels, or one clear line that names the file."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms.v2 import functional as tv

from iirsnn.errors import RunError, UsageError
from iirsnn.runtime.image_files import DamagedImage, Preparation, open_image, to_array

GRAY16 = np.array([[0, 257, 65535], [32767, 128, 129]], np.uint16)
GRAY8 = [[0, 1, 255], [127, 0, 1]]  # GRAY16 / 257, to the nearest


def pixels(path, channels):
    return to_array(open_image(path, channels)).tolist()


def pixels_or_line(file):
    """The pixels of a file, or None where it is refused in one line."""
    try:
        return pixels(file, 3)
    except DamagedImage as refused:
        line = str(refused)
    assert line.startswith(f"image {file}: ")
    assert "\n" not in line
    return None


def chunk(kind, content):
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def png(width, height, depth, colour, rows, *extra):
    """A PNG file of raw rows; `extra` are chunks before the pixels."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    content = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = [chunk(b"IHDR", header), *extra, chunk(b"IDAT", content), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def turned(image, orientation, path):
    exif = Image.Exif()
    exif[274] = orientation
    image.save(path, exif=exif)


def test_16_bit_gray_is_rounded_to_8_bits(tmp_path):
    for suffix in ("png", "tif"):
        Image.fromarray(GRAY16).save(tmp_path / f"deep.{suffix}")
        assert pixels(tmp_path / f"deep.{suffix}", 1) == [GRAY8]
        assert pixels(tmp_path / f"deep.{suffix}", 3) == [GRAY8] * 3
    body = b"P5\n3 2\n65535\n" + GRAY16.astype(">u2").tobytes()
    (tmp_path / "deep.pgm").write_bytes(body)
    assert pixels(tmp_path / "deep.pgm", 1) == [GRAY8]
    (tmp_path / "ten.pgm").write_bytes(b"P5\n2 1\n1023\n" + np.array([1023, 0], ">u2").tobytes())
    assert pixels(tmp_path / "ten.pgm", 1) == [[[255, 0]]]


def test_white_is_zero_in_some_16_bit_tiffs(tmp_path):
    Image.fromarray(GRAY16).save(tmp_path / "x.tif", tiffinfo={262: 0})
    assert pixels(tmp_path / "x.tif", 1) == [[[255 - v for v in row] for row in GRAY8]]


@pytest.mark.parametrize(
    ("colour", "values"),
    [(2, (65535, 0, 32767)), (4, (32767, 65535)), (6, (65535, 0, 32767, 65535))],
)
def test_16_bit_colour_is_within_a_level(colour, values, tmp_path):
    row = struct.pack(f">{len(values)}H", *values)
    (tmp_path / "deep.png").write_bytes(png(1, 1, 16, colour, [row]))
    found = [channel[0][0] for channel in pixels(tmp_path / "deep.png", 3)]
    expected = [127] * 3 if colour == 4 else [255, 0, 127]
    assert all(abs(a - b) <= 1 for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_without_a_white_are_refused(dtype, tmp_path):
    file = tmp_path / "odd.tif"
    Image.fromarray(np.array([[0, 1]], dtype)).save(file)
    with pytest.raises(DamagedImage, match=f"^image {file}: expected 8 or 16 bits a channel, got"):
        open_image(file, 1)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_exif_orientation_is_applied(orientation, suffix, tmp_path):
    upright = Image.new("RGB", (32, 16), "white")
    upright.paste((255, 0, 0), (0, 0, 8, 8))
    back = {5: Image.Transpose.TRANSPOSE, 7: Image.Transpose.TRANSVERSE}
    back |= {2: Image.Transpose.FLIP_LEFT_RIGHT, 4: Image.Transpose.FLIP_TOP_BOTTOM}
    back |= {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90}
    back |= {8: Image.Transpose.ROTATE_270}
    stored = upright.transpose(back[orientation]) if orientation > 1 else upright
    turned(stored, orientation, tmp_path / f"x.{suffix}")
    found = np.array(open_image(tmp_path / f"x.{suffix}", 3)).astype(int)
    assert found.shape == (16, 32, 3)
    assert np.abs(found - np.array(upright)).mean() < 5  # JPEG is not exact


def test_transparency_lies_on_white(tmp_path):
    clear_red = Image.new("RGBA", (1, 1), (255, 0, 0, 0))
    half_black = Image.new("RGBA", (1, 1), (0, 0, 0, 128))
    for image, expected in ((clear_red, [255] * 3), (half_black, [127] * 3)):
        image.save(tmp_path / "x.png")
        assert [c[0][0] for c in pixels(tmp_path / "x.png", 3)] == expected
        assert pixels(tmp_path / "x.png", 1) == [[expected[:1]]]
    Image.new("LA", (1, 1), (0, 64)).save(tmp_path / "la.png")
    assert pixels(tmp_path / "la.png", 1) == [[[191]]]
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([0, 0, 255, 0, 255, 0])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png", transparency=0)
    assert pixels(tmp_path / "p.png", 3) == [[[255, 0]], [[255, 255]], [[255, 0]]]
    palette.save(tmp_path / "p.gif", transparency=1)
    assert pixels(tmp_path / "p.gif", 3) == [[[0, 255]], [[0, 255]], [[255, 255]]]
    palette.save(tmp_path / "half.png", transparency=bytes([128, 255]))
    assert pixels(tmp_path / "half.png", 3) == [[[127, 0]], [[127, 255]], [[255, 0]]]


@pytest.mark.parametrize(
    ("depth", "colour", "row", "clear", "expected"),
    [
        (1, 0, b"\x40", (0,), [255, 255]),
        (2, 0, b"\x90", (2,), [255, 85]),
        (4, 0, b"\x3c", (3,), [255, 204]),
        (8, 0, b"\x03\x04", (3,), [255, 4]),
        (16, 0, b"\x03\x00\x01\x01", (768,), [255, 1]),
        (8, 2, b"\x03\x04\x05\x06\x06\x06", (3, 4, 5), [255, 6]),
    ],
)
def test_a_transparent_gray_or_colour_of_png(depth, colour, row, clear, expected, tmp_path):
    key = chunk(b"tRNS", struct.pack(f">{len(clear)}H", *clear))
    (tmp_path / "x.png").write_bytes(png(2, 1, depth, colour, [row], key))
    assert pixels(tmp_path / "x.png", 1) == [[expected]]


def test_palettes_bits_and_cmyk(tmp_path):
    bits = Image.fromarray(np.array([[True, False]]))
    bits.save(tmp_path / "bits.png")
    assert pixels(tmp_path / "bits.png", 1) == [[[255, 0]]]
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    red.quantize(2).save(tmp_path / "red.png")
    assert {tuple(np.unique(c)) for c in pixels(tmp_path / "red.png", 3)} == {(255,), (0,)}
    for suffix in ("jpg", "tif"):
        Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / f"ink.{suffix}")
        found = np.array(open_image(tmp_path / f"ink.{suffix}", 3)).astype(int)
        assert np.abs(found - (255, 0, 0)).max() <= 3


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "tif", "webp", "ppm"])
def test_a_file_cut_anywhere_is_the_whole_image_or_one_line(suffix, tmp_path):
    noise = np.random.default_rng(0).integers(256, size=(24, 24, 3), dtype=np.uint8)
    stream = io.BytesIO()
    format_ = {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper())
    Image.fromarray(noise).save(stream, format_)
    content, file = stream.getvalue(), tmp_path / f"cut.{suffix}"
    file.write_bytes(content)
    whole = pixels(file, 3)
    for length in [0, 1, 2, 3, *range(4, len(content), 37), len(content) - 1]:
        file.write_bytes(content[:length])
        assert pixels_or_line(file) in (whole, None), length


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "tif", "webp", "ppm"])
def test_a_changed_byte_never_gives_a_traceback(suffix, tmp_path):
    rng = np.random.default_rng(1)
    stream = io.BytesIO()
    format_ = {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper())
    Image.fromarray(rng.integers(256, size=(8, 8, 3), dtype=np.uint8)).save(stream, format_)
    content, file = bytearray(stream.getvalue()), tmp_path / f"x.{suffix}"
    for _ in range(60):
        changed = content.copy()
        for place in rng.integers(min(len(content), 120), size=rng.integers(1, 4)):
            changed[place] = rng.integers(256)
        file.write_bytes(changed)
        pixels_or_line(file)


@pytest.mark.parametrize("side", [10_000, 14_000, 60_000])
def test_a_bomb_is_one_line(side, tmp_path, recwarn):
    file = tmp_path / "bomb.png"
    file.write_bytes(png(side, side, 1, 0, []))
    with pytest.raises(DamagedImage, match=f"^image {file}: cannot be read .*bomb"):
        open_image(file, 3)
    assert not list(recwarn)


def test_files_that_are_none(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "script.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    for name, reason in (
        ("empty.png", r"is empty \(0 bytes\)"),
        ("text.png", "no image of a known kind"),
        ("script.png", "no image of a known kind"),
        ("none.png", "no such file"),
        (".", "Is a directory"),
    ):
        with pytest.raises(RunError, match=f"^image .*{reason}"):
            open_image(tmp_path / name, 3)


@pytest.mark.parametrize("size", [(300, 240), (240, 300), (256, 256), (1000, 257), (31, 40)])
def test_a_crop_is_torchvisions_resize_and_center_crop(size, tmp_path):
    noise = np.random.default_rng(0).integers(256, size=(*size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "x.png")
    image = Image.fromarray(noise)
    for side, resize in ((224, 256), (64, 64)):
        found = Preparation((3, side, side), (), (), resize=resize).pixels(tmp_path / "x.png")
        expected = to_array(tv.center_crop(tv.resize(image, [resize]), [side, side]))
        assert abs(found.astype(int) - expected).max() <= 1  # a tie is rounded either way


def test_all_of_an_image_is_kept_on_white(tmp_path):
    Image.new("L", (40, 20), 7).save(tmp_path / "x.png")
    found = Preparation((1, 8, 8), (), (), "whole").pixels(tmp_path / "x.png")[0]
    assert np.unique(found[2:6]).tolist() == [7]
    assert np.unique(found[[0, 1, 6, 7]]).tolist() == [255]


@pytest.mark.parametrize("fit", ["crop", "whole"])
@pytest.mark.parametrize("size", [(1, 3_000_000), (3_000_000, 1)])
def test_a_thread_of_an_image_takes_no_memory(fit, size, tmp_path):
    Image.new("L", size, 9).save(tmp_path / "x.png")
    how = Preparation((3, 64, 64), (), (), fit, 64 if fit == "crop" else 0)
    assert how.pixels(tmp_path / "x.png").shape == (3, 64, 64)


def test_a_preparation_survives_json():
    how = Preparation((3, 8, 8), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "crop", 8)
    assert Preparation.from_json(json.loads(json.dumps(how.as_json())), (3, 8, 8)) == how


@pytest.mark.parametrize(
    ("notes", "message"),
    [
        (None, "says nothing about its images"),
        ({"std": [1]}, "mean: expected 1 finite numbers, got None"),
        ({"mean": [0]}, "std: expected 1 finite numbers, got None"),
        ({"mean": [0], "std": [0]}, r"std: expected positive numbers, got \[0\]"),
        ({"mean": [0], "std": [-1]}, "std: expected positive"),
        ({"mean": [float("nan")], "std": [1]}, "mean: expected 1 finite"),
        ({"mean": [0, 0], "std": [1, 1]}, "mean: expected 1 finite"),
        ({"mean": "0", "std": [1]}, "mean: expected 1 finite"),
        ({"mean": [True], "std": ["1"]}, "expected 1 finite"),
        ({"mean": [0], "std": [1], "fit": "best"}, "fit: expected one of crop, whole"),
        ({"mean": [0], "std": [1], "resize": "8"}, "resize: expected 0 or at least 8, got '8'"),
        ({"mean": [0], "std": [1], "resize": 4}, "resize: expected 0 or at least 8, got 4"),
        ({"mean": [0], "std": [1], "resize": True}, "resize: expected 0 or at least 8"),
    ],
)
def test_notes_that_do_not_say_how_are_one_line(notes, message):
    with pytest.raises(UsageError, match=message):
        Preparation.from_json(notes, (1, 8, 8))


def test_networks_of_other_channels_take_no_files():
    with pytest.raises(UsageError, match="images of 1 or 3 channels, got 2"):
        Preparation.from_json({"mean": [0, 0], "std": [1, 1]}, (2, 8, 8))
