"""Named resolutions of Open-Sora 1.x: each is a set of sizes of about the same area.

The published tables are keyed by the aspect ratio *height over width*, rounded to two digits (not
always correctly), and the nearest key decides, not the nearest true ratio. Both are kept as they
are, because a model trained with these buckets has seen these sizes. For people, an aspect ratio
is width:height everywhere in Kinema; `size_for` is the one place that flips it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from kinema.config.errors import ConfigError


@dataclass(frozen=True)
class Resolution:
    """One named resolution (or one explicit size) and the sizes it stands for."""

    name: str
    pixels: int
    """Area that a clip is compared with, in pixels."""
    ratios: tuple[float, ...]
    """Published aspect keys, height over width; the order decides ties."""
    sizes: tuple[tuple[int, int], ...]
    """(height, width) in pixels, one per ratio."""

    def closest(self, height: NDArray[np.int64], width: NDArray[np.int64]) -> NDArray[np.int64]:
        """Index into `sizes` of the ratio nearest to height / width, elementwise."""
        keys = np.asarray(self.ratios)
        ascending = np.argsort(keys, kind="stable")
        ratio = height / width
        right = np.searchsorted(keys[ascending], ratio).clip(1, max(len(keys) - 1, 1))
        below = ascending[right - 1]
        above = ascending[np.minimum(right, len(keys) - 1)]
        to_below, to_above = np.abs(keys[below] - ratio), np.abs(keys[above] - ratio)
        first_wins = (to_below == to_above) & (below < above)
        return np.where((to_below < to_above) | first_wins, below, above)


_ASPECTS = {
    "3:8": 0.38, "9:21": 0.43, "12:25": 0.48, "1:2": 0.50, "9:17": 0.53, "27:50": 0.54,
    "9:16": 0.56, "5:8": 0.62, "2:3": 0.67, "3:4": 0.75, "1:1": 1.00, "4:3": 1.33,
    "3:2": 1.50, "16:9": 1.78, "17:9": 1.89, "2:1": 2.00, "50:27": 2.08,
}  # fmt: skip
"""The published names (height:width) of the keys of the screen-shaped tables."""

_SCREEN = tuple(_ASPECTS.values())
_SCREEN_4K = (*_SCREEN[:6], 0.62, 0.56, *_SCREEN[8:])
_SQUARE = (
    0.25, 0.26, 0.27, 0.28, 0.32, 0.33, 0.35, 0.4, 0.42, 0.48, 0.5, 0.52, 0.57, 0.6, 0.68, 0.72,
    0.78, 0.82, 0.88, 0.94, 1.0, 1.07, 1.13, 1.21, 1.29, 1.38, 1.46, 1.67, 1.75, 2.0, 2.09, 2.4,
    2.5, 2.89, 3.0, 3.11, 3.62, 3.75, 3.88, 4.0,
)  # fmt: skip
_SQUARE_2880 = (
    0.25, 0.26, 0.27, 0.28, 0.32, 0.33, 0.34, 0.4, 0.42, 0.47, 0.49, 0.51, 0.55, 0.59, 0.68, 0.72,
    0.78, 0.83, 0.89, 0.93, 1.0, 1.07, 1.12, 1.21, 1.28, 1.39, 1.47, 1.7, 1.82, 2.03, 2.13, 2.39,
    2.5, 2.92, 3.0, 3.12, 3.68, 3.82, 3.95, 4.0,
)  # fmt: skip
_SQUARE_CELLS = """
    8x32 8x31 8x30 8x29 9x28 9x27 9x26 10x25 10x24 11x23 11x22 11x21 12x21 12x20 13x19 13x18 14x18
    14x17 15x17 15x16 16x16 16x15 17x15 17x14 18x14 18x13 19x13 20x12 21x12 22x11 23x11 24x10 25x10
    26x9 27x9 28x9 29x8 30x8 31x8 32x8
