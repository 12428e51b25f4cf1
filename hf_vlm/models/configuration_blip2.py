"""Configuration of BLIP-2: a frozen image tower, a Q-Former, and optionally an LLM."""

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_qformer import VlmQFormerConfig
from .configuration_tower import BLIP_VISION, VlmTowerConfig, as_native

# EVA's vision transformer has BLIP's layout. BLIP-2 has its own LayerNorm for the tower's last hidden states.
EVA_VISION = BLIP_VISION


@strict
class VlmBlip2Config(PreTrainedConfig):
    """Configuration of [`VlmBlip2Model`] and its heads.

    Args:
        vision_config: Config of the image tower: a [`VlmTowerConfig`] (by default in EVA's layout), or that of any
            vision encoder of transformers.
        qformer_config: A [`VlmQFormerConfig`].
        text_config: Config of the LLM, any causal or encoder-decoder one of transformers; None in the first stage.
        image_token_id: Id of the placeholder that the queries replace; it may lie past the LLM's vocabulary.
        language_model_source: `id` and `revision` of the LLM on the Hub, if it was loaded from there.
        excludes_language_model: Whether the checkpoint omits the LLM's weights. They are then loaded from
            `language_model_source`.
        vision_norm_eps: Epsilon of the LayerNorm between tower and Q-Former.
        projection_dim: Size of the shared embedding space of images and texts.
        temperature_init_value: Initial temperature; similarities are divided by it.
        min_temperature: Lower bound to which the temperature is clamped after each optimiser step.
        max_temperature: Upper bound of the same.
        itc_weight: Weight of the image-text contrastive loss; 0 disables it.
        itm_weight: Weight of the image-text matching loss; 0 disables it.
        lm_weight: Weight of the image-grounded text generation loss (ITG); 0 disables it.
        label_smoothing: Label smoothing of the contrastive and the generation loss.
        initializer_range: Standard deviation of the heads' initialisation.
    """

    model_type = "vlm_blip2"
    sub_configs_defaults = {
        "vision_config": VlmTowerConfig,
        "qformer_config": VlmQFormerConfig,
        "text_config": SubConfigSpec(AutoConfig, model_type="opt", optional=True),
    }

    vision_config: dict | PreTrainedConfig | None = None
    qformer_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    image_token_id: int | None = None
    language_model_source: dict | None = None
    excludes_language_model: bool = False
    vision_norm_eps: float | int = 1e-5
    projection_dim: int = 256
    temperature_init_value: float | int = 0.07
    min_temperature: float | int = 0.001
    max_temperature: float | int = 0.5
    itc_weight: float | int = 1.0
    itm_weight: float | int = 1.0
    lm_weight: float | int = 1.0
    label_smoothing: float | int = 0.1
    tie_word_embeddings: bool = True
    initializer_range: float | int = 0.02

    def __post_init__(self, **kwargs):
        vision = as_native({} if self.vision_config is None else self.vision_config, VlmTowerConfig.model_type)
        self.vision_config = {**EVA_VISION, **vision} if isinstance(vision, dict) else vision
        super().__post_init__(**kwargs)

    @property
    def loss_weights(self) -> dict[str, float]:
        """The weight of each loss, by its name in the outputs' `parts`."""
        return {"itc": self.itc_weight, "itm": self.itm_weight, "lm": self.lm_weight}

    def validate_parts(self):
        """Checks that the Q-Former fits the tower."""
        vision, qformer = self.vision_config, self.qformer_config
        if qformer.memory_size != vision.hidden_size:
            raise ValueError(
                f"The Q-Former expects image states of width {qformer.memory_size}, but the tower's are "
                f"{vision.hidden_size} wide: set memory_size={vision.hidden_size}."
            )
        if self.text_config is not None and self.image_token_id is None:
            raise ValueError("A model with an LLM needs a placeholder for images: set image_token_id.")


__all__ = ["EVA_VISION", "VlmBlip2Config"]
