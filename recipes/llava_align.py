"""LLaVA, first stage (arXiv 2304.08485, section 4.2): the projector learns to map images into an LLM's embeddings.

A laptop, on the built-in scenes, after `clip_pretrain`; several GPUs, on your own pairs (LLaVA 1.0, 1.5 or 1.6):

    hf-vlm recipes run llava_align --config small
    torchrun --nproc_per_node 8 -m hf_vlm.recipes.llava_align --config paper_1.5

Every scalar key of the YAML is also an option (`--max_steps 100`). The learning rate is the stage's, unless
`learning_rates` in the YAML overrides it. An interrupted run resumes when started again.
"""

from collections.abc import Callable

from hf_vlm import VlmLlavaForConditionalGeneration, VlmLlavaProcessor
from hf_vlm.data import PLAIN_TEMPLATE, CaptionConversations, ConversationCollator, DataSource, caption_check, mix
from hf_vlm.models import with_image_token
from hf_vlm.runs.arguments import LlavaAlignDataArguments, LlavaAlignModelArguments
from hf_vlm.runs.data import scene_rows
from hf_vlm.runs.finish import finish_run
from hf_vlm.runs.launch import launch
from hf_vlm.runs.start import Run
from hf_vlm.training import VlmSFTConfig, VlmSFTTrainer, apply_stage, open_language_model, stage_named


def build_model(
    args: LlavaAlignModelArguments, bf16: bool
) -> tuple[VlmLlavaForConditionalGeneration, VlmLlavaProcessor]:
    """A tower, a new projector and an LLM, and their processor."""
    language_model, tokenizer = open_language_model(args.language_model, dtype=args.torch_dtype(bf16))
    tokenizer = with_image_token(tokenizer)
    model = VlmLlavaForConditionalGeneration.from_parts(
        args.vision,
        language_model,
        tokenizer.convert_tokens_to_ids("<image>"),
        image_size=args.image_size,
        image_grid_pinpoints=args.grids(),
        projector_type=args.projector_type,
        vision_feature_layer=args.vision_feature_layer,
    )
    if args.attn_implementation is not None:
        model.body.language_model.set_attn_implementation(args.attn_implementation)
    return model, VlmLlavaProcessor.from_parts(model, tokenizer, resize_mode=args.resize_mode)


def build_data(
    args: LlavaAlignDataArguments, size: int, seed: int, check: Callable | None = None
) -> CaptionConversations:
    """Images with their captions, as conversations."""
    if args.sources is None:
        return CaptionConversations(scene_rows(args, size, seed, args.scene_aspects), seed)
    sources = [DataSource(**source) for source in args.sources]
    options = {"on_error": args.on_error, "report": args.report, "check": check}
    return CaptionConversations(mix(sources, seed=seed, **options), seed)


def main(model_args: LlavaAlignModelArguments, data_args: LlavaAlignDataArguments, training_args: VlmSFTConfig) -> None:
    """Trains the parts that the stage names."""
    run = Run("llava_align", model_args, data_args, training_args)

    # MODEL
    model, processor = build_model(model_args, training_args.bf16)
    stage = stage_named(model_args.stage).with_rates(training_args.learning_rates)
    training_args.learning_rates = dict(stage.rates)
    model = apply_stage(model, stage)

    # DATA
    size = data_args.scene_size or processor.image_processor.size["height"]
    collator = ConversationCollator(processor, data_args.max_tokens, data_args.packed, chat_template=PLAIN_TEMPLATE)
    train = build_data(data_args, size, training_args.seed, caption_check(collator))

    # TRAIN
    trainer = VlmSFTTrainer(
        model,
        training_args,
        train_dataset=train,
        data_collator=collator,
        processing_class=processor,
    )
    run.train(trainer)
    trainer.save_model()
    finish_run(trainer, "llava_align", model_args, data_args)


if __name__ == "__main__":
    launch(main)
