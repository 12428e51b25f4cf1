"""Texts of BLIP-2's and InstructBLIP's model cards."""

from dataclasses import replace

from .evaluations import RERANKED_RETRIEVAL
from .types import NOT_EXAMINED, START, CardTexts, HeadTexts

COMPARES = """processor = AutoProcessor.from_pretrained(CHECKPOINT)
image, texts = Image.open("image.png"), ["a dolphin", "a pizza"]
outputs = model(**processor(images=[image], text=texts))
print(outputs.itm_logits.softmax(-1)[:, 1])  # probability that each text matches the image (ITM)
similarity = outputs.image_embeds @ outputs.text_embeds.T  # of each query with each text (ITC), for search
print(similarity.amax(dim=1))  # the score of an image is that of its best query"""

ASKS = """from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT)
processor = AutoProcessor.from_pretrained(CHECKPOINT)
image, end = Image.open("image.png"), processor.tokenizer.eos_token_id
"""

BLIP2_HEADS = {
    "VlmBlip2ForPreTraining": HeadTexts(
        pipeline_tag="image-feature-extraction",
        tags=("blip-2", "image-text-matching", "image-text-retrieval"),
        usage=START
        + """from transformers import AutoModelForPreTraining, AutoProcessor

model = AutoModelForPreTraining.from_pretrained(CHECKPOINT)
"""
        + COMPARES,
    ),
    "VlmBlip2ForImageTextRetrieval": HeadTexts(
        pipeline_tag="image-feature-extraction",
        tags=("blip-2", "image-text-matching", "image-text-retrieval"),
        usage=START
        + """from transformers import AutoProcessor

model = hf_vlm.VlmBlip2ForImageTextRetrieval.from_pretrained(CHECKPOINT)
"""
        + COMPARES,
    ),
    "VlmBlip2ForConditionalGeneration": HeadTexts(
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
    "VlmInstructBlipForConditionalGeneration": HeadTexts(
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

RETRIEVAL = replace(
    RERANKED_RETRIEVAL,
    note=f"{RERANKED_RETRIEVAL.note} The ITC score of an image is that of its best query.",
)

BLIP2 = CardTexts(
    title="BLIP-2",
    paper="BLIP-2: Bootstrapping Language-Image Pre-training with Frozen Image Encoders and Large Language Models",
    arxiv="2301.12597",
    pipeline_tag="image-feature-extraction",
    tags=("blip-2",),
    description=(
        "BLIP-2 connects a frozen image tower to a frozen large language model (LLM). Between them is the Q-Former, a "
        "BERT whose learned queries attend to the image. Stage 1 trains it with three objectives: the best query of an "
        "image is similar to its caption (ITC), queries that have attended to a text decide whether it matches (ITM), "
        "and the text is generated from the queries (ITG). In stage 2 a linear layer puts the queries before the LLM's "
        "text, and the LLM writes about the image."
    ),
    usage=START
    + """from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained(CHECKPOINT)
processor = AutoProcessor.from_pretrained(CHECKPOINT)
outputs = model(**processor(images=[Image.open("image.png")]))
print(outputs.last_hidden_state.shape)  # the queries, after cross-attention to the image""",
    limits=(
        "A head with an LLM writes text that is plausible for the image but can be wrong, and it inherits the LLM's "
        "errors.",
        "It was trained on captions only; its answers to questions come from the LLM.",
        "ITM scores one pair at a time: for a large collection, let ITC choose the candidates first.",
        NOT_EXAMINED,
    ),
    heads=BLIP2_HEADS,
    evaluations={"retrieval": RETRIEVAL},
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

INSTRUCTBLIP = CardTexts(
    title="InstructBLIP",
    paper="InstructBLIP: Towards General-purpose Vision-Language Models with Instruction Tuning",
    arxiv="2305.06500",
    pipeline_tag="image-text-to-text",
    tags=("instructblip",),
    description=(
        "InstructBLIP is a BLIP-2 that follows instructions about an image. Its Q-Former reads the instruction too, so "
        "the queries extract what the instruction asks for. The LLM then reads queries and instruction and answers. It "
        "is tuned on many tasks written as instructions, with the loss on the responses only. Each dataset is sampled "
        "in proportion to the square root of its size."
    ),
    usage=START
    + """from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained(CHECKPOINT)
processor = AutoProcessor.from_pretrained(CHECKPOINT)
inputs = processor(images=[Image.open("image.png")], text=["<image>What colour is the background?"])
print(model(**inputs).last_hidden_state.shape)  # hidden states of the LLM""",
    limits=(
        "Its text is plausible for the image but can be wrong, and it inherits the LLM's errors.",
        "It gives brief answers to one instruction about one image; it does not hold conversations.",
        NOT_EXAMINED,
    ),
    heads=INSTRUCT_HEADS,
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
