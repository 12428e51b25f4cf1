"""The result sheet: self-contained, and nothing from data becomes markup."""

import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from hf_vlm.data import ImageError
from hf_vlm.search import Hit, Result, write_sheet
from hf_vlm.search.match import Match
from hf_vlm.search.sheet import shrink
from hf_vlm.search.writer import thumbnail


class Tags(HTMLParser):
    """Collects tags, attributes and text."""

    def __init__(self):
        super().__init__()
        self.tags, self.links, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def test_sheet_is_self_contained_and_escaped(tmp_path):
    evil = '<script>alert("x")</script> & "quoted"'
    picture = Image.new("RGBA", (300, 200), (0, 200, 0, 128))
    path = write_sheet(
        tmp_path / "sheet.html",
        title=evil,
        note=evil,
        results=[Result(evil, [Hit(evil, 0.5, picture), Hit("no picture", 0.25)], picture)],
        table=[["test set", "R@1"], [evil, "0.500"]],
    )
    page = Tags()
    page.feed(path.read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert page.text.count('<script>alert("x")</script>') >= 5
    assert page.tags.count("img") == 2
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert re.search(r"0\.500", page.text)
    assert "no picture" in page.text


@pytest.mark.parametrize("kind", ["EPS", "PDF", "damaged"])
def test_a_thumbnail_is_read_as_any_image(kind, monkeypatch):
    """The thumbnails of an index that somebody else made: an EPS file would start Ghostscript."""
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **options: started.append(args))
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9)).save(buffer, "PNG" if kind == "damaged" else kind)
    data = buffer.getvalue()[:40] if kind == "damaged" else buffer.getvalue()
    match = Match("photos/1.png\x1b[2J", "image", "a cat", 0.5, thumbnail=data)
    for read in (lambda: match.image, match.hit):
        with pytest.raises(ImageError, match=r"^The thumbnail of photos/1\.png\\x1b\[2J: ") as caught:
            read()
        assert str(caught.value).isprintable()
    assert started == []
    assert Match("1", "text", "a cat", 0.5).image is None


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("I;16", 25700, (100, 100, 100, 255)),
        ("F", 0.5, (128, 128, 128, 255)),
        ("La", (90, 255), (90, 90, 90, 255)),
        ("RGBA", (9, 9, 9, 0), (0, 0, 0, 0)),
        ("CMYK", (255, 0, 255, 0), (0, 255, 0, 255)),
    ],
)
def test_thumbnails_show_every_mode(mode, value, expected):
    image = Image.new(mode, (200, 100), value)
    assert shrink(image, 96).size == (96, 48)
    assert shrink(image, 96).getpixel((5, 5)) == expected
    stored = Image.open(io.BytesIO(thumbnail(image))).convert("RGBA").getpixel((5, 5))
    assert np.abs(np.subtract(stored, expected))[-1 if expected[3] == 0 else slice(None)].max() < 3
