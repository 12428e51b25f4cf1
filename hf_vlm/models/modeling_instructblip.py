"""InstructBLIP: BLIP-2 whose Q-Former also reads the instruction (arXiv 2305.06500, section 2.3).

- Queries and the instruction's tokens attend to each other in the Q-Former, so that what it takes from the image is
  what the instruction asks about; only the queries go on to the LLM, which reads the instruction as well.
- It begins with BLIP-2's second stage; that stage has kept, frozen, the Q-Former's text branch of the first.
- Only the Q-Former, the LayerNorm before it and the linear layer after it are trained; LoRA can be added to the LLM.

Shapes: as in `modeling_blip2_generation.py`.
"""

from transformers import PreTrainedModel

from .configuration_instructblip import VlmInstructBlipConfig
from .modeling_blip2 import VlmBlip2Model
from .modeling_blip2_generation import VlmBlip2ForConditionalGeneration


class VlmInstructBlipModel(VlmBlip2Model):
    """BLIP-2's model with a Q-Former that reads the instruction: `qformer_input_ids` must be given."""

    config: VlmInstructBlipConfig
    reads_instruction = True


class VlmInstructBlipForConditionalGeneration(VlmBlip2ForConditionalGeneration):
    """Follows instructions about images with a frozen LLM; arguments are those of BLIP-2's second stage.

    Example:
        ```python
        >>> model = VlmInstructBlipForConditionalGeneration.from_blip2("org/blip2-small")
        ```
    """

    config: VlmInstructBlipConfig
    body_class = VlmInstructBlipModel

    @classmethod
    def from_blip2(
        cls, blip2: str | PreTrainedModel, language_model_kwargs: dict | None = None
    ) -> "VlmInstructBlipForConditionalGeneration":
        """Goes on from a BLIP-2 of the second stage.

        Args:
            blip2: Id, folder or instance of [`VlmBlip2ForConditionalGeneration`]; all but its LLM is copied.
            language_model_kwargs: `from_pretrained` options of an id or folder, such as `dtype`.

        Raises:
            ValueError: if it has no text branch or no LLM: instructions would be read by random weights.
        """
        options = language_model_kwargs or {}
        source = blip2
        if isinstance(blip2, str):
            source = VlmBlip2ForConditionalGeneration.from_pretrained(blip2, **options)
        body = source.base_model
        if not body.config.qformer_config.use_text:
            raise ValueError(
                "This BLIP-2 has no text branch in its Q-Former, and instructions would be read by random weights: "
                "begin with a second stage that has kept it."
            )
        if body.language_model is None:
            raise ValueError("This BLIP-2 has no LLM: train its second stage first, or use from_parts.")
        head = cls._on(body, {}, body.language_model)
        if isinstance(source, VlmBlip2ForConditionalGeneration):
            head.generation_config = source.generation_config
        return head


__all__ = ["VlmInstructBlipForConditionalGeneration", "VlmInstructBlipModel"]
