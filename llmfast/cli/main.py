"""The program ``llmfast``: its commands and how they end after a mistake."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import __version__
from ..errors import UserError
from . import ui
from .bench import bench_app
from .chat import chat_command
from .demo import demo_command
from .env import env_command
from .eval import eval_command
from .generate import generate_command
from .quantize import quantize_command
from .run import run_command
from .tune import tune_command


class _Program(TyperGroup):
    """The group of all commands. A caller's mistake ends with one line and code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(ui.INTERRUPTED) from None
        except BrokenPipeError:
            ui.discard_stdout()
            raise typer.Exit(ui.CLOSED_PIPE) from None

    def main(self, *args: Any, **kwargs: Any) -> Any:
        standalone = kwargs.get("standalone_mode", True)
        try:
            result = super().main(*args, **kwargs | {"standalone_mode": False})
        except UserError as mistake:
            ui.error(str(mistake))
            result = 2
        except Exception as mistake:
            # typer 0.15 raises click's exceptions, newer versions their own: both have these
            if not hasattr(mistake, "format_message") or not hasattr(mistake, "exit_code"):
                raise
            message = mistake.format_message().rstrip(".")
            if message:  # empty for a group without a command: its help is shown already
                command = getattr(getattr(mistake, "ctx", None), "command_path", "llmfast")
                ui.error(f"{message} (see `{command} --help`)")
            result = mistake.exit_code
        if standalone:
            sys.exit(result if isinstance(result, int) else 0)
        return result


app = typer.Typer(
    cls=_Program,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fast inference of Hugging Face language models.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"llmfast {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    ctx: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print it."),
    ] = False,
) -> None:
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


# each command's docstring is its help
app.command("generate")(generate_command)
app.command("chat")(chat_command)
app.command("run")(run_command)
app.command("env")(env_command)
app.command("demo")(demo_command)
app.command("eval")(eval_command)
app.command("quantize")(quantize_command)
app.command("tune")(tune_command)
app.add_typer(
    bench_app, name="bench", help="Measure whole models: decoding, and the engine under load."
)


def main() -> None:
    """Run the program on the command line's arguments."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal may lack a character
    app(prog_name="llmfast")
