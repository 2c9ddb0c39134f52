"""Draw a LabelMe dataset to try things on: pebbles, leaves and rings on sand, stone, wood or cloth.

Scene k of a seed is a function of (seed, k) alone, so a longer run starts with the same files as a
shorter one, and an interrupted run can be resumed. Coordinates are (x, y) pixels, colours are
3 x H x W (RGB) float32 0..255 until `_develop`, because numpy is faster plane by plane.
"""

import json
import math
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from samray.errors import ConfigError

VERSION = 1  # increase it when the same seed draws other pixels
MARKER = ".samray-sample-data"  # hidden and not JSON, so that it is not read as an annotation
POOL_FROM = 200  # more missing images than this are drawn on all cores
IMAGES_PER_TASK = 50
JPEG_QUALITY = 92

MIN_VISIBLE_FRACTION = 0.2
MIN_VISIBLE_PIXELS = 150
MIN_PART_PIXELS = 12  # smaller parts and holes are slivers that no annotator would outline
TOLERANCE = 0.7  # pixels by which a polygon may deviate from the outline
MARGIN = 20  # pixels around an object's crop, for its shadow
OVERSAMPLING = 4  # sub-pixels per pixel and axis at an object's edge

BACKGROUNDS = {  # muted, so that the objects stand out
    "sand": [(196, 176, 142), (172, 156, 132), (208, 196, 172)],
    "stone": [(128, 130, 128), (96, 104, 108), (150, 140, 130), (84, 96, 84)],
    "wood": [(150, 112, 76), (112, 84, 62), (178, 148, 112)],
    "cloth": [(136, 144, 160), (176, 168, 156), (104, 100, 112), (146, 128, 128)],
    "paper": [(206, 202, 192), (168, 178, 178), (186, 172, 154)],
}
PEBBLES = [(232, 228, 218), (70, 74, 82), (164, 96, 74), (122, 138, 156), (206, 178, 134),
           (108, 92, 84), (176, 178, 180), (150, 126, 140)]  # fmt: skip
LEAVES = [(74, 128, 44), (132, 158, 46), (214, 168, 40), (206, 104, 34), (160, 44, 36),
          (112, 74, 40), (40, 92, 58), (184, 140, 84)]  # fmt: skip
METALS = [(184, 188, 194), (202, 166, 84), (188, 118, 82), (96, 100, 110)]
RUBBERS = [(38, 38, 42), (190, 40, 44), (36, 92, 176), (228, 130, 30), (34, 140, 128),
           (236, 206, 60), (130, 70, 150), (234, 232, 226)]  # fmt: skip


@dataclass
class _Item:
    """One object: a crop with a margin of MARGIN pixels, and its position.

    Attributes:
        coverage: h x w float32, share of each pixel that the object covers, 0..1.
        surface: 3 x h x w float32, its colour before lighting.
        bevel: width in pixels of its rounded edge, a quarter circle in profile.
        gloss: strength of its highlight, 0..1.
        thickness: pixels above the background, for its shadow.
        corner: (x, y) of the crop's top left pixel in the image; may be negative.
    """

    label: str
    coverage: np.ndarray
    surface: np.ndarray
    bevel: float
    gloss: float
    thickness: float
    corner: tuple[int, int] = (0, 0)


