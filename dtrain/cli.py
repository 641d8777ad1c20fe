"""The commands and their help. Imports torch only where a command needs it; knows what is asked, not how it is done."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from dtrain import __version__
from dtrain.config.errors import ConfigError, one_line
from dtrain.distributed.exit_status import INTERRUPTED
from dtrain.distributed.process import run_to_end
from dtrain.distributed.stop import end_at_once
from dtrain.launch import launcher

USAGE = 2
MAIN_SPEAKS_SECONDS = (
    10.0  # torchrun ends all ranks as soon as one has ended, and the main one may be the last to see it
)

EXAMPLES = {
    "train": "dtrain train configfiles/digits.yaml trainer.max_epochs=3 optimizer.lr=5e-4",
    "launch": "dtrain launch configfiles/digits.yaml --nproc-per-node 4 --max-restarts 3",
    "test": "dtrain test configfiles/digits.yaml --checkpoint runs/digits/checkpoints/best",
    "predict": "dtrain predict configfiles/digits.yaml --output-dir predictions predictor.format=csv",
    "check": "dtrain check configfiles/digits.yaml",
    "config": "dtrain config configfiles/digits.yaml optimizer.lr=5e-4",
    "submit": "dtrain submit configfiles/digits.yaml --nodes 2 --gpus-per-node 4 --time 12:00:00",
    "sync": "dtrain sync runs/digits",
    "replay": "dtrain replay runs/digits",
    "doctor": "dtrain doctor configfiles/digits.yaml",
}
HELP = {
    "train": "train, validate, test; go on where an earlier start ended",
    "launch": "train on several ranks of this machine, or as one node of many",
    "test": "loss and metrics of a checkpoint on the test data",
    "predict": "predict the data of loaders.predict, else loaders.test, into files; go on where an earlier start ended",
    "check": "build everything and try one batch of each phase; train nothing, write nothing",
    "config": "print the resolved config, with the class of each section",
    "submit": "train as a SLURM job, with a copy of config and code; requeued until it is done",
    "sync": "send what a run's journal holds and MLflow has not to MLflow",
    "replay": "repeat the step in which a training failed, on one process, and look at every number",
    "doctor": "probe versions, GPUs, network, disk, MLflow and, under srun, all nodes; one line each, with the cure",
}

CLUSTER = {  # options of submit, which stand for keys of the config's `cluster`
    "nodes": ("N[-M]", "how many nodes"),
    "gpus_per_node": ("N", "GPUs of each, and as many ranks"),
    "nproc_per_node": ("N", "ranks on each, if not one per GPU"),
    "cpus_per_node": ("N", "processors of each"),
    "mem_per_node": ("SIZE", "memory of each, such as 64G"),
    "time": ("LIMIT", "such as 12:00:00, 90m, 1.5h, 1-12:00:00"),
    **dict.fromkeys(("partition", "account", "qos", "constraint"), ("NAME", "as the cluster calls it")),
    "array": ("'KEY=VALUE ...'", "once for each job of an array"),
}


class _Parser(argparse.ArgumentParser):
    """A mistake on the command line is one line on stderr and exit status 2; the example in a help is one line, too."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        print(one_line(f"{self.prog}: {message} (see {self.prog} --help)"), file=sys.stderr)
        sys.exit(USAGE)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="dtrain",
        description="Train PyTorch models from one YAML file. A first argument ending in .yaml or .yml means 'train'.",
        epilog="example: torchrun --nproc_per_node=4 -m dtrain configfiles/digits.yaml",
    )
    parser.add_argument("--version", action="version", version=f"dtrain {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    for name, text in HELP.items():
        command = commands.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", epilog=f"example: {EXAMPLES[name]}"
        )
        if name in ("sync", "replay"):
            command.add_argument("folder", metavar="RUN_FOLDER", help="what trainer.checkpoint_dir named")
            continue
        optional: dict[str, Any] = {"nargs": "?"} if name == "doctor" else {}
        command.add_argument("config", metavar="CONFIG", help="a YAML file", **optional)
        command.add_argument(
            "overrides", metavar="KEY=VALUE", nargs="*", default=[], help="dotted keys, values in YAML"
        )
        if name == "launch":
            launcher.add_options(command)
        if name == "submit":
            _submit_options(command)
        if name in ("test", "predict"):
            command.add_argument("--checkpoint", metavar="PATH", help="a checkpoint or weight file (default: the best)")
        if name == "doctor":
            command.add_argument("--json", action="store_true", help="print one JSON object")
        if name == "predict":
            command.add_argument("--output-dir", metavar="DIR", help="default: predictions in the run folder")
            command.add_argument("--overwrite", action="store_true", help="make files anew that were made otherwise")
    return parser


def _submit_options(command: argparse.ArgumentParser) -> None:
    for key, (metavar, text) in CLUSTER.items():
        more: dict[str, Any] = {"type": int} if metavar == "N" else {"action": "append"} if key == "array" else {}
        command.add_argument(f"--{key.replace('_', '-')}", dest=f"cluster.{key}", metavar=metavar, help=text, **more)
    command.add_argument("--dry-run", action="store_true", help="print the batch script; write and submit nothing")


