"""Configuration of BLIP: an image tower, and a text encoder and decoder that can share weights."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .configuration_tower import BLIP_VISION, VlmTowerConfig, as_native, check_heads


@strict
class VlmBlipTextConfig(PreTrainedConfig):
    """Configuration of BLIP's text transformers, which have BERT's shape. The defaults are BLIP-base.

    Args:
        vocab_size: Size of the vocabulary, including the two added tokens.
        hidden_size: Width of the transformer.
        intermediate_size: Width of the feed-forward layers.
        num_hidden_layers: Number of layers.
        num_attention_heads: Number of heads; must divide `hidden_size`.
        max_position_embeddings: The longest text in tokens.
        hidden_act: Activation of the feed-forward layers.
        layer_norm_eps: Epsilon of every LayerNorm.
        hidden_dropout: Dropout probability of embeddings and residual branches.
        attention_dropout: Dropout probability of the attention weights.
        pad_token_id: Id of the padding token.
        sep_token_id: Id of `[SEP]`, which ends a text.
        bos_token_id: Id of `[DEC]`, which replaces `[CLS]` in the decoder.
        enc_token_id: Id of `[ENC]`, which replaces `[CLS]` in the image-grounded encoder.
        initializer_range: Standard deviation of the normal initialisation.
    """

    model_type = "vlm_blip_text"
    base_config_key = "text_config"

    vocab_size: int = 30524
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 512
    hidden_act: str = "gelu"
    layer_norm_eps: float | int = 1e-12
    hidden_dropout: float | int = 0.1
    attention_dropout: float | int = 0.1
    pad_token_id: int = 0
    sep_token_id: int = 102
    bos_token_id: int = 30522
    enc_token_id: int = 30523
    initializer_range: float | int = 0.02

    def validate_architecture(self):
        """Checks that the heads divide the width and the added tokens are in the vocabulary."""
        check_heads(self.hidden_size, self.num_attention_heads)
        if max(self.bos_token_id, self.enc_token_id) >= self.vocab_size:
            raise ValueError(
                f"vocab_size ({self.vocab_size}) has no room for [DEC] ({self.bos_token_id}) and [ENC] "
                f"({self.enc_token_id})."
            )


@strict
class VlmBlipConfig(PreTrainedConfig):
    """Configuration of [`VlmBlipModel`] and its heads.

    Args:
        vision_config: Config of the image tower: a [`VlmTowerConfig`] (by default in BLIP's layout), or that of any
            vision encoder of transformers.
        text_config: A [`VlmBlipTextConfig`] for both encoder and decoder.
        use_text_encoder: Whether there is a text encoder.
        use_text_decoder: Whether there is a text decoder.
        share_encoder_decoder: Whether encoder and decoder share all weights except self-attention (section 3.2 of the
            paper).
        decoder_memory: Input of the decoder's cross-attention: `"image"` for the patch states, `"question"` for the
            encoder's hidden states.
        vision_pooling: The image feature that is projected: `"class"` for the first token, `"mean"` for the mean of all
            tokens (for towers without a class token).
        tie_word_embeddings: Whether the decoder's output matrix is the word embedding. The paper's checkpoints have a
            separate matrix; LAVIS and transformers tie it.
        projection_dim: Size of the shared embedding space of images and texts.
        temperature_init_value: Initial temperature; similarities are divided by it.
        min_temperature: Lower bound to which the temperature is clamped after each optimiser step.
        max_temperature: Upper bound of the same.
        itc_weight: Weight of the image-text contrastive loss; 0 disables it.
        itm_weight: Weight of the image-text matching loss; 0 disables it.
        lm_weight: Weight of the language-modelling loss; 0 disables it.
        label_smoothing: Label smoothing of the language-modelling loss.
        momentum: Decay of the momentum encoders.
        queue_size: Number of earlier pairs whose embeddings are further candidates of the contrastive loss; 0 for none.
        soft_target_weight: Share of the momentum encoders' similarities in the contrastive targets.
        initializer_range: Standard deviation of the heads' initialisation.
    """

    model_type = "vlm_blip"
    sub_configs_defaults = {"vision_config": VlmTowerConfig, "text_config": VlmBlipTextConfig}

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    use_text_encoder: bool = True
    use_text_decoder: bool = True
    share_encoder_decoder: bool = True
    decoder_memory: Literal["image", "question"] = "image"
    vision_pooling: Literal["class", "mean"] = "class"
    tie_word_embeddings: bool = False
    projection_dim: int = 256
    temperature_init_value: float | int = 0.07
    min_temperature: float | int = 0.001
    max_temperature: float | int = 0.5
    itc_weight: float | int = 1.0
    itm_weight: float | int = 1.0
    lm_weight: float | int = 1.0
    label_smoothing: float | int = 0.1
    momentum: float | int = 0.995
    queue_size: int = 57600
    soft_target_weight: float | int = 0.4
    initializer_range: float | int = 0.02

    def __post_init__(self, **kwargs):
        vision = as_native({} if self.vision_config is None else self.vision_config, VlmTowerConfig.model_type)
        self.vision_config = {**BLIP_VISION, **vision} if isinstance(vision, dict) else vision
        super().__post_init__(**kwargs)

    @property
    def loss_weights(self) -> dict[str, float]:
        """The weight of each loss, by its name in the outputs' `parts`."""
        return {"itc": self.itc_weight, "itm": self.itm_weight, "lm": self.lm_weight}

    def validate_parts(self):
        """Checks that the parts are consistent."""
        if not (self.use_text_encoder or self.use_text_decoder):
            raise ValueError("BLIP needs a text encoder or a text decoder: set use_text_encoder or use_text_decoder.")
        if self.decoder_memory == "question" and not self.use_text_encoder:
            raise ValueError('decoder_memory="question" needs the text encoder: set use_text_encoder=True.')
        if not (self.itc_weight or self.itm_weight or self.lm_weight):
            raise ValueError("All three loss weights are 0: set one of itc_weight, itm_weight and lm_weight.")


__all__ = ["VlmBlipConfig", "VlmBlipTextConfig"]
