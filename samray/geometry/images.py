"""Image files to RGB pixels; the format is that of the content, limits apply before decoding."""

import contextlib
import io
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from samray.errors import AnnotationError
from samray.storage import Place, read_bytes

# Detected by content, not by extension. Pillow's other formats are off, so that fewer parsers see
# untrusted bytes.
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")  # JPEG's reader also opens MPO, of phones
EXTENSIONS = (
    ".jpg", ".jpeg", ".jfif", ".jpe", ".jif", ".pjpeg", ".pjp",
    ".png", ".bmp", ".tif", ".tiff", ".webp",
)  # fmt: skip
# Pictures that people have and samray does not read: named in errors, so that nobody looks for a
# file that is there.
UNREAD_EXTENSIONS = (
    ".heic", ".heif", ".avif", ".gif", ".jp2", ".j2k", ".jpx", ".jxl", ".svg", ".psd", ".tga",
    ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2", ".exr", ".hdr", ".ico",
    ".ppm", ".pgm", ".pbm", ".pnm", ".dcm", ".nii", ".czi", ".nd2", ".lif", ".svs", ".npy",
)  # fmt: skip
MAX_MEGAPIXELS = 170.0  # the upper limit of any setting
MAX_FILE_BYTES = 2**30
MAX_ASPECT = 256  # the short side of thinner images would scale to less than a pixel
DEEP_MODES = ("I;16", "I;16B", "I;16L", "I", "F")
STRETCH_PERCENTILES = (0.1, 99.9)
STRETCH_ROWS = 256  # converted together
# Tags of TIFF. GDAL's: the value of pixels without a measurement, as text.
WIDTH, HEIGHT, BITS, PHOTOMETRIC, SAMPLE_FORMAT, GDAL_NODATA = 256, 257, 258, 262, 339, 42113
WHITE_IS_ZERO, UNSIGNED, SIGNED = 0, 1, 2


def read_image_file(path: Place) -> bytes:
    """Return an image file's bytes.

    Raises:
        AnnotationError: field `file`; it is larger than MAX_FILE_BYTES.
        OSError: it cannot be read.
    """
    return read_bytes(path, MAX_FILE_BYTES)


def decode_image(raw: bytes, max_megapixels: float = MAX_MEGAPIXELS) -> np.ndarray:
    """Return the image as shown, with its EXIF orientation applied.

    Grey images of 16 or 32 bits, integer or float, are stretched linearly from their 0.1 and
    99.9 percentiles to 0..255. Pixels of GDAL's nodata value become 0 and do not count for the
    percentiles. Of 16-bit colour channels, the upper 8 bits are used.

    Args:
        raw: a whole JPEG, PNG, BMP, TIFF or WebP file.
        max_megapixels: larger ones are refused by their header.

    Returns:
        image: H x W x 3 uint8 RGB.

    Raises:
        AnnotationError: field `image`; not an image, cut short, too large, or of many pages.
    """
    return decode_and_stretch(raw, max_megapixels)[0]


def decode_and_stretch(
    raw: bytes, max_megapixels: float
) -> tuple[np.ndarray, tuple[float, float] | None]:
    """As `decode_image`; also return the values that became 0 and 255 in a 16 or 32-bit image."""
    with _opened(raw, max_megapixels) as picture:
        tags = dict(getattr(picture, "tag_v2", {}))
        upright = ImageOps.exif_transpose(picture)
        if upright.mode in DEEP_MODES:
            return _shown(upright, tags)
        return np.asarray(upright.convert("RGB")), None


def size_from_header(raw: bytes) -> tuple[int, int]:
    """Return an image's (H, W) as shown, without decoding its pixels.

    Raises:
        AnnotationError: field `format`, samray does not read it; field `size`, it is too large
            for any setting; field `image`, it is damaged.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            picture = Image.open(io.BytesIO(raw), formats=FORMATS)
            turned = _orientation(picture, raw) in (5, 6, 7, 8)
            width, height = picture.size
            if isinstance(picture, TiffImageFile):  # Pillow may have turned its size
                width, height = picture.tag_v2[WIDTH], picture.tag_v2[HEIGHT]
        except UnidentifiedImageError as exc:
            raise AnnotationError(
                "format", "is no JPEG, PNG, BMP, TIFF or WebP file by its content"
            ) from exc
        except Image.DecompressionBombError as exc:
            reason = f"has more than {MAX_MEGAPIXELS:g} megapixels, the most that can be allowed"
            raise AnnotationError("size", reason) from exc
        # Pillow's parsers raise almost anything on damaged files.
        except Exception as exc:
            raise AnnotationError("image", "is damaged; its header cannot be read") from exc
    return (width, height) if turned else (height, width)


def grey_thumbnail(raw: bytes, side: int) -> np.ndarray:
    """Return the image as shown, resized to a small grey square.

    A JPEG is decoded at a fraction of its size, so a large image is cheap.

    Args:
        raw: as in `decode_image`.
        side: pixels.

    Returns:
        side x side float32, 0..255.

    Raises:
        AnnotationError: as in `decode_image`.
    """
    with _opened(raw, MAX_MEGAPIXELS) as picture:
        picture.draft("L", (4 * side, 4 * side))  # has no effect on formats other than JPEG
        tags = dict(getattr(picture, "tag_v2", {}))
        upright = ImageOps.exif_transpose(picture)
        if upright.mode in DEEP_MODES:
            upright = Image.fromarray(_shown(upright, tags)[0])
        small = upright.convert("L").resize((side, side), Image.Resampling.BOX)
        return np.asarray(small, dtype=np.float32)


@contextlib.contextmanager
def _opened(raw: bytes, max_megapixels: float) -> Iterator[Image.Image]:
    """Open a picture whose header is acceptable; any failure inside is an AnnotationError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about large images; samray has its own limit
        try:
            picture = Image.open(io.BytesIO(raw), formats=FORMATS)
            megapixels = picture.width * picture.height / 1e6
            if megapixels > max_megapixels:
                raise AnnotationError(
                    "image",
                    f"has {megapixels:.0f} megapixels; the limit is {max_megapixels:.0f} "
                    "(prepare.max_megapixels)",
                )
            if max(picture.size) > MAX_ASPECT * min(picture.size):
                raise AnnotationError(
                    "image",
                    f"is {picture.width} x {picture.height} pixels, too thin to be scaled; cut it",
                )
            pages = getattr(picture, "n_frames", 1)
            if picture.format != "MPO" and pages > 1:
                raise AnnotationError(
                    "image", f"has {pages} pages; save each page as an image of its own"
                )
            tags = getattr(picture, "tag_v2", {})
            if tags.get(BITS) == (8,) and SIGNED in tags.get(SAMPLE_FORMAT, ()):
                raise AnnotationError(
                    "image", "has signed values of 8 bits; save it with unsigned or 16-bit ones"
                )
            yield picture
        except AnnotationError:
            raise
        except Image.DecompressionBombError as exc:  # Pillow's limit, above samray's
            raise AnnotationError(
                "image", f"is larger than {max_megapixels:.0f} megapixels ({_one_line(exc)})"
            ) from exc
        # Pillow's parsers raise almost anything on damaged files.
        except Exception as exc:
            raise AnnotationError(
                "image",
                f"cannot be decoded ({_one_line(exc)}); it must be a whole "
                "JPEG, PNG, BMP, TIFF or WebP file",
            ) from exc


