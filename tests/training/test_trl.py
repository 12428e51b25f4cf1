"""TRL's own trainers on LLaVA, by the calls that TRL documents for native models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import LoraConfig
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForImageTextToText
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer
from trl.experimental.kto import KTOConfig, KTOTrainer

from cases import tiny, tiny_llava
from hf_vlm import VlmLlavaConfig, VlmLlavaForConditionalGeneration
from hf_vlm.families import FAMILIES

PROMPT = [{"role": "user", "content": "a red cat"}]
CHOSEN, REJECTED = ([{"role": "assistant", "content": text}] for text in ("the dog", "tree house"))
ROWS = 4


@pytest.fixture(scope="module", params=[False, True], ids=["one view", "tiles"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("llava")
    model, processor = tiny_llava.llava_model(anyres=request.param), tiny_llava.llava_processor(request.param)
    processor.chat_template = tiny_llava.CHATML
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = tiny.END, tiny.PAD
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def rows(**columns: Any) -> datasets.Dataset:
    images = [[tiny.image(40, 36, seed=seed)] for seed in range(ROWS)]
    return datasets.Dataset.from_dict({name: [cell] * ROWS for name, cell in columns.items()} | {"images": images})


def rewards(completions: list, **_: Any) -> list[float]:
    return [float(number) for number in range(len(completions))]


def preferences(**columns: Any) -> datasets.Dataset:
    return rows(prompt=PROMPT, chosen=CHOSEN, rejected=REJECTED, **columns)


def labelled() -> datasets.Dataset:
    return rows(prompt=PROMPT, completion=CHOSEN).add_column("label", [True, False] * (ROWS // 2))


SAMPLING = {"num_generations": 2, "max_completion_length": 4}
WAYS: dict[str, tuple[type, type, Callable[[], datasets.Dataset], dict[str, Any], dict[str, Any]]] = {
    "sft of messages": (SFTTrainer, SFTConfig, lambda: rows(messages=PROMPT + CHOSEN), {}, {}),
    "sft of completions": (SFTTrainer, SFTConfig, lambda: rows(prompt=PROMPT, completion=CHOSEN), {}, {}),
    "dpo": (DPOTrainer, DPOConfig, preferences, {}, {}),
    "kto": (KTOTrainer, KTOConfig, labelled, {}, {}),
    "grpo": (
        GRPOTrainer,
        GRPOConfig,
        lambda: rows(prompt=PROMPT),
        {**SAMPLING, "beta": 0.1},
        {"reward_funcs": rewards},
    ),
    "rloo": (RLOOTrainer, RLOOConfig, lambda: rows(prompt=PROMPT), SAMPLING, {"reward_funcs": rewards}),
}


@pytest.mark.parametrize("given", ["folder", pytest.param("model", marks=pytest.mark.slow), "lora"])
@pytest.mark.parametrize("way", WAYS)
def test_a_stock_trainer_moves_the_weights(way: str, given: str, checkpoint: str, tmp_path: Path) -> None:
    """Default lengths, no collator of ours: in full from a folder or a model, and by LoRA."""
    trainer_class, config_class, data, options, extra = WAYS[way]
    args = config_class(
        output_dir=str(tmp_path),
        max_steps=1,
        learning_rate=0.1,
        per_device_train_batch_size=2,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        **options,
    )
    model = checkpoint if given == "folder" else VlmLlavaForConditionalGeneration.from_pretrained(checkpoint)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False) if given == "lora" else None
    trainer = trainer_class(model, args=args, train_dataset=data(), peft_config=lora, **extra)
    trained = {name: value.detach().clone() for name, value in trainer.model.named_parameters() if value.requires_grad}
    trainer.train()
    moved = [
        name for name, value in trainer.model.named_parameters() if name in trained and (value != trained[name]).any()
    ]
    assert any("lora" in name for name in moved) if given == "lora" else any("projector" in name for name in moved)
    assert all(value.isfinite().all() for value in trainer.model.parameters())


def test_a_registered_config_names_the_auto_class_of_its_head(checkpoint: str, tmp_path: Path) -> None:
    """TRL loads a folder by this entry. It is not saved, and a checkpoint's own entry replaces it."""
    config = AutoConfig.from_pretrained(checkpoint)
    assert config.auto_map["AutoModelForImageTextToText"].endswith("VlmLlavaForConditionalGeneration")
    assert "auto_map" not in config.to_dict()
    assert VlmLlavaConfig(**config.to_dict(), auto_map={"AutoModel": "x.Y"}).auto_map == {"AutoModel": "x.Y"}
    loaded = AutoModelForImageTextToText.from_pretrained(checkpoint, trust_remote_code=True)
    assert type(loaded) is VlmLlavaForConditionalGeneration
    assert torch.isfinite(next(loaded.parameters())).all()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_each_family_names_its_own_classes(model_type: str) -> None:
    """InstructBLIP's config is a subclass of BLIP-2's."""
    CONFIG_MAPPING["vlm_blip2"]
    named = {f"hf_vlm.models.{name}" for name in FAMILIES[model_type].classes}
    auto_map = CONFIG_MAPPING[model_type].auto_map
    assert auto_map["AutoModel"] == f"hf_vlm.models.{FAMILIES[model_type].model}"
    assert set(auto_map.values()) <= named
