"""InstructBLIP: BLIP-2 whose Q-Former also reads the instruction (arXiv 2305.06500, section 2.3).

- In the Q-Former, queries and instruction tokens attend to each other, so that the queries extract image features
  relevant to the instruction. Only the queries go to the LLM, which reads the instruction too.
- Training starts from BLIP-2's second stage, which keeps the frozen text branch of the first stage's Q-Former.
- Only the Q-Former, the LayerNorm before it and the linear layer after it are trained. LoRA can be added to the LLM.

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
    """InstructBLIP with a frozen LLM; arguments are those of [`VlmBlip2ForConditionalGeneration`].

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
        """Build InstructBLIP from BLIP-2's second stage.

        Args:
            blip2: Id, folder or instance of [`VlmBlip2ForConditionalGeneration`]. All weights but the LLM's are copied.
            language_model_kwargs: `from_pretrained` options of an id or folder, such as `dtype`.

        Raises:
            ValueError: if it has no LLM, or no text branch: random weights would read the instructions.
        """
        options = language_model_kwargs or {}
        source = blip2
        if isinstance(blip2, str):
            source = VlmBlip2ForConditionalGeneration.from_pretrained(blip2, **options)
        body = source.base_model
        if not body.config.qformer_config.use_text:
            raise ValueError(
                "The Q-Former of this BLIP-2 has no text branch, so random weights would read the instructions: start "
                "from a second-stage checkpoint with qformer_config.use_text=True."
            )
        if body.language_model is None:
            raise ValueError("This BLIP-2 has no LLM: train its second stage first, or use from_parts.")
        head = cls._on(body, {}, body.language_model)
        if isinstance(source, VlmBlip2ForConditionalGeneration):
            head.generation_config = source.generation_config
        return head


__all__ = ["VlmInstructBlipForConditionalGeneration", "VlmInstructBlipModel"]
