"""The training contenders of `llava.py`: weights, conversations, and training steps by each trainer.

Each contender is built in a separate process from a folder written by `prepare`. The conversations (images and words)
are generated from a seed and go through the contender's own processor and collator.
"""

import random
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from blip2_contenders import Contender
from blip_contenders import make_images, widen
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.flop_counter import addmm_flop, register_flop_formula
from transformers import LlamaConfig, PreTrainedTokenizerFast, Trainer
from transformers.modeling_outputs import CausalLMOutput

from hf_vlm import VlmLlavaConfig, VlmLlavaForConditionalGeneration, VlmLlavaProcessor
from hf_vlm.data import ConversationCollator
from hf_vlm.hub.convert import processor_to_transformers, to_transformers
from hf_vlm.models import with_image_token
from hf_vlm.training import VlmSFTConfig, VlmSFTTrainer, apply_stage, stage_named
from hf_vlm.training.sft import as_dataset

STAGE = "llava-1.5-instruct"
ANSWER_WORDS, QUESTION_WORDS, MOST_QUESTIONS, TEXT_ONLY = (8, 300), (4, 12), 3, 0.2
SPECIAL = ["<unk>", "<pad>", "<end>", "<user>", "<assistant>"]
WORDS = (
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %} <end>"
)
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {% if m['role'] == 'assistant' %}{% generation %}"
    f"{WORDS}{{% endgeneration %}}{{% else %}}{WORDS}{{% endif %}} {{% endfor %}}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)

# `samples`: conversations per step. `micro_batch`: conversations per forward pass. `row_length`: most tokens of a
# sample and of a packed row. `images`: images per batch of questions, each answered with `new_tokens` tokens.
SIZES: dict[str, dict[str, Any]] = {
    "small": {
        "vision": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64},
        "text": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512},
        "heads": {"num_attention_heads": 4, "num_key_value_heads": 2},
        "steps": {"samples": 8, "micro_batch": 4, "row_length": 512},
        "answers": {"images": 2, "new_tokens": 5},
    },
    "base": {
        "vision": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": 224},
        "text": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49280},
        "heads": {"num_attention_heads": 9, "num_key_value_heads": 3},
        "steps": {"samples": 8, "micro_batch": 4, "row_length": 768},
        "answers": {"images": 4, "new_tokens": 32},
    },
}
SPARE_ROWS = 12  # rows of the vocabulary from the placeholder to the end
Rows = list[dict[str, Any]]
Inputs = dict[str, torch.Tensor]

# TRL sums the gradients of its head by an in-place product. PyTorch counts the FLOPs of the out-of-place one only.
register_flop_formula(torch.ops.aten.addmm_, get_raw=True)(addmm_flop)


def make_config(size: str) -> VlmLlavaConfig:
    """LLaVA-1.5 of a size: a tower in CLIP's layout, an MLP and a Llama with tied embeddings."""
    vision, text = SIZES[size]["vision"], SIZES[size]["text"]
    llama = LlamaConfig(
        **text,
        **SIZES[size]["heads"],
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=SPECIAL.index("<end>"),
        pad_token_id=SPECIAL.index("<pad>"),
    )
    return VlmLlavaConfig(
        vision_config={**vision, "intermediate_size": 4 * vision["hidden_size"], "patch_size": 16},
        text_config=llama,
        image_token_id=text["vocab_size"] - SPARE_ROWS,
    )


def prepare(folder: Path, size: str) -> None:
    """Writes the weights in both layouts, and the processor, whose tokenizer has a token for each word."""
    torch.manual_seed(0)
    model = VlmLlavaForConditionalGeneration(make_config(size)).eval()
    widen(model)
    words = [*SPECIAL, *(f"w{number}" for number in range(model.config.image_token_id - len(SPECIAL)))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<end>", chat_template=CHAT_TEMPLATE
    )
    VlmLlavaProcessor.from_parts(model, with_image_token(fast)).save_pretrained(folder / "hf_vlm")
    model.save_pretrained(folder / "hf_vlm")
    to_transformers(model).save_pretrained(folder / "transformers")


