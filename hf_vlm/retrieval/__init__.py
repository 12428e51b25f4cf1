"""Search results as a sheet."""

from .sheet import Hit, Result, write_sheet

__all__ = ["Hit", "Result", "write_sheet"]
