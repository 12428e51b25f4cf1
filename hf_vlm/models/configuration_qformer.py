"""Configuration of the Q-Former: a BERT whose learned queries attend to an image (arXiv 2301.12597, section 3.1)."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .configuration_tower import check_heads


@strict
class VlmQFormerConfig(PreTrainedConfig):
    """Configuration of [`VlmQFormerModel`]. The defaults are BLIP-2's.

    Args:
        num_query_tokens: Number of queries.
        memory_size: Width of the image states that the queries attend to.
        cross_attention_frequency: Every n-th layer, starting with the first, attends to the image.
        use_text: Whether there is a text branch: word and position embeddings, and separate feed-forward layers.
        vocab_size: Size of the vocabulary, including the added `[DEC]`.
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
        bos_token_id: Id of `[DEC]`, the first token of a text to be generated.
        initializer_range: Standard deviation of the normal initialisation.
    """

    model_type = "vlm_qformer"
    base_config_key = "qformer_config"

    num_query_tokens: int = 32
    memory_size: int = 1408
    cross_attention_frequency: int = 2
    use_text: bool = True
    vocab_size: int = 30523
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
    initializer_range: float | int = 0.02

    def validate_architecture(self):
        """Checks that the heads divide the width and that some layer attends to the image."""
        check_heads(self.hidden_size, self.num_attention_heads)
        if self.cross_attention_frequency < 1:
            raise ValueError(f"cross_attention_frequency must be 1 or more, not {self.cross_attention_frequency}.")


__all__ = ["VlmQFormerConfig"]