def make_pictures(size: str, count: int) -> list[Image.Image]:
    """Smooth random images in landscape format."""
    side = SIZES[size]["vision"]["image_size"]
    pixels = make_images(count, side, torch.Generator().manual_seed(0))[:, :, : side * 3 // 4]
    levels = (128 + 50 * pixels).clamp(0, 255).byte().permute(0, 2, 3, 1)
    return [Image.fromarray(each.numpy()) for each in levels]


def make_words(chance: random.Random, size: str, shortest: int, longest: int) -> str:
    """A random number of random words, uniform over the range."""
    known = SIZES[size]["text"]["vocab_size"] - SPARE_ROWS - len(SPECIAL)
    return " ".join(f"w{chance.randrange(known)}" for _ in range(chance.randint(shortest, longest)))


def make_conversations(size: str, count: int) -> Rows:
    """Conversations of 1 to 3 questions whose answers have 8 to 300 words in total; one in five has no image."""
    chance, rows = random.Random(0), []
    for picture in make_pictures(size, count):
        answers, turns = make_words(chance, size, *ANSWER_WORDS).split(), chance.randint(1, MOST_QUESTIONS)
        messages: list[dict[str, Any]] = []
        for turn in range(turns):
            question, answer = make_words(chance, size, *QUESTION_WORDS), " ".join(answers[turn::turns])
            messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        has_image = chance.random() >= TEXT_ONLY
        if has_image:
            messages[0]["content"].insert(0, {"type": "image"})
        rows.append({"messages": messages, "images": [picture] if has_image else []})
    return rows


def length_of(row: dict[str, Any], size: str) -> int:
    """Words and image tokens of a conversation."""
    parts = [part for message in row["messages"] for part in message["content"]]
    words = sum(len(part["text"].split()) for part in parts if part["type"] == "text")
    return words + len(row["images"]) * (SIZES[size]["vision"]["image_size"] // 16) ** 2


class Batches(NamedTuple):
    """The conversations of a training step.

    Args:
        size: A key of `SIZES`.
        samples: How many.
        micro_batch: Conversations per forward pass.
        checkpointing: Whether activations are computed again in the backward pass.
    """

    size: str
    samples: int
    micro_batch: int
    checkpointing: bool

    def rows(self, grouped: bool = False) -> list[Rows]:
        """The conversations of each micro-batch; `grouped`: sorted by length."""
        rows = make_conversations(self.size, self.samples)
        if grouped:
            rows.sort(key=lambda row: length_of(row, self.size))
        return [rows[start : start + self.micro_batch] for start in range(0, len(rows), self.micro_batch)]


def accumulate(trainer: Trainer, batches: list[Inputs], supervised: int) -> CausalLMOutput:
    """The trainer's own loss of all micro-batches; backward has run for all but the last."""
    total = torch.zeros((), device=batches[0]["input_ids"].device)
    for number, batch in enumerate(batches, start=1):
        loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=supervised)
        torch.clear_autocast_cache()  # the Trainer leaves autocast after each
        if number < len(batches) and torch.is_grad_enabled():
            with torch.autocast(total.device.type, enabled=False):
                loss.backward()
            loss = loss.detach()
        total = total + loss
    return CausalLMOutput(loss=total)


class Learner(Contender):
    """Training steps on conversations, by the loss of a trainer.

    Args:
        trainer: Its model, its collator and its `compute_loss` are used.
        ways: The conversations of each micro-batch, by the name of the way.
        device: `"cpu"` or `"cuda"`.
        precision: A key of `DTYPES`.
    """

    def __init__(self, trainer: Trainer, ways: Mapping[str, list[Rows]], device: str, precision: str):
        self.batches, forwards = {}, {}
        for name, batches in ways.items():
            collated = [dict(trainer.data_collator([dict(row) for row in rows])) for rows in batches]
            collated = [{key: tensor.to(device) for key, tensor in batch.items()} for batch in collated]
            supervised = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in collated)
            self.batches[name], forwards[name] = collated, partial(accumulate, trainer, collated, supervised)
        super().__init__(trainer.model, forwards, ("loss",), device, precision)

    def counts(self) -> dict[str, dict[str, int]]:
        """Tokens without padding, positions that the LLM computes and supervised tokens of a step, for each variant."""
        return {
            name: {
                "tokens": sum(int((batch["input_ids"] != SPECIAL.index("<pad>")).sum()) for batch in batches),
                "positions": sum(batch["input_ids"].numel() for batch in batches),
                "supervised": sum(int((batch["labels"] != -100).sum()) for batch in batches),
            }
            for name, batches in self.batches.items()
        }


def trainer_options(folder: Path, device: str) -> dict[str, Any]:
    """Arguments of both trainers; autocast and checkpointing are enabled elsewhere."""
    options = {"output_dir": str(folder / "run"), "report_to": "none", "use_cpu": device == "cpu"}
    return {**options, "bf16": False, "activation_checkpointing": False, "max_length": None}


def build_own(folder: Path, device: str, precision: str, name: str, batches: Batches, packed: bool) -> Learner:
    """This package's second stage, in packed or in padded rows."""
    model = apply_stage(VlmLlavaForConditionalGeneration.from_pretrained(folder / "hf_vlm"), stage_named(STAGE))
    processor = VlmLlavaProcessor.from_pretrained(folder / "hf_vlm")
    rows = batches.rows()
    trainer = VlmSFTTrainer(
        model,
        VlmSFTConfig(**trainer_options(folder, device)),
        train_dataset=rows[0],
        data_collator=ConversationCollator(processor, SIZES[batches.size]["steps"]["row_length"], packed),
        processing_class=processor,
    )
    if batches.checkpointing:
        model.activation_checkpointing_enable()
    return Learner(trainer, {name: rows}, device, precision)


def build_native(folder: Path, device: str, precision: str, name: str, batches: Batches, grouped: str) -> Learner:
    """transformers' class under TRL's trainer; also with conversations grouped by length."""
    from transformers import LlavaForConditionalGeneration
    from trl import SFTConfig, SFTTrainer

    model = LlavaForConditionalGeneration.from_pretrained(folder / "transformers")
    model.model.vision_tower.requires_grad_(False)
    rows = batches.rows()
    trainer = SFTTrainer(
        model,
        SFTConfig(**trainer_options(folder, device), assistant_only_loss=True),
        train_dataset=as_dataset(rows[0]),
        processing_class=processor_to_transformers(VlmLlavaProcessor.from_pretrained(folder / "hf_vlm")),
    )
    if batches.checkpointing:
        model.activation_checkpointing_enable()
    return Learner(trainer, {grouped: batches.rows(grouped=True), name: rows}, device, precision)
