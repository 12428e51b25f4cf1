"""Configuration of LLaVA: an image tower, a projector, and an LLM."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_tower import VlmTowerConfig, as_native


@strict
class VlmLlavaConfig(PreTrainedConfig):
    """Configuration of [`VlmLlavaModel`] and its head.

    | option                 | LLaVA-1.0  | 1.5                  | 1.6              |
    |------------------------|------------|----------------------|------------------|
    | `projector_type`       | `"linear"` | `"mlp"`              | `"mlp"`          |
    | `image_grid_pinpoints` | None       | None                 | shapes of a grid |
    | image processor's mode | `"crop"`   | `"pad"` (or `"crop"`)| `"anyres"`       |

    Args:
        vision_config: Config of the image tower: a [`VlmTowerConfig`] (by default CLIP's), or that of any vision
            encoder of transformers.
        text_config: Config of the LLM, any causal one of transformers.
        image_token_id: Id of the placeholder that image tokens replace.
        vision_feature_layer: Index into the tower's hidden states (0: embeddings, -1: last layer). Later layers are not
            run.
        vision_feature_select_strategy: `"default"` drops the class token, `"full"` keeps it. Registers are kept, as in
            transformers.
        projector_type: `"linear"`, or `"mlp"` of two layers.
        projector_hidden_act: Activation of the MLP.
        projector_bias: Whether the projector has biases.
        image_grid_pinpoints: `[height, width]` in pixels of the grids of tiles into which an image may be split
            ("anyres"); None gives every image one view.
        initializer_range: Standard deviation of the projector's initialisation.
    """

    model_type = "vlm_llava"
    sub_configs_defaults = {
        "vision_config": VlmTowerConfig,
        "text_config": SubConfigSpec(AutoConfig, model_type="llama"),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 32000
    vision_feature_layer: int = -2
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    projector_type: Literal["linear", "mlp"] = "mlp"
    projector_hidden_act: str = "gelu"
    projector_bias: bool = True
    image_grid_pinpoints: list[list[int]] | None = None
    tie_word_embeddings: bool = True
    initializer_range: float | int = 0.02

    def __post_init__(self, **kwargs):
        self.vision_config = as_native(self.vision_config or {}, VlmTowerConfig.model_type)
        super().__post_init__(**kwargs)

    def validate_parts(self):
        """Check that the grids are multiples of the tower's image size, and that the LLM is causal."""
        side = self.vision_config.image_size
        for shape in self.image_grid_pinpoints or []:
            if len(shape) != 2 or any(pixels <= 0 or pixels % side for pixels in shape):
                raise ValueError(
                    f"image_grid_pinpoints contains {shape}, but both sides must be positive multiples of the tower's "
                    f"image size, {side} pixels: change the grid."
                )
        if self.text_config.is_encoder_decoder:
            raise ValueError(
                f"{self.text_config.model_type} is an encoder-decoder LLM, but LLaVA needs a causal one: replace it."
            )


__all__ = ["VlmLlavaConfig"]
