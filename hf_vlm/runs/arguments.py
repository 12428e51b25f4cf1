"""Argument groups that recipes are composed of: every field is a YAML key and a command-line option.

A recipe takes one group for its model and one for its data, each built from the pieces here, and declares no argument
that it does not use. Defaults are those of the paper's configuration.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import ProcessorMixin

from ..data.sources.conversations import CONVERSATION_KEYS
from ..data.sources.rows import check_on_error, report_for
from ..data.sources.skipped import SkipReport, check_share
from .sources import PAIR_KEYS, check_sources, check_streams

NAME_HELP = "Hub id, folder or wheel:NAME"


def option(default: Any, text: str) -> Any:
    """A dataclass field with a default and a help text; a list or dict as default is copied."""
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


def required(text: str) -> Any:
    """A dataclass field without a default, with a help text."""
    return field(metadata={"help": text})


# --- pieces of a model


@dataclass(kw_only=True)
class ObjectiveArguments:
    """Weights of the three pretraining losses of BLIP and BLIP-2."""

    itc_weight: float = option(1.0, "Weight of the contrastive loss (ITC); 0 leaves the loss out.")
    itm_weight: float = option(1.0, "Weight of the matching loss (ITM); 0 leaves the loss out.")
    lm_weight: float = option(1.0, "Weight of the language-modelling loss; 0 leaves the loss out.")


@dataclass(kw_only=True)
class LoraArguments:
    """LoRA in place of full fine-tuning."""

    lora_r: int = option(0, "LoRA rank; 0 trains without LoRA.")
    lora_alpha: int = option(32, "LoRA's output is scaled by lora_alpha / lora_r.")
    lora_dropout: float = option(0.0, "Dropout probability before the LoRA layers.")


@dataclass(kw_only=True)
class DtypeArguments:
    """The dtype of the LLM."""

    language_model_dtype: str = option("auto", "float32, bfloat16, or auto: bfloat16 if bf16 is on.")

    def torch_dtype(self, bf16: bool) -> torch.dtype:
        """The dtype in which the LLM is loaded.

        Args:
            bf16: Whether the run trains in bf16.

        Raises:
            ValueError: if `language_model_dtype` is neither a dtype's name nor auto.
        """
        dtypes = {"auto": torch.bfloat16 if bf16 else torch.float32}
        dtypes |= {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        if self.language_model_dtype not in dtypes:
            raise ValueError(f"language_model_dtype is {self.language_model_dtype!r}: use one of {', '.join(dtypes)}.")
        return dtypes[self.language_model_dtype]


@dataclass(kw_only=True)
class AttentionArguments:
    """The attention implementation of the LLM."""

    attn_implementation: str | None = option(
        None, "Attention of the LLM: sdpa, flash_attention_2, ...; transformers chooses by default."
    )


@dataclass(kw_only=True)
class ChatTemplateArguments:
    """The chat template of a model with an LLM."""

    chat_template: str | None = option(None, "File with a chat template; the processor's own by default.")

    def set_chat_template(self, processor: ProcessorMixin) -> None:
        """Replace the processor's chat template by the file's, if one is named; it is saved with the processor."""
        if self.chat_template is not None:
            processor.chat_template = Path(self.chat_template).read_text(encoding="utf-8")


# --- models, one group a recipe


@dataclass(kw_only=True)
class ClipModelArguments:
    """The two towers of CLIP: a name loads pretrained weights, a config initialises new ones."""

    vision: str | None = option(None, f"Image encoder with pretrained weights: {NAME_HELP}.")
    vision_config: dict | None = option(None, "Fields of VlmTowerConfig for a new image tower.")
    text: str | None = option(None, f"Text encoder with pretrained weights: {NAME_HELP}.")
    text_config: dict | None = option(None, "Fields of VlmTextTowerConfig for a new text tower.")
    tokenizer: str | None = option(None, "Tokenizer of a new text tower; CLIP's by default.")
    lock: list[str] = option([], "Towers to freeze (LiT): vision, text.")
    image_size: int = option(224, "Side of the images in pixels.")
    resize_mode: str = option("crop", "crop, squash or pad.")
    max_text_length: int = option(77, "Longest caption in tokens.")
    projection_dim: int = option(512, "Size of the shared embedding.")
    loss_type: str = option("softmax", "softmax (CLIP) or sigmoid (SigLIP).")
    logit_scale: float | None = option(None, "Initial logit scale (a logarithm); the paper's by default.")


@dataclass(kw_only=True)
class BlipModelArguments(ObjectiveArguments):
    """BLIP's image tower, the BERT that initialises the text transformers, and the objectives."""

    vision: str | None = option(None, f"Image encoder with pretrained weights: {NAME_HELP}.")
    vision_config: dict | None = option(None, "Fields of VlmTowerConfig for a new image tower.")
    text: str = option("google-bert/bert-base-uncased", f"BERT that initialises the text transformers: {NAME_HELP}.")
    image_size: int = option(224, "Side of the images in pixels.")
    resize_mode: str = option("squash", "crop, squash or pad.")
    max_text_length: int = option(30, "Longest caption in tokens.")
    projection_dim: int = option(256, "Size of the shared embedding.")
    queue_size: int = option(57600, "Embeddings of earlier steps that serve as negatives.")
    momentum: float = option(0.995, "Decay of the momentum encoders.")
    soft_target_weight: float = option(0.4, "Weight of the momentum encoders' soft targets in ITC.")
    dropout: float | None = option(None, "Dropout of the text transformers; the BERT's own by default.")


