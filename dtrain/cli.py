"""The commands of `dtrain` and their help; what a command needs is imported when it is run."""

import argparse
import contextlib
import gc
import inspect
import linecache
import os
import re
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from dtrain import __version__
from dtrain.config.did_you_mean import did_you_mean
from dtrain.config.errors import ConfigError, one_line, to_plain
from dtrain.distributed.environment import environment, error_file, is_main, node_name
from dtrain.distributed.exit_status import DONE, FAILED, INTERRUPTED, STOPPED_EARLY, WRONG_CONFIG
from dtrain.distributed.launched_rank import tell_torchrun
from dtrain.distributed.process import run_to_end
from dtrain.distributed.stop_request import end_at_once
from dtrain.reporting import events
from dtrain.reporting.events import OUTPUT
from dtrain.reporting.own_frames import SHOWS_ALL, warning_line
from dtrain.reporting.terminal_progress import begin_early, end_early

NEVER = 2**31 - 1  # so many younger collections come before an older one
# torchrun ends all ranks as soon as one has ended, and rank 0 may be the last to find a mistake.
MAIN_RANK_SPEAKS_SECONDS = 10.0
SAME_MISTAKE_SECONDS = 3.0  # where the user's code raised, which it may do on one rank alone


def program() -> int:
    """The program `dtrain`."""
    return run_to_end(main)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status, one of those in `dtrain.distributed.exit_status`."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0].endswith((".yaml", ".yml")):
        words.insert(0, "train")
    options = parse(words)
    if getattr(options, "traceback", False):
        os.environ[SHOWS_ALL] = "1"
    # For `modules:` of the current folder, as `python -m` has it; a job has a copy of them, and says so.
    if "PYTHONSAFEPATH" not in os.environ and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    if forms := getattr(options, "output_form", None):
        os.environ[OUTPUT] = " ".join(sorted(set(forms)))
    warnings.formatwarning = warning_line
    if "quiet" in os.environ.get(OUTPUT, "") and not sys.warnoptions:
        warnings.simplefilter("ignore")
    if not hasattr(options, "output_form"):
        return _run(options)
    if "json" not in os.environ.get(OUTPUT, ""):
        try:
            return _run(options)
        finally:
            end_early()
    events.take_stdout(speaks=is_main())
    status = _run(options)
    events.end(status)
    return status


def _run(options: argparse.Namespace) -> int:
    try:
        return int(options.run(options))
    except ConfigError as error:
        return _refuse(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # `dtrain config ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:  # a full disk, a folder of somebody else's
        if os.environ.get(SHOWS_ALL):
            raise
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        print(one_line(f"dtrain {options.command}: {what}"), file=sys.stderr)
        return FAILED


def _refuse(error: ConfigError) -> int:
    """One line per mistake, by rank 0; by each rank where there is a cause: code ran, which may fail on one alone."""
    told, prefix = "; ".join(map(str, error.mistakes)), ""
    events.note_ending(reason=told)
    if not is_main():  # where rank 0 has said the same, the launcher ends this one meanwhile
        status = DONE if error_file() else WRONG_CONFIG  # torchrun would list it as a further failure, in ten lines
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(status))
        time.sleep(MAIN_RANK_SPEAKS_SECONDS if error.__cause__ is None else SAME_MISTAKE_SECONDS)
        prefix = f"rank {environment().rank}: "
    for mistake in error.mistakes if is_main() or error.__cause__ is not None else ():
        print(f"{prefix}{mistake}", file=sys.stderr)
    tell_torchrun(told)
    return WRONG_CONFIG


