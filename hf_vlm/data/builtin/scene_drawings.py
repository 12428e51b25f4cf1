"""Drawings for scenes: cropped to their visible pixels, matched with contrasting backgrounds, pasted on a canvas."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

BACKGROUNDS = {
    "red": (214, 40, 40),
    "orange": (255, 140, 0),
    "yellow": (255, 225, 50),
    "green": (40, 150, 60),
    "turquoise": (70, 215, 205),
    "blue": (40, 80, 220),
    "purple": (125, 45, 170),
    "pink": (255, 150, 200),
    "brown": (115, 70, 35),
    "grey": (128, 128, 128),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
}

FAINT = 16  # alpha of 255: fainter edge pixels are dropped, so that boxes are tight around the visible pixels
CONTRAST = 80  # of 255, in some colour channel
CONTRAST_FRACTION = 0.4  # share of a drawing's pixels that must stand out from the background


@dataclass(frozen=True)
class Drawing:
    """A cropped drawing. `picture` has premultiplied colours; `backgrounds` are the ones with enough contrast."""

    name: str
    emoji: str
    emoji_id: int
    style: str
    picture: Image.Image
    backgrounds: frozenset[str]


def cut_out(row: dict) -> Drawing:
    """The drawing of a row of `load_emoji`."""
    picture = row["image"].convert("RGBA")
    picture = picture.crop(picture.getchannel("A").point(lambda alpha: 255 * (alpha >= FAINT)).getbbox())
    pixels = np.asarray(picture.resize((24, 24), Image.Resampling.BILINEAR)).astype(int)
    ink = pixels[pixels[..., 3] > 127][:, :3]
    visible = frozenset(
        name
        for name, colour in BACKGROUNDS.items()
        if (np.abs(ink - colour).max(axis=1) >= CONTRAST).mean() >= CONTRAST_FRACTION
    )
    return Drawing(row["name"], row["emoji"], row["emoji_id"], row["style"], picture.convert("RGBa"), visible)


def paste(canvas: np.ndarray, picture: Image.Image, slot: tuple[int, int, int, int]) -> list[int]:
    """Draw into a slot of the canvas `(height, width, 3)` and return the box of the changed pixels."""
    x0, y0, x1, y1 = slot
    pixels = np.asarray(picture.resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR)).astype(np.uint16)
    alpha = pixels[..., 3:]
    under = canvas[y0:y1, x0:x1]
    drawn = pixels[..., :3] + (under * (255 - alpha) + 127) // 255
    drawn = np.where(alpha >= FAINT, np.minimum(drawn, 255), under).astype(np.uint8)
    changed = (drawn != under).any(axis=2)
    canvas[y0:y1, x0:x1] = drawn
    rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    return [int(x0 + columns[0]), int(y0 + rows[0]), int(x0 + columns[-1] + 1), int(y0 + rows[-1] + 1)]


__all__ = ["BACKGROUNDS", "Drawing", "cut_out", "paste"]
