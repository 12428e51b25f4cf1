"""The result sheet: self-contained, and nothing from data becomes markup."""

import re
from html.parser import HTMLParser

from PIL import Image

from hf_vlm.search import Hit, Result, write_sheet


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
