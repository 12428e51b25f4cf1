"""Texts of LLaVA's model cards."""

from .types import NOT_EXAMINED, START, CardTexts, HeadTexts

TALKS = """from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT)
processor = AutoProcessor.from_pretrained(CHECKPOINT)
question = "What colour is the background?\\nAnswer the question using a single word or phrase."
chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
text = processor.apply_chat_template(chat, add_generation_prompt=True)
inputs = processor(images=[Image.open("image.png")], text=[text])
written = model.generate(**inputs, max_new_tokens=20, eos_token_id=processor.tokenizer.eos_token_id)
print(processor.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""

LLAVA = CardTexts(
    title="LLaVA",
    paper="Improved Baselines with Visual Instruction Tuning",
    arxiv="2310.03744",
    pipeline_tag="image-text-to-text",
    tags=("llava", "visual-question-answering", "image-captioning"),
    description=(
        "LLaVA answers questions and holds conversations about images. A small projector maps the patches of an image "
        "tower to the token embeddings of a large language model (LLM), one token a patch. Stage 1 trains only the "
        "projector, on captions. Stage 2 trains projector and LLM (in full or with LoRA) on conversations, with "
        "the loss on the assistant's turns. LLaVA-1.6 sees an image as an overview and as tiles of a grid that fits "
        "its shape."
    ),
    usage=START
    + """from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained(CHECKPOINT)
processor = AutoProcessor.from_pretrained(CHECKPOINT)
inputs = processor(images=[Image.open("image.png")], text=["<image>\\nWhat colour is the background?"])
print(model(**inputs).last_hidden_state.shape)  # hidden states of the LLM""",
    limits=(
        "Its text is plausible for the image but can be wrong, and it inherits the LLM's errors.",
        "After stage 1 alone it only writes captions; it answers and converses after stage 2.",
        NOT_EXAMINED,
    ),
    heads={
        "VlmLlavaForConditionalGeneration": HeadTexts(
            pipeline_tag="image-text-to-text",
            tags=("llava", "visual-question-answering", "image-captioning"),
            usage=START + TALKS,
        )
    },
    citation="""@inproceedings{liu2024improved,
  title     = {Improved Baselines with Visual Instruction Tuning},
  author    = {Liu, Haotian and Li, Chunyuan and Li, Yuheng and Lee, Yong Jae},
  booktitle = {Conference on Computer Vision and Pattern Recognition},
  year      = {2024},
  eprint    = {2310.03744},
  archivePrefix = {arXiv}
}""",
)

__all__ = ["LLAVA"]
