"""The filter of BLIP's CapFilt (arXiv 2201.12086, section 3.3): removes pairs whose text does not match the image.

- The matching head (ITM) scores each text with the probability that it matches. Texts below the threshold are noise.
- With a captioner, every image also gets a synthetic caption (nucleus sampling), which is filtered in the same way.
- The output is a dataset of parquet files, one for each block of rows. `filter.json` lists the finished blocks, so that
  an interrupted run resumes with the next block. A block is the same in every run.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import datasets
import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from ..data.sources.open import DataSource
from ..data.sources.rows import OnError
from ..data.sources.skipped import SkipReport
from ..data.sources.stored import StoredRow, stored_blocks
from ..evaluation import caption_images, embed_images, embed_texts, match_logits
from ..evaluation.task import Evaluator
from ..evaluation.tasks import load_checkpoint
from ..files import hold_folder, replace_file, write_text
from ..hub.record import read_json
from ..metrics.retrieval import pair_cosines, unit_images
from ..models import VlmBlipForConditionalGeneration, VlmBlipForPreTraining

ACTIONS = ("keep", "flag")
STATE_NAME = "filter.json"
CARD = """---
configs:
- config_name: default
  data_files: data/*.parquet
---
# Filtered image-text pairs

Scored by hf_vlm's recipe blip_filter. `itm`: probability that the text matches the image; `keep`: whether it reaches
the threshold that filter.json names; `origin`: `given`, or `synthetic` for a caption that a model wrote.
"""


@dataclass(frozen=True)
class FilterSettings:
    """The settings that determine the output.

    Args:
        checkpoint: Folder or Hub id of the BLIP that filters.
        captioner: Folder or Hub id of the BLIP that writes synthetic captions; None for none.
        action: `"keep"` writes the texts that match, `"flag"` all of them; both with a column `keep`.
        threshold: Texts with a lower probability of a match are dropped or flagged.
        itc: Also write the similarity of the embeddings, as column `itc`.
        prompt: Text before a synthetic caption; not part of the caption.
        on_error: `"raise"`, or `"skip"` for bad rows.
        shard_rows: Rows of a source per output file.
        bf16: Compute under bfloat16 autocast.
        seed: Seed of the synthetic captions.

    Raises:
        ValueError: if the action is unknown or a number is out of range.
    """

    checkpoint: str
    captioner: str | None = None
    action: str = "keep"
    threshold: float = 0.5
    itc: bool = False
    prompt: str | None = None
    on_error: str = "raise"
    shard_rows: int = 1000
    bf16: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise ValueError(f"There is no action {self.action!r}; write one of {', '.join(ACTIONS)}.")
        if not 0 <= self.threshold <= 1 or self.shard_rows < 1:
            raise ValueError(
                f"threshold must be 0 to 1 and shard_rows at least 1, got {self.threshold} and {self.shard_rows}."
            )


def load_filter(checkpoint: str) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A BLIP with a matching head, and its processor.

    Raises:
        ValueError: if the model has no matching head.
    """
    model, processor = load_checkpoint(checkpoint)
    if not isinstance(model, VlmBlipForPreTraining):
        raise ValueError(
            f"{checkpoint} holds a {type(model).__name__}, which has no matching head: name a VlmBlipForPreTraining or "
            "a VlmBlipForImageTextRetrieval."
        )
    return model, processor


def load_captioner(checkpoint: str) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A BLIP that writes captions (also from a pretraining checkpoint), and its processor.

    Raises:
        ValueError: if the model has no text decoder for captions.
    """
    model, processor = load_checkpoint(checkpoint)
    if not isinstance(model, VlmBlipForPreTraining | VlmBlipForConditionalGeneration) or (
        not model.config.use_text_decoder
    ):
        raise ValueError(
            f"{checkpoint} holds a {type(model).__name__}, which writes no captions: name a BLIP with a text decoder."
        )
    return Evaluator(model, processor).captioner, processor


class PairFilter:
    """Scores pairs and writes captions, as the settings say.

    Args:
        settings: See [`FilterSettings`].
        progress: Show progress bars.
    """

    def __init__(self, settings: FilterSettings, progress: bool = True):
        self.settings = settings
        self.model, self.processor = load_filter(settings.checkpoint)
        self.captioner = None if settings.captioner is None else load_captioner(settings.captioner)
        autocast_dtype = torch.bfloat16 if settings.bf16 else None
        self.shown: dict[str, Any] = {"progress": progress, "autocast_dtype": autocast_dtype}

    def match(self, images: Sequence[Image.Image], texts: Sequence[str], owner: Sequence[int]) -> torch.Tensor:
        """The probability `(texts,)` that each text matches the image at its place in `owner`."""
        pairs = torch.stack([torch.tensor(owner), torch.arange(len(texts))], dim=1)
        return match_logits(self.model, self.processor, images, texts, pairs, **self.shown).softmax(dim=-1)[:, 1]

    def similarity(self, images: Sequence[Image.Image], texts: Sequence[str], owner: Sequence[int]) -> torch.Tensor:
        """The cosine `(texts,)` between the embeddings (ITC) of each text and its image."""
        return similarity(self.model, self.processor, images, texts, owner, **self.shown)

    def write(self, images: Sequence[Image.Image], seed: int) -> list[str]:
        """A synthetic caption for each image, by nucleus sampling with p = 0.9 (section 3.3)."""
        assert self.captioner is not None
        model, processor = self.captioner
        prompt = self.settings.prompt
        used = 1 if prompt is None else len(processor.tokenizer(prompt)["input_ids"])
        room = min(20, model.config.text_config.max_position_embeddings - used)
        options: dict[str, Any] = {"do_sample": True, "top_p": 0.9, "top_k": 0, "max_new_tokens": room}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return caption_images(model, processor, images, prompt, **self.shown, **options)

    def columns(self, rows: Sequence[StoredRow], label: str, seed: int) -> dict[str, list]:
        """The output columns for some rows: each image's given texts, then its synthetic caption, with scores."""
        images = [row.image for row in rows]
        texts = [(i, text, "given") for i, row in enumerate(rows) for text in row.captions]
        if self.captioner is not None and rows:
            written = self.write(images, seed)
            texts += [(i, text, "synthetic") for i, text in enumerate(written) if text]
            texts.sort(key=lambda text: text[0])
        owner, captions = [i for i, _, _ in texts], [text for _, text, _ in texts]
        itm = self.match(images, captions, owner) if texts else torch.empty(0)
        columns: dict[str, list] = {
            "image": [{"bytes": rows[i].file, "path": None} for i in owner],
            "caption": captions,
            "origin": [origin for _, _, origin in texts],
            "id": [rows[i].id for i in owner],
            "source": [label] * len(texts),
            "row": [rows[i].row for i in owner],
            "itm": itm.tolist(),
            "keep": (itm >= self.settings.threshold).tolist(),
        }
        if self.settings.itc:
            columns["itc"] = self.similarity(images, captions, owner).tolist() if texts else []
        return columns


def similarity(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence[Image.Image],
    texts: Sequence[str],
    owner: Sequence[int],
    **shown: Any,
) -> torch.Tensor:
    """Cosines `(texts,)` of texts and their images by any two-tower model; of several image embeddings the nearest."""
    image_embeds = unit_images(embed_images(model, processor, images, **shown))
    pairs = torch.stack([torch.tensor(owner), torch.arange(len(texts))], dim=1)
    return pair_cosines(image_embeds, embed_texts(model, processor, texts, **shown), pairs)


def features(itc: bool) -> datasets.Features:
    """The columns of the output dataset with their types."""
    kinds = {"caption": "string", "origin": "string", "id": "string", "source": "string", "row": "int64"}
    kinds |= {"itm": "float32", "keep": "bool", **({"itc": "float32"} if itc else {})}
    return datasets.Features(
        {"image": datasets.Image(), **{name: datasets.Value(kind) for name, kind in kinds.items()}}
    )


def filter_sources(
    folder: str | Path,
    sources: Sequence[dict[str, Any]],
    settings: FilterSettings,
    progress: bool = True,
    report: SkipReport | None = None,
) -> dict[str, int]:
    """Filters sources into a folder, which `datasets.load_dataset(folder)` then loads.

    Args:
        folder: A new folder, or that of an interrupted run, which is then resumed.
        sources: Fields of `DataSource`, one dict per source; read one after the other.
        settings: See [`FilterSettings`].
        progress: Show a progress bar.
        report: Counts the skipped rows; a new one by default.

    Returns:
        `images`, `texts`, `kept` (texts that reach the threshold), `synthetic` and `kept_synthetic`.

    Raises:
        ValueError: if the folder holds the output of other sources or settings, or a source cannot be read.
    """
    folder, opened = Path(folder), [DataSource(**source) for source in sources]
    wanted = {**asdict(settings), "sources": json.loads(json.dumps(list(sources)))}
    on_error = cast(OnError, settings.on_error)
    with hold_folder(folder), tqdm(desc="images", disable=not progress) as bar:
        state = _state(folder, wanted)
        pair_filter = PairFilter(settings, progress=False)
        bar.update(_totals(state)["images"])
        for number, source in enumerate(opened):
            done = [part for part in state["parts"] if part["source"] == number]
            if number in state["complete"]:
                continue
            blocks = stored_blocks(source, settings.shard_rows, len(done), on_error, report)
            for block, rows in enumerate(blocks, start=len(done)):
                seed = hash((settings.seed, number, block)) % 2**63
                columns = pair_filter.columns(rows, source.path, seed)
                _write_part(folder / "data" / f"{number:03d}-{block:06d}.parquet", columns, settings)
                state["parts"].append({"source": number, "block": block, **_counts(columns, len(rows))})
                _write_state(folder, state)
                bar.update(len(rows))
            state["complete"].append(number)
            _write_state(folder, state)
    return _totals(state)


def _state(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The state of the folder's run; empty for a new folder."""
    if state := read_json(folder / STATE_NAME):
        changed = [name for name, value in settings.items() if state["settings"].get(name) != value]
        if changed:
            raise ValueError(
                f"{folder} holds the output of another {changed[0]}: use a new folder, or delete this one."
            )
        return state
    (folder / "data").mkdir(parents=True, exist_ok=True)
    write_text(folder / "README.md", CARD)
    return {"settings": settings, "parts": [], "complete": []}


def _write_state(folder: Path, state: dict[str, Any]) -> None:
    write_text(folder / STATE_NAME, json.dumps(state, indent=2))


def _write_part(path: Path, columns: dict[str, list], settings: FilterSettings) -> None:
    written = [i for i, keep in enumerate(columns["keep"]) if keep or settings.action == "flag"]
    kept = {name: [column[i] for i in written] for name, column in columns.items()}
    part = datasets.Dataset.from_dict(kept, features=features(settings.itc))
    replace_file(path, lambda unfinished: part.to_parquet(str(unfinished)))


def _counts(columns: dict[str, list], images: int) -> dict[str, int]:
    synthetic = [keep for keep, origin in zip(columns["keep"], columns["origin"], strict=True) if origin == "synthetic"]
    counts = {"images": images, "texts": len(columns["keep"]), "kept": sum(columns["keep"])}
    return {**counts, "synthetic": len(synthetic), "kept_synthetic": sum(synthetic)}


def _totals(state: dict[str, Any]) -> dict[str, int]:
    names = ("images", "texts", "kept", "synthetic", "kept_synthetic")
    return {name: sum(part[name] for part in state["parts"]) for name in names}


__all__ = ["FilterSettings", "PairFilter", "features", "filter_sources", "load_filter", "similarity"]
