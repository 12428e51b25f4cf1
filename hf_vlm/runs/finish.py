"""The end of every recipe: the record of the run, the model card that is written from it, and the push if asked for."""

import dataclasses
import re
from collections import Counter
from pathlib import Path
from typing import Any

from huggingface_hub import RepoCard, hf_hub_download
from transformers import Trainer

from ..data.builtin.drawings import package_versions
from ..data.builtin.easy_vqa import easy_vqa_questions
from ..data.builtin.emoji import LICENCES, load_emoji
from ..data.wheels import PREFIX, WHEELS
from ..hub.cards.card import write_card
from ..hub.push import push_run
from ..hub.record import Record, has_trained, published, read_record, run_record, write_record

PARTS = ("model", "vision", "text", "tokenizer", "language_model")  # the model arguments that name pretrained parts
PERMISSIVE = {"apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0"}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
DATA_FILES = (".parquet", ".arrow", ".json", ".jsonl", ".csv", ".tar")


EASY_VQA = {
    "name": "easy-VQA",
    "licence": "MIT",
    "credit": "easy-VQA, by Victor Zhou",
    "source": "https://github.com/vzhou842/easy-VQA",
}


def finish_run(trainer: Trainer, recipe: str, model_args: Any, data_args: Any, has_easy_vqa: bool = False) -> None:
    """Writes `training_record.json` and the model card into the output folder, on the first rank.

    A finished run that is started again has trained nothing: its record then stays as it is, and the card is written
    anew, since the evaluation may have been.

    With `--push_to_hub` the folder is then pushed.

    Args:
        trainer: The trainer after `train()` and `save_model()`.
        recipe: Name of the recipe.
        model_args: Its dataclass of model arguments.
        data_args: Its dataclass of data arguments; without `sources` it trained on the built-in pictures.
        has_easy_vqa: Whether it then trained on easy-VQA as well.
    """
    if not trainer.is_world_process_zero():
        return
    folder = trainer.args.output_dir
    if has_trained(trainer) or read_record(folder)["training"].get("steps") != trainer.state.global_step:
        model, data = dataclasses.asdict(model_args), dataclasses.asdict(data_args)
        parts = pretrained_parts(model)
        builtin = data["sources"] is None
        sources = builtin_data(has_easy_vqa) if builtin else own_data(data["sources"], data["eval_sources"] or [])
        record = run_record(trainer, recipe, {"model": model, "data": data}, sources, parts)
        if builtin:
            record["versions"] |= package_versions()
            record["licence"] = own_licence(parts)
        write_record(folder, record)
    write_card(folder, trainer.args.hub_model_id if trainer.args.push_to_hub else None)
    push_run(trainer.args)


def builtin_data(has_easy_vqa: bool = False) -> list[Record]:
    """The vendors of the built-in pictures, and easy-VQA, with the rows that each gives to each split."""
    counts = {split: Counter(rows["style"]) for split, rows in load_emoji().items()}
    found: list[Record] = [
        {"name": style, **LICENCES[style], "rows": {split: n[style] for split, n in counts.items() if n[style]}}
        for style in LICENCES
    ]
    if has_easy_vqa:
        found.append({**EASY_VQA, "rows": {"train": len(easy_vqa_questions("train"))}})
    return found


def own_data(sources: list[dict[str, Any]], eval_sources: list[dict[str, Any]]) -> list[Record]:
    """The user's data sources; of data sets on the Hub, the licence that they state."""
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
    """The parts that a model's arguments name, with versions and licences where these are known.

    Of a `model` that another recipe wrote, which is gone on with whole, its parts follow.
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
        elif Path(name).is_dir() and (licence := read_record(name).get("licence")):  # what another recipe wrote
            entry["licence"] = licence
        found.append(entry)
        if part == "model" and Path(name).is_dir():
            found += [{**inner, "part": f"{inner['part']} of {entry['id']}"} for inner in read_record(name)["parts"]]
    return found


def own_licence(parts: list[Record]) -> str | None:
    """The licence of what was trained on the built-in pictures: the package's own, if all parts are as free."""
    free = [str(part.get("licence")).split()[0].lower() in PERMISSIVE for part in parts]
    return "apache-2.0" if all(free) else None


def is_hub_id(name: str) -> bool:
    """Whether a name that could be loaded was one of the Hub rather than a file or folder."""
    return HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def hub_licence(repo_id: str, repo_type: str) -> str | None:
    """The licence that a repository's card states; None where the Hub or the card cannot be had."""
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


__all__ = ["finish_run"]
