"""The `ecgscale` command: one function per subcommand, nothing else."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from inspect import cleandoc
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

from ecgscale.data.source_options import listed
from ecgscale.errors import InputError, MachineError, RankError, one_line, system_error, tells_of_lost_rank
from ecgscale.stopping import STOPPED_EXIT_CODE, Stopped

if TYPE_CHECKING:
    from ecgscale.data.ingest import IngestOptions
    from ecgscale.data.sources import Source

Config = TypeVar("Config")

# By default threads that wait for each other keep their cores busy for milliseconds: nothing where each has a core to
# itself, but beside other programs a step then takes up to twenty times as long (docs/steps.md).
_SPINS = "1000"


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; one line and exit code 2 for what the user got wrong, 1 for what the machine did."""
    return run_as_command("ecgscale", dispatch, list(sys.argv[1:] if argv is None else argv))


def dispatch(arguments: list[str]) -> int:
    """Run the subcommand that the first argument names; errors are raised. The launcher's ranks begin here too."""
    if "OMP_WAIT_POLICY" not in os.environ:  # before torch is imported, whose threads wait for each other as this says
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
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
        if _first_rank():
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
    lines += [f"  {name:<14} {(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
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


def _add_shard_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rate-hz", type=float, default=500.0, help="sample rate of the shards (default 500)")
    parser.add_argument("--records-per-shard", type=int, default=512, help="source records per tar (default 512)")
    parser.add_argument(
        "--payload", choices=("pco", "npy"), default="pco", help="samples losslessly compressed, or plain (default pco)"
    )
    _add_split_options(parser)


def _add_split_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--validation-fraction",
        type=float,
        help="share of patients for validation, by hash (default 0.1, or 0 with --test-fraction 1)",
    )
    parser.add_argument(
        "--test-fraction",
        type=float,
        default=0.0,
        help="share of patients for test, by hash (default 0; 1: a set from elsewhere, all of it for testing)",
    )
    parser.add_argument(
        "--split-by",
        default="",
        metavar="KEY",
        help="label or metadata key that names the split, such as strat_fold",
    )
    parser.add_argument("--validation-values", default="", metavar="A,B", help="values of --split-by for validation")
    parser.add_argument("--test-values", default="", metavar="A,B", help="values of --split-by for test")


def _add_ingest_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="processes (default: all cores); bytes do not depend on it",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--part", type=_part, metavar="I/N", help="write only the shards of part I of N (1/N to N/N) and do not finish"
    )
    how.add_argument("--merge", action="store_true", help="finish the data set, when all its parts have been written")
    how.add_argument(
        "--restart", action="store_true", help="throw away what an interrupted ingest has done instead of going on"
    )
    parser.add_argument(
        "--append", action="store_true", help="add to the data set in OUT, which stays usable until this is done"
    )


def _validation_fraction(options: argparse.Namespace) -> float:
    if options.validation_fraction is not None:
        return float(options.validation_fraction)
    return 0.0 if options.test_fraction == 1 else 0.1


def _part(text: str) -> tuple[int, int]:
    i, _, n = text.partition("/")
    if not (i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n)):
        raise argparse.ArgumentTypeError(f"{text!r}: give 1/N to N/N")
    return int(i), int(n)


