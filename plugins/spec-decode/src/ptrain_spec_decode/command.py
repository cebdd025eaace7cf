"""`ptrain spec-decode`: what there is to do for a speculator besides training it."""

from __future__ import annotations

from collections import Counter
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ptrain_spec_decode.engines import Engine
    from ptrain_spec_decode.journal import Journal
    from ptrain_spec_decode.offline import Outcome

EXAMPLES = """[bold]Examples[/bold]

[dim]$[/dim] ptrain spec-decode generate generated.jsonl --model my-model --data chats.jsonl --count 1000

[dim]$[/dim] ptrain spec-decode generate generated.parquet --model meta-llama/Llama-3.1-8B-Instruct
  --data HuggingFaceH4/ultrachat_200k --count 200000 --engine vllm --url http://localhost:8000/v1
"""

app = typer.Typer(
    help="Generate what speculators learn from.", epilog=EXAMPLES, no_args_is_help=True, rich_markup_mode="rich"
)


class DType(str, Enum):
    """Of weights."""

    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


@app.callback()
def options() -> None:
    """A command of its own name for each thing to do."""


@app.command("generate", epilog=EXAMPLES)
def generate(
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", show_default=False,
        help="The data set to write: a file that ends in .jsonl or .parquet.")],
    model: Annotated[str, typer.Option(help="The base: a folder, or a name on the hub.", show_default=False)],
    data: Annotated[str, typer.Option(help="Where prompts come from: a file, a folder, or a data set on the hub.",
        show_default=False)],
    engine: Annotated[str, typer.Option(help="What writes: [bold]transformers[/bold] here, [bold]vllm[/bold] or "
        "[bold]openai[/bold] on a server, or an engine of another package.")] = "transformers",
    count: Annotated[int | None, typer.Option(min=1, help="How many prompts, drawn at random; by default all.",
        show_default=False)] = None,
    prompt_length: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write after each; they are a row.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="Of sampling; 0 takes the likeliest token.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(min=0, help="Sample from so many of the likeliest tokens; 0 is all. "
        "By default 10, where the engine knows it.", show_default=False)] = None,
    top_p: Annotated[float | None, typer.Option(min=1e-6, max=1, help="Of these, from the fewest whose probabilities "
        "add up to it; by default 1.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of prompts, and of sampling.")] = 42,
    tokenizer: Annotated[str | None, typer.Option(help="The model's tokenizer, where it is elsewhere.",
        show_default=False)] = None,
    chat_template: Annotated[str | None, typer.Option(help="A template for conversations: a file, or a name such as "
        "chatml; by default the tokenizer's.", show_default=False)] = None,
    token_budget: Annotated[int | None, typer.Option(min=1, help="Send nothing more once so many tokens were read and "
        "written.", show_default=False)] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="transformers: prompts at a time; by default 32.",
        show_default=False)] = None,
    dtype: Annotated[DType | None, typer.Option(help="transformers: of the weights; by default bf16, on a CPU fp32.",
        show_default=False)] = None,
    device: Annotated[str | None, typer.Option(help="transformers: such as cuda:1; by default a GPU, if there is one.",
        show_default=False)] = None,
    url: Annotated[str | None, typer.Option(help="Servers: the address, up to /v1.", show_default=False)] = None,
    served_model: Annotated[str | None, typer.Option(help="Servers: what they call the model; by default as --model.",
        show_default=False)] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Servers: requests at a time; by default 16.",
        show_default=False)] = None,
    timeout: Annotated[float | None, typer.Option(min=0.1, help="Servers: seconds to wait for an answer; "
        "by default 300.", show_default=False)] = None,
    retries: Annotated[int | None, typer.Option(min=0, help="Servers: how often a request is sent again; by default 6.",
        show_default=False)] = None,
    api_key_env: Annotated[str | None, typer.Option(metavar="NAME", help="Servers: the environment variable that holds "
        "the key; by default OPENAI_API_KEY or VLLM_API_KEY.", show_default=False)] = None,
) -> int:  # fmt: skip
    """Let a model write on from pieces of texts, for a speculator to learn what it would write itself.

    Every answer is kept in a journal beside OUTPUT as soon as it is there: the same command, given again, goes on
    where it was stopped. The rows have `input_ids` and `labels`, and are trained on as they are.
    """
    from ptrain_spec_decode.engines import Settings, engine_class

    given = {
        "batch_size": batch_size, "dtype": dtype.value if dtype else None, "device": device, "url": url,
        "served_model": served_model, "concurrency": concurrency, "timeout": timeout, "retries": retries,
        "api_key_env": api_key_env, "top_k": top_k, "top_p": top_p,
    }  # fmt: skip
    check_output(output, data)
    cls = engine_class(engine)
    check_options(engine, cls, given)
    from ptrain_spec_decode.chunks import load_tokenizer, prompts

    loaded = load_tokenizer(tokenizer or model, chat_template)
    settings = Settings(
        model, loaded, new_tokens, temperature, (10 if top_k is None else top_k) if "top_k" in cls.options else 0,
        1.0 if top_p is None else top_p, seed, given,
    )  # fmt: skip
    return run(output, engine, cls(settings), prompts(data, loaded, prompt_length, count, seed), token_budget)


