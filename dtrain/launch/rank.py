"""What every rank runs: create the trainer, fit, close; says how it ended as an exit status; knows no command line."""

import os
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from dtrain.checkpoint.saver import WRITER
from dtrain.config.errors import ConfigError
from dtrain.distributed.exit_status import INTERRUPTED, STOPPED_EARLY
from dtrain.distributed.stop import StopWaiting
from dtrain.launch.rehearsal import rehearse as tried
from dtrain.predict.work_folder import PredictionError
from dtrain.reporting import summary as report
from dtrain.tracking.journal import NoJournal
from dtrain.trainer import Trainer
from dtrain.training.replay import replay as repeat
from dtrain.training.setup import create_trainer

if TYPE_CHECKING:
    from subprocess import Popen

FAILED = 1


def train(config: ConfigDict, sender: "Popen[bytes] | None" = None) -> int:
    """Train as the config says; 0 done, 1 failed, 75 stopped early with its checkpoint written.

    Args:
        config: From `load_config`.
        sender: From `prepare_sender`, on rank 0.
    """

    def action() -> int:
        trainer = create_trainer(config, sender=sender)
        with trainer.stop_request.listening():
            status = trainer.fit()
            trainer.ranks.close()
        return STOPPED_EARLY if status == "KILLED" else 0

    return _status(action)


def test(config: ConfigDict, checkpoint: str | None = None) -> int:
    """Evaluate a checkpoint (default: the best) on the test data and print the figures; writes nothing."""

    def action() -> int:
        trainer = create_trainer(config, purpose="test")
        path = Path(checkpoint) if checkpoint else None
        if path is None and trainer.ranks.is_main and trainer.checkpoints.last() is None:
            raise ConfigError(
                f"{trainer.checkpoints.folder} holds no checkpoint; train first, or name one: --checkpoint"
            )
        with trainer.stop_request.listening():
            try:
                trainer.test(path)
            except StopWaiting:  # while it waited for data; the other ranks may wait for this one
                return STOPPED_EARLY
            trainer.progress.close()
            trainer.ranks.close()
        return STOPPED_EARLY if trainer.stopped else 0

    return _status(action)


def predict(
    config: ConfigDict, checkpoint: str | None = None, output_dir: str | None = None, overwrite: bool = False
) -> int:
    """Predict into files; 0 done, 1 failed, 75 stopped early: the next start goes on."""

    def action() -> int:
        trainer = create_trainer(config, purpose="predict")
        with trainer.stop_request.listening():
            result = trainer.predict(checkpoint, output_dir, overwrite)
            trainer.progress.close()
            for line in report.prediction_lines(**result._asdict()):
                trainer.progress.note(line)
            trainer.ranks.close()
        return STOPPED_EARLY if result.stopped else 0

    return _status(action)


def rehearse(config: ConfigDict) -> int:
    """Build everything and try one batch of each phase; trains nothing, writes nothing."""

    def action() -> int:
        trainer = _silent(config)
        for line in tried(trainer):
            trainer.progress.note(line)
        trainer.progress.close()
        trainer.ranks.close()
        return 0

    return _status(action)


def replay(config: ConfigDict, folder: Path) -> int:
    """Repeat the failed step of a run folder on this one process, and say what is found; writes nothing."""

    def action() -> int:
        trainer = _silent(config)
        for line in repeat(trainer, folder):
            trainer.progress.note(line)
        trainer.progress.close()
        return 0

    return _status(action)


def _silent(config: ConfigDict) -> Trainer:
    trainer = create_trainer(config)
    trainer.journal = NoJournal()
    return trainer


def _status(action: Callable[[], int]) -> int:
    """The exit status of an action. Nothing here waits for other ranks: they may be gone."""
    try:
        return action()
    except ConfigError:
        raise
    except KeyboardInterrupt:
        if any(thread.name == WRITER for thread in threading.enumerate()):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(INTERRUPTED)  # a thread that writes while Python takes itself apart crashes
        return INTERRUPTED
    except PredictionError as error:
        print(error, file=sys.stderr, flush=True)
        return FAILED
    except (Exception, SystemExit):  # after somebody's own sys.exit(0 or 75), too, the work is neither done nor saved
        traceback.print_exc()
        sys.stderr.flush()
        return FAILED
