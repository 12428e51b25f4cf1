"""What a model card says of BLIP-2 and InstructBLIP and of each of their heads."""

from .types import BLIND, POPE, QUESTIONS, RECALLS, SCENES, VQA_TASK, Architecture, Evaluation, Head

START = """import hf_vlm  # registers the architecture with the Auto classes
from PIL import Image
"""

COMPARES = """processor = AutoProcessor.from_pretrained(CHECKPOINT)
image, texts = Image.open("picture.png"), ["a dolphin", "a pizza"]
outputs = model(**processor(images=[image], text=texts))
print(outputs.itm_logits.softmax(-1)[:, 1])  # how likely each text matches the picture (ITM)
similarity = outputs.image_embeds @ outputs.text_embeds.T  # of each query with each text (ITC), to search with
print(similarity.amax(dim=1))  # of a picture's queries the nearest counts"""

ASKS = """from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT)
processor = AutoProcessor.from_pretrained(CHECKPOINT)
image, end = Image.open("picture.png"), processor.tokenizer.eos_token_id
"""

BLIP2_HEADS = {
    "VlmBlip2ForPreTraining": Head(
        pipeline_tag="image-feature-extraction",
        tags=("blip-2", "image-text-matching", "image-text-retrieval"),
        usage=START
        + """from transformers import AutoModelForPreTraining, AutoProcessor

model = AutoModelForPreTraining.from_pretrained(CHECKPOINT)
"""
        + COMPARES,
    ),
    "VlmBlip2ForImageTextRetrieval": Head(
        pipeline_tag="image-feature-extraction",
        tags=("blip-2", "image-text-matching", "image-text-retrieval"),
        usage=START
        + """from transformers import AutoProcessor

model = hf_vlm.VlmBlip2ForImageTextRetrieval.from_pretrained(CHECKPOINT)
"""
        + COMPARES,
    ),
    "VlmBlip2ForConditionalGeneration": Head(
        pipeline_tag="image-text-to-text",
        tags=("blip-2", "image-captioning", "visual-question-answering"),
        usage=START
        + ASKS
        + """
inputs = processor(images=[image], text=["<image>"])
written = model.generate(**inputs, num_beams=3, max_new_tokens=20, eos_token_id=end)
print(processor.batch_decode(written, skip_special_tokens=True))  # a caption

question = "<image>Question: What colour is the background? Short answer:\\n"
written = model.generate(**processor(images=[image], text=[question]), max_new_tokens=10, eos_token_id=end)
print(processor.batch_decode(written, skip_special_tokens=True))""",
    ),
}

INSTRUCT_HEADS = {
    "VlmInstructBlipForConditionalGeneration": Head(
        pipeline_tag="image-text-to-text",
        tags=("instructblip", "visual-question-answering", "image-captioning"),
        usage=START
        + ASKS
        + """
for instruction in ["What colour is the background?", "Write a short caption for the image."]:
    inputs = processor(images=[image], text=[f"<image>{instruction}\\n"])  # for the LLM, and for the Q-Former
    written = model.generate(**inputs, max_new_tokens=20, eos_token_id=end)
    print(processor.batch_decode(written, skip_special_tokens=True))""",
    ),
}

MAJORITY = "most frequent training answer"
EASY_VQA = ("easy_vqa", "easy-VQA")
# The index keeps results of the same task apart by their data alone.
UNSEEN_SCENES, UNSEEN_EASY_VQA = (
    (f"{kind}_unseen_wordings", f"{name}, unseen wordings") for kind, name in (SCENES, EASY_VQA)
)
EASY_NOTE = (
    "Test questions of easy-VQA, drawn at random but always the same, about pictures of one coloured shape; most ask "
    "for yes or no."
)
WRITTEN = {
    "vqa_unseen_wordings": Evaluation(
        title="Questions in unseen wordings",
        task=VQA_TASK,
        dataset=UNSEEN_SCENES,
        sizes={"questions": "questions"},
        metrics=QUESTIONS,
        note="The same questions about scenes, put as an instruction in words that no training used.",
        rows={"blind": BLIND, "majority": f"{MAJORITY} of the kind"},
    ),
    "easy_vqa": Evaluation(
        title="Questions of easy-VQA",
        task=VQA_TASK,
        dataset=EASY_VQA,
        sizes={"questions": "questions"},
        metrics=QUESTIONS,
        note=EASY_NOTE,
        rows={"blind": BLIND, "majority": MAJORITY},
    ),
    "easy_vqa_unseen_wordings": Evaluation(
        title="Questions of easy-VQA in unseen wordings",
        task=VQA_TASK,
        dataset=UNSEEN_EASY_VQA,
        sizes={"questions": "questions"},
        metrics=QUESTIONS,
        note="The same questions of easy-VQA, put as an instruction in words that no training used.",
        rows={"blind": BLIND, "majority": MAJORITY},
    ),
    "pope": POPE,
}

