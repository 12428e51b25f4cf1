"""LLaVA, first stage (arXiv 2304.08485, section 4.2): the projector learns to put images into the words of an LLM.

A laptop, under twenty minutes on two cores, on scenes of the built-in pictures, after `clip_pretrain.py`:

    python recipes/llava_align.py --config recipes/llava_align/small.yaml

The published recipes (1.0, 1.5, 1.6) on several GPUs, on your own pairs:

    torchrun --nproc_per_node 8 recipes/llava_align.py --config recipes/llava_align/paper_1.5.yaml

Every scalar key of the YAML is also an option (`--max_steps 100`); the rate is the stage's, or `learning_rates` of the
YAML. A stopped run continues when started again.
"""

from dataclasses import dataclass, field

import torch
from transformers import set_seed
from trl import TrlParser

from hf_vlm import VlmLlavaForConditionalGeneration, VlmLlavaProcessor
from hf_vlm.data import (
    PLAIN_TEMPLATE,
    CaptionConversations,
    ConversationCollator,
    DataSource,
    SceneRows,
    SceneStream,
    mix,
)
from hf_vlm.models import with_image_token
from hf_vlm.runs.finish import finish_run
from hf_vlm.training import VlmSFTConfig, VlmSFTTrainer, apply_stage, last_checkpoint, open_language_model, stage_named


@dataclass
class ModelArguments:
    """The parts, and how an image is seen."""

    vision: str = field(metadata={"help": "Hub id or folder of an image tower, or of a CLIP that has one."})
    language_model: str = field(default="lmsys/vicuna-7b-v1.5", metadata={"help": "Hub id, folder or wheel:NAME."})
    language_model_dtype: str = field(default="auto", metadata={"help": "float32, bfloat16, or auto: as bf16 says."})
    stage: str = field(default="llava-1.5-align", metadata={"help": "Which parts are trained: a name of STAGES."})
    image_size: int | None = field(default=None, metadata={"help": "Pixels a side, for one of our own towers."})
    resize_mode: str = field(default="pad", metadata={"help": "crop (1.0), pad (1.5) or anyres (1.6)."})
    image_grid_pinpoints: str | None = field(
        default=None, metadata={"help": 'Grids of anyres, height x width in pixels: "336x672 672x336".'}
    )
    projector_type: str = field(default="mlp", metadata={"help": "linear (1.0) or mlp (1.5, 1.6)."})
    vision_feature_layer: int = field(default=-2, metadata={"help": "Which hidden states of the tower are read."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "How the LLM attends: sdpa, flash_attention_2, ...; transformers' choice."}
    )


@dataclass
class DataArguments:
    """Where the pairs come from."""

    sources: list[dict] | None = field(
        default=None, metadata={"help": "Data sources (path, split, columns, ...); none: scenes of built-in pictures."}
    )
    eval_sources: list[dict] | None = field(default=None, metadata={"help": "Not used."})
    on_error: str = field(default="raise", metadata={"help": "raise or skip broken images."})
    max_tokens: int = field(default=2048, metadata={"help": "Longest sample in tokens, those of the image included."})
    packed: bool = field(default=True, metadata={"help": "Put several samples into one row, without padding."})
    train_scenes: int = field(default=30_000, metadata={"help": "Scenes to train on."})
    max_words: int | None = field(default=None, metadata={"help": "Longest caption of a scene in words."})
    scene_size: int | None = field(default=None, metadata={"help": "Pixels of a scene's shorter side; the tower's."})
    scene_aspects: list[float] = field(
        default_factory=lambda: [1.0], metadata={"help": "Width over height of the scenes, of which each has one."}
    )


def build_model(args: ModelArguments, bf16: bool) -> tuple[VlmLlavaForConditionalGeneration, VlmLlavaProcessor]:
    """A tower, a new projector and an LLM, and their processor."""
    dtype = ("bfloat16" if bf16 else "float32") if args.language_model_dtype == "auto" else args.language_model_dtype
    language_model, tokenizer = open_language_model(args.language_model, dtype=getattr(torch, dtype))
    tokenizer = with_image_token(tokenizer)
    grids = [[int(side) for side in grid.split("x")] for grid in (args.image_grid_pinpoints or "").split()]
    model = VlmLlavaForConditionalGeneration.from_parts(
        args.vision,
        language_model,
        tokenizer.convert_tokens_to_ids("<image>"),
        image_size=args.image_size,
        image_grid_pinpoints=grids or None,
        projector_type=args.projector_type,
        vision_feature_layer=args.vision_feature_layer,
    )
    return model, VlmLlavaProcessor.from_parts(model, tokenizer, resize_mode=args.resize_mode)


def build_data(args: DataArguments, size: int, seed: int) -> CaptionConversations:
    """Images with their captions, as conversations."""
    if args.sources is None:
        stream = SceneStream("train", seed, size, aspects=args.scene_aspects)
        return CaptionConversations(SceneRows(stream, args.train_scenes, args.max_words), seed)
    sources = [DataSource(**source) for source in args.sources]
    return CaptionConversations(mix(sources, seed=seed, on_error=args.on_error), seed)


def main(model_args: ModelArguments, data_args: DataArguments, training_args: VlmSFTConfig) -> None:
    """Model, data, train."""
    set_seed(training_args.seed)

    # MODEL
    model, processor = build_model(model_args, training_args.bf16)
    if model_args.attn_implementation is not None:
        model.body.language_model.set_attn_implementation(model_args.attn_implementation)
    stage = stage_named(model_args.stage).with_rates(training_args.learning_rates)
    training_args.learning_rates = dict(stage.rates)
    model = apply_stage(model, stage)

    # DATA
    size = data_args.scene_size or processor.image_processor.size["height"]
    train = build_data(data_args, size, training_args.seed)

    # TRAIN
    trainer = VlmSFTTrainer(
        model,
        training_args,
        train_dataset=train,
        data_collator=ConversationCollator(
            processor, data_args.max_tokens, data_args.packed, chat_template=PLAIN_TEMPLATE
        ),
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(training_args.output_dir))
    trainer.save_model()
    finish_run(trainer, "llava_align", model_args, data_args)


if __name__ == "__main__":
    main(*TrlParser((ModelArguments, DataArguments, VlmSFTConfig)).parse_args_and_config())
