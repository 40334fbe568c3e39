"""The command `guppy`: chat with a fish, make its data, train it, examine it."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TextIO

import typer
from rich.console import Console
from rich.markup import escape
from rich.text import Text

if TYPE_CHECKING:
    from guppylm.engine import Engine, Sampling
    from guppylm.recipe import Recipe

app = typer.Typer(
    name="guppy",
    help="Guppy, a small fish made of nine million numbers. Talk to it, train it, look inside.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(highlight=False)
complaints = Console(stderr=True, highlight=False)

MODEL_HELP = "A model that ships (guppy-9m), a folder, or owner/name on the hub."


def give_up(message: str, code: int = 1) -> NoReturn:
    """Say in one sentence what is wrong, and exit."""
    complaints.print(Text.assemble(("guppy:", "bold red"), f" {message}"), soft_wrap=True)
    raise typer.Exit(code)


def _version(asked: bool) -> None:
    if asked:
        from guppylm import __version__

        typer.echo(f"guppy {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Guppy, a small fish made of nine million numbers. Talk to it, train it, look inside."""


# -- chat -------------------------------------------------------------------------------------------------

HELLO = r"""
      [cyan]o[/]
        [cyan]O[/]   [bright_yellow]><(((º>[/]   [bold]Guppy[/]
      [cyan].[/]                 {parameters:.1f} million numbers that think they are a fish.
                        [dim]/quit, Ctrl-D or Ctrl-C to leave. He will not remember.[/]
"""


@app.command()
def chat(
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Ask once, print the reply, exit.")] = None,
    batch: Annotated[
        Path | None, typer.Option(help='A .jsonl file with a "prompt" in each row; prints each row with its "reply".')
    ] = None,
    model: Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP)] = "guppy-9m",
    temperature: Annotated[
        float | None, typer.Option("--temperature", "-t", help="0 always takes the likeliest word.")
    ] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", "-k", help="Only the k likeliest words; 0 for all.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same reply.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
) -> None:
    """Chat with the fish.

    Without options it opens a conversation. When standard input is piped, each line of it that is not empty is a
    prompt and gets a line of reply.
    """
    if prompt is not None and batch is not None:
        give_up("--prompt and --batch exclude each other; give one of them.", 2)
    rows = _read_batch(batch) if batch else None
    sampling = _sampling(temperature, top_k)
    engine = _load_engine(model, device)
    if isinstance(sys.stdin, TextIOWrapper):  # bytes that are no UTF-8 are no reason to stop
        sys.stdin.reconfigure(errors="replace")
    # Lines are read outside of the event loop: within it, Ctrl-C would wait for the end of the line.
    with asyncio.Runner() as runner:
        try:
            if rows is not None:
                runner.run(_answer_batch(engine, rows, sampling, seed))
            elif prompt is not None:
                typer.echo(runner.run(engine.ask(prompt, sampling, seed=seed)).text)
            elif not sys.stdin.isatty():
                _answer_lines(runner, engine, sys.stdin, sampling, seed)
            else:
                _converse(runner, engine, sampling, seed)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except BrokenPipeError:  # the reader, `head` for example, has what it wanted
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        finally:
            runner.run(engine.aclose())


def _sampling(temperature: float | None, top_k: int | None) -> Sampling:
    from guppylm.engine import Sampling

    given: dict[str, Any] = {"temperature": temperature, "top_k": top_k}
    try:
        return Sampling(**{name: value for name, value in given.items() if value is not None})
    except ValueError as error:
        give_up(str(error), 2)


def _load_engine(model: str, device: str) -> Engine:
    from guppylm.checkpoint import ModelError
    from guppylm.engine import Engine

    try:
        return Engine.load(model, device=device)
    except (ModelError, ValueError) as error:
        give_up(str(error))


