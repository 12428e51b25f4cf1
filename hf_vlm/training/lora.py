"""LoRA on the LLM, modules trained in full, adapters and merged models."""

import copy

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, Trainer

from ..families import FAMILIES
from ..models.casting import is_packed
from ..models.modeling_blip2 import VlmBlip2PreTrainedModel


def base_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model inside PEFT's wrapper; LoRA layers stay in it. Other models are returned unchanged."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def add_lora(model: PreTrainedModel, r: int, alpha: int, dropout: float = 0.0) -> PeftModel:
    """Adds LoRA to every linear layer of the LLM. The modules between image tower and LLM are trained in full.

    Args:
        model: A head with an LLM.
        r: Rank.
        alpha: Numerator of the scale `alpha / r`.
        dropout: Dropout probability before the adapters.

    Raises:
        ValueError: if a module that is trained in full is quantised.
    """
    in_full = list(FAMILIES[model.config.model_type].trained_in_full)
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in in_full and any(is_packed(parameter) for parameter in module.parameters()):
            parts = [f"{model.base_model_prefix}.{part}" for part in (*in_full, "vision_model")]
            skipped = ", ".join(f'"{kept}"' for kept in [*parts, "lm_head"])
            raise ValueError(
                f"{name} is quantised, but LoRA trains it in full: load the model with "
                f"BitsAndBytesConfig(..., llm_int8_skip_modules=[{skipped}])."
            )
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules="all-linear",
        exclude_modules=r".*(vision_model|qformer|language_projection|projector|lm_head).*",
        modules_to_save=in_full,
    )
    adapted = get_peft_model(model, config)
    if isinstance(model, VlmBlip2PreTrainedModel):
        # PEFT unfreezes the whole module. DDP fails when a parameter with requires_grad gets no gradient.
        model.body.qformer.freeze_text(all_layers=not model.body.reads_instruction)
    return adapted


def save_trained(trainer: Trainer) -> PreTrainedModel:
    """Saves the model that a trainer trained, with its processor.

    Without LoRA the model goes to the output folder. With LoRA the adapter goes to its subfolder `adapter`, and the
    merged model to the output folder.

    Args:
        trainer: The trainer after `train()`; every rank must call this function.

    Returns:
        The model saved in the output folder, on the first rank; the trained model on the others.
    """
    model, folder = trainer.accelerator.unwrap_model(trainer.model), trainer.args.output_dir
    if not isinstance(model, PeftModel):
        trainer.save_model()
        return model
    trainer.save_model(f"{folder}/adapter")
    if not trainer.is_world_process_zero():
        return model
    merged = copy.deepcopy(model).merge_and_unload()
    merged.save_pretrained(folder)
    trainer.processing_class.save_pretrained(folder)
    return merged


__all__ = ["add_lora", "base_of", "save_trained"]
