"""Search among pictures and texts, and its results as a sheet."""

from .index import EmbeddingIndex
from .items import DatasetItems, Item, folder_items, text_items
from .match import AddReport, Match
from .sheet import Hit, Result, write_sheet

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
