"""Scenes to pre-train on: layered objects with exact masks, drawn by torch on any device.

They follow the dead leaves model (Lee, Mumford & Huang, 2001): objects that occlude each other have
the edges, T-junctions and scales of photographs, which makes the weights transfer. Other properties
of photographs are added: shading, texture, parts, similar neighbours, shadows, blur, noise, JPEG,
greyscale.

All scenes of a batch are drawn together, object k of each at once: B scenes, S pixels a side;
smooth fields have S / 2. Coordinates are (x, y) pixels, colours 0..1 RGB.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

VERSION = 2  # of the drawing: raise it when the same seed draws other pixels
MAX_OBJECTS = 20
NUM_TEXTURES = 6
MIN_PIXELS = 24  # smaller regions are remnants of occluded objects
MAX_FRACTION = 0.6  # of the image; larger regions act as background


@dataclass
class Scenes:
    """Images and their label maps.

    Attributes:
        images: B x 3 x S x S float32, RGB 0..255, 0 in the padding.
        objects: B x S x S int64, 0 for background, k for the object visible there.
        parts: B x S x S int64, 0 or the part visible there; a part lies inside an object.
        valid: B x S x S bool, image and not padding.
    """

    images: Tensor
    objects: Tensor
    parts: Tensor
    valid: Tensor


def draw_scenes(generator: torch.Generator, batch_size: int, size: int) -> Scenes:
    """Draw a batch of scenes on the generator's device; the pixels depend on its state only.

    Args:
        size: side of the square frame in pixels, a multiple of 16.
    """
    return _Painter(generator, batch_size, size).paint()


def region_masks(
    scenes: Scenes, per_scene: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw visible regions at random, objects and parts alike.

    Args:
        per_scene: regions of each scene; fewer if the scene has fewer.

    Returns:
        scene_index: P int64.
        masks: P x S x S bool, none of them empty.
    """
    batch, device = len(scenes.objects), scenes.objects.device
    most = MAX_OBJECTS + 1
    maps = torch.cat([scenes.objects, scenes.parts + most], dim=1).flatten(1)  # B x 2SS
    areas = torch.zeros(batch, 2 * most, device=device)
    areas.scatter_add_(1, maps, torch.ones_like(maps, dtype=areas.dtype))
    areas[:, [0, most]] = 0  # background, and no part
    pixels = scenes.valid.flatten(1).sum(dim=1, keepdim=True)
    usable = (areas >= MIN_PIXELS) & (areas <= MAX_FRACTION * pixels)
    keys = torch.rand(usable.shape, generator=generator, device=device) * usable
    drawn, numbers = keys.topk(per_scene, dim=1)
    scene_index, place = torch.nonzero(drawn > 0, as_tuple=True)
    number = numbers[scene_index, place]
    of_object = number < most
    source = torch.where(
        of_object[:, None, None], scenes.objects[scene_index], scenes.parts[scene_index]
    )
    return scene_index, source == torch.where(of_object, number, number - most)[:, None, None]


