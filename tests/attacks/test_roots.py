"""Rows that name files outside their source, by every reader and every kind of cell: none is read, nothing is fetched.

The secret is an image of one colour that no other image has. A reader that returns it, or asks the local server for
it, has let the row lead it out of the folder.
"""

import csv
import io
import json
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hf_vlm.data.sources.conversations import open_conversations
from hf_vlm.data.sources.images import load_image
from hf_vlm.data.sources.load import load_source
from hf_vlm.data.sources.open import DataSource
from hf_vlm.data.sources.questions import QuestionSource
from hf_vlm.data.sources.stored import stored_blocks
from hf_vlm.evaluation.test_sets import own_captions, own_classes, own_questions
from hf_vlm.search.open import open_source
from hf_vlm.training.cache_tower import open_rows as cache_rows

pytestmark = pytest.mark.slow
SECRET = (9, 200, 7)


def png(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(buffer, "PNG")
    return buffer.getvalue()


class Server(BaseHTTPRequestHandler):
    """Serves the secret under every name and counts the requests."""

    hits: list[str] = []

    def do_GET(self) -> None:
        self.hits.append(self.path)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(png(SECRET))

    do_HEAD = do_GET

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}/secret.png"
    httpd.shutdown()


def messages() -> list[dict[str, str]]:
    return [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A cat."}]


def row(image: Any) -> dict[str, Any]:
    return {"image": image, "caption": "a cat", "question": "What is it?", "answer": "cat", "label": "cat"}


def written_csv(folder: Path, path: str) -> Path:
    with (folder / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(row("")))
        writer.writeheader()
        writer.writerow(row(path))
    return folder / "a.csv"


def written_json(folder: Path, path: Any) -> Path:
    (folder / "a.jsonl").write_text(json.dumps({**row(path), "messages": messages()}) + "\n")
    return folder / "a.jsonl"


def as_bytes(folder: Path, path: str) -> Path:
    return written_json(folder, {"bytes": path, "path": None})


def as_path(folder: Path, path: str) -> Path:
    return written_json(folder, {"bytes": None, "path": path})


def parquet_text(folder: Path, path: str) -> Path:
    datasets.Dataset.from_list([{**row(path), "messages": messages()}]).to_parquet(folder / "a.parquet")
    return folder / "a.parquet"


def of_images(path: str) -> datasets.Dataset:
    stored = {**row({"bytes": None, "path": path}), "messages": messages()}
    return datasets.Dataset.from_list([stored]).cast_column("image", datasets.Image())


def parquet_image(folder: Path, path: str) -> Path:
    pq.write_table(of_images(path).data.table, folder / "a.parquet")  # to_parquet would read the file
    return folder / "a.parquet"


def saved(folder: Path, path: str) -> Path:
    of_images(str(folder / "good.png")).save_to_disk(folder / "saved")
    with pa.OSFile(str(next((folder / "saved").glob("*.arrow"))), "wb") as file:
        table = of_images(path).data.table
        with pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    return folder / "saved"


def metadata(folder: Path, path: str) -> Path:
    line = {**row(path), "messages": messages()}
    line["file_name"] = line.pop("image")
    (folder / "metadata.jsonl").write_text(json.dumps(line) + "\n")
    return folder


def metadata_csv(folder: Path, path: str) -> Path:
    line = row(path)
    line["file_name"] = line.pop("image")
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(line))
        writer.writeheader()
        writer.writerow(line)
    return folder


KINDS: dict[str, Callable[[Path, str], Path]] = {
    "csv": written_csv,
    "jsonl": written_json,
    "path in a dict": as_path,
    "path as bytes": as_bytes,
    "parquet of texts": parquet_text,
    "parquet of images": parquet_image,
    "saved to disk": saved,
    "metadata.jsonl": metadata,
    "metadata.csv": metadata_csv,
}


def captions(source: Path, streaming: bool) -> list[Any]:
    return [example["image"] for example in load_source(DataSource(str(source), streaming=streaming))]


def stored(source: Path) -> list[Any]:
    return [load_image(row.file) for block in stored_blocks(DataSource(str(source)), 4) for row in block]


def conversations(source: Path, folder: bool) -> list[Any]:
    inside = source if source.is_dir() else source.parent
    named = {"path": str(source), "split": "train", **({"image_folder": str(inside)} if folder else {})}
    return [load_image(image) for conversation in open_conversations(named) for image in conversation["images"]]


READERS: dict[str, Callable[[Path], list[Any]]] = {
    "pairs": lambda source: captions(source, False),
    "stream": lambda source: captions(source, True),
    "stored": stored,
    "questions": lambda source: [row["image"] for row in load_source(QuestionSource(str(source)))],
    "conversations": lambda source: conversations(source, False),
    "conversations with a folder": lambda source: conversations(source, True),
    "index": lambda source: [item.load() for item in open_source(str(source), ("image",), "train", None)],
    "evaluate captions": lambda source: list(own_captions(str(source), "train", {}, 0).images),
    "evaluate questions": lambda source: list(own_questions(str(source), "train", None, {}, 0).images),
    "evaluate classes": lambda source: list(own_classes(str(source), "train", {}, 0).images),
    "cache": lambda source: [load_image(row["image"]) for row in cache_rows(str(source), "train", 0, 0, "", 224)[0]],
}
ESCAPES = {
    "parent": lambda secret, url: "../secret.png",
    "absolute": lambda secret, url: str(secret),
    "link": lambda secret, url: "link.png",
    "linked folder": lambda secret, url: "linked/secret.png",
    "through a folder": lambda secret, url: "inner/../../secret.png",
    "http": lambda secret, url: url,
    "file url": lambda secret, url: f"file://{secret}",
    "local url": lambda secret, url: f"local://{secret}",
    "zip": lambda secret, url: f"zip://secret.png::{secret.parent / 'secret.zip'}",
    "chained": lambda secret, url: f"simplecache::{url}",
    "hub": lambda secret, url: "hf://datasets/org/secret/secret.png",
    "zero": lambda secret, url: f"a\0/../../{secret}",
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_row_leads_out(kind: str, reader: str, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Server.hits.clear()
    (tmp_path / "secret.png").write_bytes(png(SECRET))
    with zipfile.ZipFile(tmp_path / "secret.zip", "w") as archive:
        archive.writestr("secret.png", png(SECRET))
    wrong = {}
    for name, escape in ESCAPES.items():
        folder = tmp_path / name.replace(" ", "-")
        (folder / "inner").mkdir(parents=True)
        (folder / "good.png").write_bytes(png((1, 2, 3)))
        (folder / "link.png").symlink_to(tmp_path / "secret.png")
        (folder / "linked").symlink_to(tmp_path)
        source = KINDS[kind](folder, escape(tmp_path / "secret.png", server))
        monkeypatch.chdir(folder)
        try:
            images = READERS[reader](source)
        except ValueError as error:
            if "\n" in str(error):
                wrong[name] = f"more than one line: {error}"
            continue
        if any(load_image(image).convert("RGB").getpixel((0, 0)) == SECRET for image in images):
            wrong[name] = "read"
    assert not wrong
    assert not Server.hits
