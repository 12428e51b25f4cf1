"""An index of images and texts, searched by text, by image, or by both.

- A two-tower model embeds items and queries. Embeddings have length 1; a score is a cosine.
- A query is a weighted sum of embeddings: text and image are added, `minus` and `minus_image` are subtracted.
- The index identifies its model by the digest of the weights and refuses any other.
- Rows that `add` has returned for, or counted in its progress bar, are on disk. See `store.py` for crashes and speed.
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
from .store import CANDIDATES, COLUMNS, VectorTable, exists, id_in
from .writer import EMBED_BATCH, Writer

Source: TypeAlias = str | Path | datasets.Dataset | Iterable[Item]


class EmbeddingIndex:
    """An index of images, texts, or both, with captions, thumbnails and metadata: `create`, `open` or `build` one.

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
            raise ValueError("Model and processor belong together: give both or neither.")
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
            model: Embeds items and queries.
            processor: The model's processor.
            storage_options: Options of the object store, as LanceDB names them; by default from the environment.
            replace: Whether to replace an existing index.

        Raises:
            ValueError: if an index exists and `replace` is False.
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
        """An existing index. Without a model, the index loads its own when it first embeds something.

        Raises:
            ValueError: if there is no index, or it was built with another model.
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
        """Builds an index of a source, or resumes an interrupted build without embedding existing items again.

        Args:
            uri: See `create`.
            source: See `add`.
            model: See `create`.
            processor: The model's processor.
            storage_options: See `create`.
            on_error: See `add`.
            progress: See `add`.

        Returns:
            The index, and a report of the added items.
        """
        start = cls.open if exists(uri, storage_options) else cls.create
        index = start(uri, model, processor, storage_options=storage_options)
        return index, index.add(source, keep=True, on_error=on_error, progress=progress)

    def __len__(self) -> int:
        return len(self.table)

    def add(
        self, source: Source, *, keep: bool = False, on_error: OnError = "raise", progress: bool = True
    ) -> AddReport:
        """Embeds and adds items. An item whose id exists replaces the old one.

        Args:
            source: Items, a dataset (see `DatasetItems` for options), a folder of images, or a file of descriptions
                (txt, jsonl, csv).
            keep: Keep items whose id exists, without embedding them again.
            on_error: "raise", or "skip": unreadable images and empty texts are left out and reported.
            progress: Show a progress bar of the rows on disk.

        Raises:
            ImageError, CaptionError: with "raise"; the items before the bad one are in the index.
        """
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error={on_error!r} is unknown; use 'raise' or 'skip'.")
        items = read_items(source) if isinstance(source, str | Path | datasets.Dataset) else source
        writer = Writer(self.table, self.embed_images, self.embed_texts, on_error, keep)
        report = writer.write(items, progress)
        self.table.tidy()
        return report

    def delete(self, ids: Sequence[str] = (), where: Where | None = None) -> int:
        """Deletes by id or by a filter (see `search`).

        Returns:
            The number of deleted rows.

        Raises:
            ValueError: unless either ids or a filter are given, and not both.
        """
        if isinstance(ids, str) or bool(ids) == bool(where):
            raise ValueError("Say what to delete: a list of ids or a filter, and not both.")
        return self.table.delete(id_in(ids) if ids else to_sql(where, self.table.schema) or "")

    def info(self) -> dict[str, Any]:
        """Counts, columns, size, and the model of the index."""
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
            text: Text to search for.
            image: Image to search for; anything that `hf_vlm.data.load_image` reads.
            minus: Text to avoid.
            minus_image: Image to avoid.
            text_weight: Factor of `text`.
            image_weight: Factor of `image`.
            minus_weight: Factor of `minus` and of `minus_image`. At 1, what both texts have in common is removed.
            kind: "image", "text", or None for both. (A text is closer to any text than to most images.)
            k: Maximum number of results.
            where: Filter applied before the search: `{"style": "noto", "year": [2020, 2021]}`, whose values may be
                untrusted, or a condition in SQL (`"style = 'noto' AND year > 2020"`), which must be trusted.
            exact: Compare with every row, also in a large index.
            candidates: Candidates kept by the approximate search; higher is more accurate and slower.

        Raises:
            ValueError: if there is neither text nor image, or the filter names an unknown column.
            ImageError: if an image cannot be read.
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
        """The items nearest to an embedding `(dim,)` of the index's model; arguments as in `search`."""
        if k < 1:
            raise ValueError(f"k is {k}; it must be at least 1.")
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
            raise ValueError("There is nothing to search for: give a text, an image, or both.")
        terms = [self.embed_texts([each])[0] * weight for each, weight in texts if each is not None]
        terms += [self.embed_images([load_image(each)])[0] * weight for each, weight in images if each is not None]
        total = torch.stack(terms).sum(0)
        if not total.isfinite().all():
            weights = [weight for _, weight in texts + images]
            raise ValueError(f"The weights of the query must be finite numbers, got {weights}.")
        if total.norm() < 1e-3:
            raise ValueError("The parts of the query cancel each other: change one of them or its weight.")
        return torch.nn.functional.normalize(total, dim=0)

    def embed_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Embeddings `(images, dim)` of length 1."""
        return embed_images(*self.model(), images, EMBED_BATCH, progress=False)

    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Embeddings `(texts, dim)` of length 1."""
        return embed_texts(*self.model(), texts, progress=False)

    def model(self) -> tuple[VlmClipModel, ProcessorMixin]:
        """The model and its processor; loaded if they were not passed."""
        if self._model is None or self._processor is None:
            model, processor = self.identity.load()
            self.identity.check(model, self.table.uri)
            self._model, self._processor = model, processor
        return self._model, self._processor


__all__ = ["EmbeddingIndex"]
