"""The contenders of `blip2.py`: training steps of both stages and caption generation; their weights and batches.

Each contender is built in a separate process from a folder written by `prepare_stage1` or `prepare_stage2`.
"""

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from blip2_plain import PlainBlip2
from blip_contenders import CLASS_TOKEN, LONGEST, NEW_TOKENS, SEPARATOR, SHORTEST, make_images, widen
from harness import DTYPES, Times, TrainingStep, peak_memory, synchronize
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import OPTConfig, PreTrainedModel
from transformers.utils import ModelOutput

from hf_vlm import VlmBlip2Config, VlmBlip2ForConditionalGeneration, VlmBlip2ForPreTraining
from hf_vlm.hub.convert import to_transformers
from hf_vlm.models.towers import tower_states

PAD, BOS = 1, 2  # OPT's
STAGE1_OUTPUTS = ("loss", "loss_itc", "loss_itm", "loss_lm", "itm_logits")
STAGE2_OUTPUTS = ("loss",)

# Width and layers of image tower, Q-Former and LLM; heads are 64 wide. `batch`: pairs per step; `captions`: images.
SIZES: dict[str, dict[str, int]] = {
    "small": {"width": 64, "layers": 2, "bert": 512, "opt": 512, "image": 32, "queries": 4, "batch": 4, "captions": 2},
    "base": {
        "width": 768,
        "layers": 12,
        "bert": 30523,
        "opt": 50272,
        "image": 224,
        "queries": 32,
        "batch": 8,
        "captions": 4,
    },
}


def make_config(size: str, with_llm: bool) -> VlmBlip2Config:
    """BLIP-2 of a size, without dropout, so that losses are comparable.

    With an LLM, the Q-Former has no text branch: nothing would use it, and transformers' class has none.
    """
    sizes = SIZES[size]
    width, layers = sizes["width"], sizes["layers"]
    shape = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 64}
    wide = {**shape, "intermediate_size": 4 * width}
    qformer: dict[str, Any] = {
        "vocab_size": sizes["bert"],
        "bos_token_id": sizes["bert"] - 1,
        "sep_token_id": SEPARATOR,
    }
    qformer |= {"memory_size": width, "num_query_tokens": sizes["queries"], "use_text": not with_llm}
    qformer |= {"hidden_dropout": 0.0, "attention_dropout": 0.0}
    parts: dict[str, Any] = {
        "vision_config": {**wide, "image_size": sizes["image"], "patch_size": 16},
        "qformer_config": {**wide, **qformer},
        # transformers has one epsilon for all LayerNorms of the tower and the one after it.
        "vision_norm_eps": 1e-6,
    }
    if with_llm:
        llm = OPTConfig(**shape, ffn_dim=4 * width, word_embed_proj_dim=width, vocab_size=sizes["opt"], dropout=0.0)
        parts |= {"text_config": llm, "image_token_id": sizes["opt"] - 1}
    return VlmBlip2Config(**parts)


def make_texts(batch: int, vocab_size: int, start: int, pad: int) -> dict[str, torch.Tensor]:
    """Random captions of 8 to 20 tokens, all lengths equally likely and one of them 20, padded on the right."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(SHORTEST, LONGEST + 1, (batch,), generator=generator)
    lengths[0] = LONGEST
    tokens = torch.randint(SEPARATOR + 1, vocab_size - 1, (batch, LONGEST), generator=generator)
    tokens[:, 0] = start
    mask = torch.arange(LONGEST) < lengths[:, None]
    return {"input_ids": tokens.masked_fill(~mask, pad), "attention_mask": mask.long()}


def prepare_stage1(folder: Path, size: str, batch: int) -> None:
    """Writes weights and a batch: images, their features and captions."""
    torch.manual_seed(0)
    model = VlmBlip2ForPreTraining(make_config(size, with_llm=False)).eval()
    widen(model)
    model.save_pretrained(folder / "hf_vlm")
    texts = make_texts(batch, SIZES[size]["bert"], CLASS_TOKEN, pad=0)
    images = make_images(batch, SIZES[size]["image"], torch.Generator().manual_seed(0))
    features = tower_states(model.model.vision_model, images)
    save_file({**texts, "pixel_values": images, "vision_features": features}, folder / "batch.safetensors")


def prepare_stage2(folder: Path, size: str, batch: int) -> None:
    """Writes the weights in both layouts and a batch: images, and captions after placeholders."""
    torch.manual_seed(0)
    model = VlmBlip2ForConditionalGeneration(make_config(size, with_llm=True)).eval()
    widen(model)
    model.save_pretrained(folder / "hf_vlm")
    to_transformers(model).save_pretrained(folder / "transformers")
    texts = make_texts(batch, SIZES[size]["opt"], BOS, PAD)
    images = torch.full((batch, SIZES[size]["queries"]), model.config.image_token_id)
    learned = texts["input_ids"].masked_fill(texts["attention_mask"] == 0, -100)
    learned[:, 0] = -100
    tensors = {
        "pixel_values": make_images(batch, SIZES[size]["image"], torch.Generator().manual_seed(0)),
        "input_ids": torch.cat([images, texts["input_ids"]], dim=1),
        "attention_mask": torch.cat([torch.ones_like(images), texts["attention_mask"]], dim=1),
        "labels": torch.cat([torch.full_like(images, -100), learned], dim=1),
    }
    save_file(tensors, folder / "batch.safetensors")


def read_batch(folder: Path, device: str) -> dict[str, torch.Tensor]:
    """The batch on the device."""
    return {name: tensor.to(device) for name, tensor in load_file(folder / "batch.safetensors").items()}


class Contender:
    """Training steps of one model on one batch, in one or several variants with the same weights.

    Args:
        model: The model to train.
        forwards: Gives the output, with its loss, by the name of the way.
        compared: Fields of the output that all contenders must agree on.
        device: `"cpu"` or `"cuda"`.
        precision: A key of `DTYPES`.
    """

    def __init__(
        self,
        model: nn.Module,
        forwards: Mapping[str, Callable[[], ModelOutput]],
        compared: tuple[str, ...],
        device: str,
        precision: str,
    ):
        self.model, self.forwards, self.compared, self.device = model, forwards, compared, device
        self.steps = {
            name: TrainingStep(model, partial(loss_of, forward), device, precision)
            for name, forward in forwards.items()
        }
        optimizer = next(iter(self.steps.values())).optimizer
        for step in self.steps.values():
            step.optimizer = optimizer

    def run(self) -> dict[str, Times]:
        """A training step of each variant."""
        return {name: step.run() for name, step in self.steps.items()}

    def flops(self) -> dict[str, int]:
        """FLOPs of forward and backward, for each variant."""
        return {name: step.flops() for name, step in self.steps.items()}

    @torch.no_grad()
    def float32_outputs(self) -> dict[str, dict[str, list[float]]]:
        """The outputs that must agree, from the current weights in float32, for each variant."""
        outputs = {name: forward() for name, forward in self.forwards.items()}
        return {name: {key: each[key].flatten().tolist() for key in self.compared} for name, each in outputs.items()}

    def num_trained(self) -> int:
        """Number of trainable weights."""
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    def peak_memory(self) -> int:
        """Peak memory in bytes."""
        return peak_memory(self.device)


def loss_of(forward: Callable[[], ModelOutput]) -> torch.Tensor:
    """The loss of a forward pass."""
    return forward().loss


def build_stage1(folder: Path, device: str, precision: str, name: str, images: str) -> Contender:
    """This package's step on `images`: `"pixel_values"`, or `"vision_features"` from a cache."""
    model, batch = VlmBlip2ForPreTraining.from_pretrained(folder / "hf_vlm"), read_batch(folder, device)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", images)}
    forward = partial(model, **inputs, sample_seed=0, return_loss=True)
    return Contender(model, {name: forward}, STAGE1_OUTPUTS, device, precision)


