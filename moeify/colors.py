"""One scale of colors for expert load: even steps for the eye, in OKLab (Ottosson 2020), for light and dark pages."""

from __future__ import annotations

import math

LEVELS = 24
REACH = 8.0  # times the fair share, up and down: what lies beyond has the color of the end

_LIGHT = ((0.965, 0.012, 250), (0.34, 0.13, 262))  # lightness, chroma and hue of both ends
_DARK = ((0.25, 0.02, 262), (0.93, 0.075, 220))


def level(ratio: float) -> int:
    """Return the step, of `LEVELS`, for a load in multiples of the fair share: the fair share is the middle."""
    if ratio <= 0:
        return 0
    place = (math.log(ratio) / math.log(REACH) + 1) / 2
    return round(min(max(place, 0.0), 1.0) * (LEVELS - 1))


def even_level(share: float) -> int:
    """Return the step for a number between 0 and 1."""
    return round(min(max(share, 0.0), 1.0) * (LEVELS - 1))


def ramp(*, dark: bool) -> list[tuple[int, int, int]]:
    """Return the colors of all steps as (red, green, blue), 0 to 255."""
    start, end = _DARK if dark else _LIGHT
    steps = [n / (LEVELS - 1) for n in range(LEVELS)]
    return [_rgb(*(a + (b - a) * t for a, b in zip(start, end, strict=True))) for t in steps]


def _rgb(lightness: float, chroma: float, hue: float) -> tuple[int, int, int]:
    """Return a color of OKLCH in sRGB."""
    a, b = chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue))
    cones = (
        (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3,
        (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3,
        (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3,
    )
    rows = (
        (4.0767416621, -3.3077115913, 0.2309699292),
        (-1.2684380046, 2.6097574011, -0.3413193965),
        (-0.0041960863, -0.7034186147, 1.7076147010),
    )
    red, green, blue = (_byte(sum(r * c for r, c in zip(row, cones, strict=True))) for row in rows)
    return red, green, blue


def _byte(linear: float) -> int:
    value = min(max(linear, 0.0), 1.0)
    value = 12.92 * value if value <= 0.0031308 else 1.055 * value ** (1 / 2.4) - 0.055
    return round(value * 255)
