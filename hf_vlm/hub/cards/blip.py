"""Texts of BLIP's model cards."""

from .evaluations import RERANKED_RETRIEVAL
from .types import NOT_EXAMINED, START, CardTexts, HeadTexts

BLIP_COMPARES = """processor = AutoProcessor.from_pretrained(CHECKPOINT)
image, texts = Image.open("image.png"), ["a dolphin", "a pizza"]
outputs = model(**processor(images=[image], text=texts))
print(outputs.itm_logits.softmax(-1)[:, 1])  # probability that each text matches the image (ITM)
print(outputs.image_embeds @ outputs.text_embeds.T)  # similarity of the embeddings (ITC), for search"""

BLIP_HEADS = {
    "VlmBlipForPreTraining": HeadTexts(
        pipeline_tag="image-to-text",
        tags=("blip", "image-text-matching", "image-text-retrieval", "image-captioning"),
        usage=START
        + """from transformers import AutoModelForPreTraining, AutoProcessor

model = AutoModelForPreTraining.from_pretrained(CHECKPOINT)
"""
        + BLIP_COMPARES
        + """

captioner = hf_vlm.VlmBlipForConditionalGeneration.from_pretraining(model).eval()
written = captioner.generate(**processor(images=[image]), num_beams=3, max_new_tokens=15)
print(processor.batch_decode(written, skip_special_tokens=True))""",
    ),
    "VlmBlipForImageTextRetrieval": HeadTexts(
        pipeline_tag="image-feature-extraction",
        tags=("blip", "image-text-matching", "image-text-retrieval"),
        usage=START
        + """from transformers import AutoProcessor

model = hf_vlm.VlmBlipForImageTextRetrieval.from_pretrained(CHECKPOINT)
"""
        + BLIP_COMPARES,
    ),
    "VlmBlipForConditionalGeneration": HeadTexts(
        pipeline_tag="image-to-text",
        tags=("blip", "image-captioning"),
        usage=START
        + """from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT)
processor = AutoProcessor.from_pretrained(CHECKPOINT)
image = Image.open("image.png")
written = model.generate(**processor(images=[image]), num_beams=3, max_new_tokens=15)
print(processor.batch_decode(written, skip_special_tokens=True))

prompted = model.generate(**processor(images=[image], text=["a picture of"]), max_new_tokens=10)
print(processor.batch_decode(prompted, skip_special_tokens=True))""",
    ),
    "VlmBlipForQuestionAnswering": HeadTexts(
        pipeline_tag="visual-question-answering",
        tags=("blip", "visual-question-answering"),
        usage=START
        + """from transformers import AutoProcessor

model = hf_vlm.VlmBlipForQuestionAnswering.from_pretrained(CHECKPOINT)
processor = AutoProcessor.from_pretrained(CHECKPOINT)
question = processor(images=[Image.open("image.png")], text=["What colour is the background?"])
written = model.generate(**question, max_new_tokens=10)
print(processor.batch_decode(written, skip_special_tokens=True))

answers = ["red", "green", "blue"]
listed = processor(text=answers)
chosen = model.rank_answers(listed["input_ids"], listed["attention_mask"], **question)
print([answers[row] for row in chosen])  # the most probable answer of a closed list""",
    ),
}

BLIP = CardTexts(
    title="BLIP",
    paper=("BLIP: Bootstrapping Language-Image Pre-training for Unified Vision-Language Understanding and Generation"),
    arxiv="2201.12086",
    pipeline_tag="image-feature-extraction",
    tags=("blip",),
    description=(
        "BLIP has an image tower and a text transformer with three modes. Alone, it embeds texts (ITC). With "
        "cross-attention to an image, it decides whether a text matches it (ITM). With causal self-attention as well, "
        "it writes captions (LM). Pretraining trains all three at once. Fine-tuning then continues with captions, with "
        "question answering, or with retrieval, where ITM re-ranks the candidates that ITC finds."
    ),
    usage=START
    + """from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained(CHECKPOINT)
processor = AutoProcessor.from_pretrained(CHECKPOINT)
outputs = model(**processor(images=[Image.open("image.png")], text=["a dolphin"]))
print(outputs.last_hidden_state.shape)  # hidden states of the text tokens, after cross-attention to the image""",
    limits=(
        "Generated text is plausible for the image but can be wrong: names, numbers and positions may be made up.",
        "ITM scores one pair at a time: for a large collection, let ITC choose the candidates first.",
        NOT_EXAMINED,
    ),
    heads=BLIP_HEADS,
    evaluations={"retrieval": RERANKED_RETRIEVAL},
)

__all__ = ["BLIP"]
