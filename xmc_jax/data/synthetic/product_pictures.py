"""Pictures of synthetic products, drawn in numpy; Pillow only makes PNGs of them."""

import io

import numpy as np

_RGB = np.array(
    [
        (214, 39, 40),
        (245, 133, 20),
        (240, 215, 40),
        (44, 145, 50),
        (40, 195, 190),
        (35, 75, 190),
        (125, 55, 165),
        (245, 130, 185),
        (120, 75, 40),
        (25, 25, 30),
    ],
    np.float64,
)


def render(rng: np.random.Generator, attributes: tuple[int, ...], pixels: int) -> bytes:
    """PNG of one thing on a pale ground: a shape, its colour, its pattern, and much that varies.

    Args:
        rng: of place, size, turn, light, ground and grain.
        attributes: numbers of shape, colour, pattern and the pattern's colour, as `synthetic` has
            them; -1 for none.
    """
    import PIL.Image

    shape, colour, pattern, second = attributes
    axis = (np.arange(pixels) + 0.5) / pixels * 2 - 1
    dx, dy = rng.uniform(-0.14, 0.14, 2)
    angle, scale = rng.uniform(-0.22, 0.22), rng.uniform(0.62, 0.82)
    x, y = (axis - dx)[None] / scale, (axis - dy)[:, None] / scale
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    sharpness = pixels * scale / 2  # pixels in a unit of u: an edge is one pixel wide
    distance = _distance(shape, u, v)
    inside = np.clip(0.5 - distance * sharpness, 0, 1)[..., None]
    phase, ground = rng.random(), rng.uniform(0.82, 1.0, 3) * 255
    first, other = np.clip(_RGB[[colour, second]] + rng.normal(0, 10, (2, 3)), 0, 255)
    mix = np.clip(0.5 + _ornament(pattern, u, v, distance, phase) * sharpness, 0, 1)[..., None]
    light = 1 + rng.uniform(0.05, 0.2) * (u * rng.uniform(-1, 1) - v)[..., None] / 2
    thing = (first * (1 - mix) + other * mix) * light
    cell = max(1, pixels // 32)  # of the noise
    grain = rng.integers(-7, 8, size=(-(-pixels // cell),) * 2)
    grain = grain.repeat(cell, 0).repeat(cell, 1)[:pixels, :pixels, None]
    image = np.clip(ground * (1 - inside) + thing * inside + grain, 0, 255)
    file = io.BytesIO()
    PIL.Image.fromarray(image.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def _distance(shape: int, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """f64[n, n]: about the distance to a shape's edge, negative inside; v points down."""
    radius, width, height = np.hypot(u, v), np.abs(u), np.abs(v)
    if shape == 0:  # circle
        return radius - 0.85
    if shape == 1:  # square
        return np.maximum(width, height) - 0.78
    if shape == 2:  # triangle
        return np.maximum(v, 0.866 * width - 0.5 * v) - 0.5
    if shape == 3:  # star: each tip is cut by the line from (1, 0) to the valley
        turn = 2 * np.pi / 5
        from_tip = np.abs((np.arctan2(u, -v) + turn / 2) % turn - turn / 2)
        down, along = 0.42 * np.sin(turn / 2), 0.42 * np.cos(turn / 2) - 1
        right, up = radius * np.cos(from_tip) - 1, radius * np.sin(from_tip)
        return (down * right - along * up) / np.hypot(down, along)
    if shape == 4:  # heart: a square on its corner, and a circle on each upper side
        lobes = np.hypot(width - 0.42, v + 0.35) - 0.53
        return np.minimum((width + np.abs(v - 0.06) - 0.84) * 0.7071, lobes)
    if shape == 5:  # cross
        return np.minimum(
            np.maximum(width - 0.3, height - 0.9), np.maximum(width - 0.9, height - 0.3)
        )
    if shape == 6:  # ring
        return np.abs(radius - 0.64) - 0.26
    return (1.35 * width + height - 0.98) / 1.68  # diamond


def _ornament(pattern: int, u, v, distance, phase: float) -> np.ndarray:
    """f64[n, n]: about the distance into what has the pattern's colour, negative outside."""
    if pattern == 1:  # stripes
        return (_wave(2.2 * u + phase) - 0.06) / 2.2
    if pattern == 2:  # dots
        return 0.16 - np.hypot((2.2 * u + phase) % 1 - 0.5, (2.2 * v + phase) % 1 - 0.5) / 2.2
    if pattern == 3:  # checks
        return (_wave(1.6 * u + phase) * _wave(1.6 * v + phase) * 4 - 0.04) / 1.6
    if pattern == 4:  # chevrons
        return (_wave(2.0 * (v + 0.8 * np.abs((1.4 * u + phase) % 1 - 0.5))) - 0.06) / 2.0
    if pattern == 5:  # border
        return distance + 0.2
    return np.full_like(u, -1.0)


def _wave(x: np.ndarray) -> np.ndarray:
    """A triangular wave of period 1, from -1/4 to 1/4."""
    return np.abs(x % 1 - 0.5) - 0.25
