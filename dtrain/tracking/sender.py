"""The process that feeds MLflow from a run's journal: `python -m dtrain.tracking.sender`."""

import argparse
import contextlib
import gc
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from filelock import Timeout

from dtrain.tracking import mlflow_store
from dtrain.tracking.delivery import HOPELESS, Delivery, follow
from dtrain.tracking.environment import capture_environment
from dtrain.tracking.git_state import capture_code
from dtrain.tracking.outage import Outage
from dtrain.tracking.retry import PATIENCE_SECONDS
from dtrain.tracking.run_folder import RunFolder, close_run_of, is_dead, locked_file, read_run
from dtrain.tracking.secrets import Redacted, redact
from dtrain.tracking.system_metrics import SystemMetrics
from dtrain.tracking.tracker_processes import TrackerProcesses, problems
from dtrain.tracking.uri import resolve_tracking_uri

_log = logging.getLogger(__name__)
# While it gets ready, so do the ranks: what it has not done when they begin, costs them steps.
_NICENESS_AT_FIRST, _NICENESS = 10, 19
_NEVER = 2**31 - 1  # so many younger collections come before an older one
_STDIN = 0  # rank 0's pipe: the command line, and later what the disk does not take


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns 0 when all is delivered or found, else 1; 2 where another start would not help either."""
    prog = "python -m dtrain.tracking.sender"
    parser = argparse.ArgumentParser(prog=prog, description="Feeds MLflow from a run's journal.")
    parser.add_argument("folder", nargs="?", type=Path, metavar="RUN_FOLDER")
    parser.add_argument("--parent", type=int, metavar="PID", help="rank 0, whose journal is followed until it ends")
    parser.add_argument("--no-system-metrics", action="store_true")
    parser.add_argument("--tracking-uri", metavar="URI", help="default: run.json's, else MLFLOW_TRACKING_URI")
    parser.add_argument("--wait", action="store_true", help="get ready, then read the command line from stdin, as JSON")
    parser.add_argument("--find", metavar="RUN_ID", help="print what MLflow knows of a run, as one JSON line")
    parser.add_argument("--probe", metavar="EXPERIMENT", help="print whether MLflow can be written to, as JSON")
    options = parser.parse_args(arguments)
    os.environ.update(mlflow_store.CLIENT_SETTINGS)
    with contextlib.redirect_stderr(Redacted(sys.stderr)), contextlib.redirect_stdout(Redacted(sys.stdout)):
        logging.basicConfig(format="%(asctime)s %(message)s")
        if options.wait:
            return _wait_for_a_run(resolve_tracking_uri(options.tracking_uri))
        try:
            if options.find or options.probe:
                uri = resolve_tracking_uri(options.tracking_uri)
                ask = mlflow_store.find if options.find else mlflow_store.probe
                answer = ask(options.find or options.probe, uri)
                print(json.dumps(answer))
                return 1 if "error" in answer else 0
            if options.folder is None or not RunFolder(options.folder).journal.is_file():
                parser.error(f"a run folder is needed, with a metrics.jsonl in it; found {options.folder}")
            folder = options.folder.absolute()
            uri = _uri_of(folder, options.tracking_uri)
        except ValueError as error:
            parser.error(str(error))
        if options.parent is None:
            return _deliver_rest(folder, uri)
        return _feed(folder, options.parent, uri, not options.no_system_metrics)


def _uri_of(folder: Path, given: str | None) -> str:
    """The tracking URI: the one given, else run.json's; one with a password in it is only in the environment."""
    known = str(read_run(folder).get("tracking_uri") or "")
    if "***" in known and not given and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise ValueError(f"{known} had a password, which is stored nowhere: give --tracking-uri or MLFLOW_TRACKING_URI")
    return resolve_tracking_uri(given or (known if "***" not in known else None))


