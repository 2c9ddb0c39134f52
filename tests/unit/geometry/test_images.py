"""Image files: format by content, decoded as shown, never larger than the limit."""

import io
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import ExifTags, Image, PngImagePlugin, TiffImagePlugin

from samray.errors import AnnotationError
from samray.geometry.images import (
    MAX_FILE_BYTES,
    decode_and_stretch,
    decode_image,
    read_image_file,
    size_from_header,
)

ORIENTATION = 0x0112
# What a viewer does with the stored pixels, by the EXIF standard; axes are (row, column).
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].transpose(1, 0, 2),
    8: lambda stored: np.rot90(stored, 1),
}


@pytest.fixture
def photo() -> np.ndarray:
    """40 x 64 RGB without any symmetry."""
    y, x = np.mgrid[:40, :64]
    return np.stack([x * 4, y * 6, (x + 2 * y) % 256], axis=2).astype(np.uint8)


def encode(picture: Image.Image | np.ndarray, kind: str, **settings: object) -> bytes:
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **settings)
    return buffer.getvalue()


def png_of(width: int, height: int) -> bytes:
    """A PNG with a size in its header and little content."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10_000)))
    return b"\x89PNG\r\n\x1a\n" + content + chunk(b"IEND", b"")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotated_jpeg_is_decoded_as_shown(photo: np.ndarray, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    raw = encode(photo, "JPEG", exif=exif, quality=95)
    stored = np.asarray(Image.open(io.BytesIO(raw)))
    assert np.array_equal(decode_image(raw), UPRIGHT[orientation](stored))


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 2, 6, 8])
def test_the_size_in_the_header_is_that_of_the_decoded_image(photo, kind, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    raw = encode(photo, kind, exif=exif)
    assert size_from_header(raw) == decode_image(raw).shape[:2]


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_content_decides_whatever_the_name_says(photo: np.ndarray, kind: str) -> None:
    """The file name is not passed: a BMP named .jpg is a BMP."""
    settings = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(decode_image(encode(photo, kind, **settings)), photo)


def test_palette_image_gives_its_colours_and_not_its_indices(photo: np.ndarray) -> None:
    palette = Image.fromarray(photo).quantize(16)
    image = decode_image(encode(palette, "PNG"))
    assert np.array_equal(image, np.asarray(palette.convert("RGB")))
    assert np.abs(image.astype(int) - photo).mean() < 30


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "1", "CMYK"])
def test_every_usual_mode_becomes_three_channels_of_bytes(photo: np.ndarray, mode: str) -> None:
    picture = Image.fromarray(photo).convert(mode)
    image = decode_image(encode(picture, "TIFF" if mode == "CMYK" else "PNG"))
    assert (image.shape, image.dtype) == ((40, 64, 3), np.uint8)
    assert np.array_equal(image, np.asarray(picture.convert("RGB")))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_deep_grey_image_is_stretched_instead_of_cut_to_white(kind: str) -> None:
    """12 bits in 16: 1000..3000 of 65535 would be nearly black, clipped to 8 bits white."""
    deep = np.linspace(1000, 3000, 100 * 100).reshape(100, 100).astype(np.uint16)
    image = decode_image(encode(deep, kind))
    assert (image.shape, image.dtype) == ((100, 100, 3), np.uint8)
    assert (image[:, :, 0] == image[:, :, 2]).all()
    assert (image[0, 0, 0], image[-1, -1, 0]) == (0, 255)
    # Linear from the 0.1 percentile, 1002, to the 99.9th, 2998: the middle stays the middle.
    assert image[50, 0, 0] == pytest.approx(127.5, abs=1)
    assert image[25, 0, 0] == pytest.approx((1500 - 1002) / (2998 - 1002) * 255, abs=1)


def test_hot_pixel_does_not_darken_a_deep_image() -> None:
    deep = np.full((100, 100), 1000, np.uint16)
    deep[:, 50:] = 2000
    deep[3, 3] = 65535
    image = decode_image(encode(deep, "PNG"))
    assert image[60, 60, 0] == 255
    assert image[60, 10, 0] == 0


def test_float_image_is_stretched_instead_of_shown_black() -> None:
    shares = np.linspace(0, 1, 100 * 100, dtype=np.float32).reshape(100, 100)
    image = decode_image(encode(shares, "TIFF"))
    assert (image[0, 0, 0], image[-1, -1, 0]) == (0, 255)
    assert image[50, 0, 0] == pytest.approx(127.5, abs=1)
    assert not decode_image(encode(shares * 0, "TIFF")).any()
    for value in (np.nan, np.inf):
        shares[3, 3] = value
        with pytest.raises(AnnotationError, match="not finite"):
            decode_image(encode(shares, "TIFF"))


def test_deep_image_of_one_value_gives_no_division_by_zero() -> None:
    assert not decode_image(encode(np.full((8, 8), 500, np.uint16), "PNG")).any()


@pytest.mark.parametrize("size", [(20_000, 20_000), (12_000, 10_000)])
def test_png_bomb_is_refused_by_its_header_at_once_and_without_memory(
    size: tuple[int, int],
) -> None:
    raw = png_of(*size)
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(AnnotationError) as caught:
        decode_image(raw, max_megapixels=100)
    seconds = time.perf_counter() - start
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caught.value.field == "image"
    assert "limit" in caught.value.reason
    assert "100 megapixels" in caught.value.reason or "is 100" in caught.value.reason
    assert seconds < 1
    assert peak < 2e6


def test_limit_is_in_megapixels_and_named(photo: np.ndarray) -> None:
    raw = encode(np.zeros((1000, 1100, 3), np.uint8), "PNG")
    assert decode_image(raw, max_megapixels=1.1).shape == (1000, 1100, 3)
    with pytest.raises(AnnotationError, match=r"prepare\.max_megapixels"):
        decode_image(raw, max_megapixels=1.09)


@pytest.mark.parametrize("kind", ["TIFF", "PNG", "WEBP"])
def test_file_of_many_pages_is_refused_because_only_one_could_be_meant(
    photo: np.ndarray, kind: str
) -> None:
    pages = [Image.fromarray(photo[:, ::-1].copy()), Image.fromarray(photo[::-1].copy())]
    raw = encode(photo, kind, save_all=True, append_images=pages)
    with pytest.raises(AnnotationError, match="has 3 pages"):
        decode_image(raw)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("share", [0.2, 0.6, 0.9])
def test_image_cut_short_is_refused_instead_of_grey_below(kind: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    raw = encode(noise, kind)
    with pytest.raises(AnnotationError, match="must be a whole") as caught:
        decode_image(raw[: int(len(raw) * share)])
    assert caught.value.field == "image"


@pytest.mark.parametrize(
    "raw",
    [b"", b"\x00", b"GIF89a", b"%PDF-1.4\n", b'{"shapes": []}', b"\xff\xd8\xff\xe0", bytes(5000)],
)
def test_what_is_not_an_image_is_refused_in_one_line(raw: bytes) -> None:
    with pytest.raises(AnnotationError) as caught:
        decode_image(raw)
    assert caught.value.field == "image"
    assert "\n" not in str(caught.value)


def test_gif_and_other_formats_are_refused(photo: np.ndarray) -> None:
    with pytest.raises(AnnotationError, match="no known image format"):
        decode_image(encode(Image.fromarray(photo).quantize(8), "GIF"))


def test_damage_anywhere_ends_in_an_annotation_error_or_an_image(photo: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "BMP", "TIFF", "WEBP"):
        whole = np.frombuffer(encode(photo, kind), np.uint8)
        for _ in range(60):
            damaged = whole.copy()
            where = rng.integers(0, min(len(whole), 400), size=4)
            damaged[where] = rng.integers(0, 256, size=4)
            try:
                image = decode_image(damaged.tobytes(), max_megapixels=1)
            except AnnotationError:
                continue
            assert image.ndim == 3
            assert image.shape[2] == 3


@pytest.mark.parametrize("size", [(2, 600), (600, 2)])
def test_image_too_thin_to_be_scaled_is_refused_and_a_ribbon_is_not(size: tuple[int, int]) -> None:
    with pytest.raises(AnnotationError, match="too thin to be scaled"):
        decode_image(encode(np.zeros((*size, 3), np.uint8), "PNG"))
    ribbon = np.zeros((*(min(side, 512) for side in size), 3), np.uint8)  # 256 : 1
    assert decode_image(encode(ribbon, "PNG")).shape == ribbon.shape


def test_file_too_large_for_a_photograph_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    with path.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)  # sparse: takes no disk space
    with pytest.raises(AnnotationError, match=r"has 1024 MiB; at most 1024"):
        read_image_file(path)


@pytest.mark.parametrize("nodata", ["-9999", "-3.4028234663852886e+38", "nan", "0", "-inf"])
def test_pixels_without_a_measurement_do_not_count_for_the_stretch(nodata):
    """One -9999 of a satellite image made all other pixels nearly white."""
    deep = np.linspace(200, 300, 48 * 64, dtype=np.float32).reshape(48, 64)
    plain = decode_image(float_tiff(deep))
    hole = deep.copy()
    hole[:20, :30] = np.float32(float(nodata))
    decoded, stretch = decode_and_stretch(float_tiff(hole, nodata + "\0"), 100)
    assert not decoded[:20, :30].any()
    assert decoded[25:].std() > 20
    assert stretch[0] >= 200
    assert np.abs(decoded[25:].astype(int) - plain[25:]).max() < 40
    empty, stretch = decode_and_stretch(float_tiff(np.full_like(deep, float(nodata)), nodata), 100)
    assert (empty.any(), stretch) == (False, None)


def test_nodata_that_is_no_number_is_ignored():
    deep = np.linspace(200, 300, 48 * 64, dtype=np.float32).reshape(48, 64)
    assert np.array_equal(decode_image(float_tiff(deep, "none")), decode_image(float_tiff(deep)))
    deep[0, 0] = np.nan
    with pytest.raises(AnnotationError, match="not finite"):
        decode_image(float_tiff(deep, "-9999"))


def tiff(pixels, **options):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", [np.uint16, np.int16, np.uint32, np.int32])
def test_a_ramp_stays_a_ramp_whatever_the_kind_of_number(kind):
    """Pillow reads unsigned numbers of 32 bits as signed ones; the upper half would turn black."""
    ends = np.iinfo(kind)
    ramp = np.linspace(ends.min, ends.max, 48 * 64).astype(kind).reshape(48, 64)
    decoded, stretch = decode_and_stretch(tiff(ramp), 100)
    assert (np.diff(decoded[:, :, 0].ravel().astype(int)) >= 0).all()
    assert decoded[24, 0, 0] == pytest.approx(127.5, abs=1)
    assert stretch == pytest.approx((ends.min, ends.max), abs=0.002 * (ends.max - ends.min))


def test_a_deep_image_whose_zero_is_white_is_inverted():
    ramp = np.linspace(0, 65535, 48 * 64).astype(np.uint16).reshape(48, 64)
    plain, ends = decode_and_stretch(tiff(ramp), 100)
    inverted, swapped = decode_and_stretch(tiff(ramp, photometric="miniswhite"), 100)
    assert np.array_equal(inverted, 255 - plain)
    assert swapped == ends[::-1]


def test_signed_bytes_are_refused():
    with pytest.raises(AnnotationError, match="signed values of 8 bits"):
        decode_image(tiff(np.arange(-128, 128, dtype=np.int8).reshape(16, 16)))


@pytest.mark.parametrize("place", ["before", "behind", "xmp", "none"])
def test_the_size_of_a_png_is_known_without_decoding_it(photo, place, monkeypatch):
    """An image of a hundred megapixels would hold up all other requests."""
    exif, xmp = Image.Exif(), PngImagePlugin.PngInfo()
    exif[ExifTags.Base.Orientation] = 6
    xmp.add_itxt("XML:com.adobe.xmp", '<a tiff:Orientation="6"/>')
    options = {"before": {"exif": exif}, "behind": {"exif": exif}, "xmp": {"pnginfo": xmp}}
    buffer = io.BytesIO()
    Image.fromarray(photo).save(buffer, "PNG", **options.get(place, {}))
    raw = buffer.getvalue()
    if place == "behind":
        start = raw.index(b"eXIf") - 4
        end = start + 12 + int.from_bytes(raw[start : start + 4])
        last = raw.index(b"IEND") - 4
        raw = raw[:start] + raw[end:last] + raw[start:end] + raw[last:]
    shown = decode_image(raw).shape[:2]
    assert shown == (photo.shape[:2] if place == "none" else photo.shape[1::-1])
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", None)
    assert size_from_header(raw) == shown


def float_tiff(pixels, nodata=None):
    buffer = io.BytesIO()
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    if nodata is not None:
        tags[42113] = nodata
        tags.tagtype[42113] = 2
    Image.fromarray(pixels).save(buffer, format="TIFF", tiffinfo=tags)
    return buffer.getvalue()