@dataclass(kw_only=True)
class BlipTaskArguments(LoraArguments):
    """A pretrained BLIP and the task to fine-tune it for."""

    model: str = required("Pretrained BLIP: Hub id or folder.")
    task: str = required("caption, vqa or retrieval.")
    image_size: int | None = option(None, "Side of the images in pixels; position embeddings are interpolated.")
    prompt: str = option("", "Text before every caption; it is not supervised.")


@dataclass(kw_only=True)
class Blip2Stage1ModelArguments(ObjectiveArguments):
    """The frozen image tower, the BERT that initialises the Q-Former, and the objectives."""

    vision: str = option("openai/clip-vit-large-patch14", "Image tower: Hub id or folder.")
    text: str = option("google-bert/bert-base-uncased", f"BERT that initialises the Q-Former: {NAME_HELP}.")
    image_size: int = option(224, "Side of the images in pixels.")
    resize_mode: str = option("squash", "crop, squash or pad.")
    max_text_length: int = option(32, "Longest caption in tokens.")
    num_query_tokens: int = option(32, "Number of queries of the Q-Former.")
    cross_attention_frequency: int = option(2, "Every n-th layer of the Q-Former attends to the image.")
    projection_dim: int = option(256, "Size of the shared embedding.")
    dropout: float | None = option(None, "Dropout of the Q-Former; the BERT's own by default.")


@dataclass(kw_only=True)
class Blip2Stage2ModelArguments(DtypeArguments, ChatTemplateArguments):
    """A BLIP-2 after its first stage, and the LLM to connect it to."""

    model: str = required("BLIP-2 after its first stage: Hub id or folder.")
    language_model: str = option("facebook/opt-2.7b", f"LLM: {NAME_HELP}.")
    prompt: str = option("", "Text before every caption; it is not supervised.")
    max_length: int = option(32, "Longest caption in tokens.")


@dataclass(kw_only=True)
class InstructBlipModelArguments(LoraArguments, DtypeArguments, ChatTemplateArguments):
    """A BLIP-2 after its second stage; optionally LoRA on its LLM."""

    model: str = required("BLIP-2 after its second stage, with the Q-Former's text branch: Hub id or folder.")
    text: str = option("google-bert/bert-base-uncased", f"Tokenizer of the Q-Former: {NAME_HELP}.")
    max_text_length: int = option(128, "Longest instruction and response together, in tokens.")


@dataclass(kw_only=True)
class LlavaAlignModelArguments(DtypeArguments, AttentionArguments):
    """The parts of a new LLaVA, and how it reads an image."""

    vision: str = required("Image tower, or a CLIP that has one: Hub id or folder.")
    language_model: str = option("lmsys/vicuna-7b-v1.5", f"LLM: {NAME_HELP}.")
    stage: str = option("llava-1.5-align", "Name in hf_vlm.training.STAGES: trained parts and learning rates.")
    image_size: int | None = option(None, "Side of the images in pixels, for a tower of hf_vlm.")
    resize_mode: str = option("pad", "crop (1.0), pad (1.5) or anyres (1.6).")
    image_grid_pinpoints: str | None = option(
        None, 'Image sizes of anyres, height x width in pixels: "336x672 672x336".'
    )
    projector_type: str = option("mlp", "linear (1.0) or mlp (1.5, 1.6).")
    vision_feature_layer: int = option(-2, "Layer of the tower whose hidden states the projector reads.")

    def grids(self) -> list[list[int]] | None:
        """`image_grid_pinpoints` as pairs of height and width.

        Raises:
            ValueError: if a size is not two numbers with an x between them.
        """
        try:
            sizes = [[int(side) for side in size.split("x")] for size in (self.image_grid_pinpoints or "").split()]
        except ValueError:
            sizes = [[]]
        if any(len(size) != 2 for size in sizes):
            raise ValueError(f'image_grid_pinpoints is {self.image_grid_pinpoints!r}: write "336x672 672x336".')
        return sizes or None


