"""An index of pictures and texts that a two-tower model embedded, to be searched by text, by picture, or by both.

- Embeddings are of length 1; a score is the cosine between a query and what was found.
- A query is a weighted sum: text and picture are added, what shall not be found is taken away.
- The index knows its model by the digest of the weights and refuses any other.
- What `add` has returned for, or counted in its progress bar, is on the disk; see `store.py` for crashes and speed.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import numpy as np
import torch
from PIL import Image
from transformers import ProcessorMixin

from ..data.sources.images import load_image
from ..data.sources.rows import OnError
from ..evaluation import embed_images, embed_texts
from ..models import VlmClipModel
from .filters import Where, to_sql
from .identity import ModelIdentity
from .items import Item, read_items
from .match import AddReport, Match
from .rows import COLUMNS
from .store import CANDIDATES, VectorTable, exists, id_in
from .writer import EMBED_BATCH, Writer

Source: TypeAlias = str | Path | datasets.Dataset | Iterable[Item]


class EmbeddingIndex:
    """Pictures, texts, or both, with captions, thumbnails and metadata; `create`, `open` or `build` one.

    Example:
        ```python
        >>> index, report = EmbeddingIndex.build("my-index", "photos", model, processor)
        >>> index.search("a red fruit", minus="an apple", where={"style": "noto"}, k=5)
        ```
    """

    def __init__(self, table: VectorTable, model: VlmClipModel | None = None, processor: ProcessorMixin | None = None):
        self.table = table
        self.identity = ModelIdentity.from_json(table.record)
        if (model is None) != (processor is None):
            raise ValueError("Give the model together with its processor, or neither.")
        if model is not None:
            self.identity.check(model, table.uri)
        self._model, self._processor = model, processor

    @classmethod
    def create(
        cls,
        uri: str | Path,
        model: VlmClipModel,
        processor: ProcessorMixin,
        storage_options: dict[str, str] | None = None,
        replace: bool = False,
    ) -> "EmbeddingIndex":
        """A new, empty index.

        Args:
            uri: A folder, or a URI of an object store such as `s3://bucket/index`.
            model: Embeds what is added and what is asked for.
            processor: Of the model.
            storage_options: Of the object store, as LanceDB names them; by default from the environment.
            replace: Whether to replace an index that is there.

        Raises:
            ValueError: if there is an index already.
            ModuleNotFoundError: if LanceDB is not installed.
        """
        identity = ModelIdentity.of(model)
        table = VectorTable.create(uri, identity.dim, identity.to_json(), storage_options, replace)
        return cls(table, model, processor)

    @classmethod
    def open(
        cls,
        uri: str | Path,
        model: VlmClipModel | None = None,
        processor: ProcessorMixin | None = None,
        storage_options: dict[str, str] | None = None,
    ) -> "EmbeddingIndex":
        """An existing index. Without a model, the one it was built with is loaded when something is to be embedded.

        Raises:
            ValueError: if there is none, or it was built with another model.
        """
        return cls(VectorTable.open(uri, storage_options), model, processor)

    @classmethod
    def build(
        cls,
        uri: str | Path,
        source: Source,
        model: VlmClipModel,
        processor: ProcessorMixin,
        storage_options: dict[str, str] | None = None,
        *,
        on_error: OnError = "raise",
        progress: bool = True,
    ) -> tuple["EmbeddingIndex", AddReport]:
        """Makes an index of a source, or goes on where a build was interrupted: what is there is not embedded again.

        Args:
            uri: See `create`.
            source: See `add`.
            model: See `create`.
            processor: Of the model.
            storage_options: See `create`.
            on_error: See `add`.
            progress: See `add`.

        Returns:
            The index and what was added to it.
        """
        start = cls.open if exists(uri, storage_options) else cls.create
        index = start(uri, model, processor, storage_options=storage_options)
        return index, index.add(source, keep=True, on_error=on_error, progress=progress)

    def __len__(self) -> int:
        return len(self.table)

    def add(
        self, source: Source, *, keep: bool = False, on_error: OnError = "raise", progress: bool = True
    ) -> AddReport:
        """Embeds and adds items; one whose id is there replaces it.

        Args:
            source: Items, a data set (see `DatasetItems` for more choice), a folder of pictures, or a file of
                descriptions (txt, jsonl, csv).
            keep: Leave items whose id is there as they are, without embedding them again.
            on_error: "raise", or "skip": pictures that cannot be read and empty texts are left out and reported.
            progress: Show a progress bar, of rows that are safe.

        Raises:
            ImageError, CaptionError: with "raise"; what was read before it is in the index.
        """
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error={on_error!r} is unknown; write 'raise' or 'skip'.")
        items = read_items(source) if isinstance(source, str | Path | datasets.Dataset) else source
        writer = Writer(self.table, self.embed_images, self.embed_texts, on_error, keep)
        report = writer.write(items, progress)
        self.table.tidy()
        return report

    def delete(self, ids: Sequence[str] = (), where: Where | None = None) -> int:
        """Deletes by id or by a filter (see `search`).

        Returns:
            How many rows were deleted.

        Raises:
            ValueError: unless exactly one of the two is given.
        """
        if isinstance(ids, str) or bool(ids) == bool(where):
            raise ValueError("Say what to delete: a list of ids, or a filter.")
        return self.table.delete(id_in(ids) if ids else to_sql(where, self.table.schema) or "")

    def info(self) -> dict[str, Any]:
        """What the index holds: counts, columns, size, and the model that it was built with."""
        schema, rows = self.table.schema, len(self)
        images = self.table.table.count_rows(to_sql(None, schema, "image"))
        return {
            "index": self.table.uri,
            "items": rows,
            "images": images,
            "texts": rows - images,
            "metadata": [name for name in schema.names if name not in COLUMNS],
            "bytes": self.table.num_bytes(),
            "search": "approximate" if self.table.is_approximate else "exact",
            **asdict(self.identity),
        }

    def search(
        self,
        text: str | None = None,
        image: Any = None,
        minus: str | None = None,
        minus_image: Any = None,
        *,
        text_weight: float = 1.0,
        image_weight: float = 1.0,
        minus_weight: float = 0.5,
        kind: str | None = None,
        k: int = 10,
        where: Where | None = None,
        exact: bool = False,
        candidates: int = CANDIDATES,
    ) -> list[Match]:
        """The nearest items, best first.

        Args:
            text: To look for.
            image: To look for; anything that `hf_vlm.data.load_image` reads.
            minus: A text to stay away from.
            minus_image: A picture to stay away from.
            text_weight: Factor of `text`.
            image_weight: Factor of `image`.
            minus_weight: Factor of `minus` and of `minus_image`. At 1, what the two texts share is gone as well.
            kind: "image", "text", or None for both. (A text is nearer to any text than to most pictures.)
            k: How many at most.
            where: `{"style": "noto", "year": [2020, 2021]}`, whose values are quoted and may come from anybody, or a
                condition in SQL (`"style = 'noto' AND year > 2020"`), which must not. It is applied first.
            exact: Compare every row, where a large index would go through its graph.
            candidates: The more, the more of the true nearest does the graph find, and the slower.

        Raises:
            ValueError: if there is nothing to look for or the filter names no column.
            ImageError: if a picture cannot be read.
        """
        vector = self.query_vector(text, image, minus, minus_image, text_weight, image_weight, minus_weight)
        return self.nearest(vector, kind, k, where, exact, candidates)

    def nearest(
        self,
        vector: torch.Tensor | np.ndarray,
        kind: str | None = None,
        k: int = 10,
        where: Where | None = None,
        exact: bool = False,
        candidates: int = CANDIDATES,
    ) -> list[Match]:
        """What is nearest to an embedding `(dim,)` of this index's model; arguments as in `search`."""
        if k < 1:
            raise ValueError(f"k is {k}; ask for at least one.")
        condition = to_sql(where, self.table.schema, kind)
        rows = self.table.search(np.asarray(vector), k, condition, exact, candidates)
        return [Match.from_row(row) for row in rows]

    def query_vector(
        self,
        text: str | None = None,
        image: Any = None,
        minus: str | None = None,
        minus_image: Any = None,
        text_weight: float = 1.0,
        image_weight: float = 1.0,
        minus_weight: float = 0.5,
    ) -> torch.Tensor:
        """The embedding `(dim,)` of a query, of length 1; arguments as in `search`."""
        texts = [(text, text_weight), (minus, -minus_weight)]
        images = [(image, image_weight), (minus_image, -minus_weight)]
        if text is None and image is None:
            raise ValueError("There is nothing to look for: give a text, a picture, or both.")
        terms = [self.embed_texts([each])[0] * weight for each, weight in texts if each is not None]
        terms += [self.embed_images([load_image(each)])[0] * weight for each, weight in images if each is not None]
        total = torch.stack(terms).sum(0)
        if total.norm() < 1e-3:
            raise ValueError("The parts of the query cancel each other; change one or its weight.")
        return torch.nn.functional.normalize(total, dim=0)

    def embed_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """`(images, dim)` of length 1."""
        return embed_images(*self.model(), images, EMBED_BATCH, progress=False)

    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """`(texts, dim)` of length 1."""
        return embed_texts(*self.model(), texts, progress=False)

    def model(self) -> tuple[VlmClipModel, ProcessorMixin]:
        """The model and its processor, loaded from where they were if nobody gave them."""
        if self._model is None or self._processor is None:
            model, processor = self.identity.load()
            self.identity.check(model, self.table.uri)
            self._model, self._processor = model, processor
        return self._model, self._processor


__all__ = ["EmbeddingIndex"]
