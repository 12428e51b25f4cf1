"""Configuration of InstructBLIP: BLIP-2 whose Q-Former reads the instruction (arXiv 2305.06500)."""

from huggingface_hub.dataclasses import strict

from .configuration_blip2 import VlmBlip2Config


@strict
class VlmInstructBlipConfig(VlmBlip2Config):
    """Configuration of [`VlmInstructBlipModel`] and its head; the fields are those of [`VlmBlip2Config`]."""

    model_type = "vlm_instructblip"

    def validate_text_branch(self):
        """Check that the Q-Former has a text branch."""
        if not self.qformer_config.use_text:
            raise ValueError("InstructBLIP's Q-Former needs a text branch: set use_text=True in qformer_config.")


__all__ = ["VlmInstructBlipConfig"]
