"""The model card: `README.md` next to the weights, written from the checkpoint and the records of its run.

- Sources: config.json, the processor's files, training_record.json and results.json. Facts that they lack are left out.
- The metadata at the top is for the Hub: task, licence, datasets, base models and, as model-index, the numbers.
- Names and other external text are escaped: they are never Markdown or HTML.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ...families import FAMILIES, load_reference
from ...files import write_text
from ...metrics.descriptions import DESCRIPTIONS, Description
from ...terminal import printable
from ..record import CARD_HASH, RECORD_NAME, Record, read_json, read_record, record_text, write_record
from .evaluations import EVALUATIONS, OTHER_RUNS, TEST_SETS
from .types import CHECKPOINT, CardTexts, Evaluation, HeadTexts

logger = logging.getLogger(__name__)

CARD_NAME = "README.md"
RESULTS_NAME = "results.json"
TEMPLATE = Path(__file__).with_name("card_template.md")
Results = dict[str, dict[str, dict[str, Any]]]  # by evaluation, then by test set


def write_card(folder: str | Path, name: str | None = None, record: Record | None = None) -> Path:
    """Writes the card of a checkpoint, and its hash into the record. A card that somebody has edited is kept.

    Args:
        folder: A folder with model and processor.
        name: The name that users load the model by, such as the Hub id `org/name`; by default the folder's own name.
        record: The record of the run that has just ended, which is written too; by default the folder's record.

    Returns:
        The path of the card.

    Raises:
        ValueError: if the folder holds no checkpoint of a known family, or one of its files is broken.
    """
    folder = Path(folder)
    path = folder / CARD_NAME
    keep = path.is_file() and not is_unedited(folder)
    has_record = record is not None or (folder / RECORD_NAME).is_file()
    record = read_record(folder) if record is None else record
    if keep:
        logger.warning(f"{path} has been edited and is kept. Delete it to get a new model card.")
    else:
        text = render_card(folder, name, record)
        record = {**record, CARD_HASH: card_hash(text)}
    if has_record:
        write_record(folder, record)
    if not keep:
        write_text(path, text)
    return path


def is_unedited(folder: Path) -> bool:
    """Whether the card in a folder is unedited since it was written.

    The card's hash is compared with that in the record. Without one, the card must equal the card that would be written
    now.
    """
    text = (folder / CARD_NAME).read_text(encoding="utf-8")
    try:
        recorded = read_record(folder).get(CARD_HASH)
        return text == render_card(folder) if recorded is None else card_hash(text) == recorded
    except ValueError:  # another family, or a damaged file
        return False


def card_hash(text: str) -> str:
    """SHA-256 of a card's text."""
    return hashlib.sha256(text.encode()).hexdigest()


def render_card(folder: str | Path, name: str | None = None, record: Record | None = None) -> str:
    """The text of the card; see [`write_card`]."""
    folder = Path(folder)
    name = name or folder.resolve().name
    record = read_record(folder) if record is None else record
    config, results = read_json(folder / "config.json"), read_results(folder)
    model_type = str(config.get("model_type"))
    texts = card_texts(model_type)
    if texts is None:
        known = ", ".join(family.model_type for family in FAMILIES.values() if family.card)
        raise ValueError(f"{folder}: no model card can be written for model type {model_type}, only for {known}.")
    head = texts.head(config)
    card = ModelCard.from_template(
        card_metadata(name, model_type, head, record, results),
        template_path=str(TEMPLATE),
        title=escape(name.split("/")[-1]),
        description=texts.description,
        paper=texts.paper,
        arxiv=texts.arxiv,
        facts=facts_table(folder, texts, model_type),
        usage=head.usage.replace(CHECKPOINT, json.dumps(name, ensure_ascii=False)),
        # A snippet that takes a class from the package needs the package.
        carries_code="auto_map" in config and "hf_vlm.Vlm" not in head.usage,
        results="\n\n".join(results_section(key, by_set, model_type) for key, by_set in results.items()),
        citation=texts.citation,
        limits="\n".join(f"- {limit}" for limit in (*texts.limits, *data_limits(record))),
        **training_sections(record),
    )
    return str(card).rstrip() + "\n"


def card_under_name(folder: Path, source: Path, name: str) -> dict[str, str]:
    """The files that say under which name a checkpoint is loaded, for a repository of another name.

    Args:
        folder: The folder of the checkpoint, with its card.
        source: The files to push: `folder`, or a copy that carries its code.
        name: Id of the repository.

    Returns:
        File name -> text: the card and, where the folder has one, the record with the card's hash. An edited card is
        returned unchanged, alone.
    """
    if not is_unedited(folder):
        return {CARD_NAME: (folder / CARD_NAME).read_text(encoding="utf-8")}
    record = read_record(folder)
    text = render_card(source, name, record)
    if CARD_HASH not in record:
        return {CARD_NAME: text}
    return {CARD_NAME: text, RECORD_NAME: record_text({**record, CARD_HASH: card_hash(text)})}