@dataclass(kw_only=True)
class LlavaInstructModelArguments(AttentionArguments, ChatTemplateArguments):
    """A LLaVA after its first stage, and the parts to train."""

    model: str = required("LLaVA after its first stage (or its second, to train further): Hub id or folder.")
    stage: str = option("llava-1.5-instruct", "Name in hf_vlm.training.STAGES: trained parts and learning rates.")
    lora_r: int | None = option(None, "LoRA rank; overrides the stage's and keeps alpha / r.")
    lora_dropout: float | None = option(None, "LoRA dropout; overrides the stage's.")


# --- pieces of data


@dataclass(kw_only=True)
class SourceArguments:
    """Data sources of your own."""

    sources: list[dict] | None = option(None, "Data sources (path, split, columns, ...); built-in data by default.")
    on_error: str = option("raise", "raise, or skip rows that cannot be read.")
    max_skipped: float = option(0.5, "Largest share of a source's rows that may be skipped.")

    KEYS: ClassVar[Sequence[str]] = PAIR_KEYS
    """Keys of a source."""
    NO_STREAMS: ClassVar[str | None] = None
    """The recipe, if it reads no streams."""

    def __post_init__(self) -> None:
        if self.sources is not None:
            check_sources(self.sources, known=self.KEYS)
            if self.NO_STREAMS is not None:
                check_streams(self.sources, self.NO_STREAMS)
        check_share(self.max_skipped)
        check_on_error(self.on_error)

    @cached_property
    def report(self) -> SkipReport | None:
        """Counts the rows that are skipped; None if a bad row raises."""
        return report_for(self.on_error, None, self.max_skipped)  # type: ignore[arg-type]  # checked there


