"""Provenance of a run: the data sources and pretrained parts that its record names, with their licences."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import RepoCard, hf_hub_download

from ..data.builtin.table import BUILTIN
from ..data.wheels import PREFIX, WHEELS
from ..hub.record import Record, published, read_record

PARTS = ("model", "vision", "text", "tokenizer", "language_model")  # the model arguments that name pretrained parts
PERMISSIVE = {"apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0"}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
DATA_FILES = (".parquet", ".arrow", ".json", ".jsonl", ".csv", ".tar")


def builtin_data(has_easy_vqa: bool = False) -> list[Record]:
    """The vendors of the built-in emoji drawings, and easy-VQA, with their numbers of rows by split."""
    names = ["emoji", *(["easy_vqa"] if has_easy_vqa else [])]
    return [record for name in names for record in BUILTIN[name].provenance()]


def own_data(sources: list[dict[str, Any]], eval_sources: list[dict[str, Any]]) -> list[Record]:
    """The user's data sources; datasets on the Hub come with the licence that their card states."""
    found = []
    for source, use in [
        *((source, "train") for source in sources),
        *((source, "validation") for source in eval_sources),
    ]:
        path = source["path"]
        entry = {"name": published(path), "use": use, "split": source.get("split", "train")}
        if is_hub_id(path) and not path.endswith(DATA_FILES):
            revision = {"revision": source["revision"]} if source.get("revision") else {}
            entry |= {"hub_id": path, "licence": hub_licence(path, "dataset"), **revision}
        found.append(entry)
    return found


def pretrained_parts(model: dict[str, Any]) -> list[Record]:
    """The pretrained parts that a recipe's model arguments name, with versions and licences where known.

    A `model` that another recipe wrote is followed by its own parts.
    """
    found: list[Record] = []
    for part in PARTS:
        name = model.get(part)
        if name is None:
            continue
        entry = {"part": part, "id": published(name)}
        if name.startswith(PREFIX):
            wheel = WHEELS[name.removeprefix(PREFIX)]
            hub_id = wheel.source.split(",")[0]
            version = f"pip package {wheel.package} {wheel.version}"
            entry |= {"id": wheel.source, "hub_id": hub_id, "version": version, "licence": wheel.licence}
        elif is_hub_id(name):
            entry |= {"hub_id": name, "revision": cached_revision(name), "licence": hub_licence(name, "model")}
        record = read_record(name) if Path(name).is_dir() else {}
        if record.get("licence"):
            entry["licence"] = record["licence"]
        found.append(entry)
        if part == "model" and record:
            found += [{**inner, "part": f"{inner['part']} of {entry['id']}"} for inner in record["parts"]]
    return found


def own_licence(parts: list[Record]) -> str | None:
    """The licence of weights trained on the built-in data: Apache-2.0 if all pretrained parts are permissive."""
    free = [str(part.get("licence")).split()[0].lower() in PERMISSIVE for part in parts]
    return "apache-2.0" if all(free) else None


def is_hub_id(name: str) -> bool:
    """Whether a loaded name was a Hub id and not a local file or folder."""
    return HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def hub_licence(repo_id: str, repo_type: str) -> str | None:
    """The licence that a repository's card states; None if the card cannot be loaded or states none."""
    try:
        card = RepoCard.load(repo_id, repo_type=repo_type, ignore_metadata_errors=True)
    except OSError:
        return None
    licence = card.data.get("license")
    return ", ".join(licence) if isinstance(licence, list) else licence


def cached_revision(repo_id: str) -> str | None:
    """The commit of a model that was just loaded, from the cache."""
    try:
        return Path(hf_hub_download(repo_id, "config.json", local_files_only=True)).parent.name
    except OSError:
        return None


__all__ = ["builtin_data", "own_data", "own_licence", "pretrained_parts"]
