"""What both commands share: spelling of options, one line per error, exit codes."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from importlib import metadata

import typer
from rich.console import Console

from dit_accel.cli.parallel import processes_here
from dit_accel.errors import ConfigError, DitAccelError

EXIT_FAILURE, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

console = Console(highlight=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False, soft_wrap=True)


def dashes(arguments: Sequence[str]) -> list[str]:
    """Accept `--num_frames` for `--num-frames`: underscores in the names of options become dashes."""
    spelled = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        spelled.append(name.replace("_", "-") + equals + value if argument.startswith("--") else argument)
    return spelled


def run_app(app: typer.Typer, name: str) -> None:
    """Run a command and leave the process with 0, 1 (failure), 2 (usage) or 130 (interrupted)."""
    console.quiet = not processes_here().is_first
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal cannot show is no reason to fail
            stream.reconfigure(errors="backslashreplace")
    command = typer.main.get_command(app)
    try:
        code = command.main(args=dashes(sys.argv[1:]), prog_name=name, standalone_mode=True)
    except ConfigError as error:
        code = _fail(error, EXIT_USAGE)
    except (DitAccelError, OSError, ValueError, RuntimeError) as error:
        code = _fail(error, EXIT_FAILURE)
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    sys.exit(code)


def _fail(error: Exception, code: int) -> int:
    text = str(error).strip() or type(error).__name__
    rank = processes_here().rank  # an error may be that of one process alone
    errors.print(f"{f'process {rank}: ' if rank else ''}error: {' '.join(text.split())}", markup=False)
    return code


def version_option(value: bool) -> None:
    """Print the version and leave."""
    if value:
        console.print(metadata.version("dit_accel"))
        raise typer.Exit
