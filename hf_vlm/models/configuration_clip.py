"""Configuration of CLIP: an image tower, a text tower and a contrastive loss."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .configuration_tower import VlmTextTowerConfig, VlmTowerConfig, as_native


@strict
class VlmClipConfig(PreTrainedConfig):
    """Configuration of [`VlmClipModel`].

    Args:
        vision_config: Config of the image tower: a [`VlmTowerConfig`], or that of any vision encoder of transformers.
        text_config: Config of the text tower: a [`VlmTextTowerConfig`], or that of any text encoder of transformers.
        projection_dim: Size of the shared embedding.
        vision_pooling: The image feature that is projected: `"tower"` for the tower's own pooled output, `"class"` for
            its first token, `"mean"` for the mean of its tokens.
        text_pooling: The same for texts (`"mean"` ignores padding).
        loss_type: `"softmax"` (CLIP) or `"sigmoid"` (SigLIP, with a learned bias).
        logit_scale_init_value: Initial log of the similarity factor; None: ln(1/0.07) for softmax, ln(10) for sigmoid.
        logit_bias_init_value: Initial bias of the sigmoid loss.
        max_logit_scale: The log factor is clamped to at most this (ln 100) after each optimiser step.
        initializer_range: Standard deviation of the projections' initialisation relative to their fan-in.
    """

    model_type = "vlm_clip"
    sub_configs_defaults = {"vision_config": VlmTowerConfig, "text_config": VlmTextTowerConfig}

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    projection_dim: int = 512
    vision_pooling: Literal["tower", "class", "mean"] = "tower"
    text_pooling: Literal["tower", "class", "mean"] = "tower"
    loss_type: Literal["softmax", "sigmoid"] = "softmax"
    logit_scale_init_value: float | int | None = None
    logit_bias_init_value: float | int = -10.0
    max_logit_scale: float | int = 4.605170185988092
    initializer_range: float | int = 0.02

    def __post_init__(self, **kwargs):
        self.vision_config = as_native(self.vision_config, VlmTowerConfig.model_type)
        self.text_config = as_native(self.text_config, VlmTextTowerConfig.model_type)
        super().__post_init__(**kwargs)
        if self.logit_scale_init_value is None:
            self.logit_scale_init_value = 2.6592600369327783 if self.loss_type == "softmax" else 2.302585092994046


__all__ = ["VlmClipConfig"]