def program() -> int:
    """The program `dtrain`."""
    return run_to_end(main)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status: 0 done, 1 failed while running, 2 config or command line wrong, 75 stopped early.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0].endswith((".yaml", ".yml")):
        words.insert(0, "train")
    options = _options(words)
    # For `modules:` of the current folder, as `python -m` has it; a job has a copy of them, and says so.
    if "PYTHONSAFEPATH" not in os.environ and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        special = {
            "config": _config, "launch": launcher.launch, "sync": _sync, "replay": _replay, "submit": _submit,
            "doctor": _doctor,
        }  # fmt: skip
        return special.get(options.command, _work)(options)
    except ConfigError as error:
        return _refuse(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # `dtrain config ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _options(words: Sequence[str]) -> argparse.Namespace:
    """The command line; argparse takes no KEY=VALUE behind an option, people write it there."""
    parser = _parser()
    options, rest = parser.parse_known_args(words)
    strange = rest if not hasattr(options, "overrides") else [word for word in rest if word.startswith("-")]
    if strange:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _refuse(error: ConfigError) -> int:
    """One line per mistake, once, whatever the number of ranks.

    What has a cause was raised by code that ran, and that may go wrong on one rank alone: then each rank speaks.
    """
    from dtrain.distributed.environment import environment, is_main

    if is_main() or error.__cause__ is not None:
        prefix = "" if is_main() else f"rank {environment().rank}: "
        for mistake in error.mistakes:
            print(f"{prefix}{mistake}", file=sys.stderr)
    else:
        time.sleep(MAIN_SPEAKS_SECONDS)
    return USAGE


def _work(options: argparse.Namespace) -> int:
    """The commands that need torch; the config is checked before it is imported."""
    from dtrain.config.check import check
    from dtrain.config.errors import to_plain
    from dtrain.config.load import load_config
    from dtrain.tracking.secrets import keep_secret

    config = load_config(options.config, options.overrides)
    keep_secret(to_plain(config))
    check(config, options.command if options.command in ("test", "predict") else "train")
    sender = _sender(config) if options.command == "train" else None
    if options.command in ("train", "predict"):
        end_at_once(lambda line: print(line, file=sys.stderr, flush=True))
    from dtrain.launch import rank as worker

    if options.command == "train":
        return worker.train(config, sender)
    if options.command == "check":
        return worker.rehearse(config)
    if options.command == "predict":
        return worker.predict(config, options.checkpoint, options.output_dir, options.overwrite)
    return worker.test(config, options.checkpoint)


def _sender(config: Any) -> Any:
    """Rank 0's link to MLflow, which gets ready while torch is imported."""
    from dtrain.distributed.environment import is_main
    from dtrain.tracking.start_sender import prepare_sender

    return prepare_sender((config.get("mlflow") or {}).get("tracking_uri")) if is_main() else None


def _config(options: argparse.Namespace) -> int:
    from dtrain.config.check import check
    from dtrain.config.load import load_config, notes_on, to_yaml
    from dtrain.config.resolve import locate
    from dtrain.config.schema import calls
    from dtrain.config.signatures import Callee

    config = load_config(options.config, options.overrides)
    check(config, purpose=None)
    for line in notes_on(config):
        print(f"# {one_line(line)}")
    for name, call in calls(config).items():
        if name.endswith((".loader", ".schedule", ".ddp", ".fsdp", ".pictures")) or name == "cluster":
            continue  # dtrain's own keys beside a component's, and what is no part of a training
        target = locate(config, call).target
        where = f"  {target.file}:{target.line}" if isinstance(target, Callee) else ""
        print(f"# {name + ':':<22} {target.module}.{target.name}{where}")
    print(to_yaml(config), end="")
    return 0


def _submit(options: argparse.Namespace) -> int:
    from dtrain.launch.submit import submit

    given = {key[8:]: value for key, value in vars(options).items() if key.startswith("cluster.")}
    return submit(options.config, options.overrides, given, options.dry_run)


def _replay(options: argparse.Namespace) -> int:
    from dtrain.config.load import load_config
    from dtrain.tracking.run_folder import RunFolder

    folder = Path(options.folder)
    if not RunFolder(folder).config.is_file():
        print(f"dtrain replay: {folder} is no run folder: it has no config.yaml", file=sys.stderr)
        return USAGE
    config = load_config(RunFolder(folder).config, ["trainer.resume=none", "trainer.pre_trained=null"])
    from dtrain.launch import rank as worker

    return worker.replay(config, folder)


def _doctor(options: argparse.Namespace) -> int:
    from dtrain.config.load import load_config
    from dtrain.launch.doctor import examine

    config = load_config(options.config, options.overrides) if options.config else {}
    status = examine(config, print, options.json)
    sys.stdout.flush()
    os._exit(status)  # a probe that hangs in the kernel would keep Python from ending


def _sync(options: argparse.Namespace) -> int:
    from dtrain.tracking.run_folder import RunFolder

    if not RunFolder(options.folder).run.is_file():
        print(f"dtrain sync: {options.folder} is no run folder: it has no run.json", file=sys.stderr)
        return USAGE
    from dtrain.tracking.start_sender import deliver_rest

    return deliver_rest(options.folder)
