"""Texts of CLIP's model cards."""

from .types import NOT_EXAMINED, START, CardTexts

CLIP = CardTexts(
    title="CLIP",
    paper="Learning Transferable Visual Models From Natural Language Supervision",
    arxiv="2103.00020",
    pipeline_tag="zero-shot-image-classification",
    tags=("clip", "contrastive", "image-text-retrieval"),
    description=(
        "CLIP embeds images and texts in one space. Its image tower and text tower are trained so that an image and "
        "its caption have similar embeddings. It ranks texts for an image and images for a text, and it classifies "
        "images by comparing them with class names."
    ),
    usage=START
    + """from transformers import AutoModel, AutoProcessor, pipeline

model = AutoModel.from_pretrained(CHECKPOINT)
processor = AutoProcessor.from_pretrained(CHECKPOINT)
image, texts = Image.open("image.png"), ["a dolphin", "a pizza"]
outputs = model(**processor(images=[image], text=texts))
print(outputs.logits_per_image.softmax(-1))  # probability of each text
print(outputs.image_embeds, outputs.text_embeds)  # unit vectors, for search

classify = pipeline("zero-shot-image-classification", CHECKPOINT)
print(classify(image, candidate_labels=["dolphin", "pizza"]))
embed = pipeline("image-feature-extraction", CHECKPOINT)
print(embed(image))""",
    limits=(
        "One vector represents a whole image: it captures which objects are there better than where or how many.",
        "Scores compare the given texts with each other: one text always comes first, even if all are wrong. Scores of "
        "different images are not comparable.",
        NOT_EXAMINED,
    ),
)

__all__ = ["CLIP"]