def write_sample_data(output_dir: str | Path, num_images: int = 60, seed: int = 0) -> Path:
    """Write `images/sample_00000.jpg`, `annotations/sample_00000.json` and so on.

    A folder of an earlier run with the same seed is completed. Long runs use every core with
    spawned processes, so a script that asks for many images needs the usual
    `if __name__ == "__main__":`.

    Returns:
        folder: output_dir as a Path.

    Raises:
        ConfigError: num_images or seed is too small, or the folder holds something else or more
            images.
    """
    if num_images < 1:
        raise ConfigError(
            f"sample_data.num_images: must be at least 1, not {num_images}; ask for one or more"
        )
    if seed < 0:
        raise ConfigError(f"sample_data.seed: must be 0 or more, not {seed}; choose another")
    folder = Path(output_dir)
    _open_folder(folder, seed, num_images)
    missing = (k for k in range(num_images) if not all(path.exists() for path in _pair(folder, k)))
    first = next(missing, num_images)  # all before it exist: runs go in order
    write = partial(_write_scenes, folder, seed, num_images)
    with tqdm(
        total=num_images, initial=first, desc="drawing", unit="image", file=sys.stderr, disable=None
    ) as progress:
        if num_images - first <= POOL_FROM:
            for index in range(first, num_images):
                progress.update(write(index, 1))
        else:
            starts = range(first, num_images, IMAGES_PER_TASK)
            with ProcessPoolExecutor(
                mp_context=multiprocessing.get_context("spawn"),
                initializer=cv2.setNumThreads,  # the processes already use all cores
                initargs=(1,),
            ) as pool:
                for done in pool.map(write, starts, [IMAGES_PER_TASK] * len(starts)):
                    progress.update(done)
    return folder