@dataclass(kw_only=True)
class PairArguments(SourceArguments):
    """Image-text pairs of your own."""

    eval_sources: list[dict] | None = option(None, "Data sources for validation during training.")
    mix: str | None = option(
        None, "Shares of several sources: size (number of rows) or sqrt (its square root); their weights, or size."
    )
    augmentation: str = option("photo", "blip, crop, drawing, photo, scene or none.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_streams(self.sources or [])
        if self.eval_sources:
            check_sources(self.eval_sources)


@dataclass(kw_only=True)
class TestSceneArguments:
    """The built-in test sets after training."""

    num_scenes: int = option(500, "Number of scenes in each test set.")


@dataclass(kw_only=True)
class SceneArguments:
    """Built-in scenes as training data, used when there are no sources."""

    train_scenes: int = option(30_000, "Number of scenes to train on.")
    max_words: int | None = option(None, "Longest caption of a scene in words.")


@dataclass(kw_only=True)
class SceneSizeArguments:
    """The size of the built-in scenes."""

    scene_size: int | None = option(None, "Shorter side of a scene in pixels; the tower's image size by default.")


@dataclass(kw_only=True)
class SceneAspectArguments(SceneSizeArguments):
    """Size and aspect ratios of the built-in scenes."""

    scene_aspects: list[float] = option([1.0], "Aspect ratios (width / height) of scenes; one is drawn for each scene.")


@dataclass(kw_only=True)
class FeatureCacheArguments:
    """Cached outputs of the frozen image tower."""

    feature_cache: str | None = option(None, "Folder for the tower's outputs, computed once (without augmentation).")


@dataclass(kw_only=True)
class PackingArguments:
    """The length of conversations in tokens."""

    max_tokens: int = option(2048, "Longest sample in tokens, image tokens included.")
    packed: bool = option(True, "Pack several samples into one row, without padding.")


# --- data, one group a recipe


@dataclass(kw_only=True)
class ClipDataArguments(PairArguments, TestSceneArguments):
    """Image-text pairs; without sources the built-in emoji images."""

    num_scenes: int = option(1000, "Number of scenes in the test set of hard negatives.")


@dataclass(kw_only=True)
class BlipDataArguments(PairArguments, SceneArguments, SceneSizeArguments, TestSceneArguments):
    """Image-text pairs; without sources the built-in scenes."""

    augmentation: str = option("blip", "blip, crop, drawing, photo, scene or none.")
    train_scenes: int = option(100_000, "Number of scenes to train on.")


@dataclass(kw_only=True)
class BlipTaskDataArguments(BlipDataArguments):
    """Rows of image and caption, or of image, question and answer; without sources the built-in scenes."""

    augmentation: str = option("photo", "blip, crop, drawing, photo, scene or none.")


@dataclass(kw_only=True)
class Blip2DataArguments(PairArguments, FeatureCacheArguments, SceneArguments, TestSceneArguments):
    """Image-text pairs; without sources the built-in scenes."""


@dataclass(kw_only=True)
class InstructBlipDataArguments(SourceArguments, FeatureCacheArguments, SceneArguments, TestSceneArguments):
    """Instructions about images; without sources about the built-in scenes and easy-VQA."""

    KEYS = (*(key for key in PAIR_KEYS if key != "weight"), "task")
    NO_STREAMS = "instructblip_finetune"

    sources: list[dict] | None = option(
        None, "Data sources (path, task: caption or vqa, columns, ...); scenes and easy-VQA by default."
    )
    train_rows: int = option(100_000, "Number of instructions, drawn by the square root of the sources' sizes.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sources is not None and self.feature_cache is not None and self.on_error == "skip":
            raise ValueError("feature_cache holds the features of every row: leave it out, or set on_error: raise.")


@dataclass(kw_only=True)
class LlavaAlignDataArguments(SourceArguments, PackingArguments, SceneArguments, SceneAspectArguments):
    """Image-text pairs as conversations; without sources the built-in scenes."""

    NO_STREAMS = "llava_align"


@dataclass(kw_only=True)
class LlavaInstructDataArguments(
    SourceArguments, PackingArguments, SceneArguments, SceneAspectArguments, TestSceneArguments
):
    """Conversations about images; without sources about the built-in scenes and easy-VQA."""

    KEYS = CONVERSATION_KEYS
    NO_STREAMS = "llava_instruct"

    sources: list[dict] | None = option(
        None,
        "Conversations: {path: file.json, image_folder: ...} in LLaVA's or ShareGPT's format, or {path, name, split, "
        "revision} of a dataset with columns messages and images; scenes and easy-VQA by default.",
    )
    row_tokens: int | None = option(None, "Tokens of a packed row; max_tokens by default.")
    scene_kinds: dict[str, float] | None = option(
        None, "Weights of conversation, detail, reasoning, short and caption; 3, 1, 1, 4, 1 by default."
    )
    num_questions: int = option(400, "Number of questions in each test set.")
    lora_run: str | None = option(None, "Output folder of the same stage with LoRA, whose results the card shows too.")


# --- the filter


@dataclass(kw_only=True)
class BlipFilterArguments:
    """The models of the filter, and its output."""

    checkpoint: str = required("BLIP with a matching head, which filters: Hub id or folder.")
    output_dir: str = required("Folder to write to.")
    captioner: str | None = option(None, "BLIP that writes a synthetic caption for each image: Hub id or folder.")
    action: str = option("keep", "keep: write only the texts that match; flag: write all, with a column keep.")
    threshold: float = option(0.5, "Lowest probability of a match that is kept.")
    itc: bool = option(False, "Also write the similarity of the embeddings (ITC).")
    prompt: str | None = option(None, "Text before every synthetic caption.")
    shard_rows: int = option(1000, "Rows of a source in each file that is written.")
    bf16: bool = option(False, "Compute in bfloat16.")
    seed: int = option(0, "Seed of the synthetic captions and of the corruptions.")


@dataclass(kw_only=True)
class FilterSceneArguments:
    """The demonstration on scenes with corrupted captions."""

    clip: str | None = option(None, "CLIP to compare with: Hub id or folder.")
    num_scenes: int = option(1000, "Number of scenes in each test set.")
    scene_size: int = option(128, "Side of a scene in pixels.")
    another_image: float = option(0.2, "Share of the captions that are another image's.")
    wrong_attribute: float = option(0.2, "Share of the captions with one wrong attribute.")
    update_card: bool = option(False, "Add the numbers to the checkpoint's card.")


__all__ = [
    "Blip2DataArguments",
    "Blip2Stage1ModelArguments",
    "Blip2Stage2ModelArguments",
    "BlipDataArguments",
    "BlipFilterArguments",
    "BlipModelArguments",
    "BlipTaskArguments",
    "BlipTaskDataArguments",
    "ClipDataArguments",
    "ClipModelArguments",
    "FilterSceneArguments",
    "InstructBlipDataArguments",
    "InstructBlipModelArguments",
    "LlavaAlignDataArguments",
    "LlavaAlignModelArguments",
    "LlavaInstructDataArguments",
    "LlavaInstructModelArguments",
    "PairArguments",
    "SceneArguments",
    "SourceArguments",
]
