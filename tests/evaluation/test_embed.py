"""Embedding with transformers' own CLIP: order, padding, modes, types."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from cases import tiny
from hf_vlm.evaluation import embed_images, embed_texts


@pytest.fixture(scope="module")
def clip() -> tuple[CLIPModel, CLIPProcessor]:
    """transformers' own CLIP, tiny, with dropout and random weights; its tokenizer makes one token a letter."""
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: row for row, token in enumerate(tokens)}, merges=[], model_max_length=32)
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    layers["attention_dropout"] = 0.5
    text = layers | {"vocab_size": len(tokens), "max_position_embeddings": 32, "eos_token_id": 53, "bos_token_id": 52}
    config = CLIPConfig(text_config=text, vision_config=layers | {"image_size": 16, "patch_size": 8}, projection_dim=12)
    torch.manual_seed(0)
    model = CLIPModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    size = {"height": 16, "width": 16}
    images = CLIPImageProcessorPil(size=size, crop_size=size)
    return model, CLIPProcessor(image_processor=images, tokenizer=tokenizer)


TEXTS = ["a", "abcdefghijklmnopq rst", "", "yo yo", "x" * 50, "syringe", "it is rain", "b", "apple"]


def test_embed_texts_keeps_order_and_pads_to_each_batch(clip: tuple[CLIPModel, CLIPProcessor]) -> None:
    model, processor = clip
    shapes = []
    handle = model.text_model.register_forward_pre_hook(
        lambda _, __, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    embeds = embed_texts(model, processor, TEXTS, batch_size=2, progress=False)
    handle.remove()
    # Letters and the two ends; 50 letters are cut to 32 tokens.
    assert shapes == [(2, 32), (2, 10), (2, 7), (2, 3), (1, 2)]
    assert embeds.shape == (len(TEXTS), 12)
    assert embeds.dtype == torch.float32
    assert embeds.norm(dim=1) == pytest.approx(torch.ones(len(TEXTS)), abs=1e-6)
    model.eval()
    for text, embed in zip(TEXTS, embeds, strict=True):
        inputs = processor(text=[text], truncation=True, return_tensors="pt")
        with torch.no_grad():
            alone = model.get_text_features(**inputs).pooler_output[0]
        torch.testing.assert_close(embed, alone / alone.norm(), atol=1e-5, rtol=1e-5)
    assert torch.pdist(embeds).min() > 1e-3


def test_embed_images_keeps_order(clip: tuple[CLIPModel, CLIPProcessor], capfd: pytest.CaptureFixture[str]) -> None:
    model, processor = clip
    generator = np.random.default_rng(0)
    images = [Image.fromarray(generator.integers(0, 255, (20, 30, 3), dtype=np.uint8)) for _ in range(5)]
    embeds = embed_images(model, processor, images, batch_size=2)
    assert "5/5" in capfd.readouterr().err
    model.eval()
    with torch.no_grad():
        features = model.get_image_features(**processor(images=images, return_tensors="pt")).pooler_output
    torch.testing.assert_close(embeds, features / features.norm(dim=1, keepdim=True), atol=1e-5, rtol=1e-5)
    assert torch.pdist(embeds).min() > 1e-3
    lower = embed_images(model, processor, images, progress=False, autocast_dtype=torch.bfloat16)
    assert lower.dtype == torch.float32
    assert 1e-4 < (lower - embeds).abs().max() < 0.05
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_clip_embeds_as_its_forward_does(dtype: torch.dtype) -> None:
    model, processor = tiny.clip_model().to(dtype), tiny.clip_processor()
    images = [tiny.image(seed=seed) for seed in range(len(tiny.CAPTIONS))]
    inputs = processor(images=images, text=tiny.CAPTIONS, padding="longest", truncation=True, return_tensors="pt")
    model.eval()
    with torch.no_grad():
        expected = model(**inputs.to(dtype))
    model.train()
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    embeds = embed_images(model, processor, images, batch_size=2, progress=False)
    torch.testing.assert_close(embeds, expected.image_embeds.float(), atol=tolerance, rtol=0)
    embeds = embed_texts(model, processor, tiny.CAPTIONS, batch_size=2, progress=False)
    torch.testing.assert_close(embeds, expected.text_embeds.float(), atol=tolerance, rtol=0)


def test_embedding_restores_every_mode_and_gives_trainable_tensors(clip: tuple[CLIPModel, CLIPProcessor]) -> None:
    model, processor = clip
    model.train()
    model.vision_model.eval()
    modes = [module.training for module in model.modules()]
    embeds = embed_texts(model, processor, TEXTS, progress=False)
    assert [module.training for module in model.modules()] == modes
    assert True in modes
    assert False in modes
    # Dropout was off, and the result may take part in training, unlike a tensor made in inference mode.
    torch.testing.assert_close(embeds, embed_texts(model, processor, TEXTS, progress=False))
    weight = torch.zeros(12, requires_grad=True)
    (embeds @ weight).sum().backward()
    assert weight.grad is not None
    with pytest.raises(TypeError, match="NoneType"):
        embed_images(model, processor, [None], progress=False)
    assert [module.training for module in model.modules()] == modes


def test_embedding_refuses_nothing_and_single_strings(clip: tuple[CLIPModel, CLIPProcessor]) -> None:
    with pytest.raises(ValueError, match="No images"):
        embed_images(*clip, [])
    with pytest.raises(ValueError, match=r"non-empty list of strings, got \[\]"):
        embed_texts(*clip, [])
    with pytest.raises(ValueError, match="non-empty list of strings, got 'one caption'"):
        embed_texts(*clip, "one caption")