def _run_ingest(source: Source, out: Path, options: argparse.Namespace) -> None:
    from ecgscale.data import remarked
    from ecgscale.data.cells import told
    from ecgscale.data.copies import COPIES
    from ecgscale.data.ingest import IngestOptions, ingest, ingest_part, merge_parts

    chosen = IngestOptions(
        options.rate_hz,
        options.records_per_shard,
        options.payload,
        _validation_fraction(options),
        options.test_fraction,
        options.split_by,
        listed(options.validation_values),
        listed(options.test_values),
    )
    about = {"append": options.append, "arguments": _source_arguments(options, chosen)}
    if options.part:
        missing = ingest_part(source, out, chosen, options.part, options.workers, **about)
        what = f"{missing} shards of other parts are missing" if missing else "all shards are there, --merge finishes"
        print(f"{out}: part {'/'.join(map(str, options.part))} is done; {what}")
        return
    if options.merge:
        done = merge_parts(source, out, chosen, **about)
    else:
        done = ingest(source, out, chosen, options.workers, restart=options.restart, **about)
    if done.held:
        print(
            f"{out}: {done.held} records left out: the set has them already, by the same names and with equal samples"
        )
    for dataset, n in done.shared_ids.items():
        print(
            f"{out}: {n} patient ids occur in {dataset} too, where they count as other people, since patients are "
            f"(data set, id); if they are the same people give --dataset {dataset}"
        )
    for line in done.copies:
        print(f"{out}: {line}")
    if done.copies:
        print(f"{out}: all copies stand in {out / COPIES}")
    if done.near_ids:
        print(f"{out}: {done.near_ids}")
    if not done.patients_known:
        print(f"{out}: no patient ids found, so each record counts as a person of its own; see --patient-key")
    for line in told(done.notes, done.patients_known):
        print(f"{out}: {line}")
    for line in remarked.lines(done.remarked, done.records, f" (see {out / 'remarks.csv'})"):
        print(f"{out}: {line}")
    print(
        f"{out}: {done.records} records in {done.shards} shards, {done.rejected} rejected"
        + (f" (see {out / 'rejected.csv'})" if done.rejected else "")
    )


def _source_arguments(options: argparse.Namespace, chosen: IngestOptions) -> dict[str, str]:
    """What else the bytes of a record depend on; of a file, such as a table of labels, its content."""
    from ecgscale.files import file_sha256

    # The source itself counts by the names of its records: it may be mounted elsewhere on another machine.
    others = {"source", "out", "workers", "part", "merge", "restart", "append", *vars(chosen)}

    def content(value: object) -> str:
        if isinstance(value, list):
            return " and ".join(map(content, value))
        return f"of sha256 {file_sha256(value)}" if isinstance(value, Path) and value.is_file() else str(value)

    return {
        f"--{name.replace('_', '-')}": content(value)
        for name, value in vars(options).items()
        if name not in others and value not in (None, "", [])
    }


def ingest(argv: list[str]) -> None:
    """Recordings (WFDB, known data sets, HDF5, .npy) become tar shards with a manifest and an index."""
    from ecgscale.data.source_options import add_source_arguments, source_from

    parser = _parser("ingest", ingest.__doc__)
    add_source_arguments(parser)
    parser.add_argument("out", type=Path, help="folder to make; where it was interrupted, the same command goes on")
    _add_shard_options(parser)
    _add_ingest_options(parser)
    options = parser.parse_args(argv)
    source = source_from(options)
    from ecgscale.data.sources import implausible_unit
    from ecgscale.data.sources.listing import shared_names

    about = [source.description]
    if not options.part:  # --merge says it once for all
        about += [f"{options.source}: {line}" for line in source.left_out()]
        if options.patient_key == "@folder" and (line := shared_names(source.items())):
            about.append(f"{options.source}: {line}")
        if source.labels is not None:
            about += source.labels.remarks
    if warning := implausible_unit(source):
        about.append(f"{options.source}: {warning}")
    print("\n".join(about).encode(errors="backslashreplace").decode())  # paths may be in an old encoding
    _run_ingest(source, options.out, options)
    if source.labels is not None:
        names = " and ".join(map(str, options.labels))
        if without := source.unlabelled():
            print(f"{len(without)} records have no row in {names}, such as {without[0]}")
        for line in source.labels.coverage(source.items()):
            print(line)
        if source.labels.rows_of_none:
            print(f"{source.labels.rows_of_none} rows of {names} name no record, such as {source.labels.row_of_none}")


