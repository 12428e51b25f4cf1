"""Search among images and texts with a two-tower model: the index, its items, and result sheets."""

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .index import EmbeddingIndex
    from .items import DatasetItems, Item, folder_items, text_items
    from .match import AddReport, Match
    from .sheet import Hit, Result, write_sheet
else:
    __getattr__, __dir__ = lazy_names(__name__, __file__)

__all__ = [
    "AddReport",
    "DatasetItems",
    "EmbeddingIndex",
    "Hit",
    "Item",
    "Match",
    "Result",
    "folder_items",
    "text_items",
    "write_sheet",
]
