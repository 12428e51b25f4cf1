"""The stages of LLaVA's training: which modules are trained, and at which learning rate.

Modules that a stage does not name are frozen and stay in eval mode. Learning rates come from LLaVA's repository, and
for 1.6 from its blog post; `learning_rates` in a recipe's YAML overrides them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from peft import PeftModel

from ..models.modeling_llava import VlmLlavaForConditionalGeneration
from .lora import add_lora

PARTS = ("projector", "language_model", "vision_model")


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    Args:
        rates: Learning rates by module (a name in `PARTS`); modules left out are frozen.
        lora: `r`, `alpha` and `dropout` of LoRA on the LLM; empty trains the LLM in full.

    Example:
        ```python
        stage = stage_named("llava-1.5-lora").with_lora(r=16)
        model = apply_stage(model, stage)
        ```
    """

    rates: Mapping[str, float]
    lora: Mapping[str, float] = field(default_factory=dict)

    def with_lora(self, r: int | None = None, dropout: float | None = None) -> "Stage":
        """A copy with another LoRA rank, at the same scale `alpha / r`, or with another LoRA dropout.

        Raises:
            ValueError: if the stage has no LoRA, the rank is not positive, or the dropout is not in [0, 1).
        """
        if r is None and dropout is None:
            return self
        if not self.lora:
            raise ValueError("lora_r and lora_dropout need a stage with LoRA, such as llava-1.5-lora.")
        r = int(self.lora["r"]) if r is None else r
        dropout = self.lora.get("dropout", 0.0) if dropout is None else dropout
        if r < 1 or not 0 <= dropout < 1:
            raise ValueError(f"LoRA needs a positive rank and a dropout from 0 to below 1, got {r} and {dropout}.")
        return replace(self, lora={"r": r, "alpha": self.lora["alpha"] * r / self.lora["r"], "dropout": dropout})

    def with_rates(self, rates: Mapping[str, float] | None) -> "Stage":
        """A copy with other learning rates for some of its modules.

        Raises:
            ValueError: if this stage does not train one of the modules.
        """
        if unknown := [part for part in rates or {} if part not in self.rates]:
            trained = ", ".join(self.rates)
            raise ValueError(
                f"learning_rates: this stage does not train {unknown[0]!r}, but {trained}: choose another."
            )
        return replace(self, rates={**self.rates, **(rates or {})})


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
        ValueError: if there is no stage of that name.
    """
    if name not in STAGES:
        raise ValueError(f"There is no stage {name!r}; there are {', '.join(STAGES)}.")
    return STAGES[name]


def apply_stage(model: VlmLlavaForConditionalGeneration, stage: Stage) -> VlmLlavaForConditionalGeneration | PeftModel:
    """Freezes and unfreezes the modules of a model, or adds LoRA to its LLM, for a stage.

    Args:
        model: Changed in place.
        stage: The stage to apply.

    Returns:
        The model; with LoRA, wrapped by PEFT.

    Raises:
        ValueError: if the stage names an unknown module, or uses LoRA and names other modules than projector and LLM:
            an adapter contains only these.
    """
    if unknown := [part for part in stage.rates if part not in PARTS]:
        raise ValueError(f"{unknown[0]!r} is not a part of LLaVA: use {', '.join(PARTS)}.")
    if stage.lora and "vision_model" in stage.rates:
        raise ValueError("A stage with LoRA cannot train the image tower: an adapter does not contain the tower.")
    if stage.lora and set(stage.rates) != {"projector", "language_model"}:
        raise ValueError(f"A stage with LoRA trains projector and language_model, not {', '.join(stage.rates)}.")
    body = model.body
    body.freeze_tower()
    if "vision_model" in stage.rates:
        body.unfreeze_tower()
    body.projector.requires_grad_("projector" in stage.rates)
    body.language_model.requires_grad_("language_model" in stage.rates)
    if not stage.lora:
        return model
    return add_lora(model, int(stage.lora["r"]), int(stage.lora["alpha"]), stage.lora.get("dropout", 0.0))


__all__ = ["PARTS", "STAGES", "Stage", "apply_stage", "stage_named"]