def card_texts(model_type: str | None) -> CardTexts | None:
    """The texts of a family's cards, as its row in `families.py` says; None for any other model type."""
    family = FAMILIES.get(model_type or "")
    return load_reference(family.card) if family is not None and family.card is not None else None


def card_metadata(name: str, model_type: str, head: HeadTexts, record: Record, results: Results) -> ModelCardData:
    """The metadata of a card; see [`write_card`]."""
    evaluated = eval_results(results, model_type)
    return ModelCardData(
        # Not hf_vlm: the Hub shows no snippet for an unknown library. transformers' snippet works if the
        # repository carries its code, and otherwise after `import hf_vlm`; the card says so.
        library_name="transformers",
        pipeline_tag=head.pipeline_tag,
        license=record.get("licence"),
        datasets=[entry["hub_id"] for entry in record["data"] if "hub_id" in entry] or None,
        base_model=list(dict.fromkeys(entry["hub_id"] for entry in record["parts"] if "hub_id" in entry)) or None,
        tags=["hf_vlm", model_type, *head.tags],
        model_name=name.split("/")[-1] if evaluated else None,
        eval_results=evaluated or None,
    )


def read_results(folder: str | Path) -> Results:
    """The results of the evaluation: metrics by evaluation and test set; empty if there are none.

    Raises:
        ValueError: if it is broken.
    """
    path = Path(folder) / RESULTS_NAME
    results = read_json(path)
    sets = [scores for by_set in results.values() for scores in (by_set.values() if isinstance(by_set, dict) else [0])]
    if not all(isinstance(scores, dict) for scores in sets):
        raise ValueError(f"{path} does not hold metrics by evaluation and test set: run the evaluation again.")
    return results


def evaluation_of(name: str, by_set: dict[str, dict[str, Any]], model_type: str) -> Evaluation:
    """An evaluation as the card shows it: by the cards' texts, by the task's description, or else by its own keys."""
    texts = card_texts(model_type)
    known = EVALUATIONS | (texts.evaluations if texts else {})
    if name in known:
        return known[name]
    title = name.replace("_", " ").capitalize()
    numbers = {key: key for scores in by_set.values() for key, value in scores.items() if not isinstance(value, dict)}
    plain = Description(
        name, title, summary="", hub_task=(name, title), primary=next(iter(numbers), ""), metrics=numbers
    )
    return Evaluation(DESCRIPTIONS.get(name, plain), (name, title))


def eval_results(results: Results, model_type: str) -> list[EvalResult]:
    """The measured numbers as the Hub's model index has them, unrounded."""
    found = []
    for name, by_set in results.items():
        evaluation = evaluation_of(name, by_set, model_type)
        described = evaluation.description
        for test_set, scores in by_set.items():
            values = [(key, label, scores.get(key)) for key, label in described.metrics.items()]
            for row in described.own_rows:
                suffix, own = evaluation.rows[row], scores.get(row, {})
                values += [(f"{row}_{k}", f"{label}, {suffix}", own.get(k)) for k, label in described.metrics.items()]
            found += [
                EvalResult(
                    task_type=described.hub_task[0],
                    task_name=described.hub_task[1],
                    dataset_type=evaluation.dataset[0],
                    dataset_name=evaluation.dataset[1],
                    dataset_split=test_set,
                    metric_type=key,
                    metric_name=label,
                    metric_value=value,
                )
                for key, label, value in values
                if value is not None
            ]
    return found


def results_section(name: str, by_set: dict[str, dict[str, Any]], model_type: str) -> str:
    """One evaluation as heading, note and table; baselines stand below each test set's row."""
    evaluation = evaluation_of(name, by_set, model_type)
    used = {key for scores in by_set.values() for key in scores}
    sizes = {key: label for key, label in evaluation.description.sizes.items() if key in used}
    metrics = {key: label for key, label in evaluation.description.metrics.items() if key in used}
    rows = []
    for test_set, scores in by_set.items():
        counts = [number(scores.get(key), digits=0) for key in sizes]
        rows.append([TEST_SETS.get(test_set, test_set), *counts, *(number(scores.get(key)) for key in metrics)])
        for row, label in (evaluation.rows | OTHER_RUNS).items():
            if nested := scores.get(row):
                rows.append([label, *("" for _ in sizes), *(number(nested.get(key)) for key in metrics)])
    heading = f"### {escape(evaluation.description.title)}"
    return "\n\n".join(
        filter(None, [heading, evaluation.note, table(["test set", *sizes.values(), *metrics.values()], rows)])
    )


def training_sections(record: Record) -> dict[str, str]:
    """The sections from the record of the run, by the template's names; empty where the record has nothing."""
    parameters, sections = record["parameters"], {}
    if record["training"]:
        sections["training"] = training_text(record)
    if parameters:
        rows = [[part, number(n["total"], 0), number(n["trained"], 0)] for part, n in parameters["parts"].items()]
        rows.append(["total", number(parameters["total"], 0), number(parameters["trained"], 0)])
        sections["parameters"] = table(["part", "parameters", "trained"], rows)
    if record["arguments"]:
        arguments = {group: without_unset(values) for group, values in record["arguments"].items()}
        lines = json.dumps(arguments, indent=2, ensure_ascii=False).split("\n")
        sections["arguments"] = "\n".join(map(printable, lines))
    sections["versions"] = table(["package", "version"], record["versions"].items()) if record["versions"] else ""
    sections["data"] = data_table(record["data"])
    sections["parts"] = entries_table(record["parts"], ("part", "id", "revision", "version", "licence"))
    sections["licence"] = licence_text(record)
    return sections


