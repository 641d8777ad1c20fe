"""What every rank runs: make a trainer, do one thing with it, and say how it ended as an exit status."""

import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from ml_collections import ConfigDict

from dtrain.checkpoint.background_saver import WRITER
from dtrain.config.errors import ConfigError
from dtrain.data.loader_workers import end_workers
from dtrain.distributed.exit_status import DONE, FAILED, INTERRUPTED, STOPPED_EARLY, WRONG_CONFIG
from dtrain.distributed.launched_rank import leaves_to_launcher, mark_lost
from dtrain.distributed.ranks import is_lost_rank
from dtrain.distributed.stop_request import StopWaiting, was_pressed
from dtrain.launch.last_words import say_last
from dtrain.predict.work_folder import PredictionError
from dtrain.reporting.summary import prediction_lines
from dtrain.tracking.journal import NoJournal
from dtrain.tracking.run_folder import RunFolder
from dtrain.trainer import Trainer, create_trainer

if TYPE_CHECKING:  # what only some commands need, they import: a rank that trains holds no memory for it
    from subprocess import Popen

    from dtrain.launch.doctor import Finding
    from dtrain.launch.forecast import Asked


def train(config: ConfigDict, sender: "Popen[bytes] | None" = None) -> int:
    """Train as the config says; 0 done, 1 failed, 75 stopped early with its checkpoint written."""

    def fit(trainer: Trainer) -> bool:
        with trainer.stop_request.listening():
            return trainer.fit() == "KILLED"

    return _run(config, fit, sender=sender)


def test(config: ConfigDict, checkpoints_wanted: Sequence[str] = ()) -> int:
    """Evaluate a checkpoint (default: the best) or several on the test data, print the figures; writes nothing."""

    def measure(trainer: Trainer) -> bool:
        paths = [Path(path) for path in checkpoints_wanted]
        checkpoints = trainer.saver.checkpoints
        if not paths and trainer.ranks.is_main and checkpoints.last() is None:
            raise ConfigError(f"{checkpoints.folder} holds no checkpoint; train first, or name one: --checkpoint")
        with trainer.stop_request.listening():
            trainer.test(paths or None)
        return trainer.state.stopped

    return _run(config, measure, purpose="test")


def predict(
    config: ConfigDict,
    checkpoints: Sequence[str] = (),
    output_dir: str | None = None,
    overwrite: bool = False,
    folds: str | None = None,
) -> int:
    """Predict into files; 0 done, 1 failed, 75 stopped early: the next start resumes.

    With `folds`, a folder of the runs of all folds, each predicts the part of their data that it has not seen.
    """
    from dtrain.launch.out_of_fold import of_all_folds

    settings: dict[str, Any] | None = None
    members: Sequence[str | Path] = checkpoints
    if folds is not None:
        if checkpoints:
            raise ConfigError("--folds: names the checkpoints, too; leave out --checkpoint, which makes an ensemble")
        config, members, settings = of_all_folds(config, Path(folds))
        output_dir = output_dir or (config.get("predictor") or {}).get("output_dir") or str(Path(folds) / "predictions")

    def write(trainer: Trainer) -> bool:
        with trainer.stop_request.listening():
            result = trainer.predict(members or None, output_dir, overwrite, settings)
            trainer.progress.close()
            trainer.progress.ended(files=[str(path) for path in result.files])
            for line in prediction_lines(**result._asdict()):
                trainer.progress.note(line)
        return result.stopped

    return _run(config, write, purpose="predict")


