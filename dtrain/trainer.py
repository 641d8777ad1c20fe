"""Trainer.fit is the loop, top to bottom; knows no config.

What is not here: how the parts are made (create.py), which samples a rank gets (dataloader.py), how ranks find one
another (distributed.py), how anything is written (checkpoint.py, tracking.py) or shown (progress.py).
"""

import contextlib
import gc
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn.utils import clip_grads_with_norm_
from torch.optim import Optimizer

from dtrain.checkpoint.resume import Start
from dtrain.checkpoint.saver import Saver
from dtrain.checkpoint.store import Checkpoints
from dtrain.config.errors import ConfigError
from dtrain.dataloader import Loaders, Micro
from dtrain.distributed.environment import job_ends_at
from dtrain.distributed.process import note_step
from dtrain.distributed.ranks import Ranks
from dtrain.distributed.stop import StopRequest
from dtrain.distributed.vote import Vote
from dtrain.loss import Criterion
from dtrain.metrics import Metrics
from dtrain.modelloader import Forward
from dtrain.predict.inference import Inference, Result
from dtrain.predict.predictor import Predictor
from dtrain.predict.run import FOLDER, load_for_use, logits, predict, predict_loader
from dtrain.tracking.journal import Journal, NoJournal
from dtrain.training.evaluate import evaluate, evaluate_volumes
from dtrain.training.optimizer import KeptBuffers, WeightAverage, total_norm
from dtrain.training.run_status import recorded
from dtrain.training.schedule import Schedule
from dtrain.training.throughput import Pace
from dtrain.training.watchdog import watched


class NonFiniteError(ArithmeticError):
    """The loss or a gradient became NaN or infinite; the weights are those of before that step."""


@dataclass
class Parts:
    """What a trainer works with; `create_trainer` makes them."""

    ranks: Ranks
    module: torch.nn.Module  # the bare model: what is saved
    compiled: torch.nn.Module  # the same, compiled if so configured: what is evaluated
    model: torch.nn.Module  # the same, wrapped for the ranks: what is trained
    average: torch.nn.Module | None  # a copy, if an average of the weights is kept
    loaders: Loaders
    loss: Criterion | None  # as are optimizer and schedule: only what the purpose needs is there
    metrics: Metrics
    optimizer: Optimizer | None
    schedule: Schedule | None
    checkpoints: Checkpoints
    journal: Journal | NoJournal
    progress: Any
    pictures: Any
    predictor: Predictor
    identity: Mapping[str, Any]  # what predictions depend on besides weights, settings and input files
    tests_volumes: bool  # whether a test measures whole volumes
    start: Start
    seed: int
    table: Mapping[str, str]  # what is shown before the first step
    places: Mapping[str, str]  # where each section stands, as file:line
    record: Mapping[str, Any]  # what the journal is told at the start
    texts: Mapping[str, str]  # what goes into the run folder as it is: the config, resolved and as written


