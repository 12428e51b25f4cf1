"""The stages of LLaVA's training as data: which parts are trained, and at which learning rate.

What a stage does not name is frozen, and in eval mode whatever `train()` says. Rates are those of the papers' recipes
(LLaVA's repository; 1.6 after its blog post); a recipe's YAML may say others.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from peft import PeftModel

from ..models.modeling_llava import VlmLlavaForConditionalGeneration
from .sft import add_lora

PARTS = ("projector", "language_model", "vision_model")


@dataclass(frozen=True)
class Stage:
    """One stage.

    Args:
        rates: Learning rates by part, of `PARTS`; a part that is missing is frozen.
        lora: `r`, `alpha` and `dropout` of LoRA on the LLM, in place of training it in full.
    """

    rates: Mapping[str, float]
    lora: Mapping[str, float] = field(default_factory=dict)

    def with_rank(self, r: int) -> "Stage":
        """The same with LoRA of another rank, at the same scale `alpha / r`.

        Raises:
            ValueError: if the stage has no LoRA, or the rank is not positive.
        """
        if not self.lora or r < 1:
            raise ValueError(f"A rank of {r} needs to be positive, and a stage with LoRA, such as llava-1.5-lora.")
        return replace(self, lora={**self.lora, "r": r, "alpha": self.lora["alpha"] * r / self.lora["r"]})


STAGES: Mapping[str, Stage] = {
    "llava-1.0-align": Stage({"projector": 2e-3}),
    "llava-1.0-instruct": Stage({"projector": 2e-5, "language_model": 2e-5}),
    "llava-1.5-align": Stage({"projector": 1e-3}),
    "llava-1.5-instruct": Stage({"projector": 2e-5, "language_model": 2e-5}),
    "llava-1.5-lora": Stage(
        {"projector": 2e-5, "language_model": 2e-4}, lora={"r": 128, "alpha": 256, "dropout": 0.05}
    ),
    "llava-1.6-align": Stage({"projector": 1e-3}),
    "llava-1.6-instruct": Stage({"projector": 1e-5, "language_model": 1e-5, "vision_model": 2e-6}),
}


def stage_named(name: str) -> Stage:
    """The stage of that name.

    Raises:
        ValueError: if there is none.
    """
    if name not in STAGES:
        raise ValueError(f"There is no stage {name!r}; there are {', '.join(STAGES)}.")
    return STAGES[name]


def apply_stage(model: VlmLlavaForConditionalGeneration, stage: Stage) -> VlmLlavaForConditionalGeneration | PeftModel:
    """Freezes and thaws the parts of a model, or puts LoRA on its LLM, as a stage says.

    Args:
        model: Changed in place.
        stage: The stage.

    Returns:
        The model; with LoRA, PEFT's around it.

    Raises:
        ValueError: if the stage names an unknown part, or trains the tower beside LoRA, whose checkpoints leave it out.
    """
    if unknown := [part for part in stage.rates if part not in PARTS]:
        raise ValueError(f"{unknown[0]!r} is no part of LLaVA; there are {', '.join(PARTS)}.")
    if stage.lora and "vision_model" in stage.rates:
        raise ValueError("A stage with LoRA cannot train the image tower: its checkpoints would leave the tower out.")
    body = model.body
    body.freeze_tower()
    if "vision_model" in stage.rates:
        body.thaw_tower()
    body.projector.requires_grad_("projector" in stage.rates)
    body.language_model.requires_grad_("language_model" in stage.rates)
    if not stage.lora:
        return model
    return add_lora(model, int(stage.lora["r"]), int(stage.lora["alpha"]), stage.lora.get("dropout", 0.0))


__all__ = ["PARTS", "STAGES", "Stage", "apply_stage", "stage_named"]
