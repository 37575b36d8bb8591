"""The `ecgscale` command: one function per subcommand, nothing else."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from inspect import cleandoc
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ecgscale.errors import InputError

if TYPE_CHECKING:
    from ecgscale.data.sources import Source


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; exit code 2 and one line for what the user got wrong."""
    return run_as_command("ecgscale", _main, list(sys.argv[1:] if argv is None else argv))


def _main(arguments: list[str]) -> int:
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


# How gloo and NCCL say that another process is gone.
_LOST_RANK = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL")


def run_as_command(name: str, command: Callable[[list[str]], int], arguments: list[str]) -> int:
    """Run a command line with its errors as one line and an exit code; --debug raises them instead."""
    debug = "--debug" in arguments
    try:
        return command([argument for argument in arguments if argument != "--debug"])
    except BrokenPipeError:
        sys.stderr.close()
        return 141
    except (InputError, OSError) as error:
        if debug:
            raise
        print(f"{name}:", str(error).replace("\n", " "), file=sys.stderr)
        return 2
    except RuntimeError as error:
        if debug or not any(sign in str(error) for sign in _LOST_RANK):
            raise
        print(f"{name}: lost another rank, whose error is the one to look at (--debug shows mine)", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            f"{name}: interrupted; the same command goes on from the newest checkpoint, if any",
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
    lines += [f"  {name:<10} {(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join([*lines, "", "`ecgscale COMMAND --help` tells more; --debug shows the traceback of an error."])


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong as every other error is said: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{self.prog.removeprefix('ecgscale ')}: {message}; see `{self.prog} --help`")


def _parser(command: str, what: str | None) -> argparse.ArgumentParser:
    return OneLineParser(
        prog=f"ecgscale {command}",
        description=cleandoc(what or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _add_split_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rate-hz", type=float, default=500.0, help="sample rate of the shards (default 500)")
    parser.add_argument("--records-per-shard", type=int, default=512, help="source records per tar (default 512)")
    parser.add_argument(
        "--validation-fraction",
        type=float,
        default=0.1,
        help="share of patients for validation, by hash (default 0.1)",
    )
    parser.add_argument(
        "--test-fraction", type=float, default=0.0, help="share of patients for test, by hash (default 0)"
    )
    parser.add_argument(
        "--split-by",
        default="",
        metavar="KEY",
        help="label or metadata key that names the split, such as strat_fold",
    )
    parser.add_argument("--validation-values", default="", metavar="A,B", help="values of --split-by for validation")
    parser.add_argument("--test-values", default="", metavar="A,B", help="values of --split-by for test")
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="processes (default: all cores); bytes do not depend on it",
    )


def _run_ingest(source: Source, out: Path, options: argparse.Namespace) -> None:
    from ecgscale.data.ingest import IngestOptions, ingest

    chosen = IngestOptions(
        options.rate_hz,
        options.records_per_shard,
        options.validation_fraction,
        options.test_fraction,
        options.split_by,
        _listed(options.validation_values),
        _listed(options.test_values),
    )
    done = ingest(source, out, chosen, options.workers)
    if not done.patients_known:
        print(f"{out}: no patient ids found, so each record counts as a person of its own; see --patient-key")
    print(
        f"{out}: {done.records} records in {done.shards} shards, {done.rejected} rejected"
        + (f" (see {out / 'rejected.csv'})" if done.rejected else "")
    )


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)


def ingest(argv: list[str]) -> None:
    """A folder of WFDB records becomes tar shards with a manifest and an index."""
    parser = _parser("ingest", ingest.__doc__)
    parser.add_argument("source", type=Path, help="folder tree with .hea + .dat/.mat records")
    parser.add_argument("out", type=Path, help="folder to make; refused where it holds a data set already")
    parser.add_argument(
        "--dataset",
        help="name of the data set (default: name of the source folder); patients are (data set, id)",
    )
    parser.add_argument("--labels", type=Path, metavar="CSV", help="labels by record name; values are split at |")
    parser.add_argument("--record-column", metavar="NAME", help="column of the CSV that names the record")
    parser.add_argument(
        "--patient-key",
        metavar="KEY",
        help="CSV column or header comment that names the patient; @folder: the record's folder",
    )
    parser.add_argument(
        "--ignore-leads",
        default="",
        metavar="A,B",
        help="signals to leave out, such as vx,vy,vz; other unknown leads reject a record",
    )
    _add_split_options(parser)
    options = parser.parse_args(argv)
    from ecgscale.data.sources import WfdbFolder

    dataset = options.dataset or options.source.resolve().name
    source = WfdbFolder(
        options.source,
        dataset,
        options.labels,
        options.record_column,
        options.patient_key,
        _listed(options.ignore_leads),
    )
    _run_ingest(source, options.out, options)
    if options.labels and (without := source.unlabelled()):
        print(f"{len(without)} records have no row in {options.labels}, such as {without[0]}")


def simulate(argv: list[str]) -> None:
    """Simulated, labelled 12-lead ECGs become tar shards."""
    parser = _parser("simulate", simulate.__doc__)
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--patients", type=int, default=400, help="patients (default 400)")
    parser.add_argument("--records-per-patient", type=int, default=2, help="recordings of each (default 2)")
    parser.add_argument("--duration-s", type=float, default=10.0, help="length of a recording in seconds (default 10)")
    parser.add_argument("--noise", type=float, default=1.0, help="factor on all noise (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="equal seeds give equal bytes (default 0)")
    _add_split_options(parser)
    parser.set_defaults(test_fraction=0.2)
    options = parser.parse_args(argv)
    from ecgscale.simulate import Simulation

    source = Simulation(
        patients=options.patients,
        records_per_patient=options.records_per_patient,
        seed=options.seed,
        duration_s=options.duration_s,
        rate_hz=options.rate_hz,
        noise=options.noise,
    )
    _run_ingest(source, options.out, options)


def verify(argv: list[str]) -> None:
    """Check all counts and checksums of a data set."""
    parser = _parser("verify", verify.__doc__)
    parser.add_argument("shards", type=Path, help="folder that ingest has written")
    options = parser.parse_args(argv)
    from ecgscale.inspection import verify_dataset

    print(verify_dataset(options.shards))


def inspect(argv: list[str]) -> None:
    """Summarise a data set, or plot one of its recordings as on paper."""
    parser = _parser("inspect", inspect.__doc__)
    parser.add_argument("shards", type=Path, help="folder that ingest has written")
    parser.add_argument(
        "--plot",
        nargs=2,
        metavar=("N", "OUT.png"),
        help="draw recording number N: 12 leads, 25 mm/s, 10 mm/mV",
    )
    options = parser.parse_args(argv)
    from ecgscale import inspection

    print(
        inspection.plot_recording(options.shards, *options.plot)
        if options.plot
        else inspection.summarise(options.shards)
    )


def pretrain(argv: list[str]) -> None:
    """Pretrain an encoder without labels; goes on by itself where the run folder holds a checkpoint."""
    from ecgscale import config

    if _wants_help(argv):
        print(config.help_text(config.PretrainConfig, "pretrain"))
        return
    chosen = config.load(config.PretrainConfig, argv)
    from ecgscale.pretrain import pretrain as run

    export_folder = run(chosen)
    if _first_rank():
        print(f"export: {export_folder}")


def finetune(argv: list[str]) -> None:
    """Fine-tune a pretrained encoder on a classification task, or fit a linear probe."""
    from ecgscale import config

    if _wants_help(argv):
        print(config.help_text(config.FinetuneConfig, "finetune"))
        print("--init FOLDER is short for --init.model FOLDER. Segments and normalisation are those of the model.")
        return
    chosen = config.load(config.FinetuneConfig, ["--init.model" if a == "--init" else a for a in argv])
    from ecgscale.downstream.finetune import finetune as run

    report = run(chosen)
    if report is not None:  # the first rank's
        print(report.table())


def evaluate(argv: list[str]) -> None:
    """Score a fine-tuned model on a split of a data set, with bootstrap intervals."""
    parser = _parser("evaluate", evaluate.__doc__)
    parser.add_argument("model", type=Path, help="run folder or export of `ecgscale finetune`")
    parser.add_argument("--data.shards", dest="shards", required=True, metavar="A,B", help="data set folders")
    parser.add_argument("--split", choices=("train", "validation", "test"), default="test", help="default: test")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the report as JSON too")
    options = parser.parse_args(argv)
    from ecgscale.downstream.evaluate import evaluate as score

    print(score(options.model, list(_listed(options.shards)), options.split, options.out).table())


def export(argv: list[str]) -> None:
    """Write the newest checkpoint of a run as config.json + model.safetensors."""
    parser = _parser("export", export.__doc__)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("out", type=Path, help="folder to write")
    options = parser.parse_args(argv)
    from ecgscale.export import export_run

    print(f"export: {export_run(options.run, options.out)}")


def embed(argv: list[str]) -> None:
    """Embed recordings with a trained model.

    INPUT is a WFDB record, a folder of them, or an .npy of (leads, samples) or (records, leads, samples) in mV.
    OUTPUT.npz holds record_embedding (records, width), name (records,) and, with --tokens, tokens (records, N, width).
    """
    parser = _parser("embed", embed.__doc__)
    parser.add_argument("model", type=Path, help="run folder or export folder")
    parser.add_argument("input", type=Path, help="WFDB record, folder or .npy")
    parser.add_argument("output", type=Path, help=".npz to write")
    parser.add_argument("--tokens", action="store_true", help="keep one vector per 16 samples too")
    parser.add_argument("--rate-hz", type=float, help="sample rate of an .npy")
    parser.add_argument("--leads", metavar="I,II,...", help="leads of an .npy, in its order")
    parser.add_argument("--ignore-leads", default="", metavar="A,B", help="signals of WFDB records to leave out")
    options = parser.parse_args(argv)
    from ecgscale.embed import embed_files

    leads = _listed(options.leads) if options.leads else None
    print(
        embed_files(
            options.model,
            options.input,
            options.output,
            options.tokens,
            options.rate_hz,
            leads,
            _listed(options.ignore_leads),
        )
    )


def compare(argv: list[str]) -> None:
    """Pretrain, fine-tune and probe, beside the same from random weights; ends with one table."""
    parser = _parser("compare", compare.__doc__)
    parser.add_argument("--pretrain", type=Path, required=True, metavar="FILE", help="config of the pretraining")
    parser.add_argument("--finetune", type=Path, required=True, metavar="FILE", help="config of the task")
    parser.add_argument("--pretrain-shards", required=True, metavar="A,B", help="data sets to pretrain on")
    parser.add_argument("--task-shards", required=True, metavar="A,B", help="labelled data sets")
    parser.add_argument(
        "--run", type=Path, required=True, help="folder for the runs; finished parts are not done again"
    )
    parser.add_argument("--seeds", type=int, default=1, help="seeds of fine-tuning and of random weights (default 1)")
    options = parser.parse_args(argv)
    from ecgscale.downstream.compare import compare as run

    print(
        run(
            options.pretrain,
            options.finetune,
            _listed(options.pretrain_shards),
            _listed(options.task_shards),
            options.run,
            options.seeds,
        )
    )


def _wants_help(argv: list[str]) -> bool:
    return not argv or "-h" in argv or "--help" in argv


def _first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "ingest": ingest,
    "simulate": simulate,
    "verify": verify,
    "inspect": inspect,
    "pretrain": pretrain,
    "finetune": finetune,
    "evaluate": evaluate,
    "export": export,
    "embed": embed,
    "compare": compare,
}

if __name__ == "__main__":
    sys.exit(main())