class _Painter:
    """Draws one batch."""

    def __init__(self, generator: torch.Generator, batch: int, size: int) -> None:
        self.generator, self.device = generator, generator.device
        self.batch, self.size, self.half = batch, size, size // 2
        axis = (torch.arange(self.half, device=self.device) + 0.5) * 2
        self.y, self.x = axis[:, None], axis[None, :]  # of the half-size grid, in pixels

    # --- random values: B or B x ... ---------------------------------------------------------

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        draw = torch.rand(self.batch, *shape, generator=self.generator, device=self.device)
        return low + (high - low) * draw

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(self.batch, *shape, generator=self.generator, device=self.device)

    def chance(self, probability: float, *shape: int) -> Tensor:
        return self.uniform(0, 1, *shape) < probability

    def noise(self, channels: int, cells: int, side: int) -> Tensor:
        """Smooth noise around 0 with about `cells` bumps per side: B x channels x side x side."""
        coarse = self.normal(channels, cells + 1, cells + 1)
        if cells + 1 >= side:
            return coarse[..., :side, :side]
        return F.interpolate(coarse, (side, side), mode="bicubic", align_corners=True)

    # --- the image -----------------------------------------------------------------------------

    def paint(self) -> Scenes:
        size = self.size
        textures = self._textures()
        warp = self.noise(2, 6, self.half) + 0.5 * self.noise(2, 16, self.half)
        canvas = self._background(textures)
        objects = torch.zeros(self.batch, size, size, dtype=torch.int64, device=self.device)
        parts = torch.zeros_like(objects)
        light = self._unit(self.uniform(0, 2 * math.pi))
        # A scene has a degree of similarity: photographs often show many objects of one kind side
        # by side, which only an edge separates.
        self.similarity = torch.where(
            self.chance(0.55), self.uniform(0.6, 1.0), self.uniform(0, 0.3)
        )
        traits = self._traits()
        for number in range(1, MAX_OBJECTS + 1):
            here = {name: values[:, number - 1] for name, values in traits.items()}
            body, piece, shade, outside, solid = self._shape(here, warp, light)
            shown = here["exists"][:, None, None]
            inside = (body < 0) & shown
            in_part = inside & (piece < 0) & here["has_part"][:, None, None]
            objects = torch.where(inside, number, objects)
            parts = torch.where(inside, torch.where(in_part, number, 0), parts)

            colour = self._coloured(here, textures, shade, piece)
            shadow = here["shadow"][:, None, None] * torch.exp(
                -outside.clamp_min(0) / here["shadow_width"][:, None, None]
            )
            canvas = canvas * (1 - (shadow * shown)[:, None])
            alpha = (0.5 - body).clamp(0, 1) * shown * solid
            canvas = torch.lerp(canvas, colour, alpha[:, None])
        return self._develop(canvas, objects, parts)

    def _traits(self) -> dict[str, Tensor]:
        """Properties of each object, by name: B x MAX_OBJECTS, B x MAX_OBJECTS x 3 for colours."""
        # The order of the draws decides the pixels: another order needs another VERSION.
        k, placement = MAX_OBJECTS, self._placement()
        other = self.uniform(0, 1, k, 3)
        shift = self.uniform(-0.45, 0.45, k, 3)
        shift = torch.where(self.chance(0.3)[:, None, None], shift * 0.15, shift)  # low contrast
        colour = self._alike(self._palette(k)) + 0.04 * self.normal(k, 3)
        translucent = self.chance(0.12)[:, None]
        return {
            **placement,
            **self._form(),
            "colour": colour.clamp(0.02, 0.98),
            "second": (colour + shift).clamp(0, 1),
            "part_colour": torch.lerp(colour, other, self.uniform(0.15, 0.9, k)[..., None]),
            **self._surface(),
            "opacity": torch.where(translucent, self._alike(self.uniform(0.45, 0.9, k)), 1.0),
        }

    def _alike(self, values: Tensor) -> Tensor:
        """Move every object's value towards that of the scene's first, by its similarity."""
        share = self.similarity.view(-1, *[1] * (values.ndim - 1))
        return torch.lerp(values, values[:, :1], share)

    def _chosen(self, probability: float) -> Tensor:
        """Yes or no for each object; the same for all in scenes of high similarity."""
        own = self.chance(probability, MAX_OBJECTS)
        return torch.where((self.similarity > 0.5)[:, None], own[:, :1], own)

    def _placement(self) -> dict[str, Tensor]:
        """Which objects exist, where, how large, how elongated, and at which angle."""
        k, alike = MAX_OBJECTS, self._alike
        typical = torch.exp(self.uniform(math.log(9), math.log(62)))[:, None] * (self.size / 256)
        radius = typical * torch.exp(alike(0.55 * self.normal(k)) + 0.1 * self.normal(k))
        # As many as cover the image 0.25 to 1.6 times, and at least three.
        fill = self.uniform(0.25, 1.6) * self.size**2 / (math.pi * typical[:, 0] ** 2)
        count = fill.clamp(3, k).round()
        exists = torch.arange(k, device=self.device)[None] < count[:, None]
        stretch = torch.where(
            self._chosen(0.3), alike(self.uniform(1.5, 9, k)), alike(self.uniform(1, 1.8, k))
        )
        norm = alike(self.uniform(0, 1, k, 3) ** 2)
        norm = norm / norm.sum(dim=2, keepdim=True)
        aligned = self.chance(0.3)[:, None]
        angle = torch.where(
            aligned,
            self.uniform(0, 2 * math.pi, 1) + 0.1 * self.normal(k),
            self.uniform(0, 2 * math.pi, k),
        )
        # Centres: anywhere, or on a jittered grid.
        scattered = self.uniform(-0.03, 1.03, k, 2) * self.size
        step = (2.1 * typical * self.uniform(0.8, 1.3, 1)).clamp_min(self.size / 8)
        columns = (self.size / step).ceil()
        number = torch.arange(k, device=self.device)[None] + self.uniform(0, 1, 1)
        rows = torch.stack([number % columns, (number / columns).floor()], dim=2)
        rows = rows * step[..., None] + self.uniform(0, 1, 1, 2) * self.size / 2
        rows = rows + 0.12 * step[..., None] * self.normal(k, 2)
        centre = torch.where(self.chance(0.25)[:, None, None], rows, scattered)

        return {
            "exists": exists,
            "x": centre[..., 0],
            "y": centre[..., 1],
            "radius": radius.clamp(2.2 * self.size / 256, 0.55 * self.size),
            "stretch": stretch,
            "norm": norm,
            "angle": angle,
        }

    def _form(self) -> dict[str, Tensor]:
        """How outlines deviate from the ellipse: bends, lobes, holes, and a part."""
        k, alike, chosen = MAX_OBJECTS, self._alike, self._chosen
        return {
            "bend": torch.where(chosen(0.3), alike(self.uniform(-0.8, 0.8, k)), 0.0),
            "taper": torch.where(chosen(0.3), alike(self.uniform(0.2, 0.85, k)), 0.0),
            "fade": torch.where(chosen(0.15), alike(self.uniform(0.3, 0.8, k)), 0.0),
            "wave": torch.where(chosen(0.1), alike(self.uniform(0.3, 1.2, k)), 0.0),
            "lobes": torch.where(
                chosen(0.45)[..., None], alike(0.16 * self.normal(k, 4)), torch.tensor(0.0)
            ),
            "turn": self.uniform(0, 2 * math.pi, k),
            "warp": torch.where(chosen(0.5), alike(self.uniform(0, 0.22, k)), 0.02),
            "hole": torch.where(chosen(0.12), alike(self.uniform(0.3, 0.75, k)), 0.0),
            "has_part": chosen(0.3),
            "part_place": alike(self.uniform(-0.7, 0.7, k, 2)),
            "part_size": alike(self.uniform(0.25, 0.65, k)),
            "joined": chosen(0.25),  # the part may protrude and belongs to the object's outline
        }

    def _surface(self) -> dict[str, Tensor]:
        """Texture, relief, rim and shadow."""
        k, alike, chosen = MAX_OBJECTS, self._alike, self._chosen
        return {
            "texture": (alike(self.uniform(0, 1, k)) * NUM_TEXTURES).long() % NUM_TEXTURES,
            "contrast": alike(self.uniform(0, 1, k)) ** 1.5,
            "bevel": torch.exp(alike(self.uniform(math.log(1.5), math.log(30), k))),
            "relief": torch.where(chosen(0.7), alike(self.uniform(0.05, 0.55, k)), 0.0),
            "rim": torch.where(chosen(0.4), alike(self.uniform(-0.6, 0.35, k)), 0.0),
            "rim_width": alike(self.uniform(0.8, 3, k)),
            "shadow": torch.where(chosen(0.55), alike(self.uniform(0.1, 0.6, k)), 0.0),
            "shadow_width": alike(self.uniform(1.5, 7, k)),
        }

    def _palette(self, count: int) -> Tensor:
        """Colours of one scene, B x count x 3: any hue, one saturation per scene."""
        brightness = self.uniform(0.05, 0.95, count, 1)
        tint = self.normal(count, 3)
        tint = tint - tint.mean(dim=2, keepdim=True)
        vivid = self.uniform(0, 1, 1, 1) ** 2 * 0.35
        return brightness + vivid * tint

    def _shape(
        self, here: dict[str, Tensor], warp: Tensor, light: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """One object of each scene.

        Returns:
            body, piece: B x S x S, approximate signed distance in pixels from the edge of the
                object and of its part; negative inside.
            shade: B x S x S, lighter (above 0) or darker by relief and rim.
            outside: as body, of the object without holes; casts the shadow.
            solid: B x S x S, opacity 0..1; objects may fade towards one end.
        """

        def of(name: str) -> Tensor:
            return here[name][:, None, None]

        radius = of("radius")
        bump = of("warp") * radius
        dx = self.x - of("x") + bump * warp[:, 0]
        dy = self.y - of("y") + bump * warp[:, 1]
        cos, sin = here["angle"].cos()[:, None, None], here["angle"].sin()[:, None, None]
        narrow = radius * of("stretch").rsqrt()
        u = (cos * dx + sin * dy) / (radius * of("stretch").sqrt())
        v = (cos * dy - sin * dx) / narrow
        v = v + of("bend") * of("stretch") * (u * u - 0.3) + of("wave") * torch.sin(5 * u)
        v = v / (1 - of("taper") * u).clamp_min(0.12)
        solid = of("opacity") * (1 - of("fade") * (0.5 + 0.5 * u).clamp(0, 1))
        distance = self._norm(u, v, here)
        # The part: a smaller shape of the same kind, inside or protruding.
        place, share = here["part_place"], of("part_size")
        inner = self._norm(
            (u - place[:, 0, None, None]) / share, (v - place[:, 1, None, None]) / share, here
        )
        piece = (inner - 1) * share
        body = distance - 1
        body = torch.where(of("joined"), torch.minimum(body, piece), body)
        outside = body
        hole = of("hole")
        body = torch.where(hole > 0, torch.maximum(body, hole - distance), body)
        fields = []
        for field in (body, piece, outside):
            gx = F.pad((field[:, :, 2:] - field[:, :, :-2]) / 4, (1, 1), mode="replicate")
            gy = F.pad(((field[:, 2:] - field[:, :-2]) / 4)[None], (0, 0, 1, 1), mode="replicate")[
                0
            ]
            steep = torch.sqrt(gx * gx + gy * gy).clamp_min(1e-4)
            fields.append((field / steep).clamp(-60, 60))
            if len(fields) == 1:
                slope = (gx * light[:, 0, None, None] + gy * light[:, 1, None, None]) / steep
        depth = (-fields[0]).clamp_min(0)
        shade = of("relief") * slope * torch.exp(-depth / of("bevel"))
        shade = shade + of("rim") * torch.exp(-((depth / of("rim_width")) ** 2))
        halves = torch.stack([*fields, shade, solid], dim=1)
        full = F.interpolate(halves, scale_factor=2, mode="bilinear")
        body, piece, outside, shade, solid = full.unbind(dim=1)
        return body, piece, shade, outside, solid

    @staticmethod
    def _norm(u: Tensor, v: Tensor, here: dict[str, Tensor]) -> Tensor:
        """A mixture of circle, square and diamond, with lobes around it."""
        a, b = u.abs(), v.abs()
        weight = here["norm"][:, :, None, None]
        round_ = torch.sqrt(u * u + v * v + 1e-6)
        distance = weight[:, 0] * round_ + weight[:, 1] * torch.maximum(a, b)
        distance = distance + weight[:, 2] * 0.75 * (a + b)
        # cos of 2, 3, 4 and 5 times the angle, by multiplication of unit complex numbers
        cos, sin = u / round_, v / round_
        c, s, ripple = cos, sin, torch.ones_like(cos)
        for place in range(4):
            c, s = c * cos - s * sin, s * cos + c * sin
            ripple = ripple + here["lobes"][:, place, None, None] * (
                c if place % 2 else torch.lerp(c, s, 0.5)
            )
        return distance / ripple.clamp_min(0.35)

    def _coloured(
        self, here: dict[str, Tensor], textures: Tensor, shade: Tensor, piece: Tensor
    ) -> Tensor:
        """Return the object's colours at every pixel, B x 3 x S x S."""

        def of(name: str) -> Tensor:
            return here[name][:, :, None, None]

        rows = torch.arange(self.batch, device=self.device)
        pattern = textures[rows, here["texture"]][:, None]
        share = pattern * here["contrast"][:, None, None, None]
        colour = torch.lerp(of("colour"), of("second"), share)
        in_part = (0.5 - piece).clamp(0, 1) * here["has_part"][:, None, None]
        colour = torch.lerp(colour, of("part_colour"), in_part[:, None])
        return colour * (1 + shade[:, None]) + 0.25 * shade[:, None].clamp_min(0)

    def _textures(self) -> Tensor:
        """Patterns of each scene, B x NUM_TEXTURES x S x S, 0..1."""
        size = self.size
        fine, coarse = self.noise(1, size // 3, size), self.noise(2, 24, size)
        grain = self.normal(1, size, size)
        bend = F.interpolate(self.noise(2, 5, self.half), (size, size), mode="bilinear")
        axis = torch.arange(size, device=self.device, dtype=torch.float32)
        angle = self.uniform(0, math.pi, 2)[..., None, None]
        along = angle.cos() * axis[None, None, None] + angle.sin() * axis[None, None, :, None]
        pitch = torch.exp(self.uniform(math.log(1.2), math.log(9), 2))[..., None, None]
        stripes = torch.sin(along / pitch + self.uniform(0.5, 5, 2)[..., None, None] * bend)
        checks = stripes[:, :1] * stripes[:, 1:]
        spots = (coarse[:, 1:] - 0.8) * 6
        mixed = 0.6 * coarse[:, :1] + 0.5 * fine + 0.25 * grain
        patterns = torch.cat([mixed, stripes[:, :1], fine, spots, grain * 0.8, checks], dim=1)
        return (0.5 + 0.4 * patterns).clamp(0, 1)

    def _background(self, textures: Tensor) -> Tensor:
        """Colours of the background, B x 3 x S x S."""
        first, second = self._palette(2)[..., None, None].unbind(dim=1)
        slope = self.noise(1, 1, self.size) * self.uniform(0, 0.15, 1, 1, 1)
        rows = torch.arange(self.batch, device=self.device)
        number = (self.uniform(0, 1) * NUM_TEXTURES).long() % NUM_TEXTURES
        share = textures[rows, number][:, None] * (self.uniform(0, 1, 1, 1, 1) ** 2)
        blotches = self.noise(1, 4, self.size) * self.uniform(0, 0.1, 1, 1, 1)
        return (torch.lerp(first, second, share) + slope + blotches).clamp(0, 1)

    def _develop(self, canvas: Tensor, objects: Tensor, parts: Tensor) -> Scenes:
        """Add a camera's effects: exposure, blur, noise, JPEG, greyscale, and the aspect ratio."""
        size = self.size
        light = 1 + self.noise(1, 1, size) * self.uniform(0, 0.2, 1, 1, 1)
        image = (canvas.clamp(0, 1.3) * light).clamp_min(0)
        soft = _blurred(image)
        share = torch.where(self.chance(0.5), self.uniform(0, 1), torch.zeros(()).to(self.device))
        image = torch.lerp(image, soft, share[:, None, None, None])
        low, high = self.uniform(0, 0.3), self.uniform(0.6, 1.1)
        normal = self.chance(0.6)
        low, high = torch.where(normal, 0, low), torch.where(normal, 1, high)
        image = low[:, None, None, None] + (high - low)[:, None, None, None] * image
        image = image.clamp(1e-4, 1) ** torch.exp(0.3 * self.normal(1, 1, 1))
        grey = image.mean(dim=1, keepdim=True).expand_as(image)
        image = torch.where(self.chance(0.25, 1, 1, 1), grey, image)
        strength = self.uniform(0, 1, 1, 1, 1) ** 3 * 0.1
        grain = torch.where(
            self.chance(0.5, 1, 1, 1), self.normal(1, size, size), self.normal(3, size, size)
        )
        image = (image + strength * grain).clamp(0, 1) * 255
        image = torch.where(self.chance(0.5, 1, 1, 1), _jpeg(image, self.uniform(0.3, 3.5)), image)
        # SAM's frame: the longest side fills it, the rest is padding at the bottom or right.
        short = torch.where(self.chance(0.25), self.uniform(0.5, 1), self.uniform(0.66, 1.1))
        short = (short.clamp_max(1) * size).round()[:, None, None]
        axis = torch.arange(size, device=self.device)
        wide = self.chance(0.6)[:, None, None]
        valid = torch.where(wide, axis[None, :, None] < short, axis[None, None, :] < short)
        return Scenes(image.round() * valid[:, None], objects * valid, parts * valid, valid)

    @staticmethod
    def _unit(angle: Tensor) -> Tensor:
        return torch.stack([angle.cos(), angle.sin()], dim=1)


def _blurred(image: Tensor) -> Tensor:
    """A Gaussian of sigma about 1.6 pixels, per channel."""
    kernel = torch.tensor([0.05, 0.12, 0.2, 0.26, 0.2, 0.12, 0.05], device=image.device)
    channels = image.shape[1]
    across = (kernel / kernel.sum()).view(1, 1, 1, 7).expand(channels, 1, 1, 7)
    padded = F.pad(image, (3, 3, 3, 3), mode="replicate")
    return F.conv2d(
        F.conv2d(padded, across, groups=channels), across.transpose(2, 3), groups=channels
    )


def _jpeg(image: Tensor, coarseness: Tensor) -> Tensor:
    """JPEG's artefacts: the 8 x 8 cosine transform, quantised with Annex K's luminance table.

    Args:
        image: B x 3 x S x S, 0..255.
        coarseness: B, factor on the table; 1 is quality 50.
    """
    place = torch.arange(8, device=image.device, dtype=torch.float32)
    basis = torch.cos((2 * place[None] + 1) * place[:, None] * math.pi / 16) / 2
    basis[0] /= math.sqrt(2)
    table = torch.tensor(_LUMINANCE, device=image.device, dtype=torch.float32).view(8, 8)
    batch, channels, size, _ = image.shape
    blocks = image.view(batch, channels, size // 8, 8, size // 8, 8).transpose(3, 4) - 128
    step = (table * coarseness[:, None, None]).clamp_min(1)[:, None, None, None]
    rounded = (basis @ blocks @ basis.T / step).round() * step
    blocks = (basis.T @ rounded @ basis + 128).transpose(3, 4)
    return blocks.reshape(batch, channels, size, size).clamp(0, 255)


_LUMINANCE: Any = [
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55,
    14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87, 80, 62,
    18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92,
    49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99,
]  # fmt: skip
