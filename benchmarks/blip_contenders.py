"""The contenders of `blip.py`: a pretraining step, its text side, and caption generation; their weights and batches.

Each contender is built in a separate process from a folder written by `prepare_steps` or `prepare_captions`.
"""

import time
from pathlib import Path
from typing import Any

import torch
from blip_plain import PlainBlip
from harness import DTYPES, Times, TrainingStep, peak_memory, synchronize
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutput

from hf_vlm import VlmBlipConfig, VlmBlipForConditionalGeneration, VlmBlipForPreTraining
from hf_vlm.hub.convert import to_transformers
from hf_vlm.models.configuration_tower import BLIP_VISION

PADDED_LENGTH = 30
SHORTEST, LONGEST = 8, 20
CLASS_TOKEN, SEPARATOR = 101, 102
COMPARED = ("loss", "loss_itc", "loss_itm", "loss_lm", "itm_logits")
NEW_TOKENS = 20

# Width and layers of image tower and text; heads are 64 wide. `batches`: image side and pairs per step.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"width": 64, "layers": 2, "vocab": 512, "queue": 16, "batches": {32: 4, 64: 2}, "captions": 2},
    "small": {"width": 192, "layers": 6, "vocab": 8192, "queue": 4096, "batches": {112: 8, 192: 4}, "captions": 8},
    "base": {"width": 768, "layers": 12, "vocab": 30524, "queue": 57600, "batches": {224: 4, 384: 2}, "captions": 8},
}


def make_config(size: str, image_size: int) -> VlmBlipConfig:
    """BLIP of a size for images of a side, without dropout, so that losses are comparable."""
    width, layers, vocab_size = (SIZES[size][name] for name in ("width", "layers", "vocab"))
    shape = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
    }
    text = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "vocab_size": vocab_size, "sep_token_id": SEPARATOR}
    text |= {"bos_token_id": vocab_size - 2, "enc_token_id": vocab_size - 1}
    return VlmBlipConfig(
        vision_config={**BLIP_VISION, **shape, "image_size": image_size, "patch_size": 16},
        text_config={**shape, **text},
        queue_size=SIZES[size]["queue"],
    )


@torch.no_grad()
def widen(model: nn.Module) -> None:
    """Draws larger weights than a new model has, so that matching scores and captions differ between pairs."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.normal_(std=1.5 * module.in_features**-0.5)


def make_images(batch: int, side: int, generator: torch.Generator) -> torch.Tensor:
    """Smooth random images with a little noise: pure noise images would all look alike to the model."""
    coarse = torch.randn(batch, 3, 4, 4, generator=generator)
    images = F.interpolate(coarse, size=(side, side), mode="bilinear")
    return images + 0.1 * torch.randn(images.shape, generator=generator)


def make_batch(config: VlmBlipConfig, batch: int) -> dict[str, torch.Tensor]:
    """Images, captions of 8 to 20 tokens, all lengths equally likely and one of them 20, and a full queue.

    Returns:
        `pixel_values`, `states` in the place of the tower's output, `input_ids` and `attention_mask` of 20 tokens,
        `padded_ids` and `padded_mask` of 30, `queue_images` and `queue_texts`.
    """
    generator = torch.Generator().manual_seed(0)
    vision, text = config.vision_config, config.text_config
    lengths = torch.randint(SHORTEST, LONGEST + 1, (batch,), generator=generator)
    lengths[0] = LONGEST
    tokens = torch.randint(SEPARATOR + 1, text.bos_token_id, (batch, PADDED_LENGTH), generator=generator)
    tokens[:, 0] = CLASS_TOKEN
    positions = torch.arange(PADDED_LENGTH)
    tokens[positions == lengths[:, None] - 1] = SEPARATOR
    mask = positions < lengths[:, None]
    padded_ids, padded_mask = torch.where(mask, tokens, text.pad_token_id), mask.long()
    queue = torch.randn(2, config.queue_size, config.projection_dim, generator=generator)
    queue_images, queue_texts = F.normalize(queue, dim=-1)
    return {
        "pixel_values": make_images(batch, vision.image_size, generator),
        "states": torch.randn(batch, vision.num_patches + 1, vision.hidden_size, generator=generator),
        "input_ids": padded_ids[:, :LONGEST].contiguous(),
        "attention_mask": padded_mask[:, :LONGEST].contiguous(),
        "padded_ids": padded_ids,
        "padded_mask": padded_mask,
        "queue_images": queue_images.contiguous(),
        "queue_texts": queue_texts.contiguous(),
    }


def prepare_steps(folder: Path, size: str, image_size: int, batch: int) -> None:
    """Writes the weights and the batch of a pretraining step."""
    torch.manual_seed(0)
    model = VlmBlipForPreTraining(make_config(size, image_size))
    widen(model)
    model.save_pretrained(folder / "model")
    save_file(make_batch(model.config, batch), folder / "batch.safetensors")


class GivenStates(nn.Module):
    """A stand-in for an image tower of a config: constant hidden states with a gradient."""

    def __init__(self, states: torch.Tensor, config: PreTrainedConfig):
        super().__init__()
        self.config = config
        self.states = nn.Parameter(states)

    def forward(self, pixel_values: torch.Tensor) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=self.states)


class PretrainingStep(TrainingStep):
    """A whole step: momentum update, forward, backward, AdamW and the queue. `text_side` has no towers.

    The text side leaves out both image towers, whose output is given, and the momentum update.
    """

    def __init__(self, model: VlmBlipForPreTraining, batch: dict[str, torch.Tensor], device: str, precision: str):
        super().__init__(model, self.whole_loss, device, precision)
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        texts = {name: batch[name] for name in ("input_ids", "attention_mask")}
        self.inputs = {**texts, "sample_seed": 0, "return_loss": True}
        self.pixel_values = batch["pixel_values"]
        # Frozen for the averaged tower: gradients reach only the trained one.
        tower, states = model.config.vision_config, batch["states"]
        self.given = GivenStates(states, tower), GivenStates(states.clone(), tower).requires_grad_(False)
        ids = torch.full((len(batch["queue_images"]),), -1, device=device)
        model.momentum.queue.add(batch["queue_images"], batch["queue_texts"], ids)
        self.optimizer.register_step_post_hook(lambda *_: model.enqueue())
        self.text_side = TrainingStep(model, self.text_loss, device, precision)
        self.text_side.optimizer = self.optimizer

    def whole_loss(self) -> torch.Tensor:
        """The loss of the batch after the momentum update."""
        self.model.update_momentum()
        return self.model(pixel_values=self.pixel_values, **self.inputs).loss

    def text_loss(self) -> torch.Tensor:
        """The loss with constant hidden states instead of both towers."""
        body, encoders = self.model.model, self.model.momentum.encoders
        towers = body.vision_model, encoders["vision_model"]
        body.vision_model, encoders["vision_model"] = self.given
        try:
            return self.model(pixel_values=self.pixel_values, **self.inputs).loss
        finally:
            body.vision_model, encoders["vision_model"] = towers

    @torch.no_grad()
    def float32_outputs(self) -> dict[str, list[float]]:
        """Each loss of the current weights in float32, and all matching logits."""
        output = self.model(pixel_values=self.pixel_values, **self.inputs)
        return {name: output[name].flatten().tolist() for name in COMPARED}

    def run_text(self) -> Times:
        """A step of the text side only."""
        return self.text_side.run()

    def text_flops(self) -> int:
        """FLOPs of forward and backward of the text side."""
        return self.text_side.flops()


def build_hf_vlm(folder: Path, device: str, precision: str) -> PretrainingStep:
    """This package's step, captions padded to the longest."""
    batch = load_file(folder / "batch.safetensors")
    return PretrainingStep(VlmBlipForPreTraining.from_pretrained(folder / "model"), batch, device, precision)


