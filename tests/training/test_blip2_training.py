"""Training BLIP-2: how a batch is split changes nothing of language modelling, and the temperature stays in bounds."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset

from cases import tiny, tiny_blip2
from hf_vlm import VlmBlip2ForConditionalGeneration, VlmBlip2ForPreTraining, VlmInstructBlipForConditionalGeneration
from hf_vlm.data import CaptionCollator, PairDataset, PromptCollator
from hf_vlm.training import Blip2Trainer, VlmSFTConfig, VlmSFTTrainer, VlmTrainer, VlmTrainingArguments

ROWS = [
    {"image": tiny.image(seed=i), "caption": text, "instruction": "a red", "response": text}
    for i, text in enumerate(["a red cat", "the dog", "a tree on the red cat", "a cat"])
]
SPLITS = [(4, 1), (2, 2), (1, 4)]  # rows a micro-batch, and micro-batches a step


def arguments(folder: Path, kind: type[VlmTrainingArguments] = VlmTrainingArguments, **options) -> VlmTrainingArguments:
    values = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 1, "max_grad_norm": 0.0, "bf16": "false"}
    values |= {"report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True}
    return kind(output_dir=str(folder), **{**values, **options})


def stage1(folder: Path, **options) -> Blip2Trainer:
    model = tiny_blip2.blip2_model(VlmBlip2ForPreTraining, **options.pop("config", {}))
    collator = CaptionCollator(tiny_blip2.stage1_processor())
    return Blip2Trainer(model, arguments(folder, **options), train_dataset=PairDataset(ROWS), data_collator=collator)


def with_llm(folder: Path, head: type, kind: type, **options) -> VlmTrainer:
    is_instruct = head is VlmInstructBlipForConditionalGeneration
    processor = tiny_blip2.instruct_processor() if is_instruct else tiny_blip2.stage2_processor()
    config = VlmSFTConfig if kind is VlmSFTTrainer else VlmTrainingArguments
    texts = [{"instruction": row["instruction"], "response": row["response"]} for row in ROWS]
    rows = Dataset.from_list([{**text, "source": "s", "index": i} for i, text in enumerate(texts)])
    return kind(
        tiny_blip2.blip2_model(head, "llama"),
        arguments(folder, config, **options),
        train_dataset=rows,
        data_collator=PromptCollator(processor, {"s": ROWS}, with_qformer=is_instruct),
        processing_class=processor,
    )


def after_a_step(trainer: VlmTrainer) -> dict[str, torch.Tensor]:
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name: p.detach() - before[name] for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert max(float(change.abs().max()) for change in moved.values()) > 1e-3
    return moved


@pytest.mark.parametrize("make", ["stage 1", "stage 2", "instructblip"])
def test_how_a_batch_is_split_changes_nothing(make: str, tmp_path: Path) -> None:
    steps = []
    for rows, micro_batches in SPLITS:
        split = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": micro_batches}
        torch.manual_seed(0)
        if make == "stage 1":
            trainer = stage1(tmp_path, config={"itc_weight": 0.0, "itm_weight": 0.0}, **split)
        elif make == "stage 2":
            trainer = with_llm(tmp_path, VlmBlip2ForConditionalGeneration, VlmTrainer, **split)
        else:
            trainer = with_llm(tmp_path, VlmInstructBlipForConditionalGeneration, VlmSFTTrainer, **split)
        steps.append(after_a_step(trainer))
    for step in steps[1:]:
        for name, change in step.items():
            torch.testing.assert_close(change, steps[0][name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(("start", "limits"), [(0.4, (0.001, 0.35)), (0.05, (0.06, 0.5))])
def test_temperature_is_clamped_after_each_step(start: float, limits: tuple[float, float], tmp_path: Path) -> None:
    bounds = {"min_temperature": limits[0], "max_temperature": limits[1]}
    trainer = stage1(tmp_path, config=bounds, learning_rate=1e-6)
    torch.nn.init.constant_(trainer.model.similarity.temperature, start)
    trainer.train()
    nearest = min(limits, key=lambda limit: abs(limit - start))
    assert trainer.model.similarity.temperature.item() == pytest.approx(nearest, rel=1e-4)
