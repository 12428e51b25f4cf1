"""LLaVA, second stage (arXiv 2304.08485, section 4.2; 2310.03744, section 3): visual instruction tuning, by TRL.

A laptop, about half an hour on two cores, on conversations about scenes of the built-in pictures and on easy-VQA, after
`llava_align.py`:

    python recipes/llava_instruct.py --config recipes/llava_instruct/small.yaml

The published recipes (1.0, 1.5 in full and by LoRA, 1.6) on several GPUs, on your own conversations:

    torchrun --nproc_per_node 8 recipes/llava_instruct.py --config recipes/llava_instruct/paper_1.5.yaml

The stage says what is trained, projector and LLM in full or by LoRA (`--stage llava-1.5-lora`), and how fast, where
`learning_rates` of the YAML does not. Every scalar key of the YAML is also an option. A stopped run continues when
started again.
"""

import copy
from dataclasses import dataclass, field, replace

import torch
from torch.utils.data import ConcatDataset
from transformers import AutoProcessor, set_seed
from trl import TrlParser

from hf_vlm import VlmLlavaForConditionalGeneration
from hf_vlm.data import (
    ConversationCollator,
    QuestionConversations,
    SceneConversations,
    SceneRows,
    SceneStream,
    easy_vqa_images,
    easy_vqa_questions,
    open_conversations,
)
from hf_vlm.evaluation.test_sets import AFTER_TRAINING, save_scene_report
from hf_vlm.runs.finish import finish_run
from hf_vlm.training import VlmSFTConfig, VlmSFTTrainer, apply_stage, last_checkpoint, stage_named


@dataclass
class ModelArguments:
    """The first stage, and what of it is trained."""

    model: str = field(metadata={"help": "Hub id or folder of a first stage (or of a second, to go on with)."})
    stage: str = field(default="llava-1.5-instruct", metadata={"help": "What is trained, and how fast: see STAGES."})
    lora_r: int | None = field(default=None, metadata={"help": "Another rank than the stage's, at its alpha / r."})
    lora_dropout: float | None = field(default=None, metadata={"help": "Another dropout than the stage's."})
    chat_template: str | None = field(default=None, metadata={"help": "File of a chat template; the processor's own."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "How the LLM attends: sdpa, flash_attention_2, ...; transformers' choice."}
    )


@dataclass
class DataArguments:
    """Where the conversations come from."""

    sources: list[dict] | None = field(
        default=None,
        metadata={
            "help": "Conversations: {path: file.json, image_folder: ...} in LLaVA's or ShareGPT's format, or {path, "
            "name, split, revision} of a data set with messages and images; none: scenes and easy-VQA."
        },
    )
    eval_sources: list[dict] | None = field(default=None, metadata={"help": "Not used; the test sets are at the end."})
    on_error: str = field(default="raise", metadata={"help": "raise or skip rows that are bad or have broken images."})
    max_tokens: int = field(default=2048, metadata={"help": "Longest sample in tokens, those of images included."})
    packed: bool = field(default=True, metadata={"help": "Put several samples into one row, without padding."})
    row_tokens: int | None = field(default=None, metadata={"help": "Tokens of a packed row; max_tokens by default."})
    train_scenes: int = field(default=30_000, metadata={"help": "Scenes to talk about."})
    scene_kinds: dict[str, float] | None = field(
        default=None, metadata={"help": "How often each kind of conversation about scenes comes; KINDS by default."}
    )
    max_words: int | None = field(default=None, metadata={"help": "Longest caption of a scene in words."})
    scene_size: int | None = field(default=None, metadata={"help": "Pixels of a scene's shorter side; the tower's."})
    scene_aspects: list[float] = field(
        default_factory=lambda: [1.0], metadata={"help": "Width over height of the scenes, of which each has one."}
    )
    num_scenes: int = field(default=500, metadata={"help": "Scenes of each test set."})
    num_questions: int = field(default=400, metadata={"help": "Questions of each test set, the first."})
    lora_run: str | None = field(
        default=None, metadata={"help": "Folder of this stage by LoRA, whose results the card shows beside these."}
    )


def build_data(args: DataArguments, size: int, seed: int) -> ConcatDataset:
    """Conversations of all sources, one after the other; the trainer shuffles them."""
    if args.sources is None:
        stream = SceneStream("train", seed, size, aspects=args.scene_aspects)
        scenes = SceneRows(stream, args.train_scenes, args.max_words)
        easy_vqa = QuestionConversations(easy_vqa_questions("train"), easy_vqa_images("train"))
        return ConcatDataset([SceneConversations(scenes, seed, args.scene_kinds), easy_vqa])
    return ConcatDataset([open_conversations(source, on_error=args.on_error) for source in args.sources])


def main(model_args: ModelArguments, data_args: DataArguments, training_args: VlmSFTConfig) -> None:
    """Model, data, train; then, on the built-in pictures, the test sets."""
    set_seed(training_args.seed)

    # MODEL
    model = VlmLlavaForConditionalGeneration.from_pretrained(model_args.model, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(model_args.model)
    if model_args.attn_implementation is not None:
        model.body.language_model.set_attn_implementation(model_args.attn_implementation)
    if model_args.chat_template is not None:
        with open(model_args.chat_template, encoding="utf-8") as file:
            processor.chat_template = file.read()
    stage = stage_named(model_args.stage).with_rates(training_args.learning_rates)
    stage = stage.with_lora(model_args.lora_r, model_args.lora_dropout)
    training_args.learning_rates = dict(stage.rates)
    model = apply_stage(model, stage)

    # DATA
    size = data_args.scene_size or processor.image_processor.size["height"]
    train = build_data(data_args, size, training_args.seed)
    collator = ConversationCollator(processor, data_args.max_tokens, data_args.packed, data_args.row_tokens)

    # TRAIN
    trainer = VlmSFTTrainer(
        model, training_args, train_dataset=train, data_collator=collator, processing_class=processor
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(training_args.output_dir))
    trainer.save_model(f"{training_args.output_dir}/adapter" if stage.lora else None)
    if trainer.is_world_process_zero():
        whole = copy.deepcopy(model).merge_and_unload() if stage.lora else model
        if stage.lora:
            whole.save_pretrained(training_args.output_dir)
            processor.save_pretrained(training_args.output_dir)
        if data_args.sources is None:
            settings = replace(AFTER_TRAINING, max_questions=data_args.num_questions, bf16=training_args.bf16)
            options = {"aspects": data_args.scene_aspects, "beside": {"lora": data_args.lora_run}}
            save_scene_report(
                training_args.output_dir, whole, processor, data_args.num_scenes, size, settings, **options
            )
    finish_run(trainer, "llava_instruct", model_args, data_args, has_easy_vqa=True)


if __name__ == "__main__":
    main(*TrlParser((ModelArguments, DataArguments, VlmSFTConfig)).parse_args_and_config())