def draw_scene(seed: int, index: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Return a picture, H x W x 3 uint8 RGB, and its LabelMe shapes.

    Every object of the picture is in the shapes, by its visible outline. Parts of one object share
    a group_id; a cut from the outer outline leads to a hole (see `_outlines`).
    """
    image, label_map, labels = _render(seed, index)
    shapes = []
    for number, label in enumerate(labels, start=1):
        polygons = _outlines(label_map == number)
        for polygon in polygons:
            shapes.append(
                {
                    "label": label,
                    "points": polygon.astype(float).tolist(),
                    "group_id": number if len(polygons) > 1 else None,
                    "shape_type": "polygon",
                    "flags": {},
                }
            )
    return image, shapes


def _open_folder(folder: Path, seed: int, num_images: int) -> None:
    """Make the folders and the marker, or check that an earlier run may be resumed."""
    marker = folder / MARKER
    text = f"samray sample-data\nversion {VERSION}\nseed {seed}\n"
    where = f"sample_data.output_dir: {folder}"
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{where} must be a folder, not a file; choose another name")
    if marker.is_file():
        found = marker.read_text(encoding="utf-8", errors="replace")
        if found != text:
            raise ConfigError(
                f"{where} must be new, empty or started with seed {seed} by version {VERSION}; it "
                f"holds {' '.join(found.split())[:60]!r}; choose another folder or the same seed"
            )
        there = len(list((folder / "images").glob("sample_*.jpg")))
        if there > num_images:  # `prepare` would read all of them
            raise ConfigError(
                f"{where} must hold no more than the {num_images} images asked for; it holds "
                f"{there} of an earlier call; choose another folder, or ask for {there} or more"
            )
    elif folder.is_dir() and any(path.name != f".{MARKER}.tmp" for path in folder.iterdir()):
        raise ConfigError(
            f"{where} must be new or empty; it holds other files; choose another folder"
        )
    try:
        for part in (folder, folder / "images", folder / "annotations"):
            part.mkdir(parents=True, exist_ok=True)
            for leftover in part.glob(".*.tmp"):  # of an interrupted run
                leftover.unlink()
        if not marker.is_file():
            _write_whole(marker, text.encode())
    except OSError as exc:
        raise ConfigError(
            f"{where} must be a folder to write into; {exc.strerror}; choose another folder"
        ) from exc


def _pair(folder: Path, index: int) -> tuple[Path, Path]:
    name = f"sample_{index:05d}"
    return folder / "images" / f"{name}.jpg", folder / "annotations" / f"{name}.json"


def _write_scenes(folder: Path, seed: int, num_images: int, start: int, count: int) -> int:
    """Write the missing ones of `count` scenes, none beyond num_images; return how many exist."""
    stop = min(start + count, num_images)
    for index in range(start, stop):
        image_path, json_path = _pair(folder, index)
        if image_path.exists() and json_path.exists():
            continue
        image, shapes = draw_scene(seed, index)
        document = {
            "version": "5.5.0",
            "flags": {},
            "shapes": shapes,
            "imagePath": f"../images/{image_path.name}",
            "imageData": None,
            "imageHeight": image.shape[0],
            "imageWidth": image.shape[1],
        }
        quality = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
        _, jpeg = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), quality)
        _write_whole(image_path, jpeg.tobytes())
        _write_whole(json_path, json.dumps(document).encode())
    return stop - start


def _write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _render(seed: int, index: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Draw one scene.

    Returns:
        image: H x W x 3 uint8 RGB.
        label_map: H x W uint8; 0 is background, k the object visible there.
        labels: of objects 1, 2, ... from bottom to top.
    """
    rng = np.random.default_rng([seed, index])
    sides = [int(rng.integers(320, 513))] * 2
    sides[rng.integers(2)] = int(sides[0] * rng.uniform(0.68, 0.9))
    height, width = sides
    angle = rng.uniform(0, 2 * np.pi)
    light = np.array([0.62 * math.cos(angle), 0.62 * math.sin(angle), 0.785], dtype=np.float32)
    canvas, background_colour = _background(rng, (height, width))

    count = int(rng.integers(5, 11))
    radius = math.sqrt(height * width * rng.uniform(0.45, 0.7) / (count * np.pi))
    makers = (_pebble, _leaf, _ring)
    used = [background_colour]
    # Each kind at least once, so that every scene has all of them; the rest at random.
    kinds = rng.permutation([0, 1, 2, *rng.integers(3, size=count - 3)])
    items = [makers[kind](rng, radius * rng.uniform(0.75, 1.25), used) for kind in kinds]
    _place(rng, items, (height, width))

    # Hardly visible objects are removed before painting, so that every object has an outline.
    label_map = _label_map(items, (height, width))
    visible = np.bincount(label_map.ravel(), minlength=count + 1)[1:]
    whole = [np.count_nonzero(item.coverage >= 0.5) for item in items]
    items = [
        item
        for item, seen, area in zip(items, visible, whole, strict=True)
        if seen >= max(MIN_VISIBLE_PIXELS, MIN_VISIBLE_FRACTION * area)
    ]
    label_map = _label_map(items, (height, width))
    for item in items:
        _paint(canvas, item, light)
    return _develop(rng, canvas), label_map, [item.label for item in items]


def _place(rng: np.random.Generator, items: list[_Item], size: tuple[int, int]) -> None:
    """Place every item so that it overlaps others in part, and rarely by more than a third."""
    taken = np.zeros(size, dtype=bool)
    for item in items:
        h, w = item.coverage.shape
        body = item.coverage >= 0.5
        best, wanted = 2.0, rng.uniform(0.0, 0.3)  # share of the item that lies on others
        for _ in range(8):
            x = int(size[1] * rng.uniform(0.06, 0.94) - w / 2)
            y = int(size[0] * rng.uniform(0.06, 0.94) - h / 2)
            on_canvas, on_item = _windows((x, y), (h, w), size)
            seen = body[on_item]
            share = float(np.mean(taken[on_canvas][seen])) if seen.any() else 1.0
            if abs(share - wanted) < best:
                best, item.corner = abs(share - wanted), (x, y)
        on_canvas, on_item = _windows(item.corner, (h, w), size)
        taken[on_canvas] |= body[on_item]


def _windows(
    corner: tuple[int, int], crop: tuple[int, ...], size: tuple[int, ...]
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """The part of a crop that lies in the image: (slices of the image, slices of the crop)."""
    (x, y), (h, w) = corner, crop[:2]
    x1, y1, x2, y2 = max(x, 0), max(y, 0), min(x + w, size[1]), min(y + h, size[0])
    return (slice(y1, y2), slice(x1, x2)), (slice(y1 - y, y2 - y), slice(x1 - x, x2 - x))


def _label_map(items: list[_Item], size: tuple[int, int]) -> np.ndarray:
    label_map = np.zeros(size, dtype=np.uint8)
    for number, item in enumerate(items, start=1):
        on_canvas, on_item = _windows(item.corner, item.coverage.shape, size)
        label_map[on_canvas][item.coverage[on_item] >= 0.5] = number
    return label_map


def _background(rng: np.random.Generator, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the background, 3 x H x W float32, and its mean colour."""
    kind = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    palette = BACKGROUNDS[kind]
    colour = np.array(palette[rng.integers(len(palette))], dtype=np.float32)
    colour *= rng.uniform(0.88, 1.1)
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float32)
    if rng.random() < 0.5:
        x, y = y, x  # boards and threads run either way
    tone = 0.05 * _noise(rng, size, 90)
    if kind == "sand":
        ripples = np.sin(y / rng.uniform(9, 16) + 1.5 * _noise(rng, size, 60))
        tone += 0.05 * rng.random() * ripples + 0.035 * _noise(rng, size, 5)
        tone += 0.07 * rng.standard_normal(size, dtype=np.float32)
    elif kind == "stone":
        tone += 0.09 * _noise(rng, size, 34) + 0.06 * _noise(rng, size, 11)
        tone += 0.05 * _noise(rng, size, 3) - 0.16 * (_noise(rng, size, 4) > 1.9)
    elif kind == "wood":
        board = rng.uniform(60, 120)
        across = y / board + rng.random()
        number = np.floor(across).astype(int)
        shift = rng.uniform(0, 40, size=16).astype(np.float32)[number]
        rings = y / rng.uniform(5, 9) + 3 * np.sin(x / 130 + shift) + 2.2 * _noise(rng, size, 80)
        tone += 0.06 * np.sin(rings + shift) + 0.04 * np.sin(2.7 * rings)
        tone += rng.uniform(-0.08, 0.08, size=16).astype(np.float32)[number]
        tone += 0.03 * rng.standard_normal(size, dtype=np.float32)
        tone -= 0.45 * (np.abs(across - np.round(across)) * board < 1.2)
    elif kind == "cloth":
        pitch = rng.uniform(1.0, 1.7)
        threads = np.sin(x * pitch) * np.sin(y * pitch) + 0.5 * np.sin((x + y) * pitch / 3)
        tone += 0.05 * threads + 0.04 * _noise(rng, size, 24) + 0.03 * _noise(rng, size, 2)
    else:
        tone += rng.uniform(-0.2, 0.2) * (x / size[1] - 0.5) + 0.025 * _noise(rng, size, 3)
        tone += rng.uniform(-0.2, 0.2) * (y / size[0] - 0.5)
    tint = _noise(rng, size, 70) * rng.uniform(-3, 3, size=(3, 1, 1)).astype(np.float32)
    return _tinted(colour, tone) + tint, colour


def _pebble(rng: np.random.Generator, radius: float, used: list[np.ndarray]) -> _Item:
    """A rounded stone with speckles and sometimes a vein of quartz."""
    angle = np.linspace(0, 2 * np.pi, 90, endpoint=False)
    swing = sum(
        rng.normal(0, 0.16 / k**1.3) * np.cos(k * angle + rng.uniform(0, 6.3)) for k in range(2, 6)
    )
    coverage, (x, y) = _cover(1.12 * radius * (1 + swing)[:, None] * _oval(rng, angle, 0.65))
    size = coverage.shape
    tone = 0.09 * _noise(rng, size, radius / 2) + 0.05 * _noise(rng, size, 5)
    tone += rng.uniform(0.02, 0.07) * rng.standard_normal(size, dtype=np.float32)
    tone -= rng.uniform(0.1, 0.3) * (_noise(rng, size, 2.5) > rng.uniform(1.3, 2.4))
    turn = rng.uniform(0, 2 * np.pi)
    along = x * math.cos(turn) + y * math.sin(turn)
    along += 0.12 * radius * _noise(rng, size, radius / 2)
    if rng.random() < 0.35:
        tone += 0.1 * np.sin(along / rng.uniform(2.5, 5))  # strata
    if rng.random() < 0.3:
        tone += 0.4 * np.exp(-(((along - rng.uniform(-0.4, 0.4) * radius) / 2.2) ** 2))  # quartz
    surface = _tinted(_pick_colour(rng, PEBBLES, used), tone)
    return _Item("pebble", coverage, surface, bevel=radius, gloss=0.12, thickness=7)


def _leaf(rng: np.random.Generator, radius: float, used: list[np.ndarray]) -> _Item:
    """A leaf around a bent midrib: plain, toothed, lobed, or bent to a crescent."""
    kind = rng.choice(["plain", "toothed", "lobed", "crescent"], p=[0.25, 0.2, 0.3, 0.25])
    length = radius * rng.uniform(2.5, 3.1)
    half_width = radius * rng.uniform(0.5, 0.64)
    bend = rng.uniform(-0.7, 0.7)
    s = np.linspace(-0.13, 1, 90)  # 0 is the end of the stem, where the blade begins
    blade = s.clip(0)
    profile = np.sin(np.pi * blade**0.85).clip(0) ** 0.9
    if kind == "toothed":
        profile = profile * (0.9 + 0.16 * ((blade * rng.integers(9, 14)) % 1))
    elif kind == "lobed":
        profile = profile * (0.86 + 0.36 * np.cos(2 * np.pi * rng.integers(3, 5) * (s - 0.04)))
        half_width *= 1.2
    elif kind == "crescent":
        bend = rng.choice([-1, 1]) * rng.uniform(2.2, 3.0)
        half_width *= 0.68
    heading = rng.uniform(0, 2 * np.pi) + bend * (s - 0.5)
    way = np.stack([np.cos(heading), np.sin(heading)], axis=1)
    normal = np.stack([-way[:, 1], way[:, 0]], axis=1)
    rib = np.cumsum(way, axis=0) * (length * (s[1] - s[0]))
    reach = np.maximum(half_width * profile, 1.6)[:, None] * normal  # as wide as the stem at least
    left, right = rib - reach, rib + reach * rng.uniform(0.88, 1.12)
    coverage, (x, y) = _cover(np.concatenate([left, right[::-1]]))
    size = coverage.shape
    rib, left, right = (part - (x[0, 0], y[0, 0]) for part in (rib, left, right))

    half = np.zeros(size, dtype=np.uint8)
    cv2.fillPoly(half, [np.concatenate([rib, left[::-1]]).astype(np.int32)], 1)
    side = cv2.GaussianBlur(half.astype(np.float32), (0, 0), 1.5) - 0.5
    veins = np.zeros(size, dtype=np.uint8)
    lines = [rib] + [
        np.stack([rib[k], edge[k + 7] * 0.86 + rib[k + 7] * 0.14])
        for k in range(15, 80, 8)
        for edge in (left, right)
    ]
    for number, line in enumerate(lines):  # in sixteenths of a pixel: 4 binary places
        fixed, width = np.round(line * 16).astype(np.int32), 1 if number else 2
        cv2.polylines(veins, [fixed], False, 255, width, cv2.LINE_AA, 4)
    tone = rng.choice([-0.2, 0.2]) * side + 0.07 * _noise(rng, size, 14)
    tone += 0.04 * _noise(rng, size, 3) + rng.choice([-0.3, 0.35]) * veins / np.float32(255)
    colour = _pick_colour(rng, LEAVES, used)
    other = np.array(LEAVES[rng.integers(len(LEAVES))], dtype=np.float32)
    share = np.clip(0.18 + 0.2 * _noise(rng, size, radius / 1.5), 0, 0.5)
    surface = _tinted(colour, (1 - share) * (1 + tone) - 1) + _tinted(other, share * (1 + tone) - 1)
    return _Item("leaf", coverage, surface, bevel=3, gloss=0.06, thickness=4)


def _ring(rng: np.random.Generator, radius: float, used: list[np.ndarray]) -> _Item:
    """A metal washer or nut, or a rubber ring; the background shows through its hole."""
    metal = rng.random() < 0.5
    angle = np.linspace(0, 2 * np.pi, 120, endpoint=False)
    edge = 1.08 * radius * _oval(rng, angle, 0.82)
    hole = rng.uniform(0.42, 0.55) if metal else rng.uniform(0.52, 0.7)
    outer = np.ones(len(angle))
    if metal and rng.random() < 0.35:
        outer = np.minimum(1.0, 0.9 / np.cos(angle % (np.pi / 3) - np.pi / 6))  # a nut
    coverage, (x, y) = _cover(outer[:, None] * edge, hole * edge)
    size = coverage.shape
    tone = 0.03 * rng.standard_normal(size, dtype=np.float32)
    colour = _pick_colour(rng, METALS if metal else RUBBERS, used)
    if metal:  # as turned on a lathe: fine circles and a fan-shaped highlight
        tone += 0.2 * np.cos(2 * np.arctan2(y, x) + rng.uniform(0, 6.3))
        tone += 0.05 * np.sin(np.hypot(x, y) * 2.1) + 0.07 * _noise(rng, size, 8)
    else:
        tone += 0.08 * _noise(rng, size, 10)
    bevel, gloss = (4.0, 0.3) if metal else (radius * (1 - hole) / 2, 0.4)
    return _Item("ring", coverage, _tinted(colour, tone), bevel, gloss, thickness=6)


def _oval(rng: np.random.Generator, angle: np.ndarray, least: float) -> np.ndarray:
    """Return points of a rotated ellipse, N x 2, with half-axes 1 and `least` to 1."""
    squeeze, turn = rng.uniform(least, 1), rng.uniform(0, 2 * np.pi)
    c, s = math.cos(turn), math.sin(turn)
    circle = np.stack([np.cos(angle), squeeze * np.sin(angle)], axis=1)
    return np.asarray(circle @ np.array([[c, s], [-s, c]]))


def _cover(outline: np.ndarray, hole: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Fill an outline without its hole, with smooth edges.

    Returns:
        coverage: h x w float32, with MARGIN empty pixels around the outline.
        places: 2 x h x w float32, x and y of each pixel in the outline's coordinates.
    """
    low = np.floor(outline.min(axis=0)).astype(int) - MARGIN
    width, height = (np.ceil(outline.max(axis=0)).astype(int) + MARGIN - low).tolist()
    fine = np.zeros((height * OVERSAMPLING, width * OVERSAMPLING), dtype=np.uint8)
    for points, value in ((outline, 255), (hole, 0)):
        if points is not None:
            cv2.fillPoly(fine, [((points - low) * OVERSAMPLING).astype(np.int32)], value)
    coverage = cv2.resize(fine, (width, height), interpolation=cv2.INTER_AREA)
    places = np.mgrid[:height, :width][::-1] + low[:, None, None]
    return coverage.astype(np.float32) / 255, places.astype(np.float32)


def _lit(item: _Item, light: np.ndarray) -> np.ndarray:
    """Return the object's lit colours, 3 x h x w; the light is a unit vector, z to the viewer."""
    depth = cv2.distanceTransform((item.coverage >= 0.5).astype(np.uint8), cv2.DIST_L2, 5)
    bevel = min(item.bevel, float(depth.max()))
    height = 0.75 * bevel * np.sqrt(1 - (1 - np.minimum(depth / bevel, 1)) ** 2)
    height = cv2.GaussianBlur(height, (0, 0), max(0.8, 0.14 * bevel))  # no ridge in the middle
    slope_x = cv2.Sobel(height, -1, 1, 0, scale=1 / 8)
    slope_y = cv2.Sobel(height, -1, 0, 1, scale=1 / 8)
    steep = np.sqrt(1 + slope_x * slope_x + slope_y * slope_y)
    halfway = light + np.array([0, 0, 1], dtype=np.float32)
    diffuse, mirrored = (
        np.maximum((z - x * slope_x - y * slope_y) / steep, 0)
        for x, y, z in (light, halfway / np.linalg.norm(halfway))
    )
    return np.asarray(item.surface * (0.4 + 0.78 * diffuse) + 255 * item.gloss * mirrored**30)


def _pick_colour(
    rng: np.random.Generator, palette: list[tuple[int, int, int]], used: list[np.ndarray]
) -> np.ndarray:
    """Choose from three candidates the one farthest from all colours in use, and add it to them."""
    candidates = np.array(palette, dtype=np.float32)[rng.permutation(len(palette))[:3]]
    candidates *= rng.uniform(0.94, 1.06, size=candidates.shape).astype(np.float32)
    distances = np.linalg.norm(candidates[:, None] - np.array(used), axis=2)
    distances[:, 0] *= 0.7  # the background, which every object touches
    used.append(candidates[int(distances.min(axis=1).argmax())])
    return used[-1]


def _tinted(colour: np.ndarray, tone: np.ndarray) -> np.ndarray:
    """Return the colour, lighter where tone is above 0 and darker below: 3 x H x W float32."""
    return np.asarray(colour[:, None, None] * (1 + tone).astype(np.float32))


def _noise(rng: np.random.Generator, size: tuple[int, ...], cell: float) -> np.ndarray:
    """Smooth random values around 0, mostly within -1..1, `cell` pixels apart: H x W float32."""
    rows, columns = math.ceil(size[0] / cell) + 2, math.ceil(size[1] / cell) + 2
    coarse: cv2.typing.MatLike = rng.standard_normal((rows, columns), dtype=np.float32)
    return cv2.resize(coarse, (size[1], size[0]), interpolation=cv2.INTER_CUBIC)


def _paint(canvas: np.ndarray, item: _Item, light: np.ndarray) -> None:
    """Paint one object and its shadow on the canvas, in place."""
    (rows, columns), on_item = _windows(item.corner, item.coverage.shape, canvas.shape[1:])
    shadow = np.zeros_like(item.coverage)
    for spread, reach, darkness in ((2.0, 0.3, 0.5), (5.0, 1.3, 0.5)):  # contact, then the rest
        move = np.eye(2, 3)
        move[:, 2] = -light[:2] * item.thickness * reach
        cast = cv2.warpAffine(item.coverage, move, item.coverage.shape[::-1])
        shadow = np.maximum(shadow, darkness * cv2.GaussianBlur(cast, (0, 0), spread))
    window = canvas[:, rows, columns]
    window *= 1 - shadow[on_item]
    window += (_lit(item, light)[:, *on_item] - window) * item.coverage[on_item]


def _develop(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    """Turn the canvas into a photo: exposure, white balance, vignette and grain."""
    height, width = canvas.shape[1:]
    y, x = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)[None]
    gain = rng.uniform(0.85, 1.12) * (1 - rng.uniform(0, 0.14) * (x * x + y * y))
    grain = rng.uniform(1, 4) * rng.standard_normal((height, width), dtype=np.float32)
    balance = rng.uniform(0.96, 1.04, size=(3, 1, 1)).astype(np.float32)
    picture = canvas * gain.astype(np.float32) * balance + grain
    return np.ascontiguousarray(np.clip(picture, 0, 255).astype(np.uint8).transpose(1, 2, 0))


def _outlines(mask: np.ndarray) -> list[np.ndarray]:
    """Return N x 2 int32 polygons, one for each part of the mask, largest first.

    A LabelMe polygon has no holes, so a cut leads from the outer outline to the hole's outline,
    around it, and back along the same cut. OpenCV gives a hole's outline as the mask's pixels
    beside the hole; a filled polygon includes its border, so the hole keeps its pixels.

    Args:
        mask: H x W bool.
    """
    contours, hierarchy = cv2.findContours(
        mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE
    )
    outlines = []
    for number, (_, _, hole, parent) in enumerate(hierarchy[0]):
        if parent >= 0 or cv2.contourArea(contours[number]) < MIN_PART_PIXELS:
            continue
        polygon, holes = _simplified(contours[number]), []
        while hole >= 0:
            if cv2.contourArea(contours[hole]) >= MIN_PART_PIXELS:
                holes.append(_simplified(contours[hole]))
            hole = hierarchy[0][hole][0]
        while holes:  # the nearest first, so that no cut crosses another hole
            gaps = [np.linalg.norm(polygon[:, None] - other, axis=2) for other in holes]
            nearest = int(np.argmin([gap.min() for gap in gaps]))
            start, stop = np.unravel_index(gaps[nearest].argmin(), gaps[nearest].shape)
            around = np.roll(holes.pop(nearest), -stop, axis=0)
            polygon = np.concatenate([polygon[: start + 1], around, around[:1], polygon[start:]])
        outlines.append(polygon)
    return sorted(outlines, key=cv2.contourArea, reverse=True)


def _simplified(contour: np.ndarray) -> np.ndarray:
    return np.asarray(cv2.approxPolyDP(contour, TOLERANCE, closed=True))[:, 0]