def build_plain(folder: Path, device: str, precision: str, name: str, queries_once: str) -> Contender:
    """The plain step with cached features; also with the queries computed only once."""
    model, batch = PlainBlip2.from_pretrained(folder / "hf_vlm"), read_batch(folder, device)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "vision_features")}

    def forward(recompute: bool) -> ModelOutput:
        model.recomputes_queries = recompute
        return model(**inputs, sample_seed=0)

    forwards = {queries_once: partial(forward, False), name: partial(forward, True)}
    return Contender(model, forwards, STAGE1_OUTPUTS, device, precision)


def build_stage2(folder: Path, device: str, precision: str, name: str) -> Contender:
    """This package's second stage."""
    model = VlmBlip2ForConditionalGeneration.from_pretrained(folder / "hf_vlm")
    return Contender(model, {name: partial(model, **read_batch(folder, device))}, STAGE2_OUTPUTS, device, precision)


def build_native_stage2(folder: Path, device: str, precision: str, name: str, trimmed: str) -> Contender:
    """transformers' second stage, with the same trainable weights; also with logits of the texts only."""
    from transformers import Blip2ForConditionalGeneration

    model = Blip2ForConditionalGeneration.from_pretrained(folder / "transformers").requires_grad_(False)
    for module in (model.qformer, model.language_projection, model.vision_model.post_layernorm):
        module.requires_grad_(True)
    model.query_tokens.requires_grad_(True)
    batch = read_batch(folder, device)
    # `logits_to_keep` goes through to the LLM; the loss takes as many labels as there are logits.
    fewer = {**batch, "labels": batch["labels"][:, -LONGEST:], "logits_to_keep": LONGEST}
    forwards = {trimmed: partial(model, **fewer, use_cache=False), name: partial(model, **batch, use_cache=False)}
    return Contender(model, forwards, STAGE2_OUTPUTS, device, precision)


class Writer:
    """A model that generates captions of 20 new tokens, with weights in the given precision."""

    def __init__(self, model: PreTrainedModel, folder: Path, device: str, precision: str):
        # transformers keeps the Q-Former in float32 unless told again.
        self.model, self.device = model.to(device, DTYPES[precision]).eval(), device
        batch = read_batch(folder, device)
        prompts = batch["input_ids"][:, : 1 - LONGEST]  # placeholders and the start token
        self.inputs = {"pixel_values": batch["pixel_values"].to(DTYPES[precision]), "input_ids": prompts}

    def write(self, num_beams: int) -> tuple[float, list[list[int]]]:
        """Seconds, and the new tokens of each image."""
        options = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "num_beams": num_beams}
        synchronize(self.device)
        start = time.perf_counter()
        tokens = self.model.generate(**self.inputs, do_sample=False, **options)
        synchronize(self.device)
        return time.perf_counter() - start, tokens[:, -NEW_TOKENS:].tolist()

    def peak_memory(self) -> int:
        """Peak memory in bytes."""
        return peak_memory(self.device)


def build_writer(folder: Path, device: str, precision: str) -> Writer:
    """This package's captioner."""
    model = VlmBlip2ForConditionalGeneration.from_pretrained(folder / "hf_vlm", dtype=DTYPES[precision])
    return Writer(model, folder, device, precision)


def build_native_writer(folder: Path, device: str, precision: str) -> Writer:
    """transformers' captioner."""
    from transformers import Blip2ForConditionalGeneration

    model = Blip2ForConditionalGeneration.from_pretrained(folder / "transformers", dtype=DTYPES[precision])
    return Writer(model, folder, device, precision)