def simulate(argv: list[str]) -> None:
    """Simulated, labelled 12-lead ECGs become tar shards."""
    parser = _parser("simulate", simulate.__doc__)
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--patients", type=int, default=400, help="patients (default 400)")
    parser.add_argument("--records-per-patient", type=int, default=2, help="recordings of each (default 2)")
    parser.add_argument("--duration-s", type=float, default=10.0, help="length of a recording in seconds (default 10)")
    parser.add_argument("--noise", type=float, default=1.0, help="factor on all noise (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="equal seeds give equal bytes (default 0)")
    _add_shard_options(parser)
    _add_ingest_options(parser)
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


def index(argv: list[str]) -> None:
    """Tars that others wrote with the webdataset library become a data set, by an index beside them.

    A sample is KEY.npy, int16 counts (leads, samples), and KEY.json with the rate (rate_hz, fs, sampling_rate ...), the
    leads (leads, sig_name ...), the scale (mv_per_count, or gain in counts per mV or units), patient and labels.
    """
    parser = _parser("index", index.__doc__)
    parser.add_argument("folder", type=Path, help="folder of the *.tar files, which are not changed")
    parser.add_argument("--dataset", default="", help="name of the data set (default: name of the folder)")
    parser.add_argument("--rate-hz", type=float, help="sample rate, where the JSON does not say it")
    parser.add_argument(
        "--leads", default="", metavar="I,II,...", help="rows of the arrays, where the JSON does not (default: the 12)"
    )
    parser.add_argument("--rename-leads", default="", metavar="DI=I,DII=II", help="leads that the JSON calls otherwise")
    parser.add_argument("--mv-per-count", type=float, help="millivolts per count, where the JSON does not say it")
    parser.add_argument("--patient-key", default="", metavar="KEY", help="JSON key that names the patient")
    parser.add_argument("--label-keys", default="", metavar="A,B", help="JSON keys that are labels, beside `labels`")
    parser.add_argument(
        "--label-columns",
        action="append",
        default=[],
        metavar="NAME=A,B,C",
        help="JSON keys of flags that are the classes of one label NAME (default: labels)",
    )
    parser.add_argument("--signal-ext", default="npy", help="extension of the arrays, such as ecg.npy (default npy)")
    parser.add_argument("--meta-ext", default="json", help="extension of the JSON (default json)")
    _add_split_options(parser)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    options = parser.parse_args(argv)
    from ecgscale.data import remarked
    from ecgscale.data.cells import told
    from ecgscale.data.copies import about_copies
    from ecgscale.data.foreign import Rules
    from ecgscale.data.indexing import index_folder
    from ecgscale.data.ingest.options import IngestOptions
    from ecgscale.data.persons import near_ids
    from ecgscale.data.shard_set import ShardSet

    rules = Rules(
        rate_hz=options.rate_hz,
        leads=listed(options.leads),
        mv_per_count=options.mv_per_count,
        patient_key=options.patient_key,
        label_keys=listed(options.label_keys),
        label_columns=tuple(options.label_columns),
        signal_ext=options.signal_ext.lstrip(".").lower(),
        meta_ext=options.meta_ext.lstrip(".").lower(),
        rename_leads=listed(options.rename_leads),
    )
    splits = IngestOptions(
        validation_fraction=_validation_fraction(options),
        test_fraction=options.test_fraction,
        split_by=options.split_by,
        validation_values=listed(options.validation_values),
        test_values=listed(options.test_values),
    )
    done = index_folder(options.folder, rules, splits, options.dataset, options.workers)
    shards = ShardSet.open(options.folder)
    for line in filter(None, (*about_copies(shards), near_ids(shards))):
        print(f"{options.folder}: {line}")
    if not done.patients_known:
        print(f"{options.folder}: no patient ids found, so each record is a person of its own; see --patient-key")
    for line in told(done.notes, done.patients_known):
        print(f"{options.folder}: {line}")
    for line in remarked.lines(done.remarked, done.records):
        print(f"{options.folder}: {line}")
    print(f"{options.folder}: {done.records} records at {done.rate_hz:g} Hz in {done.shards} tars")


def verify(argv: list[str]) -> None:
    """Check all counts and checksums of a data set."""
    parser = _parser("verify", verify.__doc__)
    parser.add_argument("shards", help="folder or URL that ingest has written")
    options = parser.parse_args(argv)
    from ecgscale.inspection import verify_dataset

    print(verify_dataset(options.shards))


def inspect(argv: list[str]) -> None:
    """Summarise a data set or a model, or plot one recording of a data set as on paper."""
    parser = _parser("inspect", inspect.__doc__)
    parser.add_argument("folder", help="folder or URL that ingest has written, run folder or export folder")
    parser.add_argument(
        "--plot",
        nargs=2,
        metavar=("N", "OUT.png"),
        help="draw recording number N: 12 leads, 25 mm/s, 10 mm/mV",
    )
    options = parser.parse_args(argv)
    from ecgscale import inspection

    print(
        inspection.plot_recording(options.folder, *options.plot)
        if options.plot
        else inspection.summarise(options.folder)
    )


def pretrain(argv: list[str]) -> None:
    """Pretrain an encoder without labels; goes on by itself where the run folder holds a checkpoint."""
    from ecgscale import config

    if _wants_help(argv):
        print(config.help_text(config.PretrainConfig, "pretrain"))
        print("--init FOLDER is short for --init.model FOLDER. Shape, segments and normalisation are the model's.")
        return
    chosen = config.load(config.PretrainConfig, argv)
    from ecgscale.pretrain import pretrain as run

    export_folder = run(chosen)
    if _first_rank():
        print(f"export: {export_folder}")


def finetune(argv: list[str]) -> None:
    """Fine-tune a pretrained encoder on a downstream task, or fit a probe; scored on the test split."""
    from ecgscale import config

    if _wants_help(argv):
        print(config.help_text(config.FinetuneConfig, "finetune"))
        print("--init FOLDER is short for --init.model FOLDER. Segments and normalisation are those of the model.")
        return
    chosen = config.load(config.FinetuneConfig, argv)
    from ecgscale.downstream.evaluate import table
    from ecgscale.downstream.finetune import finetune as run

    scored = run(chosen)
    if scored is not None:  # the first rank's
        print(table(scored))


def evaluate(argv: list[str]) -> None:
    """Score a fine-tuned model on a split of a data set, with bootstrap intervals, by one lead set or many.

    `--leads 12 6 4 3 2 1` scores it on each lead set of the CinC 2021 challenge, the other leads masked.
    """
    parser = _parser("evaluate", evaluate.__doc__)
    parser.add_argument("model", type=Path, help="run folder or export of `ecgscale finetune`")
    parser.add_argument("--data.shards", dest="shards", required=True, metavar="A,B", help="data set folders")
    parser.add_argument("--split", choices=("train", "validation", "test"), default="test", help="default: test")
    parser.add_argument(
        "--leads",
        nargs="+",
        default=[],
        metavar="SET",
        help="lead sets: sizes of the challenge's or lists such as I,II,V5 (default: as it was fine-tuned)",
    )
    parser.add_argument(
        "--min-record-s",
        type=float,
        metavar="S",
        help="leave out shorter recordings, and count them (default: task.min_scored_s, usually 0: none)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the report as JSON too")
    options = parser.parse_args(argv)
    from ecgscale.downstream.evaluate import evaluate as score
    from ecgscale.downstream.evaluate import table

    lead_sets = [listed(leads) for leads in options.leads]
    shards = list(listed(options.shards))
    print(table(score(options.model, shards, options.split, lead_sets, options.out, options.min_record_s)))


def export(argv: list[str]) -> None:
    """Write the newest checkpoint of a run, or an export, for ecgscale, fairseq-signals or ONNX.

    safetensors is a folder with config.json + model.safetensors, which all commands take. fairseq is a .pt file in the
    layout of fairseq-signals, of models with the conv stem. onnx is an .onnx file that takes millivolts (batch, 12,
    samples), missing leads zero, and is checked in onnxruntime before it is written. It takes one window: cut
    recordings into windows of the profile's length and rate, as `ecgscale embed` does, and average what comes out.
    """
    from ecgscale.interop.formats import FORMATS, export_as

    parser = _parser("export", export.__doc__)
    parser.add_argument("run", type=Path, help="run folder or export folder")
    parser.add_argument("out", type=Path, help="folder, .pt or .onnx file to write")
    parser.add_argument("--format", choices=FORMATS, help="default: by the ending of OUT, else safetensors")
    options = parser.parse_args(argv)
    by_ending = {".pt": "fairseq", ".onnx": "onnx"}.get(options.out.suffix, "safetensors")
    print(export_as(options.run, options.out, options.format or by_ending))


def import_fairseq(argv: list[str]) -> None:
    """Turn a checkpoint of fairseq-signals into an export: pretrained or fine-tuned, any size.

    Every tensor is accounted for by its name; code in the file is not run. The profile is the preprocessing that the
    weights were trained with: the wrong one fails silently.
    """
    parser = _parser("import-fairseq", import_fairseq.__doc__)
    parser.add_argument("checkpoint", type=Path, help=".pt file")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument(
        "--profile",
        metavar="NAME",
        help="mv-500hz (Oh et al. 2022), zscore-500hz (ECG-FM: each lead z-scored over the recording) or mv-250hz, all "
        "of 5 s segments (default: by the checkpoint's cfg.task.normalize)",
    )
    parser.add_argument("--classes", default="", metavar="A,B,...", help="names of a classification head's classes")
    options = parser.parse_args(argv)
    from ecgscale.interop.fairseq import import_checkpoint

    print(import_checkpoint(options.checkpoint, options.out, options.profile, tuple(listed(options.classes))))


def embed(argv: list[str]) -> None:
    """Embed recordings with a trained model.

    INPUT is a WFDB record, a folder of them, a data set of `ecgscale ingest`, or an .npy of (leads, samples) or
    (records, leads, samples), floats in mV unless --unit says otherwise. Its numbers are checked as `ecgscale ingest`
    checks them. OUTPUT.npz holds record_embedding (records, width), name (records,), with --tokens tokens
    (records, N, width), of a data set split (records,), and where some have no embedding rejected, the reasons.
    """
    parser = _parser("embed", embed.__doc__)
    parser.add_argument("model", type=Path, help="run folder or export folder")
    parser.add_argument("input", type=Path, help="WFDB record, folder of them, data set or .npy")
    parser.add_argument("output", type=Path, help=".npz to write")
    parser.add_argument("--tokens", action="store_true", help="keep one vector per 16 samples too")
    parser.add_argument("--rate-hz", type=float, help="sample rate of an .npy")
    parser.add_argument("--leads", metavar="I,II,...", help="leads of an .npy, in its order")
    parser.add_argument("--ignore-leads", default="", metavar="A,B", help="signals of WFDB records to leave out")
    parser.add_argument(
        "--rename-leads", default="", metavar="A=I,B=II", help="leads that WFDB records or --leads call otherwise"
    )
    parser.add_argument("--unit", help="of floats in an .npy: V, mV (default) or uV, or a multiple such as 0.5mV")
    parser.add_argument("--mv-per-count", type=float, help="millivolts per count of integers in an .npy")
    options = parser.parse_args(argv)
    from ecgscale.embed import embed_files
    from ecgscale.lead_names import parse_renames

    leads = listed(options.leads) if options.leads else None
    print(
        embed_files(
            options.model,
            options.input,
            options.output,
            options.tokens,
            options.rate_hz,
            leads,
            listed(options.ignore_leads),
            parse_renames(listed(options.rename_leads)),
            options.unit,
            options.mv_per_count,
        )
    )


def reproduce(argv: list[str]) -> None:
    """Compare pretraining methods: methods x tasks x protocols x label fractions x seeds x lead sets, in one table.

    CONFIG.yaml says which; random weights always stand beside. What is finished is not done again. Over many jobs:
    --part 1/N to N/N side by side, then the same command with --merge.
    """
    from ecgscale.downstream.comparison import ReproduceConfig
    from ecgscale.downstream.reproduce import merge, plan, work

    _study("reproduce", argv, ReproduceConfig, plan, work, merge)


def scaling_law(argv: list[str]) -> None:
    """Pretrain a ladder of sizes x tokens, fit L = E + A/N^alpha + B/D^beta, predict the next size.

    CONFIG.yaml says which. What is finished is not done again. Over many jobs: --part 1/N to N/N side by side, then the
    same command with --merge.
    """
    from ecgscale.scaling.ladder import ScalingConfig, plan, work
    from ecgscale.scaling.report import merge

    _study("scaling-law", argv, ScalingConfig, plan, work, merge)


def _study(
    command: str,
    argv: list[str],
    config_type: type[Config],
    plan: Callable[[Config], str],
    work: Callable[[Config, tuple[int, int]], str],
    merge: Callable[[Config], str],
) -> None:
    """A command that does many runs: all of them or a part, then its table."""
    from ecgscale import config

    parser = OneLineParser(prog=f"ecgscale {command}", add_help=False, allow_abbrev=False)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--part", type=_part, default=(1, 1))
    how.add_argument("--merge", action="store_true")
    how.add_argument("--dry-run", action="store_true")
    if _wants_help(argv):
        print(config.help_text(config_type, command))
        print("  CONFIG.yaml is short for --config CONFIG.yaml\n  --part I/N   do only part I of N, and write no table")
        print("  --merge      write the table, when all parts are done\n  --dry-run    only list what is to be done")
        return
    options, rest = parser.parse_known_args(argv)
    if rest and not rest[0].startswith("-"):
        rest = ["--config", *rest]
    chosen = config.load(config_type, rest)
    if options.dry_run:
        print(plan(chosen))
        return
    said = "" if options.merge else work(chosen, options.part)
    if not _first_rank():
        return
    if said:
        print(said)
    if options.merge or options.part[1] == 1:
        print(merge(chosen))


def plan(argv: list[str]) -> None:
    """Say what a pretraining run needs and how long it takes: memory, time, energy, failures; recommend a config."""
    from ecgscale import config
    from ecgscale.plan.command import check, run
    from ecgscale.plan.config import PlanConfig

    if _wants_help(argv):
        print(config.help_text(PlanConfig, "plan"))
        print("  --out FILE.yaml  write the recommended config, for `ecgscale pretrain --config`")
        print("  --json           for programs: seconds, bytes, FLOP/s")
        print("  --measure        plan for this machine, with rates that are measured in half a minute")
        print("  --check          hold predictions against real steps on this machine, in minutes; takes no other key")
        return
    parser = OneLineParser(prog="ecgscale plan", add_help=False, allow_abbrev=False)
    parser.add_argument("--out", type=Path)
    for name in ("json", "measure", "check"):
        parser.add_argument(f"--{name}", action="store_true")
    options, rest = parser.parse_known_args(argv)
    if options.check:
        unwanted = [f"--{name}" for name in ("out", "measure") if getattr(options, name)]
        print(check([*unwanted, *rest], options.json))
        return
    print(run(config.load(PlanConfig, rest), options.out, options.json, options.measure))


def bench(argv: list[str]) -> None:
    """Measure steps of training, scaling, the stream and kernels beside honest baselines, and report on results."""
    from ecgscale.bench.command import add_parts

    parser = _parser("bench", bench.__doc__)
    add_parts(parser.add_subparsers(dest="part", required=True, metavar="PART"))
    options, keys = parser.parse_known_args(argv)
    options.run(options, keys)


def _wants_help(argv: list[str]) -> bool:
    return not argv or "-h" in argv or "--help" in argv


def _first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "ingest": ingest,
    "simulate": simulate,
    "index": index,
    "verify": verify,
    "inspect": inspect,
    "pretrain": pretrain,
    "finetune": finetune,
    "evaluate": evaluate,
    "export": export,
    "import-fairseq": import_fairseq,
    "embed": embed,
    "reproduce": reproduce,
    "scaling-law": scaling_law,
    "plan": plan,
    "bench": bench,
}

if __name__ == "__main__":
    sys.exit(main())