def check_output(output: Path, data: str) -> None:
    """Raise BadParameter where the file has another form, can't be written, or is what prompts come from."""
    from ptrain_spec_decode.offline import SUFFIXES

    if output.suffix not in SUFFIXES:
        raise typer.BadParameter(f"`{output}` ends in neither {' nor '.join(SUFFIXES)}", param_hint="OUTPUT")
    if output.is_dir() or not output.parent.is_dir():
        what = "is a folder" if output.is_dir() else f"can't be written: there is no folder `{output.parent}`"
        raise typer.BadParameter(f"`{output}` {what}", param_hint="OUTPUT")
    if output.resolve() == Path(data).resolve():
        raise typer.BadParameter(f"`{output}` is what the prompts come from, and would be lost", param_hint="OUTPUT")


def check_options(name: str, engine: type[Engine], given: dict[str, Any]) -> None:
    """Raise BadParameter where a flag was given that the engine would not read."""
    for option, value in given.items():
        if value is not None and option not in engine.options:
            hint = f"--{option.replace('_', '-')}"
            raise typer.BadParameter(f"the engine `{name}` does not take it", param_hint=hint)


def run(output: Path, name: str, engine: Engine, prompts: list[list[int]], budget: int | None) -> int:
    """Generate what is missing, and write the data set; return the exit code."""
    from ptrain_spec_decode import offline
    from ptrain_spec_decode.journal import Journal

    settings = engine.settings
    requests = offline.requests_of(prompts, settings.seed)
    path = output.with_name(output.name + ".journal")
    known = offline.journal_settings(name, settings, requests)
    journal = Journal(path, known)
    try:
        there = sum(request.key in journal for request in requests)
        needed = offline.bytes_needed(len(requests), len(requests) - there, settings.new_tokens, output)
        offline.check_space(output, needed)
        typer.echo(
            f"{len(requests):,} rows of {settings.new_tokens} tokens by `{name}`: {there:,} are there, "
            f"{len(requests) - there:,} to go; about {offline.size(needed)} of disk; journal: {path}"
        )
        if there < len(requests):
            engine.start()
        outcome = _generated(engine, requests, journal, budget, len(requests) - there)
        rows = offline.write_rows(journal, requests, output)
        return _told(output, offline.Outcome(rows, dict(journal.failed), *outcome))
    finally:
        journal.close()


def _generated(
    engine: Engine, requests: list[Any], journal: Journal, budget: int | None, missing: int
) -> tuple[int, int]:
    """Requests that were not sent, and tokens that were used."""
    import sys

    from ptrain.data.progress import progress
    from ptrain_spec_decode import offline

    before = journal.used
    with progress("generating", missing) as advance:
        bar = advance if sys.stderr.isatty() else None
        meter = offline.Meter(missing, lambda line: typer.echo(line, err=True), bar)
        left = offline.collect(engine, requests, journal, budget, meter)
    return left, journal.used - before


def _told(output: Path, outcome: Outcome) -> int:
    """Say what has come out, and what to do next."""
    typer.echo(f"{output}: {outcome.rows:,} rows; {outcome.used:,} tokens were read and written")
    for reason, number in Counter(outcome.failed.values()).most_common(5):
        typer.echo(f"  {number:,} failed: {reason}", err=True)
    if outcome.left:
        typer.echo(f"  {outcome.left:,} were not sent: the budget is spent", err=True)
    if outcome.failed or outcome.left:
        typer.echo("  the same command tries the rest again", err=True)
    return 1 if outcome.failed else 0