"""
"""Height x width of the square-based sizes, in sixteenths of the side."""
_LISTED = {
    "144p": """
        117x312 125x291 133x277 135x270 139x262 141x260 144x256 151x241 156x234 166x221
        192x192 221x165 235x156 256x144 263x139 271x135 277x132
    """,
    "240p": """
        196x522 210x490 222x462 226x452 232x438 236x436 240x426 252x404 262x393 276x368
        320x320 370x278 392x262 426x240 440x232 452x226 462x222
    """,
    "360p": """
        294x784 314x732 332x692 340x680 350x662 352x652 360x640 380x608 392x588 416x554
        480x480 554x416 588x392 640x360 660x350 678x340 692x332
    """,
    "480p": """
        392x1046 420x980 444x925 452x904 466x880 470x870 480x854 506x810 522x784 554x738
        640x640 740x555 784x522 854x480 880x466 906x454 924x444
    """,
    "720p": """
        588x1568 628x1466 666x1388 678x1356 698x1318 706x1306 720x1280 758x1212 784x1176
        832x1110 960x960 1108x832 1176x784 1280x720 1320x698 1358x680 1386x666
    """,
    "1080p": """
        882x2352 942x2198 998x2080 1018x2036 1048x1980 1058x1958 1080x1920 1138x1820
        1176x1764 1248x1664 1440x1440 1662x1246 1764x1176 1920x1080 1980x1048 2036x1018
        2078x998
    """,
    "2k": """
        1176x3136 1256x2930 1330x2770 1358x2716 1398x2640 1412x2612 1440x2560 1518x2428
        1568x2352 1662x2216 1920x1920 2218x1664 2352x1568 2560x1440 2638x1396 2716x1358
        2772x1330
    """,
    "4k": """
        1764x4704 1886x4400 1996x4158 2036x4072 2096x3960 2118x3918 2276x3642 2160x3840
        2352x3528 2494x3326 2880x2880 3326x2494 3528x2352 3840x2160 3958x2096 4072x2036
        4156x1994
    """,
    "2880": """
        1408x5760 1408x5568 1408x5376 1408x5184 1600x4992 1600x4800 1600x4672 1792x4480
        1792x4288 1920x4096 1920x3904 1920x3776 2112x3840 2112x3584 2304x3392 2304x3200
        2496x3200 2496x3008 2688x3008 2688x2880 2880x2880 2880x2688 3008x2688 3008x2496
        3200x2496 3200x2304 3392x2304 3584x2112 3840x2112 3904x1920 4096x1920 4288x1792
        4480x1792 4672x1600 4800x1600 4992x1600 5184x1408 5376x1408 5568x1408 5760x1408
    """,
}
"""Height x width in pixels of the sizes that no simple rule gives."""


def _parse(text: str, unit: int = 1) -> tuple[tuple[int, int], ...]:
    pairs = (item.split("x") for item in text.split())
    return tuple((int(height) * unit, int(width) * unit) for height, width in pairs)


def _named() -> dict[str, Resolution]:
    screen = {
        "144p": 256 * 144, "240p": 426 * 240, "360p": 640 * 360, "480p": 854 * 480,
        "720p": 1280 * 720, "1080p": 1920 * 1080, "2k": 2560 * 1440, "4k": 3840 * 2160,
    }  # fmt: skip
    found = [
        Resolution(n, p, _SCREEN_4K if n == "4k" else _SCREEN, _parse(_LISTED[n]))
        for n, p in screen.items()
    ]
    for side in (256, 512, 1024, 2048):
        sizes = _parse(_SQUARE_CELLS, side // 16)
        found.append(Resolution(str(side), side * side, _SQUARE, sizes))
    found.append(Resolution("2880", 2880 * 2880, _SQUARE_2880, _parse(_LISTED["2880"])))
    return {r.name: r for r in found}


NAMED = _named()
"""Every named resolution of Open-Sora 1.x."""

_ASPECT = re.compile(r"([1-9]\d*):([1-9]\d*)")
_EXPLICIT = re.compile(r"([1-9]\d*)x([1-9]\d*)")


def resolution(name: str) -> Resolution:
    """A named resolution such as `"480p"`, or an explicit size `"WIDTHxHEIGHT"` such as `"64x64"`.

    An explicit size has one aspect: every clip that is large enough is resized and cropped to it.

    Raises:
        ConfigError: neither; names the nearest.
    """
    if name in NAMED:
        return NAMED[name]
    match = _EXPLICIT.fullmatch(name)
    if match is None:
        near = get_close_matches(name, NAMED, n=1)
        known = ", ".join(sorted(NAMED, key=lambda n: NAMED[n].pixels))
        raise ConfigError(
            f"resolution {name!r} is neither known nor WIDTHxHEIGHT",
            hint=(f"did you mean {near[0]!r}? " if near else "") + f"known: {known}",
        )
    width, height = int(match[1]), int(match[2])
    return Resolution(name, height * width, (height / width,), ((height, width),))


def aspect_names(name: str) -> list[str]:
    """Aspect ratios that `size_for` accepts for a resolution, width:height."""
    found = resolution(name)
    if found.name not in NAMED:
        return []
    return [_flip(a) for a, ratio in _ASPECTS.items() if ratio in found.ratios]


def size_for(name: str, aspect: str | None = None) -> tuple[int, int]:
    """(height, width) in pixels of a resolution at an aspect ratio written width:height.

    Args:
        name: a named resolution, or an explicit WIDTHxHEIGHT (which takes no aspect).
        aspect: such as `"16:9"`, which is landscape; `"32:18"` is the same.

    Raises:
        ConfigError: the resolution has no size of that aspect; names those it has.
    """
    found = resolution(name)
    if found.name not in NAMED:
        if aspect is not None:
            raise ConfigError(
                f"size {name} leaves no choice of aspect ratio", hint="leave the aspect ratio out"
            )
        return found.sizes[0]
    names = aspect_names(name)
    same = [n for n in names if aspect is not None and _ratio(n) == _ratio(aspect)]
    if not same:
        raise ConfigError(
            f"resolution {name!r} has no size of aspect ratio {aspect!r} (width:height)",
            hint=f"one of {', '.join(names)}",
        )
    return found.sizes[found.ratios.index(_ASPECTS[_flip(same[0])])]


def _ratio(aspect: str) -> Fraction | None:
    """16:10 is 8:5; None: no ratio."""
    match = _ASPECT.fullmatch(aspect)
    return None if match is None else Fraction(int(match[1]), int(match[2]))


def _flip(aspect: str) -> str:
    first, second = aspect.split(":")
    return f"{second}:{first}"
