"""Draws docs/images/strip.png: scenes of the test set, and what small models find, write and answer.

    python docs/make_strip.py --clip clip-small --blip blip-small --llava llava-small

The scenes are the first ones with two objects of the test set with unseen drawings (`unseen_style`); they are not
selected by result. Each model is optional; its lines are left out where no checkpoint is given. CLIP ranks the names of
all emoji for the largest object, which is framed. BLIP writes a caption, LLaVA answers questions about the scene; the
true answer stands in brackets.
"""

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForPreTraining, AutoProcessor

import hf_vlm
from hf_vlm.data import SceneStream, load_emoji
from hf_vlm.evaluation import embed_images, embed_texts

SIDE, TEXT_WIDTH, MARGIN, LINE = 240, 330, 16, 21
HEADING, BODY, FADED = "#2f4b9b", "#202020", "#707070"
SHORT = "\nAnswer the question using a single word or phrase."

Lines = list[tuple[str, str]]


@torch.no_grad()
def clip_lines(folder: str, scenes: list[dict[str, Any]]) -> list[Lines]:
    """For the framed object of each scene the three most similar of all emoji names, with their cosines.

    CLIP sees the object's own drawing: it was trained on single drawings, without a background.
    """
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    drawings = load_emoji()["unseen_style"]
    names = list(drawings["name"])
    texts = embed_texts(model, processor, names)
    images = embed_images(model, processor, [drawings[names.index(framed(scene)["name"])]["image"] for scene in scenes])
    found = []
    for similarities in images @ texts.T:
        best = similarities.topk(3)
        lines = [(f"{names[i]}  {value:.2f}", BODY) for value, i in zip(*map(torch.Tensor.tolist, best), strict=True)]
        found.append([(f"CLIP finds, of {len(names):,} names", HEADING), *lines])
    return found


def framed(scene: dict[str, Any]) -> dict[str, Any]:
    """A scene's largest object."""
    return max(scene["objects"], key=lambda thing: thing["box"][2] - thing["box"][0])


@torch.no_grad()
def blip_lines(folder: str, scenes: list[dict[str, Any]]) -> list[Lines]:
    """A caption for each scene, by beam search."""
    model, processor = AutoModelForPreTraining.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    captioner = hf_vlm.VlmBlipForConditionalGeneration.from_pretraining(model).eval()
    written = captioner.generate(
        **processor(images=[scene["image"] for scene in scenes]), num_beams=3, max_new_tokens=20
    )
    captions = processor.batch_decode(written, skip_special_tokens=True)
    return [[("BLIP writes", HEADING), (caption, BODY)] for caption in captions]


@torch.no_grad()
def llava_lines(folder: str, scenes: list[dict[str, Any]], count: int = 2) -> list[Lines]:
    """Answers to the first questions of different kinds about each scene, with the true answers."""
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    answered = []
    for scene in scenes:
        lines: Lines = [("LLaVA answers", HEADING)]
        kinds = {question["kind"]: question for question in reversed(scene["questions"])}
        for question in sorted(kinds.values(), key=lambda one: one["kind"])[:count]:
            content = [{"type": "image"}, {"type": "text", "text": question["question"] + SHORT}]
            text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            inputs = processor(images=[scene["image"]], text=[text])
            end = processor.tokenizer.eos_token_id
            written = model.generate(**inputs, do_sample=False, max_new_tokens=8, eos_token_id=end)
            answer = processor.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
            lines += [(question["question"], FADED), (f"{answer}  ({question['answer']})", BODY)]
        answered.append(lines)
    return answered


def wrapped(text: str, font: Any, width: int) -> list[str]:
    """The text in lines that are no wider than `width` pixels."""
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".strip(" ") if lines[-1] else word
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def draw_strip(scenes: list[dict[str, Any]], texts: list[Lines]) -> Image.Image:
    """The scenes in a row, each with its lines on its right."""
    font = ImageFont.load_default(15)
    laid = [[(line, colour) for text, colour in lines for line in wrapped(text, font, TEXT_WIDTH)] for lines in texts]
    height = max(SIDE, max(len(lines) for lines in laid) * LINE) + 2 * MARGIN
    panel = SIDE + TEXT_WIDTH + 2 * MARGIN
    strip = Image.new("RGB", (panel * len(scenes), height), "white")
    draw = ImageDraw.Draw(strip)
    for number, (scene, lines) in enumerate(zip(scenes, laid, strict=True)):
        left = number * panel + MARGIN
        strip.paste(scene["image"].convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS), (left, MARGIN))
        box = [side * SIDE / scene["image"].width for side in framed(scene)["box"]]
        draw.rectangle([left + box[0], MARGIN + box[1], left + box[2], MARGIN + box[3]], outline=HEADING, width=2)
        for row, (line, colour) in enumerate(lines):
            draw.text((left + SIDE + MARGIN, MARGIN + row * LINE), line, fill=colour, font=font)
    return strip


def main() -> None:
    """Makes the image from the checkpoints that are named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clip", help="folder or Hub id of a VlmClipModel")
    parser.add_argument("--blip", help="folder or Hub id of a VlmBlipForPreTraining")
    parser.add_argument("--llava", help="folder or Hub id of a VlmLlavaForConditionalGeneration")
    parser.add_argument("--scenes", type=int, default=3, help="number of scenes")
    parser.add_argument("--first", type=int, default=0, help="number of the first scene")
    parser.add_argument("--size", type=int, default=128, help="pixels of a scene's side")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "images" / "strip.png")
    args = parser.parse_args()
    makers = [(clip_lines, args.clip), (blip_lines, args.blip), (llava_lines, args.llava)]
    if not any(folder for _, folder in makers):
        parser.error("name at least one checkpoint: --clip, --blip or --llava")
    stream = SceneStream("unseen_style", size=args.size)
    with_two = (scene for scene in map(stream.scene, itertools.count(args.first)) if len(scene["objects"]) == 2)
    scenes = list(itertools.islice(with_two, args.scenes))
    texts: list[Lines] = [[] for _ in scenes]
    for make, folder in makers:
        if folder is not None:
            for lines, new in zip(texts, make(folder, scenes), strict=True):
                lines += new
    args.output.parent.mkdir(parents=True, exist_ok=True)
    draw_strip(scenes, texts).save(args.output, optimize=True)
    print(f"Wrote {args.output}")


if __name__ == "__main__":
    main()