class _Parser(argparse.ArgumentParser):
    """A mistake on the command line is one line on stderr and exit status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG_CONFIG, one_line(f"{self.prog}: {message} (see {self.prog} --help)") + "\n")


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The command line; argparse takes no KEY=VALUE behind an option, people write it there."""
    parser, commands = _parsers()
    if not words:  # as other tools have it
        parser.exit(WRONG_CONFIG, parser.format_help())
    words = [*words[1:], "--help"] if words[0] == "help" else _with_dashes(words)
    if words[0].startswith("-"):
        if words[0] not in (known := [*parser._option_string_actions]):
            is_of_command = any(words[0] in each._option_string_actions for each in commands.values())
            hint = "; options stand behind the command or CONFIG" if is_of_command else did_you_mean(words[0], known)
            parser.error(f"unexpected argument {words[0]!r}{hint}")
    elif words[0] not in commands:
        parser.error(f"{words[0]!r} is not a command{did_you_mean(words[0], set(commands) - HIDDEN)}")
    options, rest = parser.parse_known_args(words)
    for word in rest:
        if word.startswith("-") or not hasattr(options, "overrides"):
            known = [name for name in commands[options.command]._option_string_actions if name.startswith("--")]
            near = did_you_mean(word.partition("=")[0], known) if word.startswith("--") else ""
            near = near or _as_override(word, options)
            commands[options.command].error(f"unexpected argument {word!r}{near}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _as_override(word: str, options: argparse.Namespace) -> str:
    """`--lr=1e-3`, as other programs have it."""
    is_setting = hasattr(options, "overrides") and word.startswith("--")
    return "; settings of the config are written without dashes, such as optimizer.lr=1e-3" if is_setting else ""


def _with_dashes(words: Sequence[str]) -> list[str]:
    """--nproc_per_node as --nproc-per-node: torchrun takes both; behind a bare -- another program's words follow."""
    end = words.index("--") if "--" in words else len(words)
    options = [word.partition("=") if word.startswith("--") else (word, "", "") for word in words[:end]]
    names = [name.replace("_", "-") if name.startswith("--") else name for name, _, _ in options]
    return [name + sign + value for name, (_, sign, value) in zip(names, options, strict=True)] + list(words[end:])


def _parsers() -> tuple[_Parser, dict[str, _Parser]]:
    """The parser of `dtrain`, and those of its commands by name."""
    form = argparse.RawDescriptionHelpFormatter  # an example is one line
    parser = _Parser(
        prog="dtrain",
        usage="dtrain CONFIG [KEY=VALUE ...]\n       dtrain COMMAND ...",
        description=_overview(),
        epilog="example: torchrun --nproc_per_node=4 -m dtrain configfiles/digits.yaml",
        formatter_class=form,
    )
    parser.add_argument("-V", "--version", action="version", version=f"dtrain {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser, help=argparse.SUPPRESS)
    parsers: dict[str, _Parser] = {}
    for name, (run, arguments, example) in COMMANDS.items():
        epilog = f"example: dtrain {name} {example}"
        parsers[name] = commands.add_parser(
            name, prog=f"dtrain {name}", description=inspect.getdoc(run), epilog=epilog, formatter_class=form
        )
        parsers[name].set_defaults(run=run)
        for argument, options in arguments.items():
            parsers[name].add_argument(*argument.split(), **options)
    return parser, parsers


def _overview() -> str:
    """What `dtrain --help` says of the commands: a line for each, in groups, those that one needs first on top."""
    lines = ["Train PyTorch models from one YAML file. Without a command, CONFIG is trained."]
    grouped = {name for names in GROUPS.values() for name in names.split()}
    rest = " ".join(name for name in COMMANDS if name not in grouped | HIDDEN)
    for title, names in (GROUPS | ({"Others": rest} if rest else {})).items():
        lines += ["", f"{title}:"]
        for name in names.split():
            text = (COMMANDS[name][0].__doc__ or "").partition("\n")[0]
            lines.append(f"  {name:<{max(map(len, COMMANDS))}}  {text[:1].lower()}{text[1:].rstrip('.')}")
    return "\n".join(lines)


def _natural(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected a whole number, not {text!r}")
    return int(text)


class _Nodes(int):
    """How many nodes there are, or at most are; `fewest` is less where they may come and go."""

    fewest: int


def _nodes(text: str) -> _Nodes:
    """Of 4, or of the fewest and the most, 1:4."""
    fewest, colon, most = text.partition(":")
    nodes = _Nodes(_natural(most if colon else fewest))
    nodes.fewest = _natural(fewest)
    if colon and not 1 <= nodes.fewest <= nodes:
        raise argparse.ArgumentTypeError(f"expected the fewest nodes and the most, such as 1:4, not {text!r}")
    return nodes


def _seconds(text: str) -> float:
    if text in ("0", "0s"):
        return 0.0
    from dtrain.config.durations import seconds_of

    try:
        return seconds_of(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a time such as 30m, 1.5h or 01:30:00, not {text!r}") from None


def _positive(text: str) -> int:
    if not _natural(text):
        raise argparse.ArgumentTypeError("expected at least 1, not 0")
    return int(text)


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, not {text!r}")
    return value


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MGT])i?B?", text.strip(), re.IGNORECASE)
    if match is None or not float(match[1]):
        raise argparse.ArgumentTypeError(f"expected a size such as 80G or 512M, not {text!r}")
    return int(float(match[1]) * {"M": 1e6, "G": 1e9, "T": 1e12}[match[2].upper()])


def _sizes(text: str) -> list[int]:
    if not all(size.isdigit() and int(size) for size in text.split(",")):
        raise argparse.ArgumentTypeError(f"expected sizes with commas between them, such as 3,224,224, not {text!r}")
    return [int(size) for size in text.split(",")]


Arguments = dict[str, dict[str, Any]]  # names, and what `add_argument` takes for each
CONFIG: Arguments = {
    "config": dict(metavar="CONFIG", help="a YAML file"),
    "overrides": dict(metavar="KEY=VALUE", nargs="*", default=[], help="dotted keys, values in YAML"),
}
TRACEBACK: Arguments = {"--traceback": dict(action="store_true", help="show the whole traceback of an error")}
RUN = CONFIG | TRACEBACK
_FORM: dict[str, Any] = dict(dest="output_form", action="append_const", default=None)
OUTPUT_FORM: Arguments = {
    "--quiet -q": _FORM | dict(const="quiet", help="print the result and errors alone"),
    "--json": _FORM | dict(const="json", help="print a JSON object per event, for programs; all else goes to stderr"),
}
TRAIN = RUN | OUTPUT_FORM
DOCTOR = CONFIG | {
    "config": CONFIG["config"] | {"nargs": "?"},
    "--json": dict(action="store_true", help="print one JSON object"),
    "--preflight": dict(action="store_true", help="under srun or torchrun: name slow, broken and differing nodes"),
    "--within": dict(metavar="SECONDS", type=_positive, default=120, help="for all of --preflight (default 120)"),
    "--slow-below": dict(
        metavar="X", type=_fraction, help="slow is what is below this part of the median (default 0.7; CPUs 0.3)"
    ),
    "--note-bad-nodes": dict(action="store_true", help="write those found into bad-nodes in the run folder"),
}
CHECK = RUN | {
    "--find-lr": dict(action="store_true", help="try ever higher learning rates, suggest one, draw find-lr.png"),
    "--memory": dict(metavar="SIZE", type=_bytes, help="of a GPU, such as 80G: the largest batch that fits"),
    "--world-size": dict(metavar="N", type=_positive, help="as if on so many ranks"),
    "--all-data": dict(action="store_true", help="read every sample once, and name those that are broken"),
}
TEST = TRAIN | {
    "--checkpoint": dict(
        metavar="PATH", action="append", default=[],
        help="a checkpoint, weight file or run folder; several, or a pattern: an ensemble (default: the best)",
    ),
}  # fmt: skip
PREDICT = TEST | {
    "--output-dir": dict(metavar="DIR", help="default: predictions in the run folder"),
    "--folds": dict(metavar="DIR", help="of the folds' run folders: each predicts what it was not trained on"),
    "--overwrite": dict(action="store_true", help="replace files that were made with other settings"),
}
LAUNCH = TRAIN | {
    "--nproc-per-node": dict(metavar="N|auto", default="auto", help="ranks on this machine; auto: all GPUs, else 1"),
    "--nnodes": dict(
        metavar="N|MIN:MAX",
        type=_nodes,
        default="1",
        help="number of machines (default 1), or the fewest and the most, as 1:4",
    ),
    "--rdzv-endpoint": dict(metavar="HOST:PORT", help="where the nodes meet: one of them, and a port"),
    "--rdzv-id": dict(metavar="ID", default="dtrain", help="distinguishes jobs that meet at one endpoint"),
    "--max-restarts": dict(metavar="N", type=_natural, default=0, help="restart failed ranks from the last checkpoint"),
    "--affinity": dict(
        choices=("auto", "none"), help="ranks on the CPUs of their GPU's side (auto, the default), or wherever"
    ),
    "--spares": dict(
        metavar="N", type=_natural, default=0, help="machines more that wait, and replace those that fail"
    ),
    "--join-every": dict(
        metavar="TIME",
        type=_seconds,
        default=1800.0,
        help="a machine that comes joins at the next checkpoint, or after so long (30m)",
    ),
    "--launcher": dict(choices=("torchrun", "accelerate"), default="torchrun", help="whose settings to use"),
    "--log-dir": dict(metavar="DIR", type=Path, help="default: logs in the run folder"),
}
SWEEP = CONFIG | {
    "overrides": CONFIG["overrides"]
    | {"help": "one value, several (1e-3,1e-2 or range(2,5)) or a range to draw from (loguniform(1e-5,1e-2))"},
    "--nproc-per-node": dict(metavar="N|auto", help="ranks of each trial, as with launch (default: one process)"),
    "--jobs": dict(metavar="N", type=_natural, help="trials at once (default: as there are GPUs for, else one)"),
    "--submit": dict(action="store_true", help="as a SLURM array, as dtrain submit does, instead of here"),
    "--dry-run": dict(action="store_true", help="print each trial's command; train nothing"),
}
_NAME = dict(metavar="NAME", help="as the cluster calls it")
CLUSTER: Arguments = {  # options of submit, which stand for keys of the config's `cluster`
    "nodes": dict(metavar="N[-M]", help="number of nodes"),
    "spares": dict(metavar="N", type=_natural, help="nodes more that wait, and replace those that fail"),
    "gpus_per_node": dict(metavar="N", type=int, help="GPUs of each, and as many ranks"),
    "nproc_per_node": dict(metavar="N", type=int, help="ranks on each, if not one per GPU"),
    "cpus_per_node": dict(metavar="N", type=int, help="CPU cores of each"),
    "mem_per_node": dict(metavar="SIZE", help="memory of each, such as 64G"),
    "time": dict(metavar="LIMIT", help="such as 12:00:00, 90m, 1.5h, 1-12:00:00"),
    **dict.fromkeys(("partition", "account", "qos", "constraint"), _NAME),
    "preflight": dict(action="store_true", default=None, help="look at the nodes first, and leave bad ones out"),
    "array": dict(metavar="'KEY=VALUE ...'", action="append", help="once for each job of an array"),
}
SUBMIT = CONFIG | {f"--{key.replace('_', '-')}": options for key, options in CLUSTER.items()}
SUBMIT["--dry-run"] = dict(action="store_true", help="print the batch script; write and submit nothing")
EXPORT: Arguments = {
    "config": dict(metavar="RUN|CONFIG", help="a run folder, or a YAML file whose run folder has checkpoints"),
    "overrides": CONFIG["overrides"],
    "--checkpoint": dict(metavar="PATH", help="a checkpoint or weight file (default: the best)"),
    "--format": dict(choices=("onnx", "torch", "safetensors"), help="default: by the ending of --output, else onnx"),
    "--output": dict(metavar="FILE", help="default: model.onnx, .pt2 or .safetensors in the run folder"),
    "--input-shape": dict(metavar="N,N,...", type=_sizes, help="of one sample; default: the data are asked"),
}
RUN_FOLDER: Arguments = {"folder": dict(metavar="RUN_FOLDER", help="trainer.checkpoint_dir of the training")}
TRACKING_URI: Arguments = {
    "--tracking-uri": dict(metavar="URI", help="MLflow's store (default: MLFLOW_TRACKING_URI, else sqlite here)")
}
_ONE_RUN = dict(metavar="RUN", help="a run folder, or the id of a run in MLflow")
RUNS: Arguments = {
    "folder": dict(metavar="DIR", nargs="?", help="where to look for run folders (default: the current folder)"),
    "--tracking-uri": dict(metavar="URI", help="list the runs in this MLflow store instead"),
    "--limit": dict(metavar="N", type=_natural, default=20, help="list so many at most (default 20)"),
    "--json": dict(action="store_true", help="print one JSON list, for programs"),
}
DIFF: Arguments = {
    "run_a": _ONE_RUN | {"metavar": "A"},
    "run_b": _ONE_RUN | {"metavar": "B"},
    **TRACKING_URI,
    "--json": dict(action="store_true", help="print one JSON object, for programs"),
}
REPRODUCE: Arguments = {
    "run_name": _ONE_RUN,
    "overrides": CONFIG["overrides"] | {"help": "settings of this machine, such as device=cpu"},
    **TRACKING_URI,
    "--output": dict(metavar="DIR", help="a folder for all of it (default: beside the run, with -reproduced)"),
    "--repository": dict(metavar="PATH|URL", help="where the commit is found (default: this folder's repository)"),
    "--tolerance": dict(
        metavar="X", type=float, default=1e-5, help="relative difference that counts as the same (1e-5)"
    ),
    "--dry-run": dict(action="store_true", help="say what would be done; train nothing"),
}
REPORT: Arguments = {
    "runs": _ONE_RUN | {"nargs": "+", "help": "run folders, or ids of runs in MLflow; several are laid over another"},
    **TRACKING_URI,
    "--output": dict(metavar="FILE", help="default: report.html in the run's folder, of several runs in this one"),
}
INIT: Arguments = {
    "folder": dict(metavar="DIR", nargs="?", default=".", help="where; it may be there (default: the current folder)"),
    "--task": dict(
        choices=("classification", "segmentation", "regression"),
        default="classification",
        help="what the example learns (default: classification)",
    ),
}
COMPLETION: Arguments = {
    "shell": dict(metavar="SHELL", choices=("bash", "zsh", "fish"), help="bash, zsh or fish"),
    "words": dict(
        metavar="WORD", nargs="*", default=[], help="of a command line, for the script; the last one is begun"
    ),
}
JOB: Arguments = {
    "--run-folder": dict(metavar="DIR", type=Path, required=True, help="trainer.checkpoint_dir of the training"),
    "--requeue": dict(metavar="COMMAND", default="", help="requeues the job, where its exit status alone does not"),
    "--preflight": dict(
        metavar="WORD", action="append", default=[], help="of a command that is run first, and notes bad nodes"
    ),
    "--spares": dict(
        metavar="N", type=_natural, default=0, help="of the nodes: lost ones do not count in how the job ended"
    ),
    "--stopped-status": dict(metavar="N", type=int, default=STOPPED_EARLY, help="of a job that is to start again"),
    "step": dict(metavar="COMMAND", nargs="+", help="starts the training; takes KEY=VALUE arguments at its end"),
}


@contextlib.contextmanager
def _with_young_collections_only() -> Iterator[None]:
    """While a config is read and torch imported, which make objects by the million and hardly any garbage.

    Python would look through all of them again and again: a fifth of the time that importing torch takes. Through the
    newest 700 it still does, which takes hardly any time; without that, importing torch leaves 7 MB more.
    """
    usual = gc.get_threshold()
    gc.set_threshold(usual[0], NEVER, NEVER)
    try:
        yield
    finally:
        gc.freeze()  # until the first step is done, nobody looks through these
        gc.set_threshold(*usual)


def _import_rank(trains: bool = False) -> Any:
    """The module of what a rank does, and with it torch; `trains`: what torch imports with the first optimizer, too."""
    if is_main() and sys.stdout.isatty():
        begin_early("importing PyTorch")
    with _with_young_collections_only():
        from dtrain.launch import rank

        linecache.clearcache()  # torch has read 20,000 lines of its own sources: 2 MB for what comes next
        if trains:
            import torch._dynamo  # noqa: F401

            linecache.clearcache()
    return rank


def _train(options: argparse.Namespace) -> int:
    """Train, validate and test; resume where an earlier start ended."""
    from dtrain.tracking.start_sender import prepare_sender

    config = _checked(options, "train")
    uri = (config.get("mlflow") or {}).get("tracking_uri")
    sender = prepare_sender(uri) if is_main() else None  # it gets ready while torch is imported
    end_at_once(_say)
    return int(_import_rank(trains=True).train(config, sender))


def _launch(options: argparse.Namespace) -> int:
    """Train on all GPUs of this machine, or as one node of many."""
    from dtrain.launch.rendezvous import endpoint_of, without_stacks_of_torch

    config = _checked(options, "train")
    host, port = endpoint_of(options.rdzv_endpoint, options.nnodes + options.spares)
    end_at_once(_say)
    with without_stacks_of_torch():
        from dtrain.launch.launcher import launch

    try:
        return launch(config, options, host, port)
    except ConfigError as error:
        if is_main():
            raise
        for text in map(str, error.mistakes):  # of this node: the first one may have none
            print(f"dtrain launch: {text if node_name() in text else f'{node_name()}: {text}'}", file=sys.stderr)
        return WRONG_CONFIG


def _sweep(options: argparse.Namespace) -> int:
    """Train all combinations of values, or those that Optuna chooses.

    Each trial has a run folder of its own. Start it again to continue: what is finished is skipped.
    """
    from dtrain.launch.sweep import sweep

    return sweep(
        options.config, options.overrides, options.nproc_per_node, options.dry_run, options.jobs, options.submit
    )


def _test(options: argparse.Namespace) -> int:
    """Measure loss and metrics of a checkpoint on the test data."""
    config = _checked(options, "test")
    return int(_import_rank().test(config, options.checkpoint))


def _predict(options: argparse.Namespace) -> int:
    """Write a checkpoint's predictions into files.

    The data are those of loaders.predict, else loaders.test. Resumes where an earlier start ended.
    """
    config = _checked(options, "predict" if options.folds is None else None)
    end_at_once(_say)
    rank = _import_rank()
    return int(rank.predict(config, options.checkpoint, options.output_dir, options.overwrite, options.folds))


def _export(options: argparse.Namespace) -> int:
    """Write a trained model as an ONNX, torch.export or safetensors file.

    What an ONNX or torch.export file computes is compared with the model on one batch.
    """
    if Path(options.config).is_dir():
        options.folder = options.config
        options.config = str(_run_folder(options, "config.yaml") / "config.yaml")
        options.overrides = [*options.overrides, f"trainer.checkpoint_dir={options.folder}"]  # it may have been moved
    elif not options.config.endswith((".yaml", ".yml")):
        raise ConfigError(f"dtrain export: {options.config} is neither a run folder nor a YAML file")
    config = _checked(options, "export")
    from dtrain.launch.export import export

    return export(config, options.checkpoint, options.format, options.output, options.input_shape)


def _check(options: argparse.Namespace) -> int:
    """Build everything and try a batch of each phase; train nothing.

    Nothing is written but --find-lr's picture.
    """
    config = _checked(options, "train")
    if config.get("trackers"):
        from dtrain.launch.tracker import require_trackers

        require_trackers(config)
    from dtrain.launch import rank
    from dtrain.launch.forecast import Asked

    asked = Asked(options.memory, options.world_size, options.all_data)
    return rank.rehearse(config, asked, options.find_lr)


def _checked(options: argparse.Namespace, purpose: str | None) -> Any:
    """The config, checked before torch is imported; from now on its secrets are masked in what is printed."""
    if waits := not is_main() and error_file():  # rank 0 may be first to find a mistake, for which this one is ended
        signal.signal(signal.SIGTERM, lambda *_: os._exit(DONE))
    with _with_young_collections_only():
        from dtrain.config.check import check
        from dtrain.config.load import load_config
        from dtrain.config.signatures import SOURCE
        from dtrain.tracking.secrets import keep_secret

        config = load_config(options.config, options.overrides)
        keep_secret(to_plain(config))
        check(config, purpose)
        SOURCE.forget()
    if waits:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return config


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _config(options: argparse.Namespace) -> int:
    """Print the resolved config, with the class of each section."""
    from dtrain.config.load import notes_on, to_yaml
    from dtrain.config.optimizers import group_lines
    from dtrain.config.schema import calls
    from dtrain.config.signatures import Callee

    config = _checked(options, None)
    for line in notes_on(config):
        print(f"# {one_line(line)}")
    for name, call in calls(config).items():
        if name.endswith((".loader", ".schedule", ".folds", ".ddp", ".fsdp", ".pictures", ".swa", ".profile")):
            continue
        if name.startswith(("cluster", "sweep", "metric.", "groups.", "trainer.freeze")):
            continue  # dtrain's own keys beside a component's, and what is not part of a training
        target = call.target
        where = f"  {target.file}:{target.line}" if isinstance(target, Callee) else ""
        print(f"# {name + ':':<22} {target.module}.{target.name}{where}")
    for key, text in group_lines(config, calls(config)):
        print(f"# {key + ':':<22} {text}")
    print(to_yaml(config), end="")
    return DONE


def _init(options: argparse.Namespace) -> int:
    """Make a small project that trains as it is.

    Config, model, data, metric and test; nothing is overwritten.
    """
    from dtrain.launch.new_project import make_project

    for file in make_project(Path(options.folder), options.task):
        print(file)
    where = "" if options.folder == "." else f"cd {shlex.quote(options.folder)} && "
    print(f"next: {where}dtrain check config.yaml && dtrain train config.yaml")
    return DONE


def _schema(options: argparse.Namespace) -> int:
    """Print the JSON Schema of a config, for editors.

    With the arguments of what it names; without a config, of all that is known.
    """
    import json

    from dtrain.config.json_schema import schema_of
    from dtrain.config.load import load_config

    config = load_config(options.config, options.overrides) if options.config else None
    print(json.dumps(schema_of(config), ensure_ascii=False))
    return DONE


def _completion(options: argparse.Namespace) -> int:
    """Print the script by which a shell completes words.

    Commands, options, files, and the keys and values of the config typed already.
    """
    from dtrain.config.completion import SCRIPTS, complete

    if options.words:
        print(
            *complete(options.words, {name: command[1] for name, command in COMMANDS.items() if name != "job"}),
            sep="\n",
        )
    else:
        print(SCRIPTS[options.shell], end="")
    return DONE


def _submit(options: argparse.Namespace) -> int:
    """Train as a SLURM job, requeued until it is done.

    The job has a copy of config and code.
    """
    from dtrain.launch.submit import submit

    return submit(options.config, options.overrides, {key: getattr(options, key) for key in CLUSTER}, options.dry_run)


def _sync(options: argparse.Namespace) -> int:
    """Send to MLflow, and to the mirror, what a run has and they do not."""
    folder = _run_folder(options, "run.json")
    from dtrain.tracking.start_mirror import finish_mirror
    from dtrain.tracking.start_sender import deliver_rest

    status = deliver_rest(options.folder)
    return max(status, finish_mirror(folder))


def _replay(options: argparse.Namespace) -> int:
    """Repeat the step in which a training failed; look at its numbers.

    On one process.
    """
    from dtrain.config.load import load_config

    folder = _run_folder(options, "config.yaml")
    config = load_config(
        folder / "config.yaml", ["trainer.resume=none", "trainer.pre_trained=null", "trainer.mirror_to=null"]
    )
    from dtrain.launch import rank

    return rank.replay(config, folder)


def _runs(options: argparse.Namespace) -> int:
    """List the recent trainings with status, progress and best figure.

    Of run folders, or from MLflow.
    """
    from dtrain.launch.runs import list_runs

    return list_runs(options.folder, options.tracking_uri, options.limit, options.json)


def _diff(options: argparse.Namespace) -> int:
    """Show how two runs differ: config, code, environment, data, figures."""
    from dtrain.launch.diff import diff

    return diff(options.run_a, options.run_b, options.tracking_uri, options.json)


def _reproduce(options: argparse.Namespace) -> int:
    """Train a run again from its commit, diff, config and seed; compare.

    In a new folder; the figures are compared.
    """
    from dtrain.launch.reproduce import reproduce

    names = ("output", "repository", "tolerance", "dry_run")
    wishes = {name: getattr(options, name) for name in names}
    return reproduce(options.run_name, options.overrides, uri=options.tracking_uri, **wishes)


def _report(options: argparse.Namespace) -> int:
    """Write one HTML page about runs, which needs no server.

    Config, curves, pictures, timing, environment.
    """
    from dtrain.launch.report import report

    return report(options.runs, options.tracking_uri, options.output)


def _run_folder(options: argparse.Namespace, needed: str) -> Path:
    folder = Path(options.folder)
    if not (folder / needed).is_file():
        raise ConfigError(f"dtrain {options.command}: {folder} is not a run folder: it has no {needed}")
    return folder


def _doctor(options: argparse.Namespace) -> int:
    """Probe GPUs, network, disk, MLflow; one line each, with a fix.

    Under srun or torchrun, of all nodes. Before a big job: --preflight.
    """
    from dtrain.config.load import load_config
    from dtrain.launch.doctor import examine

    config = load_config(options.config, options.overrides) if options.config else {}
    if options.preflight:
        from dtrain.launch.preflight import Asked, preflight

        asked = Asked(options.within, options.slow_below, options.json, options.note_bad_nodes)
        os._exit(preflight(config, asked))
    os._exit(examine(config, options.json))  # a probe that hangs in the kernel would keep Python from ending


def _job(options: argparse.Namespace) -> int:
    """Run the step of a batch job; requeue the job when it was stopped early.

    Warnings of the batch system are passed on to it.
    """
    from dtrain.launch.requeue import run_job

    return run_job(
        options.run_folder, options.step, options.requeue, options.stopped_status, options.preflight, options.spares
    )


# Each command: what runs it, whose docstring is its help; its arguments; an example for its help.
COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], int], Arguments, str]] = {
    "train": (_train, TRAIN, "configfiles/digits.yaml trainer.max_epochs=3 optimizer.lr=5e-4"),
    "launch": (_launch, LAUNCH, "configfiles/digits.yaml --nproc-per-node 4 --max-restarts 3"),
    "test": (_test, TEST, "configfiles/digits.yaml --checkpoint runs/digits/checkpoints/best"),
    "predict": (_predict, PREDICT, "configfiles/digits.yaml --output-dir predictions predictor.format=csv"),
    "sweep": (_sweep, SWEEP, "configfiles/digits.yaml optimizer.lr=1e-3,1e-2 seed=0..2"),
    "export": (_export, EXPORT, "runs/digits --output digits.onnx"),
    "check": (_check, CHECK, "configfiles/digits.yaml --find-lr"),
    "config": (_config, CONFIG, "configfiles/digits.yaml optimizer.lr=5e-4"),
    "init": (_init, INIT, "my-project --task segmentation"),
    "schema": (_schema, CONFIG | {"config": DOCTOR["config"]}, "configfiles/digits.yaml > dtrain.schema.json"),
    "completion": (_completion, COMPLETION, "bash >> ~/.bashrc"),
    "submit": (_submit, SUBMIT, "configfiles/digits.yaml --nodes 2 --gpus-per-node 4 --time 12:00:00"),
    "runs": (_runs, RUNS, "runs --limit 10"),
    "diff": (_diff, DIFF, "runs/digits runs/digits-lr1e-2"),
    "reproduce": (_reproduce, REPRODUCE, "runs/digits --dry-run"),
    "report": (_report, REPORT, "runs/digits runs/digits-lr1e-2 --output report.html"),
    "sync": (_sync, RUN_FOLDER, "runs/digits"),
    "replay": (_replay, RUN_FOLDER | TRACEBACK, "runs/digits"),
    "doctor": (_doctor, DOCTOR, "configfiles/digits.yaml"),
    "job": (_job, JOB, "--run-folder runs/digits -- srun dtrain launch configfiles/digits.yaml"),
}
# The order in which `dtrain --help` shows them; one that is in no group stands at the end.
GROUPS = {
    "Start with": "train check launch test predict",
    "Before a training": "init config doctor",
    "Many trainings": "sweep submit",
    "Runs": "runs diff report reproduce export replay sync",
    "Editors and shells": "schema completion",
}
HIDDEN = {"job"}  # for scripts