def rehearse(config: ConfigDict, asked: "Asked", finds_lr: bool = False) -> int:
    """Build everything and try each part once, then learning rates if asked; writes nothing but their picture.

    Returns the status of a wrong config, too, where the forecast finds what a training would fail of.
    """
    from dtrain.launch.find_lr import find_lr, keep
    from dtrain.launch.forecast import Forecast, asked_in_background
    from dtrain.launch.forecast import lines as table_lines
    from dtrain.launch.rehearsal import rehearse as rehearsed

    ask_store = asked_in_background(config)
    if (config.get("trainer") or {}).get("mirror_to"):  # nothing is fetched for a rehearsal
        config.trainer.mirror_to = None
    would_fail: list[Finding] = []

    def lines(trainer: Trainer) -> Iterator[str]:
        forecast = Forecast(trainer, config, asked, ask_store)
        findings = forecast.broken()  # of which the first would end the rehearsal
        if not findings:
            kept = keep(trainer) if finds_lr else None
            yield from rehearsed(trainer, config)
            yield from find_lr(trainer, kept) if kept else ()
            findings = trainer.ranks.broadcast(forecast.findings())
        yield from table_lines(findings)
        would_fail.extend(one for one in findings if one.status == "fail")

    status = _run_and_note(config, lines)
    return WRONG_CONFIG if status == DONE and would_fail else status


def replay(config: ConfigDict, folder: Path) -> int:
    """Repeat the failed step of a run folder on this one process, and say what is found; writes nothing."""
    from dtrain.training.replay import Step
    from dtrain.training.replay import replay as repeated

    def step(it: Trainer) -> Iterator[str]:
        it.scaler = it.own.scaler = None  # gradients as they are
        return repeated(Step(it.learn, it.state, it.trainables), it.train_loader, folder)

    return _run_and_note(config, step)


def _run_and_note(config: ConfigDict, action: Callable[[Trainer], Iterator[str]]) -> int:
    """Show the lines that an action finds; it writes nothing and is not stopped early.

    A GPU that the config asks for may be elsewhere: then the CPU does, which a line says.
    """
    asked = config.get("device", "auto")
    if falls_back := asked != "auto" and not torch.cuda.device_count():
        with config.ignore_type():
            config.device = [*([asked] if isinstance(asked, str) else asked), "cpu"]

    def note_all(trainer: Trainer) -> bool:
        if falls_back:  # what is compared with another run is what was asked for
            with config.ignore_type():
                config.device = asked
        trainer.journal = NoJournal()
        for line in action(trainer):
            trainer.progress.note(line)
        return False

    return _run(config, note_all)


def _run(config: ConfigDict, action: Callable[[Trainer], bool], **options: Any) -> int:
    """Make a trainer and do something with it, which returns whether it was stopped early; returns the exit status.

    After an error nothing here waits for other ranks: they may be gone.
    """
    trainer = None
    try:
        trainer = create_trainer(config, **options)
        stopped = action(trainer)
        trainer.progress.close()
        trainer.ranks.close()
        return STOPPED_EARLY if stopped else DONE
    except StopWaiting:  # while it waited for data; the other ranks may wait for this one
        return STOPPED_EARLY
    except ConfigError:
        raise
    except KeyboardInterrupt as error:
        if not was_pressed(error):  # a constructor has raised it
            say_last(error)
            return FAILED
        if any(thread.name == WRITER for thread in threading.enumerate()):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(INTERRUPTED)  # a thread that writes while Python takes itself apart crashes
        return INTERRUPTED
    except PredictionError as error:
        print(error, file=sys.stderr, flush=True)
        return FAILED
    except (Exception, SystemExit) as error:  # after somebody's own sys.exit(0 or 75), too, nothing is done or saved
        if is_lost_rank(error) and leaves_to_launcher():
            mark_lost()
            error.failure_card = getattr(error, "failure_card", [])  # type: ignore[union-attr]
        say_last(error, _own_log(trainer, error))
        return FAILED
    finally:
        end_workers()  # else torch's handler for them raises while others of this process's are ended


def _own_log(trainer: Trainer | None, error: BaseException) -> Path | None:
    """The log into which this rank of a training writes its traceback itself; the main rank's has all that was said."""
    if trainer is None or trainer.ranks.is_main or not hasattr(error, "failure_card"):
        return None
    return RunFolder(trainer.parts.start.folder).rank_log(trainer.ranks.rank)
