"""What a model card says of LLaVA."""

from .blip2 import START, WRITTEN
from .types import Architecture, Head

TALKS = """from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT)
processor = AutoProcessor.from_pretrained(CHECKPOINT)
question = "What colour is the background?\\nAnswer the question using a single word or phrase."
chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
text = processor.apply_chat_template(chat, add_generation_prompt=True)
inputs = processor(images=[Image.open("picture.png")], text=[text])
written = model.generate(**inputs, max_new_tokens=20, eos_token_id=processor.tokenizer.eos_token_id)
print(processor.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""

LLAVA = Architecture(
    title="LLaVA",
    paper="Improved Baselines with Visual Instruction Tuning",
    arxiv="2310.03744",
    pipeline_tag="image-text-to-text",
    tags=("llava", "visual-question-answering", "image-captioning"),
    description=(
        "LLaVA talks about pictures. What an image tower sees goes through a small projector into the words of a large "
        "language model, one token a patch. In the first stage the projector alone learns from captions; in the second "
        "it learns, with the language model in full or by LoRA, from conversations, of which only what the assistant "
        "says is learned. LLaVA-1.6 sees a picture as an overview and as tiles of a grid that fits its shape."
    ),
    usage=START
    + """from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained(CHECKPOINT)
processor = AutoProcessor.from_pretrained(CHECKPOINT)
inputs = processor(images=[Image.open("picture.png")], text=["<image>\\nWhat colour is the background?"])
print(model(**inputs).last_hidden_state.shape)  # states of the language model""",
    limits=(
        "It writes what is likely beside a picture, which need not be there, and it brings what its language model "
        "knows and gets wrong.",
        "After the first stage alone it writes captions; it talks after the second.",
        "It was not examined for bias or for safety; do not use it to judge people.",
    ),
    heads={
        "VlmLlavaForConditionalGeneration": Head(
            pipeline_tag="image-text-to-text",
            tags=("llava", "visual-question-answering", "image-captioning"),
            usage=START + TALKS,
        )
    },
    evaluations=WRITTEN,
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
