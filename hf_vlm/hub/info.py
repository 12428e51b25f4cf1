"""`hf-vlm info`: architecture, training data and results of a checkpoint, read without loading its weights."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import (
    EvalResult,
    HfApi,
    ModelCard,
    parse_local_safetensors_file_metadata,
    snapshot_download,
)
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    SafetensorsParsingError,
)
from huggingface_hub.utils import SafetensorsFileMetadata
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..checkpoints import check_config, file_errors
from ..families import FAMILIES, load_class
from ..terminal import printable
from .cards.card import RESULTS_NAME, card_texts, eval_results, input_sizes, read_results
from .record import RECORD_NAME, count_parameters, read_json, read_record

# The files that are downloaded from the Hub. Of the weights, only the headers are read.
FILES = ["config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json"]
FILES += [RECORD_NAME, RESULTS_NAME, "README.md"]
LINE_LENGTH = 2000
Info = dict[str, Any]


def checkpoint_info(source: str) -> Info:
    """Facts about a checkpoint, from its files.

    Args:
        source: A folder or a Hub id.

    Returns:
        `architecture`, `model_type`, `head`, `parameters` (`total` and by part), `weights` (`bytes`, and `dtypes` with
        the number of values of each), `inputs` (`images` and `texts`) and `revision` (for Hub ids). From the training
        record: `recipe`, `training`, `data`, `parts`, `licence` and `results` (one entry per number). Unknown facts are
        left out.

    Raises:
        ValueError: if the checkpoint does not exist, is of another architecture, or has a broken file.
    """
    folder, revision = local_files(source)
    config = own_config(folder, source)
    record = read_record(folder)
    with file_errors(f"{source}: config.json"), torch.device("meta"):
        model = head_class(config, source)(config)
    parameters = count_parameters(model)
    texts = card_texts(config.model_type)
    with file_errors(f"{source}: the header of its weights"):
        weights = stored_weights(folder, source if revision else None, revision)
    with file_errors(f"{source}: processor_config.json or tokenizer_config.json"):
        inputs = input_sizes(folder)
    with file_errors(f"{source}: {RESULTS_NAME} or README.md"):
        results = measured(folder, config.model_type)
    info = {
        "checkpoint": source,
        "revision": revision,
        "architecture": texts.title if texts else None,
        "model_type": config.model_type,
        "head": type(model).__name__,
        "parameters": {
            "total": parameters["total"],
            "parts": {part: counts["total"] for part, counts in parameters["parts"].items()},
        },
        "weights": weights,
        "inputs": inputs,
        **{key: record.get(key) for key in ("recipe", "training", "data", "parts", "licence")},
        "results": results,
    }
    return {key: value for key, value in info.items() if value not in (None, {}, [])}


def local_files(source: str) -> tuple[Path, str | None]:
    """The folder with a checkpoint's small files and, for a Hub id, their commit."""
    if Path(source).is_dir():
        return Path(source), None
    try:
        folder = Path(snapshot_download(source, allow_patterns=FILES))
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise ValueError(
            f"{source} is neither a folder nor a Hub repository that you can read: correct the name, or log in."
        ) from error
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"{source} is not a local folder, and the Hub cannot be reached: check it, or go online."
        ) from error
    return folder, folder.name


def own_config(folder: Path, source: str) -> PreTrainedConfig:
    """The config of a checkpoint of this package.

    Raises:
        ValueError: if config.json is missing, broken, or of another architecture.
    """
    content = read_json(folder / "config.json")
    if not content:
        raise ValueError(f"{source} has no config.json, so it is not a checkpoint: give the folder or id of a model.")
    if content.get("model_type") not in [*FAMILIES]:
        known, found = ", ".join(sorted(FAMILIES)), printable(content.get("model_type"), 100)
        raise ValueError(f"{source} is a {found} checkpoint: give one of this package ({known}).")
    with file_errors(f"{source}: config.json"):
        check_config(content, source)
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def head_class(config: PreTrainedConfig, source: str) -> type[PreTrainedModel]:
    """The class that saved a checkpoint; the base model if the config does not name one."""
    family = FAMILIES[config.model_type]
    written_by = (config.architectures or [family.model])[0]
    if written_by not in family.classes:
        known = ", ".join(family.classes)
        raise ValueError(
            f"{source}: config.json names the unknown class {printable(written_by, 100)}: it must be one of {known}."
        )
    return load_class(written_by)