class Trainer:
    """Trains, validates and tests one model. Its settings are the keys under `trainer` in the config.

    Args:
        parts: The objects that it works with.
        max_epochs: Passes over the training data.
        max_steps: Optimizer steps; with max_epochs, whichever comes first.
        checkpoint_dir: The run folder. Default: runs/<experiment>.
        resume: auto | none | a checkpoint | an MLflow run id.
        pre_trained: A checkpoint or weight file to start a new training from; or a mapping, to fit it to the model.
        monitor: The figure that 'best' means. Default: the first metric of the validation, else val/loss.
        mode: min | max. Default: min for a loss or an ...Error, else max.
        precision: fp32 | bf16 | fp16. Default: accelerate's own setting, else fp32.
        accumulate: Batches per optimizer step.
        clip_grad_norm: The largest total gradient norm; larger ones are scaled down to it.
        log_every_steps: train/loss is the mean since its last point; also at each epoch's end.
        validate_every_steps: Default: at each epoch's end.
        checkpoint_every_steps: Besides the checkpoints after each validation and epoch.
        checkpoint_every_minutes: The same by the clock.
        keep_last: Newest checkpoints to keep.
        keep_best: Best checkpoints to keep besides.
        on_nonfinite: stop | skip, when a loss or gradient on any rank is NaN or infinite.
        early_stop_patience: Validations without a new best after which the training ends.
        ema_decay: Keep an exponential moving average of the weights, validate and test it.
        compile: true, a mode of torch.compile, or its arguments.
        sync_batchnorm: BatchNorm over all ranks (GPU only).
        deterministic: torch's deterministic algorithms.
        pictures: What is drawn at validations: its settings as a mapping; false or null: nothing.
        time_limit: After so long (seconds, 90m, 01:30:00) this start saves and ends, as before a batch system's limit.
        strategy: ddp | fsdp: each rank has the model, or a part. Default: accelerate's own setting, else ddp.
        ddp: Options of DistributedDataParallel, and backend and timeout_seconds of its process group.
        fsdp: Which parts of a shared-out model are gathered at a time.
        hang_timeout_seconds: A rank that makes no progress for so long is named, and the job ends; 0: never.
        input_key: Which entry of a dict batch is the input.
        target_key: Which entry of a dict batch is the target.
    """

    def __init__(
        self,
        parts: Parts,
        *,
        max_epochs: int | None = None,
        max_steps: int | None = None,
        checkpoint_dir: str | None = None,
        resume: str = "auto",
        pre_trained: str | dict | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] | None = None,
        precision: Literal["fp32", "bf16", "fp16"] | None = None,
        accumulate: int = 1,
        clip_grad_norm: float | None = None,
        log_every_steps: int = 50,
        validate_every_steps: int | None = None,
        checkpoint_every_steps: int | None = None,
        checkpoint_every_minutes: float | None = None,
        keep_last: int = 2,
        keep_best: int = 1,
        on_nonfinite: Literal["stop", "skip"] = "stop",
        early_stop_patience: int | None = None,
        ema_decay: float | None = None,
        compile: bool | str | dict = False,
        sync_batchnorm: bool = False,
        deterministic: bool = False,
        pictures: bool | dict | None = True,
        time_limit: float | str | None = None,
        strategy: Literal["ddp", "fsdp"] | None = None,
        ddp: dict | None = None,
        fsdp: dict | None = None,
        hang_timeout_seconds: float = 1800.0,
        input_key: str | None = None,
        target_key: str | None = None,
    ) -> None:
        self.parts, self.ranks, self.loaders = parts, parts.ranks, parts.loaders
        given: Any = parts  # the purpose at hand has what it takes
        self.train_loader, self.loss = given.loaders.train, given.loss
        self.optimizer, self.schedule = given.optimizer, given.schedule
        self.module, self.model, self.compiled = parts.module, parts.model, parts.compiled
        self.checkpoints, self.journal, self.progress = parts.checkpoints, parts.journal, parts.progress
        self.metrics, self.device = parts.metrics, parts.ranks.device
        self.max_epochs = math.inf if max_epochs is None else max_epochs
        self.max_steps = math.inf if max_steps is None else max_steps
        self.monitor, self.mode, self.precision = monitor or "val/loss", mode or "min", precision or "fp32"
        self.clip_grad_norm, self.on_nonfinite = clip_grad_norm, on_nonfinite
        self.log_every_steps, self.validate_every_steps = log_every_steps, validate_every_steps
        self.checkpoint_every_steps, self.early_stop_patience = checkpoint_every_steps, early_stop_patience
        self.input_key, self.target_key, self.hang_timeout_seconds = input_key, target_key, hang_timeout_seconds
        self.scaler = torch.amp.GradScaler(self.device.type) if precision == "fp16" else None
        self.ema = None if parts.average is None or ema_decay is None else WeightAverage(parts.average, ema_decay)
        self.total_norm = parts.ranks.shards.total_norm if parts.ranks.shards else total_norm
        self.parameters = [item for item in self.module.parameters() if item.requires_grad]
        self.saver = Saver(parts.checkpoints, checkpoint_every_minutes, lambda line: self.progress.note(line))
        self.vote, self.pace = Vote(parts.ranks), Pace(parts.ranks.rank, parts.ranks.world_size)
        self.stop_request = StopRequest(time_limit, job_ends_at(), alone=parts.ranks.world_size == 1)
        self.pre_trained = pre_trained
        self.forward = Forward(self.module, self.device, self.precision, input_key, target_key, self.loss)
        self._begin_at_zero()

    def _begin_at_zero(self) -> None:
        """All that changes while a training goes on; `state.restore` sets most of it otherwise."""
        self.epoch = self.step = self.position = 0  # position: samples of this epoch done, by all ranks together
        self.best: float | None = None
        self.bad_validations = 0  # since the last best
        self.stopped = False  # all ranks agreed to stop on a signal
        self.ended = ""  # why the training ended before its limits
        self.beats = 0  # grows as long as there is progress
        self.batch_start = 0  # the position of the batch at work or waited for
        self.test_figures: dict[str, float] = {}
        self.validated_step = -1
        self.score: float | None = None  # of the last validation
        self.rate = 0.0  # of the last step, as is the norm
        self.grad_norm = torch.zeros((), device=self.device)
        self.skipped = 0  # steps whose gradient was not finite
        self._weights: dict[tuple[float, torch.dtype], torch.Tensor] = {}
        self._bad_steps = torch.zeros((), device=self.device)
        self._sum_dtype = torch.float32 if self.device.type == "mps" else torch.float64
        self._clear_sums()

    # ---------------------------------------------------------------------------------------------------- the loop

    def fit(self) -> str:
        """Train to the end of max_epochs or max_steps, then test; go on where the last start ended.

        Returns:
            FINISHED, or KILLED when a signal ended it early (its checkpoint is written).

        Raises:
            NonFiniteError: A loss or gradient was not finite, and on_nonfinite is stop.
            ConfigError: Another training writes the same run folder.
        """
        if self.train_loader is None:
            raise ConfigError("loaders: has no 'train', so there is nothing to train on")
        if self.parts.start.busy:
            raise ConfigError(self.parts.start.busy)
        if self.parts.start.finished:
            self.progress.note(self.parts.start.finished)
            self.journal.deliver_later(self.parts.start.folder)
            return "FINISHED"
        with recorded(self), watched(self, self.hang_timeout_seconds), self.saver.abandoning(self):
            self.saver.check(self)
            self._finish_last_start()
            self.kept_buffers = KeptBuffers(self.module.buffers() if self.on_nonfinite == "skip" else ())
            while self.epoch < self.max_epochs and self.step < self.max_steps and not self.ended:
                self._train_epoch()
            self._after_last_step()
            if self.loaders.test is not None and not self.stopped:
                self.test_figures = self.test()
        return "KILLED" if self.stopped else "FINISHED"

    def _train_epoch(self) -> None:
        """One pass over the training data, or what is left of it."""
        loader = self.train_loader
        end = loader.end(self.position)
        self.progress.start_epoch(self.epoch + 1, *self._extent())
        self.model.train()
        self.pace.restart()
        self.saver.mark(self)
        self.batch_start = self.position
        for micro in self.stop_request.waiting(loader.epoch(self.epoch, self.position)):
            self.beats += 1
            self.pace.data_came()
            with contextlib.nullcontext() if micro.closes else self.ranks.no_sync(self.model):
                self._forward_backward(micro)
            if micro.closes:
                self._optimizer_step()
                self._after_step(micro.position)
                self.saver.mark(self)
                if self.ended or self.step >= self.max_steps:
                    break
            self.batch_start += loader.shard.global_batch
        if self.position >= end and not self.stopped:  # a stopped epoch ends when the training goes on
            self._after_epoch()
        self.progress.end_epoch()

    def _forward_backward(self, micro: Micro) -> None:
        """Forward, loss, backward; the gradients become those of the mean over all ranks' samples of this step."""
        loss, terms, _ = self.outcome(self.model, micro.batch)
        self.pace.forward_done()
        value = loss.detach()
        # 0 * loss is NaN for a loss that is not finite; so then are its gradients, which every rank gets to see.
        seed = torch.add(self._weight(micro.weight, value.dtype), value, alpha=0)
        (self.scaler.scale(loss) if self.scaler else loss).backward(seed)
        self.sums["loss"].add_(value, alpha=micro.samples)
        for name, term in terms.items():
            self.sum_of(f"loss_{name}").add_(term.detach(), alpha=micro.samples)
        self.pace.exchanged()

    def _optimizer_step(self) -> None:
        """Clip, and step unless a gradient is not finite."""
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        self.grad_norm = self.total_norm([item.grad for item in self.parameters if item.grad is not None])
        if self.clip_grad_norm is not None:
            clip_grads_with_norm_(self.parameters, self.clip_grad_norm, self.grad_norm)
        self.rate = self.schedule.rate(self.step)
        self.schedule.apply(self.step, self._take_step)
        self.kept_buffers.after_step(self.grad_norm)
        self.optimizer.zero_grad()

    def _take_step(self) -> None:
        """optimizer.step(), but not where the norm of the reduced gradients, equal on all ranks, is not finite."""
        if self.scaler:  # skips a step that overflowed, and lowers its scale
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif getattr(self.optimizer, "_step_supports_amp_scaling", False):  # fused: the device skips, nobody waits
            bad = torch.isfinite(self.grad_norm).logical_not().float()
            self.optimizer.found_inf = bad
            self.optimizer.step()
            self._bad_steps += bad
        elif math.isfinite(self.grad_norm.item()):
            self.optimizer.step()
        else:
            self._bad_steps += 1
            self._judge_bad_steps()

    def _after_step(self, position: int) -> None:
        """What follows each optimizer step, in this order."""
        self.samples += position - self.position
        self.pace.exchanged(position - self.position)
        self.step, self.position = self.step + 1, position
        if self.ema:
            self.ema.update(self.module)
        self.progress.step()
        note_step()
        if self._is_due(self.log_every_steps):
            self._log()
        self.schedule.tick("step")
        if self._is_due(self.validate_every_steps):
            self._validate()
        stop, save = self.vote.cast(bool(self.stop_request), self.saver.is_due)
        if save or self._is_due(self.validate_every_steps) or self._is_due(self.checkpoint_every_steps):
            self.saver.save(self)
        if stop:
            self.stop()
        if not self.metrics.ready:
            self._prepare_metrics()

    def _after_epoch(self) -> None:
        """What follows each epoch, in this order."""
        self._log()
        if self.validate_every_steps is None and not self._validate():
            return  # stopped meanwhile: this epoch ends when the training goes on
        self.epoch, self.position = self.epoch + 1, 0
        self.schedule.tick("epoch")
        self.saver.save(self)

    def _after_last_step(self) -> None:
        """Leave nothing that is not logged, validated and saved, wherever in an epoch the end came."""
        self.vote.settle()
        if not self.stopped:  # else the sums go into the checkpoint, and the next start logs what this one would have
            self._log()
            self._validate()
        self.saver.save(self)
        self.saver.finish(self)

    # -------------------------------------------------------------------------------------------------- evaluation

    def _validate(self) -> bool:
        """Validate, keep the best, count towards early stopping; once per step at most. False where it was stopped."""
        if self.loaders.val is None or self.validated_step == self.step:
            return True
        self.saver.mark(self)  # this step is whole, even where the validation waits for data and is asked to stop
        with self.pace.paused():
            figures = self.evaluate("val")
        if self.stopped:
            return False
        self.validated_step = self.step
        score = figures.get(self.monitor)
        if score is None:
            raise KeyError(f"trainer.monitor is {self.monitor!r}, but the validation gives {', '.join(figures)}")
        better = self.best is None or (score > self.best if self.mode == "max" else score < self.best)
        is_best = better and math.isfinite(score)
        self.bad_validations = 0 if is_best else self.bad_validations + 1
        self.best = score if is_best else self.best
        self.progress.evaluation("val", self.step, figures, is_best)
        self.score = score
        self.schedule.tick("validation", score)
        self.judge_patience()
        return True

    def judge_patience(self) -> None:
        """End the training where too many validations have brought no new best."""
        if self.early_stop_patience is not None and self.bad_validations >= self.early_stop_patience:
            self.ended = f"no better {self.monitor} in {self.bad_validations} validations"

    def evaluate(self, phase: str, module: torch.nn.Module | None = None) -> dict[str, float]:
        """Loss and metrics over a whole phase, journalled; none where a request to stop came meanwhile.

        Args:
            phase: val or test.
            module: What to evaluate. Default: the averaged weights where there are some, else the model.
        """
        module = module or (self.ema.module if self.ema else self.compiled)
        album = self.parts.pictures.album(self.step, self.journal, self.progress.note) if phase == "val" else None
        loader, stop = getattr(self.loaders, phase), self.asked_to_stop
        if phase == "test" and self.parts.tests_volumes:
            means = evaluate_volumes(module, logits(self._inference(), loader), self.metrics, self.ranks, stop)
        else:
            waited_for = loader if self.ranks.shards else self.stop_request.waiting(loader)  # with shards all wait
            means = evaluate(module, waited_for, self.outcome, self.metrics, self.ranks, stop, album)
        self.model.train()
        if means is None:
            self.stop()
            return {}
        figures = {f"{phase}/{name}": value for name, value in means.items()}
        self.journal.log(self.step, figures)
        return figures

    def test(self, checkpoint: Path | None = None) -> dict[str, float]:
        """Loss and metrics on the test data, with the weights of a checkpoint (default: the best, else the last).

        The model keeps these weights.
        """
        self.saver.wait()
        load_for_use(self.module, self.ranks, self.checkpoints, checkpoint)
        figures = self.evaluate("test", self.compiled)
        if figures:
            self.progress.evaluation("test", self.step, figures)
        return figures

    def predict(
        self, checkpoint: str | Path | None = None, output_dir: str | Path | None = None, overwrite: bool = False
    ) -> Result:
        """Predict what `loaders.predict` holds, else `loaders.test`, into files. All ranks call it.

        Args:
            checkpoint: A checkpoint folder or weight file. Default: the predictor's own, else the best, else the last.
            output_dir: Where the files go. Default: the predictor's own, else `predictions` in the run folder.
            overwrite: Make files anew that were made with another model or other settings.

        Raises:
            ConfigError: There is nothing to predict, no checkpoint, or a file that is not to be written.
            PredictionError: A file cannot be written.
        """
        loader, predictor = predict_loader(self.loaders, self.ranks), self.parts.predictor
        path = checkpoint or predictor.checkpoint
        is_required = not (self.pre_trained and self.parts.start.checkpoint is None)
        load_for_use(self.module, self.ranks, self.checkpoints, Path(path) if path else None, is_required)
        folder = Path(output_dir or predictor.output_dir or self.parts.start.folder / FOLDER)
        with self.stop_request.listening():
            return predict(self._inference(), loader, folder, overwrite)

    def _inference(self) -> Inference:
        parts = self.parts
        return Inference(
            parts.predictor, self.forward, self.compiled, self.ranks, self.progress, self.asked_to_stop, parts.identity
        )

    # ------------------------------------------------------------------------------------- figures and checkpoints

    def _log(self) -> None:
        """Reduce the sums since the last point once, and give the same floats to journal and progress."""
        if not self.samples:
            return
        self._judge_bad_steps()
        figures = {name: value for name, value in self._train_figures().items() if math.isfinite(value)}
        if "train/loss" not in figures and self.on_nonfinite == "stop":
            raise NonFiniteError(f"train/loss is not finite at step {self.step}")
        figures |= {"lr": self.rate, "samples_per_second": self.pace.samples_per_second}
        if self.clip_grad_norm is not None:
            figures["grad_norm"] = float(self.grad_norm)
        if self.skipped:
            figures["skipped_steps"] = self.skipped
        self._clear_sums()
        self.journal.log(self.step, figures)
        self.progress.figures(self.step, figures)
        self.pace.restart(warm_up=False)

    def _train_figures(self) -> dict[str, float]:
        own = torch.tensor(self.pace.own(), dtype=self._sum_dtype, device=self.device)
        sums = self.ranks.sum_(torch.cat([torch.stack(list(self.sums.values())), own])).tolist()
        count = len(self.sums)
        if slow := self.pace.judge(sums[count:]):
            self.progress.note(f"warning: {slow}")
        return {f"train/{name}": value / self.samples for name, value in zip(self.sums, sums[:count], strict=True)}

    def _judge_bad_steps(self) -> None:
        """Stop for the steps that were skipped since the last look, or count them; the same on every rank."""
        bad = int(self._bad_steps.item())
        if not bad:
            return
        self._bad_steps.zero_()
        self.skipped += bad
        text = f"step {self.step + 1}: loss or gradient not finite (gradient norm {float(self.grad_norm)})"
        if self.on_nonfinite == "stop":
            raise NonFiniteError(f"{text}; the weights are those of before it. trainer.on_nonfinite=skip would go on")
        self.progress.note(f"{text}; skipped, {self.skipped} so far")

    def stop(self) -> None:
        """End early, with everything saved; the next start goes on."""
        self.stopped, self.ended = True, self.stop_request.reason or "another rank was asked to stop"

    def asked_to_stop(self) -> bool:
        """Whether this rank, or during an evaluation any other, was asked to stop; costs no collective."""
        self.beats += 1
        return self.ranks.board.is_raised("stop", wish=bool(self.stop_request))

    def _finish_last_start(self) -> None:
        """A validation during which an earlier start was stopped comes first."""
        if self.step and self._is_due(self.validate_every_steps) and self._validate():
            self.saver.save(self)

    # ------------------------------------------------------------------------------------------------ small change

    def _prepare_metrics(self) -> None:
        """Make the metrics after the first step: their imports take seconds, but a mistake in them should show now."""
        with self.pace.paused():
            self.metrics.prepare()
            gc.collect()
            gc.freeze()  # what is there by now stays; looking through it for garbage would cost some steps 5 %

    def outcome(self, model: torch.nn.Module, batch: Any) -> Any:
        """What a model makes of one batch: the loss, its terms, and what metrics look at."""
        return self.forward(model, batch)

    def _weight(self, weight: float, dtype: torch.dtype) -> torch.Tensor:
        """A batch's weight as a tensor on the device; there are few different ones."""
        if (weight, dtype) not in self._weights:
            self._weights[weight, dtype] = torch.tensor(weight, dtype=dtype, device=self.device)
        return self._weights[weight, dtype]

    def sum_of(self, name: str) -> torch.Tensor:
        """The running sum of a loss or one of its terms since the last point, on the device."""
        if name not in self.sums:
            self.sums[name] = torch.zeros((), dtype=self._sum_dtype, device=self.device)
        return self.sums[name]

    def _clear_sums(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.sum_of("loss")
        self.samples = 0  # of all ranks, since the last point

    def _extent(self) -> tuple[int | None, int, int]:
        """Epochs, steps of an epoch, and how many of them are done, for the progress bar."""
        loader = self.train_loader
        steps = int(min(loader.steps(self.position), self.max_steps - self.step))
        done = -(-self.position // loader.global_batch)
        return None if math.isinf(self.max_epochs) else int(self.max_epochs), steps + done, done

    def samples_at_work(self) -> list[int]:
        """The training samples of this rank's batch, the one that it waits for where it does."""
        return next(iter(self.train_loader.shard.batches_from(self.epoch, self.batch_start, 1)), [])

    def _is_due(self, every_steps: int | None) -> bool:
        return every_steps is not None and self.step % every_steps == 0