def _read_batch(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        give_up(f"Cannot read {path}: {error.strerror}.")
    except UnicodeDecodeError:
        give_up(f"{path} is not UTF-8 text.")
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            give_up(f"{path}:{number} is not JSON ({error}).")
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            give_up(f'{path}:{number} has no "prompt" text.')
        rows.append(row)
    return rows


async def _answer_batch(engine: Engine, rows: list[dict[str, Any]], sampling: Sampling, seed: int | None) -> None:
    """Each row with its reply, in order, as many at once as the engine takes."""
    gate = asyncio.Semaphore(engine.max_batch)

    async def answer(index: int, row: dict[str, Any]) -> str:
        async with gate:
            completion = await engine.ask(row["prompt"], sampling, seed=None if seed is None else seed + index)
            return json.dumps({**row, "reply": completion.text}, ensure_ascii=False)

    tasks = [asyncio.create_task(answer(index, row)) for index, row in enumerate(rows)]
    try:
        for task in tasks:
            # Half a surrogate pair is no character, but JSON can write it: as \udXXX it goes out as it came in.
            typer.echo((await task).encode("utf-8", "backslashreplace"))
    finally:
        for task in tasks:
            task.cancel()


def _answer_lines(runner: asyncio.Runner, engine: Engine, lines: TextIO, sampling: Sampling, seed: int | None) -> None:
    for line in lines:
        if line.strip():
            reply = runner.run(engine.ask(line, sampling, seed=seed)).text
            typer.echo(" ".join(reply.split()))  # a line for a line


def _converse(runner: asyncio.Runner, engine: Engine, sampling: Sampling, seed: int | None) -> None:
    """The terminal chat: every line is a new beginning for him."""

    async def answer(line: str) -> None:
        async for piece in engine.stream(line, sampling, seed=seed):
            console.out(piece, end="", highlight=False)

    console.print(HELLO.format(parameters=engine.model.parameter_count() / 1e6))
    while True:
        try:
            line = console.input("[bold green]you[/]   > ")
        except (EOFError, KeyboardInterrupt):
            console.print()
            break
        if line.strip() in ("/quit", "/exit", "/q"):
            break
        if not line.strip():
            console.print("[bold bright_yellow]guppy[/] > [dim]blub? say something, i am listening.[/]")
            continue
        console.print("[bold bright_yellow]guppy[/] > ", end="")
        try:
            runner.run(answer(line))
        except KeyboardInterrupt:
            console.print()
            break
        console.print()
        if engine.chat.encode_prompt(line).cut:
            console.print("        [dim](that was long. he heard the beginning and the end.)[/]")
    console.print("[dim]bye. he has forgotten you already.[/]")


# -- data -------------------------------------------------------------------------------------------------


@app.command()
def data(
    out: Annotated[Path, typer.Option(help="The folder for train.jsonl and held_out.jsonl.")] = Path("data/guppy"),
    conversations: Annotated[
        int, typer.Option("--conversations", "-n", min=100, help="How many, all in all.")
    ] = 60_000,
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 1,
    character: Annotated[str, typer.Option(help="A character that ships (guppy) or a folder.")] = "guppy",
    report: Annotated[
        bool, typer.Option("--report", help="Print counts, distinctness and overlap, topic by topic.")
    ] = False,
) -> None:
    """Compose conversations from the character files."""
    from guppylm.datagen import dataset
    from guppylm.datagen.grammar import CharacterError, load_character

    begun = time.monotonic()
    try:
        train, held_out = dataset.compose(load_character(character), conversations, seed)
        out.mkdir(parents=True, exist_ok=True)
        dataset.write_jsonl(out / "train.jsonl", train)
        dataset.write_jsonl(out / "held_out.jsonl", held_out)
    except CharacterError as error:
        give_up(str(error))
    except OSError as error:
        give_up(f"Cannot write to {out}: {error.strerror}.")
    console.print(
        f"{len(train):,} conversations in {out / 'train.jsonl'}, {len(held_out):,} held out by wording in "
        f"{out / 'held_out.jsonl'} ({time.monotonic() - begun:.0f} s)."
    )
    if report:
        _print_report(dataset.report(train, held_out))


def _print_report(report: dict[str, Any]) -> None:
    from rich.table import Table

    topics = report.pop("topics")
    for name, value in report.items():
        console.print(f"{name:>30}: {value:,}")
    table = Table("topic", "conversations", "distinct prompts", "distinct replies", "most frequent reply")
    for name, of in topics.items():
        table.add_row(
            name, f"{of['conversations']:,}", f"{of['distinct prompts']:,}", f"{of['distinct replies']:,}",
            f"{100 * of['most frequent reply']:.2f} %",
        )  # fmt: skip
    console.print(table)


# -- train ------------------------------------------------------------------------------------------------


@app.command()
def train(
    recipe: Annotated[
        str, typer.Option(help="A recipe of training/recipes (guppy, quick, tiny, finetune) or a .toml file.")
    ] = "quick",
    data: Annotated[
        Path | None,
        typer.Option(help="A folder with train.jsonl and held_out.jsonl; composed by the recipe if not given."),
    ] = None,
    out: Annotated[Path, typer.Option(help="The run's folder; it becomes the model folder.")] = Path("runs/guppy"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Change a number of the recipe: train.steps=500.")
    ] = None,
) -> None:
    """Train a fish: conversations, tokenizer, model. Ctrl-C stops it; --resume goes on."""
    from guppylm.recipe import RecipeError, load_recipe
    from guppylm.train import TrainError

    try:
        _train(load_recipe(recipe, set_), data, out, resume)
    except (RecipeError, TrainError) as error:
        give_up(str(error))


def _train(recipe: Recipe, folder: Path | None, out: Path, resume: bool) -> None:
    from guppylm import checkpoint
    from guppylm.card import model_card
    from guppylm.train import CHECKPOINT, Run, check_folder, distributed, find_start, precision_line

    with distributed() as rank:

        def say(line: str) -> None:
            if rank == 0:
                console.print(line)

        check_folder(out)
        if not resume and (out / CHECKPOINT).exists():
            give_up(f"{out} holds a run already. Go on with it (--resume), or choose another --out.", 2)
        if not resume and (start := find_start(recipe)):
            say(f"start      with what {start.path} has learnt")
        conversations, held_out = _conversations(recipe, folder)
        say(f"data       {len(conversations):,} conversations, {len(held_out):,} held out by wording")
        run = Run(recipe, conversations, held_out, out, resume=resume)
        say(f"tokenizer  {run.config.vocab_size:,} tokens, {len(run.config.thoughts)} topics to think of")
        say(f"model      {run.model.parameter_count() / 1e6:.2f} million parameters, on {run.device}")
        say(f"precision  {precision_line(run.device)}")
        if run.step:
            say(f"resumed    at step {run.step:,} of {recipe.train.steps:,}")
        begun = time.monotonic()
        for _ in _watch(run) if rank == 0 else run.train():
            pass
        if not run.finished:
            say(f"Stopped at step {run.step:,}; nothing is lost. Go on with --resume.")
            raise typer.Exit(130)
        if rank == 0:
            try:
                checkpoint.save(out, run.model, run.tokenizer, model_card(recipe, run, time.monotonic() - begun))
            except OSError as error:
                give_up(f"Cannot write the fish to {out}: {error.strerror}. Make room, then --resume.")
            (out / CHECKPOINT).unlink()
    if rank == 0:
        console.print(f"Your fish is in {out}. Say hello:  guppy chat --model {out}")


def _conversations(recipe: Recipe, folder: Path | None) -> tuple[list[Any], list[Any]]:
    from guppylm.datagen import dataset
    from guppylm.datagen.grammar import CharacterError, load_character

    try:
        if folder is None:
            character = load_character(recipe.data.character)
            return dataset.compose(character, recipe.data.conversations, recipe.data.seed)
        return dataset.read_jsonl(folder / "train.jsonl"), dataset.read_jsonl(folder / "held_out.jsonl")
    except CharacterError as error:
        give_up(str(error))
    except FileNotFoundError as error:
        give_up(f"{error.filename} is missing. Compose it with: guppy data --out {folder}")
    except OSError as error:
        give_up(f"Cannot read {error.filename}: {error.strerror}.")
    except ValueError as error:
        give_up(str(error))


def _watch(run: Any) -> Iterator[Any]:
    """A progress bar with loss, speed and time left; a word of the fish now and then."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from guppylm.train import sample_reply

    columns = (
        TextColumn("training  "),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[says]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=run.recipe.train.steps, completed=run.step, says="")
        for moment in run.train():
            says = f"loss {moment.loss:.2f}  {moment.tokens_per_second:,.0f} tokens/s"
            progress.update(task, completed=moment.step, says=says)
            if moment.examined is not None:
                prompt, reply = sample_reply(run)
                heard = f"hears {100 * moment.examined:3.0f} % of topics"
                progress.console.print(f"[dim]step {moment.step:>6,}  {heard}   {prompt} → [/]{escape(reply)}")
            yield moment


# -- evaluate ---------------------------------------------------------------------------------------------


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)] = "guppy-9m",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the whole page as JSON, every answer included.")
    ] = False,
    conversations: Annotated[int, typer.Option(min=1000, help="Size of the data set it is compared with.")] = 60_000,
    data_seed: Annotated[int, typer.Option(help="Seed of that data set.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the replies.")] = 0,
) -> None:
    """Examine a fish: does it listen, does it speak well, what did it learn?"""
    from rich.markdown import Markdown

    from guppylm import checkpoint
    from guppylm.datagen.grammar import CharacterError, load_character
    from guppylm.evaluate import as_markdown
    from guppylm.evaluate import evaluate as examine

    try:
        loaded = checkpoint.load(model)
        page = asyncio.run(
            examine(loaded, load_character("guppy"), conversations=conversations, data_seed=data_seed, seed=seed)
        )
    except (checkpoint.ModelError, CharacterError) as error:
        give_up(str(error))
    if as_json:
        typer.echo(json.dumps(page, indent=2, ensure_ascii=False))
    else:
        console.print(Markdown(as_markdown(page)))


# -- the hub ----------------------------------------------------------------------------------------------


@app.command()
def pull(model: Annotated[str, typer.Argument(help="owner/name, or owner/name@revision.")]) -> None:
    """Download a model folder from the hub."""
    from guppylm import hub

    if not hub.is_repository(model):
        give_up(f"'{model}' is no hub repository; write owner/name.", 2)
    try:
        typer.echo(hub.pull(model))  # a path alone, for scripts
    except hub.HubError as error:
        give_up(str(error))


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="A model folder.")],
    repository: Annotated[str, typer.Argument(help="owner/name.")],
    private: Annotated[bool, typer.Option("--private", help="Only you can see it.")] = False,
) -> None:
    """Upload a model folder to the hub."""
    from guppylm import checkpoint, hub

    try:
        checkpoint.load(folder)  # nobody should download a broken fish
        typer.echo(hub.push(folder, repository, private=private))
    except (checkpoint.ModelError, hub.HubError) as error:
        give_up(str(error))


# -- the service ------------------------------------------------------------------------------------------


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    short_help="The bots: `guppy bot invite` prints the link by which people add him on Discord.",
)
def bot(context: typer.Context) -> None:
    """`python -m bot`, by another name: a process of its own, because nothing here knows of the bots."""
    # -P: the package that is installed, not a bot.py that lies in this folder.
    os.execv(sys.executable, [sys.executable, "-P", "-m", "bot", *context.args])


if __name__ == "__main__":
    app()