def _wait_for_a_run(uri: str) -> int:
    """The sender of a training that is still being built: does what takes long, then what stdin says, if it does."""
    _run_in_background(_NICENESS_AT_FIRST)
    usual = gc.get_threshold()
    gc.set_threshold(usual[0], _NEVER, _NEVER)  # looking through all that is imported is a fifth of what this costs
    with contextlib.suppress(Exception):  # it shows again, and is reported, when there is a run
        mlflow_store.system_monitor(uri)  # imports mlflow with its system metrics, and makes the store
    gc.freeze()
    gc.set_threshold(*usual)
    with open(_STDIN, "rb", buffering=0, closefd=False) as pipe:  # without a buffer: more may follow
        line = pipe.readline()
    if not line:
        return 0
    arguments = json.loads(line)
    return main(arguments)


def _only_log(folder: Path) -> int:
    """From now on all output goes into the run folder's log; returns what was stdout, at whose end rank 0 listens."""
    rank_0 = os.dup(1)
    log = os.open(RunFolder(folder).sender_log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for output in (1, 2):
        os.dup2(log, output)
    return rank_0


def _run_in_background(niceness: int) -> None:
    """Leave the processor to the ranks, and stay alive where a batch system signals every process of a job to end."""
    os.nice(max(0, niceness - os.nice(0)))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _feed(folder: Path, parent: int, uri: str, system_metrics: bool) -> int:
    """The sender of a training that runs."""
    rank_0 = _only_log(folder)
    facts = read_run(folder)
    _run_in_background(_NICENESS if facts["state"] == "RUNNING" else 0)  # of a run that has ended, rank 0 waits for it
    code = RunFolder(folder).code(facts["attempt"])
    code_tags = capture_code(code)  # first of all, before anybody edits a file
    environment = RunFolder(folder).environment(facts["attempt"])
    try:
        code_tags |= capture_environment(environment)
    except OSError as error:
        _log.warning("the environment is not recorded: %s", error)
    trackers = TrackerProcesses(folder)
    system = None
    if system_metrics:
        try:
            since = facts["started"], folder, facts.get("attempt_started", 0.0)
            system = SystemMetrics(mlflow_store.system_monitor(uri), *since)
        except Exception as error:
            _log.warning("no system metrics: %s", mlflow_store.describe_error(error))
    with contextlib.suppress(ImportError):  # it shows again, and is reported
        mlflow_store.get_ready()
    outage = Outage(uri, rank_0)  # whose clock starts now
    # The sender of a rank 0 that exited may still deliver the rest.
    with locked_file(RunFolder(folder).sender_lock, 2 * PATIENCE_SECONDS):
        delivery = Delivery(folder, mlflow_store.MlflowStore(uri), system, outage)
        delivery.begin(code_tags, *(str(each.relative_to(folder)) for each in (code, environment)))
        exit_status = follow(delivery, parent, pipe=_STDIN)
    if exit_status == HOPELESS:
        trackers.follow(parent)
    trackers.finish()
    return exit_status


def _deliver_rest(folder: Path, uri: str) -> int:
    """`dtrain sync`: sends what is left of a run that nobody writes any more."""
    try:
        with locked_file(RunFolder(folder).sender_lock, 5):
            facts = read_run(folder)
            if facts.get("state") == "RUNNING" and is_dead(folder, facts):
                close_run_of(folder, facts["pid"])
            trackers = TrackerProcesses(folder)
            delivery = Delivery(folder, mlflow_store.MlflowStore(uri))
            exit_status = min(follow(delivery), 1)
            trackers.finish(PATIENCE_SECONDS)
    except Timeout:
        _log.warning("another sender is at work on %s, see %s", folder, RunFolder(folder).sender_log)
        return 1
    for tracker, problem in problems(folder).items():
        print(f"{tracker} does not have all of it: {problem}")
    if exit_status == 0:
        print(f"all of {folder} is in MLflow: run {delivery.memory.run_id} in {redact(uri)}")
    elif delivery.memory.problem:
        text = f"dtrain sync: MLflow ({redact(uri)}) does not have all of {folder}: {delivery.memory.problem}"
        print(f"{text}; nothing is lost, try again later", file=sys.stderr)
    if read_run(folder).get("state") == "RUNNING":
        print(f"its status is RUNNING: on {facts.get('host')}, process {facts.get('pid')} may still be at work")
    return exit_status


if __name__ == "__main__":
    exit_status = main()
    sys.stdout.flush()
    os._exit(exit_status)  # taking 2,000 modules apart, for nothing, would cost rank 0 another second of waiting
