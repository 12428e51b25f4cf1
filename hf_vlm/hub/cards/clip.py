"""What a model card says of CLIP."""

from .types import Architecture

CLIP = Architecture(
    title="CLIP",
    paper="Learning Transferable Visual Models From Natural Language Supervision",
    arxiv="2103.00020",
    pipeline_tag="zero-shot-image-classification",
    tags=("clip", "contrastive", "image-text-retrieval"),
    description=(
        "CLIP embeds pictures and texts in one space: an image tower and a text tower, trained so that a picture "
        "and its caption meet there. It ranks texts for a picture and pictures for a text, and it classifies "
        "pictures by comparing them with the names of the classes."
    ),
    usage="""import hf_vlm  # registers the architecture with the Auto classes
from PIL import Image
from transformers import AutoModel, AutoProcessor, pipeline

model = AutoModel.from_pretrained(CHECKPOINT)
processor = AutoProcessor.from_pretrained(CHECKPOINT)
image, texts = Image.open("picture.png"), ["a dolphin", "a pizza"]
outputs = model(**processor(images=[image], text=texts))
print(outputs.logits_per_image.softmax(-1))  # which of the texts fits the picture
print(outputs.image_embeds, outputs.text_embeds)  # unit vectors, to search with

classify = pipeline("zero-shot-image-classification", CHECKPOINT)
print(classify(image, candidate_labels=["dolphin", "pizza"]))
embed = pipeline("image-feature-extraction", CHECKPOINT)
print(embed(image))""",
    limits=(
        "One vector stands for a whole picture: it tells what is there better than where it is or how many.",
        "It compares the texts that it is given: the best of texts that are all wrong still comes first, and the "
        "scores of one picture say nothing of another's.",
        "It was not examined for bias or for safety; do not use it to judge people.",
    ),
)

__all__ = ["CLIP"]
