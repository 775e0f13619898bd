"""The ``specmemo`` command: the library's front door with options for arguments."""

from typing import Annotated

import typer

from specmemo_jax import __version__
from specmemo_jax.cli import batch, calibrate, chat, convert, generate, models, plan, train
from specmemo_jax.cli.failures import OneLineErrors, quiet_libraries
from specmemo_jax.cli.options import GroupedHelp

app = typer.Typer(
    name="specmemo",
    cls=OneLineErrors,
    help="Exact speculative decoding in JAX, within a memory plan.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("generate", cls=GroupedHelp, epilog=generate.EPILOG)(generate.generate)
app.command("batch", cls=GroupedHelp, epilog=batch.EPILOG)(batch.batch)
app.command("chat", cls=GroupedHelp, epilog=chat.EPILOG)(chat.chat)
app.command("plan", cls=plan.PlanCommand, epilog=plan.EPILOG)(plan.plan)
app.command("calibrate", cls=GroupedHelp, epilog=calibrate.EPILOG)(calibrate.calibrate)
app.command("train", cls=GroupedHelp, epilog=train.EPILOG)(train.train)
app.command("convert", cls=GroupedHelp, epilog=convert.EPILOG)(convert.convert)
app.command("pull", cls=GroupedHelp)(models.pull)
app.command("list", cls=GroupedHelp)(models.list_models)


def _show_version(wanted: bool) -> bool:
    if wanted:
        print(f"specmemo {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", envvar="SPECMEMO_DEBUG", help="Show tracebacks and libraries' logs.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if not debug:
        quiet_libraries()


def main() -> None:
    """Run the command line; its exit code is the process's."""
    app(prog_name="specmemo")
