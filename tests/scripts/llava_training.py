"""A tiny LLaVA training that the tests and the programs they start have in common."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainerCallback
from trl import SFTTrainer

from cases import tiny, tiny_blip2, tiny_llava
from hf_vlm import VlmLlavaForConditionalGeneration
from hf_vlm.data import ConversationCollator
from hf_vlm.training import STAGES, VlmSFTConfig, VlmSFTTrainer, apply_stage
from hf_vlm.training.sft import as_dataset

MAX_LENGTH = 220  # of a sample, and of a packed row: the longest has 205, two images of anyres among them
# How the step of eight rows comes apart: rows a micro-batch, micro-batches.
SPLITS = [(8, 1), (4, 2), (2, 4)]
# A step of plain gradient descent at this rate takes the gradient off the weights.
ONE_GRADIENT = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}


def rows(count: int = 8) -> list[dict[str, Any]]:
    """Conversations of one to three turns about one image, none, two, none, and so on; all are of unequal length."""
    found = []
    for i in range(count):
        sizes = [tiny_llava.SIZES[(i + k) % 5] for k in range((1, 0, 2, 0)[i % 4])]
        images = [tiny.image(*size, seed=10 * i + k) for k, size in enumerate(sizes)]
        messages = []
        for turn in range(1 + i % 3):
            marks = "<image>\n" * len(images) if turn == 0 else ""
            messages.append({"role": "user", "content": marks + tiny.CAPTIONS[(i + turn) % 5]})
            messages.append({"role": "assistant", "content": tiny.CAPTIONS[(2 * i + turn + 1) % 5]})
        found.append({"messages": messages, "images": images, "id": i})
    return found


def texts(count: int = 8) -> list[dict[str, Any]]:
    """[`rows`] without those that have images."""
    return [row for row in rows(2 * count) if not row["images"]]


def model(
    anyres: bool = False, dropout: float = 0.0, llm: str = "llama", **options
) -> VlmLlavaForConditionalGeneration:
    """A randomised model; `dropout` applies to the attention of the LLM and of the tower."""
    sizes = {"vocab_size": len(tiny.VOCABULARY) + 1, "max_position_embeddings": 2 * MAX_LENGTH}
    parts = {
        "vision_config": tiny.tower_config(attention_dropout=dropout, num_hidden_layers=3),
        "text_config": tiny_blip2.llm_config(llm, attention_dropout=dropout, **sizes),
    }
    return tiny_llava.llava_model(anyres=anyres, **{**parts, **options})


class Note(ConversationCollator):
    """Notes of each batch which rows are in it, by their ids, and whether any has images."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.ids: list[list[int]] = []
        self.images: list[bool] = []

    def __call__(self, batch):
        self.ids.append([row["id"] for row in batch])
        self.images.append(any(row["images"] for row in batch))
        return super().__call__(batch)


def collator(anyres: bool = False, packed: bool = False, **options) -> Note:
    """A collator with the tiny processor."""
    processor = tiny_llava.llava_processor(anyres)
    return Note(processor, packed=packed, **{"max_length": MAX_LENGTH, "chat_template": tiny_llava.CHATML, **options})


def arguments(output_dir: str | Path, stage: str | None = None, **options) -> VlmSFTConfig:
    """Arguments of a short, quiet, reproducible run on the CPU, with the learning rates of a stage."""
    defaults = {
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "learning_rates": None if stage is None else dict(STAGES[stage].rates),
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "bf16": "false",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        "dataloader_pin_memory": False,
    }
    return VlmSFTConfig(output_dir=str(output_dir), **{**defaults, **options})


def trainer(
    output_dir: str | Path,
    llava: PreTrainedModel | PeftModel,
    stage: str | None = None,
    train_rows: list[dict[str, Any]] | None = None,
    data_collator: ConversationCollator | None = None,
    kind: type[SFTTrainer] = VlmSFTTrainer,
    eval_rows: list[dict[str, Any]] | None = None,
    callbacks: list[TrainerCallback] | None = None,
    **options,
) -> SFTTrainer:
    """A trainer, by default over eight [`rows`]; the options are training arguments."""
    data_collator = data_collator or collator(anyres=llava.config.image_grid_pinpoints is not None)
    train_rows = train_rows or rows()
    return kind(
        llava,
        arguments(output_dir, stage, **options),
        train_dataset=train_rows if kind is VlmSFTTrainer else as_dataset(train_rows),
        eval_dataset=None if eval_rows is None else as_dataset(eval_rows),
        data_collator=data_collator,
        processing_class=data_collator.processor,
        callbacks=callbacks,
    )


def staged(name: str, lora_dropout: float | None = None, **options) -> PreTrainedModel | PeftModel:
    """[`model`] with its parts frozen and unfrozen by a stage; with LoRA, wrapped by PEFT.

    LoRA begins away from zero, or half of its weights would have no gradient.
    """
    stage = STAGES[name]
    if stage.lora and lora_dropout is not None:
        stage = replace(stage, lora={**stage.lora, "dropout": lora_dropout})
    staged = apply_stage(model(**options), stage)
    for part, parameter in staged.named_parameters():
        if "lora_B" in part:
            nn.init.normal_(parameter, std=0.02)
    return staged


def losses(trained: SFTTrainer) -> list[float]:
    """The loss of each step, as logged."""
    return [line["loss"] for line in trained.state.log_history if "loss" in line]
