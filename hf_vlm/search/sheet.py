"""A result sheet: queries and their results as one self-contained HTML file.

All text from data is escaped. Images are embedded, so the file can be mailed or opened offline.
"""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..files import write_text
from ..models.images import to_rgb

THUMBNAIL_SIDE = 96

STYLE = """
:root { color-scheme: light dark; font: 15px/1.45 system-ui, sans-serif; }
body { max-width: 1180px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; }
p.note { margin-top: 0; opacity: .7; }
table { border-collapse: collapse; margin: 1rem 0 2rem; font-size: .82rem; font-variant-numeric: tabular-nums;
  display: block; overflow-x: auto; }
th, td { padding: .25rem .7rem .25rem 0; text-align: right; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; }
section { margin: 1.6rem 0; }
h2 { font-size: 1.05rem; margin: 0 0 .5rem; display: flex; align-items: center; gap: .6rem; }
.hits { display: flex; flex-wrap: wrap; gap: .7rem; }
figure { margin: 0; width: 7.2rem; }
img { width: 6rem; height: 6rem; object-fit: contain; background: #fff; border: 1px solid #8886; border-radius: 8px; }
h2 img { width: 3.4rem; height: 3.4rem; }
figcaption { font-size: .8rem; line-height: 1.25; overflow-wrap: anywhere; }
figcaption span { opacity: .65; }
"""


@dataclass
class Hit:
    """One result: a caption, its score, and its image if it has one."""

    caption: str
    score: float
    image: Image.Image | None = None


@dataclass
class Result:
    """A query (text, image, or both) and its hits, best first."""

    query: str
    hits: Sequence[Hit]
    image: Image.Image | None = None


def shrink(image: Image.Image, side: int) -> Image.Image:
    """The image in RGBA, at most `side` pixels high and wide; greys of more than 8 bits by the processors' rule."""
    if image.mode.startswith("I") or image.mode in ("F", "La"):
        image = to_rgb(image)
    small = image.convert("RGBA")
    small.thumbnail((side, side))
    return small


def image_tag(image: Image.Image, description: str) -> str:
    """An `<img>` tag with an embedded PNG thumbnail."""
    buffer = io.BytesIO()
    shrink(image, 2 * THUMBNAIL_SIDE).save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(description)}" src="data:image/png;base64,{data}">'


def result_section(result: Result) -> str:
    """The HTML of one query with its hits."""
    figures = "".join(
        f"<figure>{'' if hit.image is None else image_tag(hit.image, hit.caption)}"
        f"<figcaption>{html.escape(hit.caption)} <span>{hit.score:.3f}</span></figcaption></figure>"
        for hit in result.hits
    )
    image = "" if result.image is None else image_tag(result.image, result.query)
    return f'<section><h2>{image}{html.escape(result.query)}</h2><div class="hits">{figures}</div></section>'


def table_section(table: Sequence[Sequence[str]]) -> str:
    """The HTML of a table whose first row is its header."""
    head, *rows = [[html.escape(str(cell)) for cell in row] for row in table]
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>{body}</table>"


def write_sheet(
    path: str | Path,
    title: str,
    note: str,
    results: Sequence[Result],
    table: Sequence[Sequence[str]] = (),
) -> Path:
    """Writes a result sheet.

    Args:
        path: The file; an existing one is replaced.
        title: Heading of the page.
        note: Line below the heading.
        results: Queries and hits, in order.
        table: Rows of cells to show first, such as metrics; the first row is the header.

    Returns:
        The absolute path of the file.
    """
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>',
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style>',
        f'<h1>{html.escape(title)}</h1><p class="note">{html.escape(note)}</p>',
        table_section(table) if table else "",
        *(result_section(result) for result in results),
        "</html>",
    ]
    return write_text(Path(path).resolve(), "\n".join(parts))


__all__ = ["Hit", "Result", "write_sheet"]
