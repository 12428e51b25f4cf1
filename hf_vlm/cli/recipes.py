"""The command line of the recipes: `hf-vlm recipes list | show | copy | run`, and `hf-vlm train`."""

import runpy
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..runs.catalogue import copy_recipe, find_recipe, format_recipes, load_recipes

recipes_app = typer.Typer(
    help="List, show, copy and run the training recipes.", no_args_is_help=True, rich_markup_mode="markdown"
)
# Everything after the recipe's name goes to the recipe, `--help` too.
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of a recipe, such as clip_pretrain.")]


def run_recipe(name: str, options: list[str]) -> None:
    """Runs a recipe in this process, as `python -m hf_vlm.recipes.NAME OPTIONS` does."""
    recipe = find_recipe(name)
    sys.argv = [str(recipe.path), *options]
    runpy.run_module(f"hf_vlm.recipes.{recipe.name}", run_name="__main__", alter_sys=True)


@recipes_app.command("list", epilog="Example: `hf-vlm recipes list`")
def list_recipes() -> None:
    """List the recipes: what each trains, and the hardware, time and data of its configs."""
    typer.echo(format_recipes(load_recipes()))


@recipes_app.command(epilog="Examples: `hf-vlm recipes show clip_pretrain` and `... show clip_pretrain --config small`")
def show(
    name: Name,
    config: Annotated[str, typer.Option(help="Show this YAML file instead of the script.")] = "",
) -> None:
    """Print a recipe's script, or one of its YAML files."""
    recipe = find_recipe(name)
    typer.echo((recipe.find_config(config) if config else recipe.path).read_text(encoding="utf-8"), nl=False)


@recipes_app.command(epilog="Example: `hf-vlm recipes copy clip_pretrain my-recipes`")
def copy(
    name: Name,
    folder: Annotated[Path, typer.Argument(help="Where to copy to; created if it does not exist.")] = Path("."),
) -> None:
    """Copy a recipe's script and YAML files to edit them; existing files are not overwritten."""
    script, *_ = copies = copy_recipe(find_recipe(name), folder)
    typer.echo("\n".join(f"Wrote {path}" for path in copies))
    typer.echo(f"Run it: python {script} --config NAME")


@recipes_app.command(
    context_settings=PASS_ON,
    epilog="Example: `hf-vlm recipes run clip_pretrain --config small --max_steps 100`",
)
def run(context: typer.Context, name: Name = "--help") -> None:
    """Run a recipe: `--config` takes the name of a packaged YAML file or a path, and each of its keys is an option.

    `hf-vlm recipes run NAME --help` shows all options. On several GPUs: `torchrun --nproc_per_node 8 -m
    hf_vlm.recipes.NAME --config paper`.
    """
    if name in ("--help", "-h"):
        typer.echo(context.get_help())
        return
    run_recipe(name, context.args)


def train(context: typer.Context, name: Annotated[str, typer.Argument(metavar="[NAME]")] = "") -> None:
    """Run a training recipe; without a name, list the recipes. The same as `hf-vlm recipes run NAME`."""
    if name in ("--help", "-h"):
        typer.echo(context.get_help())
    elif not name:
        typer.echo(format_recipes(load_recipes()))
        typer.echo("Run one: hf-vlm train NAME --config small")
    else:
        run_recipe(name, context.args)


__all__ = ["PASS_ON", "recipes_app", "train"]
