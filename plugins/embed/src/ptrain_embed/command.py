"""`ptrain embed`: hard negatives, evaluation, and several recipes as one pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Mapping

EXAMPLES = """[bold]Examples[/bold]

[dim]$[/dim] ptrain embed eval sentence-transformers/all-MiniLM-L6-v2 beir/scifact

[dim]$[/dim] ptrain embed mine recipe.yaml -o mine.negatives=5

[dim]$[/dim] ptrain embed pipeline pairs.yaml negatives.yaml --workers 8
"""

app = typer.Typer(
    help="Measure embedding models, and find hard negatives for them.", epilog=EXAMPLES, no_args_is_help=True,
    rich_markup_mode="rich",
)  # fmt: skip

Overrides = Annotated[list[str] | None, typer.Option("--override", "-o", metavar="KEY=VALUE",
    help="Set a key of the recipe, e.g. [bold]-o mine.negatives=5[/bold]; may be given again.")]  # fmt: skip
Code = Annotated[Path | None, typer.Option(metavar="FILE", help="Python code of your own that is the top layer of "
    "plugins.")]  # fmt: skip


@app.callback()
def options() -> None:
    """A command of its own name for each thing to do."""


@app.command("mine", epilog=EXAMPLES)
def mine(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", show_default=False,
        help="A recipe of the type embed with a section `mine`.")],
    override: Overrides = None,
    code: Code = None,
) -> int:  # fmt: skip
    """Find hard negatives for the rows of `data.sources`, as the section `mine` says, and write them as a data set.

    Vectors and what was found for each query stay in a folder beside the data set: the same command goes on where it
    was stopped, and other rules for what is taken need no second search. A report says what was thrown out.
    """
    import ptrain
    from ptrain_embed.mine import mine as write

    run = ptrain.open_recipe(recipe, override or [], code=code)
    report = write(run, typer.echo)
    for line in report.lines():
        typer.echo(line)
    typer.echo(f"{run.config.mine.output}: data for the next recipe; report: {run.config.mine.output}.report.json")
    return 0


@app.command("eval", epilog=EXAMPLES)
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", show_default=False,
        help="A folder, or a name on the hub.")],
    data: Annotated[str, typer.Argument(metavar="DATA", show_default=False,
        help="A folder with a corpus, queries and qrels; a file of graded pairs of sentences; or mteb:TASK, where the "
        "package mteb is installed.")],
    dimensions: Annotated[str | None, typer.Option(metavar="N,N,...", show_default=False,
        help="Measure at these first dimensions too.")] = None,
    split: Annotated[str, typer.Option(help="Which of the qrels, or of the splits of an MTEB task.")] = "test",
    titles: Annotated[bool, typer.Option(help="Put the title of a document before its text.")] = True,
    max_length: Annotated[int | None, typer.Option(min=1, show_default=False,
        help="The most tokens of a text; by default what the model was made for.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights: fp32, bf16 or fp16.")] = "fp32",
    device: Annotated[str | None, typer.Option(help="Such as cuda:1; by default a GPU, if there is one.",
        show_default=False)] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="A file for the figures.",
        show_default=False)] = None,
) -> int:  # fmt: skip
    """Measure a model: nDCG@10, MRR@10, MAP and recall on a collection, or correlations with grades of pairs."""
    from ptrain_embed.encoder import Encoder

    sizes = _sizes(dimensions)
    kind = _kind(data, split)
    if kind == "mteb" and (sizes or not titles):
        raise typer.BadParameter(
            "mteb measures the whole vectors, and documents with their titles", param_hint="--dimensions, --no-titles"
        )
    encoder = Encoder.load(model, device=device, dtype=dtype, max_length=max_length)
    found = _measured(encoder, kind, data, split, titles, sizes)
    for name, value in found.items():
        typer.echo(f"{name:20} {value:.4f}")
    if json is not None:
        from ptrain_embed.vectors import write_note

        write_note(json, found)
    return 0


@app.command("pipeline", epilog=EXAMPLES)
def pipeline(
    recipes: Annotated[list[Path], typer.Argument(metavar="RECIPE...", show_default=False,
        help="Recipes, in order: each is run, and where it has a section `mine`, negatives are mined after that.")],
    override: Overrides = None,
    workers: Annotated[int | None, typer.Option("--workers", "-n", min=1, metavar="N", show_default=False,
        help="Workers of each run; by default one for each accelerator, or one on CPU.")] = None,
) -> int:  # fmt: skip
    """Run recipes one after the other, each with the mining that it asks for; the same command goes on where it was."""
    from ptrain_embed.pipeline import Stage, run_stages

    stages = [Stage(recipe, override or [], workers) for recipe in recipes]
    return run_stages(stages, typer.echo)


def _sizes(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(one) for one in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"`{text}` is no list of numbers", param_hint="--dimensions") from None


def _kind(data: str, split: str) -> str:
    """What DATA is: "mteb", "retrieval" or "similarity".

    Raises:
        BadParameter: there is nothing of that name.
        DataError: mteb has no such task.
    """
    if data.startswith(MTEB):
        from ptrain_embed import mteb_model

        mteb_model.task_of(data.removeprefix(MTEB), split)
        return "mteb"
    path = Path(data).expanduser()
    if not path.exists():
        raise typer.BadParameter(f"there is no file or folder `{data}`", param_hint="DATA")
    return "retrieval" if path.is_dir() else "similarity"


def _measured(
    encoder: Any, kind: str, data: str, split: str, titles: bool, sizes: list[int] | None
) -> Mapping[str, float]:
    from ptrain_embed import measure

    if kind == "retrieval":
        return measure.measure_collection(encoder, data, split, titles, sizes)
    if kind == "similarity":
        return measure.measure_pairs(encoder, data, sizes)
    from ptrain_embed import mteb_model

    return mteb_model.measure_task(encoder, data.removeprefix(MTEB), split)


MTEB = "mteb:"