def _orientation(picture: Image.Image, raw: bytes) -> int:
    """EXIF's orientation of a picture, from the bytes around its pixels."""
    # PNG's own `getexif` decodes all pixels to look behind them, in files of a hundred megapixels.
    exif = Image.Image.getexif(picture)
    if ExifTags.Base.Orientation not in exif and picture.format == "PNG":
        start = raw.rfind(b"eXIf")
        if raw[start + 4 : start + 8] in (b"II*\0", b"MM\0*"):
            length = int.from_bytes(raw[start - 4 : start], "big")
            exif.load(raw[start + 4 : start + 4 + length])
        elif match := _XMP.match(raw, max(0, raw.rfind(b"tiff:Orientation"))):
            return int(match[2])
    return int(exif.get(ExifTags.Base.Orientation, 1))


_XMP = re.compile(rb'tiff:Orientation(="|>)([0-9])')  # as Pillow reads it


def _shown(
    deep: Image.Image, tags: Mapping[int, Any]
) -> tuple[np.ndarray, tuple[float, float] | None]:
    """An image of DEEP_MODES as `_stretch` gives it, by the tags of its TIFF file, if any."""
    values = np.asarray(deep)
    unsigned = set(tags.get(SAMPLE_FORMAT, (UNSIGNED,))) == {UNSIGNED}
    if tags.get(BITS) == (32,) and unsigned and values.dtype == np.int32:
        values = values.view(np.uint32)  # Pillow has signed numbers only
    rgb, ends = _stretch(values, _nodata(tags))
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO and ends is not None:  # Pillow inverts 8 bits only
        return 255 - rgb, ends[::-1]
    return rgb, ends


def _nodata(tags: Mapping[int, Any]) -> float | None:
    """The value that GDAL has marked as no measurement, or None."""
    try:
        return float(str(tags.get(GDAL_NODATA)).strip("\0 "))
    except ValueError:
        return None


def _stretch(
    deep: np.ndarray, nodata: float | None
) -> tuple[np.ndarray, tuple[float, float] | None]:
    """H x W of 16 or 32 bits, integer or float -> H x W x 3 uint8, and the values of 0 and 255.

    Pixels of the value `nodata` become 0; the values are None if all pixels are such.
    """
    measured = np.ones(deep.shape, bool)
    if nodata is not None:  # -3.4e38 is written with more digits than a float32 holds
        with np.errstate(over="ignore"):
            value = np.float32(nodata) if deep.dtype.kind == "f" else nodata
        measured = ~np.isnan(deep) if np.isnan(nodata) else deep != value
    values = deep[measured]
    if not np.isfinite(values).all():
        raise AnnotationError("image", "has values that are not finite; replace them")
    if not values.size:
        return np.zeros((*deep.shape, 3), np.uint8), None
    low, high = np.percentile(values, STRETCH_PERCENTILES, overwrite_input=True)
    del values
    least = 1.0 if deep.dtype.kind in "iu" else np.finfo(np.float32).tiny
    scale = 255.0 / max(high - low, least)
    rgb = np.empty((*deep.shape, 3), np.uint8)
    for start in range(0, len(deep), STRETCH_ROWS):  # in float64, which is 8 times the result
        rows = slice(start, start + STRETCH_ROWS)
        scaled = (np.where(measured[rows], deep[rows], low).astype(np.float64) - low) * scale
        rgb[rows] = np.clip(np.rint(scaled), 0, 255).astype(np.uint8)[:, :, None]
    return rgb, (float(low), float(high))


def _one_line(exc: Exception) -> str:
    if isinstance(exc, UnidentifiedImageError):
        return "its content is of no known image format"
    return " ".join(str(exc).split())[:120] or type(exc).__name__