RETRIEVAL = Evaluation(
    title="Retrieval",
    task=("image-text-retrieval", "Image-text retrieval"),
    dataset=SCENES,
    sizes={"num_images": "pictures", "num_texts": "texts"},
    metrics=RECALLS,
    note=(
        "Between scenes and the captions that name all there is and the background, by embeddings (ITC; of a picture's "
        "queries the nearest counts), and with the best candidates put in order by matching (ITM). R@k: how often a "
        "right one is among the first k."
    ),
    rows={"reranked": "re-ranked by ITM", "chance": "chance"},
    own=("reranked",),
)

NOT_EXAMINED = "It was not examined for bias or for safety; do not use it to judge people."

BLIP2 = Architecture(
    title="BLIP-2",
    paper="BLIP-2: Bootstrapping Language-Image Pre-training with Frozen Image Encoders and Large Language Models",
    arxiv="2301.12597",
    pipeline_tag="image-feature-extraction",
    tags=("blip-2",),
    description=(
        "BLIP-2 learns to read a frozen image tower. Between the tower and language stands the Q-Former, a BERT whose "
        "learned queries look at the picture. In the first stage it learns three objectives at once: the nearest of a "
        "picture's queries meets its caption in one space (ITC), queries that have met a text tell whether it matches "
        "(ITM), and a text is written after the queries (ITG). In the second stage one linear layer puts the queries "
        "before the text of a large language model, frozen as well, which then writes about the picture."
    ),
    usage=START
    + """from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained(CHECKPOINT)
processor = AutoProcessor.from_pretrained(CHECKPOINT)
outputs = model(**processor(images=[Image.open("picture.png")]))
print(outputs.last_hidden_state.shape)  # the queries that have read the picture""",
    limits=(
        "A head with a language model writes what is likely beside a picture, which need not be there, and it brings "
        "what that model knows and gets wrong.",
        "It has learned captions: that it also answers questions is what the language model makes of them.",
        "Matching looks at one pair at a time: for a large collection, let the embeddings choose candidates first.",
        NOT_EXAMINED,
    ),
    heads=BLIP2_HEADS,
    evaluations={"retrieval": RETRIEVAL, **WRITTEN},
    citation="""@inproceedings{li2023blip2,
  title     = {{BLIP-2}: Bootstrapping Language-Image Pre-training with Frozen Image Encoders and Large Language
               Models},
  author    = {Li, Junnan and Li, Dongxu and Savarese, Silvio and Hoi, Steven},
  booktitle = {International Conference on Machine Learning},
  year      = {2023},
  eprint    = {2301.12597},
  archivePrefix = {arXiv}
}""",
)

INSTRUCTBLIP = Architecture(
    title="InstructBLIP",
    paper="InstructBLIP: Towards General-purpose Vision-Language Models with Instruction Tuning",
    arxiv="2305.06500",
    pipeline_tag="image-text-to-text",
    tags=("instructblip",),
    description=(
        "InstructBLIP is a BLIP-2 that follows instructions about a picture. Its Q-Former reads the instruction too, "
        "so that what the queries take from the frozen image tower is what is asked about; the language model then "
        "reads queries and instruction and answers. It is tuned on many tasks put as instructions, each data set drawn "
        "with a probability in proportion to the square root of its size, and it learns the responses alone."
    ),
    usage=START
    + """from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained(CHECKPOINT)
processor = AutoProcessor.from_pretrained(CHECKPOINT)
inputs = processor(images=[Image.open("picture.png")], text=["<image>What colour is the background?"])
print(model(**inputs).last_hidden_state.shape)  # states of the language model""",
    limits=(
        "It writes what is likely beside a picture, which need not be there, and it brings what its language model "
        "knows and gets wrong.",
        "It answers in the manner of its training: briefly, and to one instruction about one picture, not in "
        "conversation.",
        NOT_EXAMINED,
    ),
    heads=INSTRUCT_HEADS,
    evaluations=WRITTEN,
    citation="""@inproceedings{dai2023instructblip,
  title     = {{InstructBLIP}: Towards General-purpose Vision-Language Models with Instruction Tuning},
  author    = {Dai, Wenliang and Li, Junnan and Li, Dongxu and Tiong, Anthony Meng Huat and Zhao, Junqi and
               Wang, Weisheng and Li, Boyang and Fung, Pascale and Hoi, Steven},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2023},
  eprint    = {2305.06500},
  archivePrefix = {arXiv}
}""",
)

__all__ = ["BLIP2", "INSTRUCTBLIP"]