def stored_weights(folder: Path, repo_id: str | None, revision: str | None) -> Info | None:
    """Bytes and dtypes of the weights, from the headers of their files; None if there are no weights."""
    try:
        headers = [parse_local_safetensors_file_metadata(path) for path in sorted(folder.glob("model*.safetensors"))]
        if not headers and repo_id:
            headers = remote_headers(repo_id, revision)
    except SafetensorsParsingError as error:
        raise ValueError(f"{repo_id or folder}: the weights are damaged ({str(error).splitlines()[0]})") from error
    if not headers:
        return None
    tensors = [tensor for header in headers for tensor in header.tensors.values()]
    dtypes: dict[str, int] = defaultdict(int)
    for tensor in tensors:
        dtypes[tensor.dtype] += tensor.parameter_count
    return {"bytes": sum(end - begin for begin, end in (t.data_offsets for t in tensors)), "dtypes": dict(dtypes)}


def remote_headers(repo_id: str, revision: str | None) -> list[SafetensorsFileMetadata]:
    """The headers of a repository's weight files; empty without weights or without a connection to the Hub."""
    try:
        return list(HfApi().get_safetensors_metadata(repo_id, revision=revision).files_metadata.values())
    except (NotASafetensorsRepoError, OfflineModeIsEnabled):
        return []


def measured(folder: Path, model_type: str) -> list[Info]:
    """The results of a checkpoint: from results.json, or else from the metadata of its model card."""
    card = folder / "README.md"
    found: list[EvalResult] = eval_results(read_results(folder), model_type)
    if not found and card.is_file():
        found = ModelCard.load(card, ignore_metadata_errors=True).data.eval_results or []
    return [
        {
            "task": result.task_type,
            "dataset": result.dataset_name,
            "split": result.dataset_split,
            "metric": result.metric_name or result.metric_type,
            "value": result.metric_value,
        }
        for result in found
    ]


def format_info(info: Info) -> str:
    """The result of [`checkpoint_info`] as lines of text.

    Raises:
        ValueError: if the training record holds impossible values.
    """
    with file_errors(f"{info['checkpoint']}: {RECORD_NAME}"):
        return _lines(info)


def _lines(info: Info) -> str:
    parts = ", ".join(f"{part} {count:,}" for part, count in info["parameters"]["parts"].items())
    lines = [
        ("checkpoint", info["checkpoint"] + (f" at {info['revision']}" if "revision" in info else "")),
        ("architecture", f"{info.get('architecture', info['model_type'])} ({info['model_type']}), {info['head']}"),
        ("parameters", f"{info['parameters']['total']:,}: {parts}"),
    ]
    if weights := info.get("weights"):
        lines.append(("weights", f"{weights['bytes'] / 1e6:,.1f} MB, {', '.join(weights['dtypes'])}"))
    lines += info.get("inputs", {}).items()
    if training := info.get("training"):
        facts = ", ".join(f"{key.replace('_', ' ')} {short(value)}" for key, value in training.items())
        lines.append(("training", f"{info.get('recipe', '')}: {facts}"))
    for entry in info.get("data", []):
        rows = ", ".join(f"{split} {count}" for split, count in entry.get("rows", {}).items())
        lines.append(("data", f"{entry.get('name')}: {rows or entry.get('split')}; {entry.get('licence') or '?'}"))
    for entry in info.get("parts", []):
        lines.append(("part", f"{entry.get('part')}: {entry.get('id')}; {entry.get('licence') or '?'}"))
    if "licence" in info:
        lines.append(("licence", info["licence"]))
    groups: dict[str, list[str]] = defaultdict(list)
    for result in info.get("results", []):
        groups[f"{result['dataset']}, {result['split']}"].append(f"{result['metric']} {short(result['value'])}")
    lines += [("results", f"{group}: {'; '.join(numbers)}") for group, numbers in groups.items()]
    return "\n".join(f"{label:<14}{printable(text, LINE_LENGTH)}" for label, text in lines)


def short(value: Any) -> str:
    """A value as short text, fractions with three decimals."""
    return f"{value:.3f}" if isinstance(value, float) and not value.is_integer() else f"{value}"


__all__ = ["checkpoint_info", "format_info"]