def build_plain(folder: Path, device: str, precision: str) -> PretrainingStep:
    """The plain step, captions padded to 30."""
    batch = load_file(folder / "batch.safetensors")
    batch |= {"input_ids": batch["padded_ids"], "attention_mask": batch["padded_mask"]}
    return PretrainingStep(PlainBlip.from_pretrained(folder / "model"), batch, device, precision)


def prepare_captions(folder: Path, size: str, batch: int) -> None:
    """Writes the weights in both layouts, and the images."""
    torch.manual_seed(0)
    config = make_config(size, min(SIZES[size]["batches"]))
    config = VlmBlipConfig.from_dict({**config.to_dict(), **VlmBlipForConditionalGeneration.layout})
    model = VlmBlipForConditionalGeneration(config).eval()
    widen(model)
    model.save_pretrained(folder / "hf_vlm")
    to_transformers(model).save_pretrained(folder / "transformers")
    images = make_images(batch, config.vision_config.image_size, torch.Generator().manual_seed(0))
    save_file({"pixel_values": images}, folder / "images.safetensors")


class Writer:
    """A model that generates captions of 20 new tokens, with weights in the given precision."""

    def __init__(self, model_class: Any, name: str, folder: Path, device: str, precision: str):
        self.model = model_class.from_pretrained(folder / name, dtype=DTYPES[precision]).to(device).eval()
        self.device = device
        self.pixel_values = load_file(folder / "images.safetensors")["pixel_values"].to(device, DTYPES[precision])

    def write(self, num_beams: int) -> tuple[float, list[list[int]]]:
        """Seconds, and the tokens of each image."""
        options = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "num_beams": num_beams}
        synchronize(self.device)
        start = time.perf_counter()
        tokens = self.model.generate(pixel_values=self.pixel_values, do_sample=False, **options)
        synchronize(self.device)
        return time.perf_counter() - start, tokens.tolist()

    def peak_memory(self) -> int:
        """Peak memory in bytes."""
        return peak_memory(self.device)


def build_writer(folder: Path, device: str, precision: str) -> Writer:
    """This package's captioner."""
    return Writer(VlmBlipForConditionalGeneration, "hf_vlm", folder, device, precision)


def build_native_writer(folder: Path, device: str, precision: str) -> Writer:
    """transformers' captioner."""
    from transformers import BlipForConditionalGeneration

    return Writer(BlipForConditionalGeneration, "transformers", folder, device, precision)