def training_text(record: Record) -> str:
    """Steps, batch size, time and device of the training, as a table."""
    facts = dict(record["training"])
    if facts.get("timed_steps") == facts.get("steps"):
        facts.pop("timed_steps", None)
    labels = {
        "steps": "steps",
        "epochs": "epochs",
        "rows": "training pairs",
        "global_batch_size": "global batch size",
        "minutes": "minutes of training, evaluations in between included",
        "timed_steps": "steps that these minutes cover",
        "device": "device",
        "ranks": "processes",
        "weights_of_step": "step whose weights these are",
        "chosen_by": "chosen on the validation pairs by",
        "chosen_at": "its value there",
    }
    digits = {"minutes": 1, "epochs": 1, "chosen_at": 3}
    rows = [
        [label, facts[key] if isinstance(facts[key], str) else number(facts[key], digits.get(key, 0))]
        for key, label in labels.items()
        if facts.get(key) is not None
    ]
    return table(["recipe", str(record.get("recipe", ""))], rows)


def data_table(data: Sequence[Record]) -> str:
    """The data sources with their rows by split, and their licences."""
    rows = []
    for entry in data:
        counts = ", ".join(f"{split}: {number(count, 0)}" for split, count in entry.get("rows", {}).items())
        licence = entry.get("licence") or "not recorded: see the source"
        rows.append(
            [entry.get("name"), counts or entry.get("split"), licence, entry.get("credit"), entry.get("source")]
        )
    return table(["data", "rows", "licence", "credit", "source"], rows) if rows else ""


def entries_table(entries: Sequence[Record], keys: Sequence[str]) -> str:
    """A table of dictionaries; empty columns are left out."""
    filled = [key for key in keys if any(entry.get(key) is not None for entry in entries)]
    return table(filled, [[entry.get(key) for key in filled] for entry in entries]) if entries else ""


def licence_text(record: Record) -> str:
    """The licence of the weights, with a note that data and parts keep theirs."""
    stated = (
        f"These weights: {escape(record['licence'])}."
        if record.get("licence")
        else ("No licence is stated for these weights; whoever publishes them must state one.")
    )
    sources = " Training data and pretrained parts keep the licences named above."
    return stated + (sources if record["data"] or record["parts"] else "")


def data_limits(record: Record) -> list[str]:
    """Limits that follow from the training data."""
    names = [entry["name"] for entry in record["data"] if "train" in entry.get("rows", {"train": 0})]
    if not names:
        return []
    listed = ", ".join(escape(name) for name in names)
    return [f"All training images came from {listed}. Performance on other kinds of images was not measured."]


def facts_table(folder: Path, texts: CardTexts, model_type: str) -> str:
    """Architecture and sizes of the inputs."""
    sizes = input_sizes(folder)
    return table(["architecture", f"{texts.title} ({model_type})"], [[key, sizes[key]] for key in sizes])


def input_sizes(folder: str | Path) -> dict[str, str]:
    """Input sizes of the processor in words, for `images` and `texts`; unknown sizes are left out."""
    folder = Path(folder)
    processor = read_json(folder / "processor_config.json")
    image_options = processor.get("image_processor") or read_json(folder / "preprocessor_config.json")
    sizes, size = {}, image_options.get("size", {})
    if {"height", "width"} <= set(size):
        sizes["images"] = f"{size['height']} x {size['width']} pixels"
    longest = read_json(folder / "tokenizer_config.json").get("model_max_length")
    if isinstance(longest, int) and longest < 10**6:  # tokenizers without a limit give a huge number
        sizes["texts"] = f"at most {longest} tokens"
    return sizes


def without_unset(values: dict[str, Any]) -> dict[str, Any]:
    """Arguments without those that are unset or off; 0 is a value."""
    return {key: value for key, value in values.items() if value not in (None, "", [], {}) and value is not False}


def number(value: float | None, digits: int = 3) -> str:
    """A number as the card's tables show it."""
    return "" if value is None else f"{value:,.{digits}f}"


def table(header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table of plain text."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join('---' if cell == '---' else escape(cell) for cell in line)} |" for line in lines)


def escape(text: Any) -> str:
    """Text on one line with control, Markdown and HTML characters escaped."""
    line = printable(" ".join(("" if text is None else str(text)).split()))
    return re.sub(r"([\\`*_{}\[\]<>#|!&~$])", r"\\\1", line)


__all__ = [
    "CARD_NAME",
    "RESULTS_NAME",
    "card_texts",
    "card_under_name",
    "eval_results",
    "input_sizes",
    "is_unedited",
    "read_results",
    "render_card",
    "write_card",
]
