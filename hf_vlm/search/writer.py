"""Writing items: read, embedded in batches, and written in commits of a few hundred rows."""

import io
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from itertools import islice

import torch
from PIL import Image
from tqdm.auto import tqdm

from ..data.sources.images import ImageError
from ..data.sources.rows import CaptionError, OnError
from .items import Item
from .match import AddReport
from .sheet import shrink
from .store import Row, VectorTable

EMBED_BATCH = 32
WRITE_ROWS = 512
WRITE_SECONDS = 10.0  # a crash loses at most this much work, also with a slow model
THUMBNAIL_SIDE = 96


class Writer:
    """Adds items to a table.

    Args:
        table: The table to write to.
        embed_images: Maps images to embeddings `(images, dim)` of length 1.
        embed_texts: Maps texts to embeddings `(texts, dim)` of length 1.
        on_error: "raise", or "skip": items that cannot be read are left out and reported.
        keep: Keep items whose id is in the table, without embedding them again.
    """

    def __init__(
        self,
        table: VectorTable,
        embed_images: Callable[[Sequence[Image.Image]], torch.Tensor],
        embed_texts: Callable[[Sequence[str]], torch.Tensor],
        on_error: OnError = "raise",
        keep: bool = False,
    ):
        self.table = table
        self.embed_images, self.embed_texts = embed_images, embed_texts
        self.on_error, self.keep = on_error, keep
        self.report = AddReport()
        self.waiting: dict[str, tuple[Row, torch.Tensor]] = {}
        self.last_write = time.monotonic()

    def write(self, items: Iterable[Item], progress: bool = True) -> AddReport:
        """Writes all items. If an error or interrupt ends it early, the embedded items are written first."""
        total = len(items) if isinstance(items, Sized) else None
        with tqdm(total=total, desc="index", unit=" items", disable=not progress) as bar:
            try:
                for batch in _batches(items, EMBED_BATCH):
                    self._take(batch)
                    if len(self.waiting) >= WRITE_ROWS or time.monotonic() - self.last_write > WRITE_SECONDS:
                        self._flush()
                    bar.n = self.report.seen
                    bar.refresh()
            finally:
                self._flush()
                bar.update(self.report.seen - bar.n)
        return self.report

    def _take(self, batch: Sequence[Item]) -> None:
        known = (self.table.known([item.id for item in batch]) | self.waiting.keys()) if self.keep else set()
        images, texts = [], []
        try:
            for item in batch:
                if self.keep and item.id in known:
                    self.report.kept += 1
                    continue
                known.add(item.id)
                try:
                    if item.kind == "text":
                        texts.append((item, item.check_text()))
                    else:
                        images.append((item, item.load()))
                except (ImageError, CaptionError) as error:
                    if self.on_error == "raise":
                        raise type(error)(f"{error} Use on_error='skip' to leave such items out.") from error
                    self.report.errors.append(str(error))
        finally:
            self._embed(images, texts)

    def _embed(self, images: list[tuple[Item, Image.Image]], texts: list[tuple[Item, str]]) -> None:
        if images:
            for (item, image), vector in zip(images, self.embed_images([each for _, each in images]), strict=True):
                self._wait(item, vector, thumbnail(image))
        if texts:
            for (item, _), vector in zip(texts, self.embed_texts([each for _, each in texts]), strict=True):
                self._wait(item, vector, None)

    def _wait(self, item: Item, vector: torch.Tensor, image: bytes | None) -> None:
        row = Row(item.id, item.kind, item.text or "", item.path, image, item.metadata)
        self.report.replaced += item.id in self.waiting  # twice in one source: the later one is kept
        self.waiting[item.id] = (row, vector)

    def _flush(self) -> None:
        rows, self.waiting = list(self.waiting.values()), {}
        if rows:
            added, replaced = self.table.write(
                [row for row, _ in rows], torch.stack([each for _, each in rows]).numpy()
            )
            self.report.added += added
            self.report.replaced += replaced
        self.last_write = time.monotonic()


def thumbnail(image: Image.Image, side: int = THUMBNAIL_SIDE) -> bytes:
    """A thumbnail as the bytes of a WebP file."""
    small = shrink(image, side)
    buffer = io.BytesIO()
    small.save(buffer, format="WEBP", quality=80)
    return buffer.getvalue()


def _batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


__all__ = ["EMBED_BATCH", "Writer", "thumbnail"]
