"""Checks the `sources` of a recipe before a model or any data is loaded."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from ..data.sources.open import DataSource
from .catalogue import nearest

PAIR_KEYS = tuple(field.name for field in fields(DataSource))


def check_sources(sources: Any, extra: Sequence[str] = (), known: Sequence[str] = PAIR_KEYS) -> None:
    """Checks `sources` of a YAML file before anything is opened.

    Args:
        sources: The value of `sources` in the file.
        extra: Keys of a source in addition to the known ones.
        known: Keys of a source; by default the fields of [`~hf_vlm.data.DataSource`].

    Raises:
        ValueError: if `sources` is not a list of mappings with a `path`, or a mapping has an unknown key.
    """
    known = [*known, *extra]
    are_mappings = isinstance(sources, list) and all(isinstance(source, dict) for source in sources)
    if not sources or not are_mappings or not all(isinstance(source.get("path"), str) for source in sources):
        raise ValueError("sources must be a list of mappings, each with a path: [{path: my-pairs.parquet}].")
    for source in sources:
        for key in source:
            if key not in known:
                raise ValueError(
                    f"The source {source['path']} has the unknown key {key!r}; "
                    f"a source can have {', '.join(known)}.{nearest(str(key), known)}"
                )


def check_streams(sources: Sequence[dict[str, Any]], reader: str | None = None) -> None:
    """Refuses streams that a recipe cannot read.

    Args:
        sources: Checked `sources` of a YAML file.
        reader: A recipe that reads no streams. None: streams are read.

    Raises:
        ValueError: if a source is a stream that is not read, only some sources are streams, or several have no weight.
    """
    streams = [source for source in sources if source.get("streaming")]
    if streams and reader is not None:
        raise ValueError(
            f"The source {streams[0]['path']} has streaming: {streams[0]['streaming']}, but {reader} reads no streams; "
            "leave out streaming."
        )
    if streams and len(streams) < len(sources):
        raise ValueError(
            f"The source {streams[0]['path']} is a stream beside sources that are not; set streaming for all or none."
        )
    for source in streams if len(streams) > 1 else []:
        if source.get("weight") is None:
            raise ValueError(
                f"The source {source['path']} is a stream beside others and has no weight: streams do not know their "
                "sizes. Give each a weight, or name the files of one source by one pattern (data/*.parquet)."
            )


def check_steps(sources: Sequence[dict[str, Any]] | None, max_steps: int) -> None:
    """Refuses a stream without a number of steps: a stream has no length."""
    if max_steps <= 0:
        for source in sources or []:
            if source.get("streaming"):
                raise ValueError(f"The source {source['path']} is a stream, which has no length: set max_steps.")


__all__ = ["PAIR_KEYS", "check_sources", "check_steps", "check_streams"]
