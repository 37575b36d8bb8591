"""The `ecgscale` command: which subcommands there are, and how errors end."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from ecgscale.commands import data, models, runs
from ecgscale.commands.command import Subcommand, Values, first_rank, of_options
from ecgscale.errors import InputError, MachineError, RankError, one_line, system_error, tells_of_lost_rank
from ecgscale.stopping import STOPPED_EXIT_CODE, Stopped

# By default threads that wait for each other keep their cores busy for milliseconds: nothing where each has a core to
# itself, but beside other programs a step then takes up to twenty times as long (docs/steps.md).
_SPINS = "1000"


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; one line and exit code 2 for what the user got wrong, 1 for what the machine did."""
    return run_as_command("ecgscale", dispatch, list(sys.argv[1:] if argv is None else argv))


def dispatch(arguments: list[str]) -> int:
    """Run the subcommand that the first argument names; errors are raised."""
    _leave_cores_to_others()
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
    elif arguments[0] == "--version":
        from ecgscale import __version__

        print(f"ecgscale {__version__}")
    elif arguments[0] not in COMMANDS:
        raise InputError(f"unknown command {arguments[0]!r}; known are {', '.join(COMMANDS)}")
    else:
        COMMANDS[arguments[0]](arguments[1:])
    return 0


def run_values(command: str, values: Values) -> int:
    """Run a subcommand with what it is given; errors are raised. The launcher's ranks begin here."""
    _leave_cores_to_others()
    COMMANDS[command].run(values)
    return 0


def _leave_cores_to_others() -> None:
    """Before torch is imported, whose threads wait for each other as this says."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)


def run_as_command(name: str, command: Callable[[list[str]], int], arguments: list[str]) -> int:
    """Run a command line with its errors as one line and an exit code; --debug raises them instead."""
    debug = "--debug" in arguments
    try:
        return command([argument for argument in arguments if argument != "--debug"])
    except BrokenPipeError:
        sys.stderr.close()
        return 141
    except (InputError, MachineError, OSError) as error:
        if debug:
            raise
        told = system_error(error) if isinstance(error, OSError) else error
        print(f"{name}:", one_line(str(told)), file=sys.stderr)
        return 2 if isinstance(told, InputError) else 1
    except Stopped as told:
        if first_rank():
            print(f"{name}: {told}; the same command goes on", file=sys.stderr)
        return STOPPED_EXIT_CODE
    except RankError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if debug or not tells_of_lost_rank(error):
            raise
        print(f"{name}: lost another rank, whose error is the one to look at (--debug shows mine)", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            f"{name}: interrupted; the same command goes on where it can",
            file=sys.stderr,
        )
        return 130


def _overview() -> str:
    lines = [
        "usage: ecgscale COMMAND ... [--debug]",
        "",
        "Pretrain ECG encoders without labels on millions of recordings.",
        "",
    ]
    lines += [f"  {name:<14} {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join([*lines, "", "`ecgscale COMMAND --help` tells more; --debug shows the traceback of an error."])


COMMANDS: dict[str, Subcommand] = {
    "ingest": of_options("ingest", data.Ingest),
    "simulate": of_options("simulate", data.Simulate),
    "index": of_options("index", data.Index),
    "verify": of_options("verify", data.Verify),
    "inspect": of_options("inspect", data.Inspect),
    "pretrain": runs.PRETRAIN,
    "finetune": runs.FINETUNE,
    "evaluate": of_options("evaluate", models.Evaluate),
    "export": of_options("export", models.Export),
    "import-fairseq": of_options("import-fairseq", models.ImportFairseq),
    "embed": of_options("embed", models.Embed),
    "reproduce": runs.REPRODUCE,
    "scaling-law": runs.SCALING_LAW,
    "plan": runs.PLAN,
    "bench": runs.BENCH,
}

if __name__ == "__main__":
    sys.exit(main())
