"""The command line of the index: `hf-vlm index build | add | delete | search | info`."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..data.builtin.table import BUILTIN
from ..terminal import printable

index_app = typer.Typer(
    help="Search images and texts by text, by image, or by both.", no_args_is_help=True, rich_markup_mode="markdown"
)


class OnBad(StrEnum):
    """Handling of items that cannot be read."""

    error = "raise"
    skip = "skip"


class Kind(StrEnum):
    """Kind of items to index or to find."""

    image = "image"
    text = "text"
    both = "both"


Index = Annotated[str, typer.Argument(help="Folder of the index, or a URI such as s3://bucket/index.")]
Sources = Annotated[
    list[str],
    typer.Argument(
        help="Folders of images, images, text files (txt: one text per line; jsonl, csv: a column `text` or `caption`, "
        "other columns become metadata), parquet files, datasets saved to disk or on the Hub, or "
        f"built-in data ({', '.join(BUILTIN)})."
    ),
]
Model = Annotated[
    str, typer.Option(help="Folder or Hub id of the model. Default: the model that the index was built with.")
]
OnError = Annotated[OnBad, typer.Option(help="raise an error for items that cannot be read, or skip and report them.")]
Indexed = Annotated[Kind, typer.Option(help="Index a dataset's images, its captions as texts, or both.")]
Split = Annotated[str, typer.Option(help="Split of a dataset.")]
Columns = Annotated[str, typer.Option(help="Columns of a dataset, as image=NAME,caption=NAME,id=NAME.")]
Where = Annotated[list[str] | None, typer.Option(help="Condition NAME=VALUE on the metadata; repeat for several.")]
Sql = Annotated[str, typer.Option(help="Condition in SQL instead, such as \"style = 'noto' AND year > 2020\".")]


@index_app.command(epilog="Example: `hf-vlm index build my-index --model my-clip photos/ descriptions.txt`")
def build(
    index: Index,
    sources: Sources,
    model: Model = "",
    on_error: OnError = OnBad.error,
    kind: Indexed = Kind.image,
    split: Split = "train",
    columns: Columns = "",
    replace: Annotated[bool, typer.Option("--replace", help="Delete an existing index first.")] = False,
) -> None:
    """Build an index, or resume an interrupted build: items already in the index are not embedded again."""
    from ..search.open import build as build_index
    from ..search.open import open_sources

    opened = open_sources(sources, kind.value, split, columns)
    typer.echo(str(build_index(index, model, opened, on_error.value, replace)))


@index_app.command(epilog="Example: `hf-vlm index add my-index more-photos/ --on-error skip`")
def add(
    index: Index,
    sources: Sources,
    model: Model = "",
    on_error: OnError = OnBad.error,
    kind: Indexed = Kind.image,
    split: Split = "train",
    columns: Columns = "",
) -> None:
    """Add items to an index; an item with an existing id (an image's path, the column `id`) replaces the old one."""
    from ..search.open import add as add_to_index
    from ..search.open import open_index, open_sources

    opened = open_sources(sources, kind.value, split, columns)
    typer.echo(str(add_to_index(open_index(index, model), opened, on_error.value, keep=False)))


@index_app.command(epilog="Examples: `hf-vlm index delete my-index ID ID` and `... delete my-index --where style=noto`")
def delete(
    index: Index,
    ids: Annotated[list[str] | None, typer.Argument(help="Ids as `search` shows them.")] = None,
    where: Where = None,
    sql: Sql = "",
) -> None:
    """Delete items by id or by metadata."""
    from ..search.open import open_index, read_filter

    opened = open_index(index)
    typer.echo(f"{opened.delete(ids or [], read_filter(where or [], sql, opened.table.schema))} deleted")


@index_app.command(
    epilog='Examples: `hf-vlm index search my-index "a red fruit" --minus "an apple" --k 5` and '
    "`hf-vlm index search my-index --image photo.png --where style=noto --sheet results.html`"
)
def search(
    index: Index,
    text: Annotated[str | None, typer.Argument(help="Text to search for.")] = None,
    image: Annotated[Path | None, typer.Option(help="Image to search for, alone or with the text.")] = None,
    minus: Annotated[str | None, typer.Option(help="Negative query: a text.")] = None,
    minus_image: Annotated[Path | None, typer.Option(help="Negative query: an image.")] = None,
    text_weight: Annotated[float, typer.Option(help="Weight of the text.")] = 1.0,
    image_weight: Annotated[float, typer.Option(help="Weight of the image.")] = 1.0,
    minus_weight: Annotated[float, typer.Option(help="Weight of the negative query.")] = 0.5,
    kind: Annotated[Kind, typer.Option(help="Kind of items to find.")] = Kind.both,
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Number of results.")] = 8,
    where: Where = None,
    sql: Sql = "",
    exact: Annotated[
        bool, typer.Option("--exact", help="Compare with every item, without the approximate index.")
    ] = False,
    model: Model = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    sheet: Annotated[Path | None, typer.Option(help="Write the results with their images to an HTML file.")] = None,
) -> None:
    """Find images and texts by text, by image, or by both."""
    from ..search.open import open_index, query_label, read_filter, write_results
    from ..search.terminal import matches_table

    opened = open_index(index, model)
    matches = opened.search(
        text,
        image,
        minus,
        minus_image,
        text_weight=text_weight,
        image_weight=image_weight,
        minus_weight=minus_weight,
        kind=None if kind is Kind.both else kind.value,
        k=k,
        where=read_filter(where or [], sql, opened.table.schema),
        exact=exact,
    )
    shown = json.dumps([match.to_dict() for match in matches], indent=2, default=str)
    typer.echo(shown if as_json else matches_table(matches))
    if sheet is not None:
        path = write_results(sheet, index, query_label(text, image, minus, minus_image), image, matches)
        typer.echo(f"Sheet: {path}", err=as_json)


@index_app.command(epilog="Example: `hf-vlm index info my-index`")
def info(
    index: Index, as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False
) -> None:
    """Show the contents of an index and the model that it was built with."""
    from ..search.open import open_index

    facts = open_index(index).info()
    lines = [f"{name.replace('_', ' ') + ':':16} {printable(str(value))}" for name, value in facts.items()]
    typer.echo(json.dumps(facts, indent=2) if as_json else "\n".join(lines))


__all__ = ["index_app"]
