"""What a model card says of every architecture and evaluation; no number of a run is here."""

from dataclasses import dataclass

CHECKPOINT = "CHECKPOINT"  # stands in a usage snippet for the name to load, quotation marks included


@dataclass(frozen=True)
class Architecture:
    """The texts of one model type.

    Args:
        title: Its name in the field.
        paper: Title of the paper.
        arxiv: The paper's number on arXiv.
        pipeline_tag: The task under which the Hub lists it.
        tags: More words to find it by.
        description: One paragraph.
        usage: A Python snippet that runs where `picture.png` is, with [`CHECKPOINT`] for the name to load.
        limits: What it cannot do, whatever it was trained on.
    """

    title: str
    paper: str
    arxiv: str
    pipeline_tag: str
    tags: tuple[str, ...]
    description: str
    usage: str
    limits: tuple[str, ...]


@dataclass(frozen=True)
class Evaluation:
    """How one evaluation of `results.json` is shown.

    Args:
        title: Heading of its table.
        task: Task type and name in the model index.
        dataset: Data set type and name in the model index.
        sizes: Keys that count what was compared, with their column headings.
        metrics: Keys of the measured numbers, with their column headings and names in the model index.
        note: What the numbers are.
    """

    title: str
    task: tuple[str, str]
    dataset: tuple[str, str]
    sizes: dict[str, str]
    metrics: dict[str, str]
    note: str


ARCHITECTURES = {
    "vlm_clip": Architecture(
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
    ),
}

EVALUATIONS = {
    "retrieval": Evaluation(
        title="Retrieval",
        task=("image-text-retrieval", "Image-text retrieval"),
        dataset=("hf_vlm_emoji", "Built-in emoji drawings"),
        sizes={"num_images": "pictures", "num_texts": "texts"},
        metrics={
            "text_to_image_r1": "text to image R@1",
            "text_to_image_r5": "text to image R@5",
            "text_to_image_r10": "text to image R@10",
            "image_to_text_r1": "image to text R@1",
            "image_to_text_r5": "image to text R@5",
            "image_to_text_r10": "image to text R@10",
        },
        note=(
            "On the built-in emoji drawings. R@k: how often a right one is among the first k; all pictures or all "
            "texts of the test set compete."
        ),
    ),
    "hard_negatives": Evaluation(
        title="Captions that differ in a word",
        task=("image-text-matching", "True captions against hard negatives"),
        dataset=("hf_vlm_scenes", "Scenes of built-in emoji drawings"),
        sizes={"pairs": "pairs"},
        metrics={
            "accuracy": "accuracy",
            "accuracy_object": "accuracy, object",
            "accuracy_colour": "accuracy, colour",
            "accuracy_above_below": "accuracy, above or below",
            "accuracy_left_right": "accuracy, left or right",
            "accuracy_number": "accuracy, number",
        },
        note=(
            "On scenes composed of these drawings: how often a picture prefers its true caption to one that differs in "
            "a word, in all and by what the word says. Chance is one half."
        ),
    ),
}

TEST_SETS = {
    "unseen_style": "emoji of the training in a style that it never showed",
    "unseen_emoji": "emoji held out of the training, in the styles that it showed",
    "unseen_both": "emoji held out of the training, in a style that it never showed",
}

__all__ = ["ARCHITECTURES", "CHECKPOINT", "EVALUATIONS", "TEST_SETS", "Architecture", "Evaluation"]
