"""What a model card says of BLIP and of each of its heads."""

from .types import POPE, RECALLS, SCENES, Architecture, Evaluation, Head

BLIP_START = """import hf_vlm  # registers the architecture with the Auto classes
from PIL import Image
"""

BLIP_COMPARES = """processor = AutoProcessor.from_pretrained(CHECKPOINT)
image, texts = Image.open("picture.png"), ["a dolphin", "a pizza"]
outputs = model(**processor(images=[image], text=texts))
print(outputs.itm_logits.softmax(-1)[:, 1])  # how likely each text matches the picture (ITM)
print(outputs.image_embeds @ outputs.text_embeds.T)  # similarity of the embeddings (ITC), to search with"""

BLIP_HEADS = {
    "VlmBlipForPreTraining": Head(
        pipeline_tag="image-to-text",
        tags=("blip", "image-text-matching", "image-text-retrieval", "image-captioning"),
        usage=BLIP_START
        + """from transformers import AutoModelForPreTraining, AutoProcessor

model = AutoModelForPreTraining.from_pretrained(CHECKPOINT)
"""
        + BLIP_COMPARES
        + """

captioner = hf_vlm.VlmBlipForConditionalGeneration.from_pretraining(model).eval()
written = captioner.generate(**processor(images=[image]), num_beams=3, max_new_tokens=15)
print(processor.batch_decode(written, skip_special_tokens=True))""",
    ),
    "VlmBlipForImageTextRetrieval": Head(
        pipeline_tag="image-feature-extraction",
        tags=("blip", "image-text-matching", "image-text-retrieval"),
        usage=BLIP_START
        + """from transformers import AutoProcessor

model = hf_vlm.VlmBlipForImageTextRetrieval.from_pretrained(CHECKPOINT)
"""
        + BLIP_COMPARES,
    ),
    "VlmBlipForConditionalGeneration": Head(
        pipeline_tag="image-to-text",
        tags=("blip", "image-captioning"),
        usage=BLIP_START
        + """from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT)
processor = AutoProcessor.from_pretrained(CHECKPOINT)
image = Image.open("picture.png")
written = model.generate(**processor(images=[image]), num_beams=3, max_new_tokens=15)
print(processor.batch_decode(written, skip_special_tokens=True))

prompted = model.generate(**processor(images=[image], text=["a picture of"]), max_new_tokens=10)
print(processor.batch_decode(prompted, skip_special_tokens=True))""",
    ),
    "VlmBlipForQuestionAnswering": Head(
        pipeline_tag="visual-question-answering",
        tags=("blip", "visual-question-answering"),
        usage=BLIP_START
        + """from transformers import AutoProcessor

model = hf_vlm.VlmBlipForQuestionAnswering.from_pretrained(CHECKPOINT)
processor = AutoProcessor.from_pretrained(CHECKPOINT)
question = processor(images=[Image.open("picture.png")], text=["What colour is the background?"])
written = model.generate(**question, max_new_tokens=10)
print(processor.batch_decode(written, skip_special_tokens=True))

answers = ["red", "green", "blue"]
listed = processor(text=answers)
chosen = model.rank_answers(listed["input_ids"], listed["attention_mask"], **question)
print([answers[row] for row in chosen])  # the likeliest of a closed list""",
    ),
}

BLIP = Architecture(
    title="BLIP",
    paper=("BLIP: Bootstrapping Language-Image Pre-training for Unified Vision-Language Understanding and Generation"),
    arxiv="2201.12086",
    pipeline_tag="image-feature-extraction",
    tags=("blip",),
    description=(
        "BLIP has an image tower and a text transformer that works in three ways: alone, to embed texts beside "
        "pictures (ITC); with cross-attention to a picture, to tell whether a text matches it (ITM); and, with "
        "causal self-attention, to write texts about it (LM). Pretraining learns all three at once; from there it "
        "goes on to captions, to answers to questions, or to retrieval, where matching puts in order what the "
        "embeddings find."
    ),
    usage=BLIP_START
    + """from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained(CHECKPOINT)
processor = AutoProcessor.from_pretrained(CHECKPOINT)
outputs = model(**processor(images=[Image.open("picture.png")], text=["a dolphin"]))
print(outputs.last_hidden_state.shape)  # states of the text's tokens that have seen the picture""",
    limits=(
        "It writes what is likely beside a picture, which need not be there: names, numbers and places of things "
        "can be made up.",
        "Matching looks at one pair at a time: for a large collection, let the embeddings choose candidates first.",
        "It was not examined for bias or for safety; do not use it to judge people.",
    ),
    heads=BLIP_HEADS,
    evaluations={
        "retrieval": Evaluation(
            title="Retrieval",
            task=("image-text-retrieval", "Image-text retrieval"),
            dataset=SCENES,
            sizes={"num_images": "pictures", "num_texts": "texts"},
            metrics=RECALLS,
            note=(
                "Between scenes and the captions that name all there is and the background, by embeddings (ITC), "
                "and with the best candidates put in order by matching (ITM). R@k: how often a right one is among the "
                "first k."
            ),
            rows={"reranked": "re-ranked by ITM", "chance": "chance"},
            own=("reranked",),
        ),
        "pope": POPE,
    },
)

__all__ = ["BLIP"]
