"""A tiny BLIP training that the tests and the programs they start have in common."""

from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from cases import tiny
from hf_vlm import VlmBlipForPreTraining, VlmBlipForQuestionAnswering
from hf_vlm.data import Augmentation, CaptionCollator, PairDataset, QuestionCollator, QuestionDataset
from hf_vlm.models.modeling_blip import VlmBlipHead
from hf_vlm.training import BlipTrainer, BlipTrainingArguments

DROPOUT = {
    "vision": {"attention_dropout": 0.1, "drop_path_rate": 0.2},
    "text": {"hidden_dropout": 0.1, "attention_dropout": 0.1},
}
ANSWERS = [["red", "red", "blue"], "two tree", ["a", "cat"], "right of the house", "tree"]
# How the step of eight rows comes apart: rows a micro-batch, micro-batches.
SPLITS = [(8, 1), (4, 2), (2, 4), (1, 8)]


def rows(count: int) -> list[dict[str, Any]]:
    """Examples with two captions of one to eight words, and two questions with one or several answers.

    Every fifth row is a second image of the one before.
    """
    examples = []
    for i in range(count):
        caption, other = tiny.CAPTIONS[i % 5], tiny.CAPTIONS[(i // 5 + i) % 5]
        questions = [
            {"question": f"{caption} of", "answer": ANSWERS[i % 5]},
            {"question": other, "answer": ANSWERS[(i + 1) % 5]},
        ]
        picture = tiny.image(seed=i).convert("RGBA")
        captions = [f"{caption} and a dog" if i % 2 else caption, f"the {other}"]
        examples.append({"image": picture, "caption": captions, "questions": questions, "id": i - (i % 5 == 4)})
    return examples


def model(head: type[VlmBlipHead] = VlmBlipForPreTraining, dropout: bool = False, **options) -> VlmBlipHead:
    """A randomised head, whose temperature is not clamped at once; for the options, see `tiny.blip_config`."""
    return tiny.blip_model(head, **({**DROPOUT, **options} if dropout else {"max_temperature": 2.0, **options}))


def dataset(head: type[VlmBlipHead], count: int = 16, **options) -> Dataset:
    """[`rows`] as the head reads them."""
    return (QuestionDataset if head is VlmBlipForQuestionAnswering else PairDataset)(rows(count), **options)


def collator(
    head: type[VlmBlipHead] = VlmBlipForPreTraining, augment: bool = False, **options
) -> CaptionCollator | QuestionCollator:
    """The head's collator, with the tiny processor."""
    kind = QuestionCollator if head is VlmBlipForQuestionAnswering else CaptionCollator
    return kind(tiny.blip_processor(), Augmentation.drawing() if augment else None, **options)


def arguments(output_dir: str | Path, **options) -> BlipTrainingArguments:
    """Arguments of a short, quiet, reproducible run on the CPU."""
    defaults = {
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "bf16": "false",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return BlipTrainingArguments(output_dir=str(output_dir), **{**defaults, **options})


# A step of plain gradient descent at this rate takes the gradient off the weights.
ONE_GRADIENT = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}


def trainer(
    output_dir: str | Path,
    blip: VlmBlipHead,
    train_dataset: Dataset | None = None,
    data_collator: CaptionCollator | QuestionCollator | None = None,
    head: type[VlmBlipHead] | None = None,
    eval_dataset: Dataset | None = None,
    callbacks: list | None = None,
    compute_metrics: Any = None,
    **options,
) -> BlipTrainer:
    """A trainer, by default over 16 [`rows`] that are not augmented; the options are training arguments.

    `head` is what `blip` is at heart, where it is wrapped.
    """
    head = head or type(blip)
    return BlipTrainer(
        blip,
        arguments(output_dir, **options),
        train_dataset=train_dataset or dataset(head),
        eval_dataset=eval_dataset,
        data_collator=data_collator or collator(head),
        eval_collator=collator(head),
        callbacks=callbacks,
        compute_metrics=compute_metrics,
    )
