"""A process of its own that talks to a Hub as a user would: it answers calls until its input ends.

A call is one line of JSON, `{"name": ..., "args": [...], "options": {...}}`; so is its answer, `{"result": ...}` or
`{"error": type, "text": ...}`.
"""

import contextlib
import hashlib
import io
import json
import os
import sys

import torch
from huggingface_hub import snapshot_download
from PIL import Image
from transformers import AutoModel, AutoProcessor, pipeline

from hf_vlm.cli.main import main
from hf_vlm.hub.push import push_folder

torch.set_num_threads(1)


def picture() -> Image.Image:
    """Always the same one."""
    return Image.linear_gradient("L").convert("RGB").resize((40, 36))


def logits(source: str, **options) -> str:
    """A checkpoint's outputs for an image, as a digest of their bits."""
    model = AutoModel.from_pretrained(source, **options).eval()
    processor = AutoProcessor.from_pretrained(source, **options)
    with torch.inference_mode():
        found = model(**processor(images=[picture()], text=["a red cat", "tree"])).logits_per_image
    return hashlib.sha256(found.numpy().tobytes()).hexdigest()


def body(source: str, text: str | None = None) -> list:
    """The keys that `AutoModel` misses in a checkpoint, and its outputs for the image, as a digest of their bits."""
    model, info = AutoModel.from_pretrained(source, output_loading_info=True)
    inputs = AutoProcessor.from_pretrained(source)(images=[picture()], text=None if text is None else [text])
    with torch.inference_mode():
        found = model(**inputs).last_hidden_state
    return [sorted(info["missing_keys"]), hashlib.sha256(found.numpy().tobytes()).hexdigest()]


def pipelines(source: str) -> list:
    """The outputs of both pipelines for the image."""
    classify = pipeline("zero-shot-image-classification", model=source)
    labels = [[row["label"], row["score"]] for row in classify(picture(), candidate_labels=["cat", "dog", "tree"])]
    return [labels, pipeline("image-feature-extraction", model=source)(picture())]


def push_parts(folder: str, repo_id: str) -> None:
    """Model and processor by their own methods."""
    AutoModel.from_pretrained(folder).push_to_hub(repo_id)
    AutoProcessor.from_pretrained(folder).push_to_hub(repo_id)


def cli(*args: str, token: str | None = None) -> dict:
    """`hf-vlm ...`, with another token if one is given."""
    before, sys.argv = os.environ["HF_TOKEN"], ["hf-vlm", *args]
    os.environ["HF_TOKEN"] = before if token is None else token
    out, err = io.StringIO(), io.StringIO()
    code = None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as exit:
            code = exit.code
    os.environ["HF_TOKEN"] = before
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


def recipe(*args: str) -> None:
    """CLIP's recipe with these options."""

    from hf_vlm.runs.launch import parse_arguments
    from recipes import clip_pretrain

    clip_pretrain.main(*parse_arguments(clip_pretrain.main, list(args)))


CALLS = {
    call.__name__: call for call in (body, logits, pipelines, push_parts, push_folder, snapshot_download, cli, recipe)
}


def serve() -> None:
    """Answers on the stream that was standard output; what is printed goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        call = json.loads(line)
        try:
            answer = {"result": CALLS[call["name"]](*call["args"], **call["options"])}
        except Exception as error:
            answer = {"error": type(error).__name__, "text": str(error)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()
