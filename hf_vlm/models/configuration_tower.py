"""Configurations of the two towers: an image encoder (ViT) and a causal text encoder.

The CLIP, BLIP and EVA layouts of a vision transformer are options of one class, not classes of their own:

| option           | CLIP       | BLIP         | EVA (BLIP-2) |
|------------------|------------|--------------|--------------|
| `use_pre_norm`   | True       | False        | False        |
| `use_patch_bias` | False      | True         | True         |
| `final_norm`     | `"pooled"` | `"sequence"` | `"sequence"` |
| `hidden_act`     | quick_gelu | gelu         | gelu         |
| `layer_norm_eps` | 1e-5       | 1e-5         | 1e-6         |

EVA has no bias on the keys. A key bias adds the same number to every score of a query, and softmax removes it. A zero
key bias therefore computes the same function, and no option is needed.
"""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig


def check_heads(hidden_size: int, num_attention_heads: int) -> None:
    """Refuses a width that the number of heads does not divide."""
    if hidden_size % num_attention_heads != 0:
        raise ValueError(
            f"hidden_size ({hidden_size}) must be a multiple of num_attention_heads ({num_attention_heads})."
        )


@strict
class VlmTowerConfig(PreTrainedConfig):
    """Configuration of [`VlmTowerModel`], a pre-LayerNorm vision transformer. The defaults are CLIP ViT-B/16.

    Args:
        hidden_size: Width of the transformer.
        intermediate_size: Width of the feed-forward layers.
        num_hidden_layers: Number of layers.
        num_attention_heads: Number of heads; must divide `hidden_size`.
        num_channels: Colour channels of the input.
        image_size: Side of the (square) image in pixels; a multiple of `patch_size`.
        patch_size: Side of a patch in pixels.
        hidden_act: Activation of the feed-forward layers, as named in transformers' `ACT2FN`.
        layer_norm_eps: Epsilon of every LayerNorm.
        qkv_bias: Whether the query, key and value projections have biases.
        use_class_token: Whether a learned class token precedes the patches.
        use_patch_bias: Whether the patch embedding has a bias.
        use_pre_norm: Whether a LayerNorm follows the embeddings.
        final_norm: `"pooled"` normalises only the pooled output (CLIP), `"sequence"` the whole last hidden state.
        pooling: `"class"` takes the class token, `"mean"` averages the patches.
        attention_dropout: Dropout probability of the attention weights.
        patch_dropout: Fraction of the patches dropped in training (FLIP, arXiv 2212.00794); the class token stays.
        drop_path_rate: Stochastic depth: rate of the last layer, rising linearly from 0 at the first.
        initializer_range: Standard deviation of the normal initialisation.
    """

    model_type = "vlm_tower"
    base_config_key = "vision_config"

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 16
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float | int = 1e-5
    qkv_bias: bool = True
    use_class_token: bool = True
    use_patch_bias: bool = False
    use_pre_norm: bool = True
    final_norm: Literal["pooled", "sequence"] = "pooled"
    pooling: Literal["class", "mean"] = "class"
    attention_dropout: float | int = 0.0
    patch_dropout: float | int = 0.0
    drop_path_rate: float | int = 0.0
    initializer_range: float | int = 0.02

    @property
    def num_patches(self) -> int:
        """Number of patches of an image of `image_size`."""
        return (self.image_size // self.patch_size) ** 2

    def validate_architecture(self):
        """Checks that the sizes are consistent.

        Raises:
            StrictDataclassError: if the heads do not divide the width, the patches do not tile the image, or the pooled
                token does not exist.
        """
        check_heads(self.hidden_size, self.num_attention_heads)
        if self.image_size % self.patch_size != 0:
            raise ValueError(f"image_size ({self.image_size}) must be a multiple of patch_size ({self.patch_size}).")
        if self.pooling == "class" and not self.use_class_token:
            raise ValueError('pooling="class" needs use_class_token=True; use pooling="mean".')


@strict
class VlmTextTowerConfig(PreTrainedConfig):
    """Configuration of [`VlmTextTowerModel`], CLIP's causal text encoder. The defaults are those of CLIP ViT-B.

    Args:
        vocab_size: Size of the vocabulary.
        hidden_size: Width of the transformer.
        intermediate_size: Width of the feed-forward layers.
        num_hidden_layers: Number of layers.
        num_attention_heads: Number of heads; must divide `hidden_size`.
        max_position_embeddings: The longest text in tokens, start and end tokens included.
        hidden_act: Activation of the feed-forward layers.
        layer_norm_eps: Epsilon of every LayerNorm.
        attention_dropout: Dropout probability of the attention weights.
        bos_token_id: Id of the start-of-text token.
        eos_token_id: Id of the end-of-text token, whose hidden state is the text's pooled output.
        pad_token_id: Id of the padding token. Padding on the right has no effect, because of the causal mask.
        initializer_range: Standard deviation of the embeddings' initialisation.
    """

    model_type = "vlm_text_tower"
    base_config_key = "text_config"

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float | int = 1e-5
    attention_dropout: float | int = 0.0
    bos_token_id: int | None = 49406
    eos_token_id: int = 49407
    pad_token_id: int | None = 49407
    initializer_range: float | int = 0.02

    def validate_architecture(self):
        """Checks that the heads divide the width."""
        check_heads(self.hidden_size, self.num_attention_heads)


def as_native(config: dict | PreTrainedConfig | None, own_type: str) -> dict | PreTrainedConfig | None:
    """Converts a dict to a config of transformers if its `model_type` is not `own_type`; returns the rest unchanged."""
    if isinstance(config, dict) and config.get("model_type", own_type) != own_type:
        return AutoConfig.for_model(**config)
    return config


# The options of BLIP's vision transformer that differ from VlmTowerConfig's defaults, which are CLIP's.
BLIP_VISION = {
    "use_pre_norm": False,
    "use_patch_bias": True,
    "final_norm": "sequence",
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
}


__all__ = ["BLIP_VISION", "VlmTextTowerConfig", "VlmTowerConfig", "as_native", "check_heads"]
