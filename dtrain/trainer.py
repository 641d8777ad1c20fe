"""create_trainer builds the parts in the order of need; Trainer.fit is the loop, top to bottom."""

import contextlib
import functools
import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from subprocess import Popen
from typing import Any, Literal

import torch
from ml_collections import ConfigDict
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_

from dtrain.checkpoint.checkpoint_files import Loaded
from dtrain.checkpoint.weights import load_weights
from dtrain.config.build import build
from dtrain.config.check import check
from dtrain.config.errors import ConfigError, to_plain
from dtrain.config.live_objects import with_objects
from dtrain.config.load import from_mapping
from dtrain.config.metric_rules import not_given
from dtrain.data import rng
from dtrain.data.batch import to_device
from dtrain.data.samplers import ORDER
from dtrain.data.shared_memory import too_little_for
from dtrain.dataloader import MicroBatch
from dtrain.distributed.environment import cores, environment
from dtrain.distributed.launched_rank import mark_first_step
from dtrain.distributed.side_stream import mover
from dtrain.distributed.stop_request import StopWaiting
from dtrain.distributed.vote import Vote
from dtrain.predict.inference import Result
from dtrain.predict.members import load_to_test
from dtrain.predict.run import compare_with_training, logits, predict
from dtrain.reporting.metric_tables import draw_tables, keep_tables, tell_tables
from dtrain.reporting.validation_pictures import Album
from dtrain.tracking.secrets import keep_secret
from dtrain.training.advice import Advisor
from dtrain.training.anomaly import detecting_anomalies
from dtrain.training.bad_node import note_nodes_of
from dtrain.training.best_score import is_new_best, judge_patience
from dtrain.training.closure import Closure, asks_for_closure
from dtrain.training.ema import EMA
from dtrain.training.evaluate import evaluate, evaluate_volumes
from dtrain.training.evidence import Evidence
from dtrain.training.failure_card import reported
from dtrain.training.finite_step import FiniteStep, NonFiniteError
from dtrain.training.gpu_memory import peak_gb
from dtrain.training.held_folder import keep_whole
from dtrain.training.model_signature import signature_of
from dtrain.training.optimizer import require_one_optimizer, require_trained
from dtrain.training.optimizer_step import drop_gradients, may_keep_gradients
from dtrain.training.own_step import OwnStep, trained
from dtrain.training.profile import Profiler
from dtrain.training.rescue import LastStep, rescue
from dtrain.training.result import FitResult, fit_result
from dtrain.training.run_status import session
from dtrain.training.saving import check_saving
from dtrain.training.setup import Parts, make_parts
from dtrain.training.slow_clock import cause_in_clock
from dtrain.training.spare_state import distrusted_after_error, keep, require_space
from dtrain.training.state import Activity, TrainState, capture, means, restore
from dtrain.training.step_clock import clock_of
from dtrain.training.swa import SWA
from dtrain.training.throughput import Throughput, meets_in_forward
from dtrain.training.watchdog import watchdog

_SEE_GRADIENTS = ("learn", "backward", "take_step", "optimizer_step")  # methods that have a step's at hand

_tensor = functools.lru_cache(torch.tensor)  # of a batch's weight, of which there are few different ones


def create_trainer(  # noqa: PLR0913
    config: ConfigDict | Mapping[str, Any],
    package: str | Path | None = None,
    sender: Popen[bytes] | None = None,
    purpose: Literal["train", "test", "predict"] = "train",
    *,
    model: torch.nn.Module | None = None,
    datasets: Mapping[str, Any] | None = None,
    loss: Callable[..., Any] | None = None,
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    metrics: Mapping[str, Any] | Sequence[Any] | None = None,
    collate_fn: Callable[..., Any] | None = None,
) -> "Trainer":
    """Build model, loaders, loss, metrics, optimizer and scheduler as the config names them, and a trainer of them.

    Every rank calls it. What an earlier start of the same training left is read, so that `fit` resumes from there.

    Args:
        config: From `load_config`, or a mapping of the same form.
        package: A file or folder against which a relative `checkpoint_dir` resolves. Default: the current folder.
        sender: A process that waits for the run, from `prepare_sender`. Default: one is started with the run.
        purpose: For test and predict the config need not have what only a training needs, and only their data are
            read; a trainer made for training can test and predict as well.
        model: Takes the place of the section `model`, which then need not be there; so do the others of theirs.
        datasets: By phase (train, val, test, predict); batch_size and the like stay under `loaders`.
        loss: A module or function of (output, target).
        optimizer: A function of the parameters that are trained, or, if its argument is so called, of the model.
        metrics: By name, or a list: objects with update, compute and reset, or functions of (output, target).
        collate_fn: Makes a batch of a list of samples.

    Raises:
        ConfigError: With every mistake that can be found.
    """
    objects = {"model": model, "datasets": datasets, "loss": loss, "optimizer": optimizer, "metrics": metrics}
    config = with_objects(from_mapping(config), {**objects, "collate_fn": collate_fn})
    keep_secret(to_plain(config))
    check(config, purpose)
    parts = make_parts(config, package, sender, purpose)
    parts.progress.waits_for("")
    trainer: Trainer = build(config, "trainer", parts, monitor=parts.monitor, mode=parts.mode)
    if purpose == "train" and type(trainer).training_step is Trainer.training_step:
        require_one_optimizer(config)
    # Dropout differs between ranks; the weights, drawn before, do not.
    rng.seed_all(parts.seed, 1 + parts.ranks.rank)
    if parts.start.checkpoint is not None and purpose == "train":
        trainer.resume(parts.loaded)
        if parts.start.kept is None:  # else it is written when the training begins
            parts.loaded = None
    return trainer


class Trainer:
    """Trains, validates and tests one model. Its settings are the keys under `trainer` in the config.

    Args:
        parts: The objects that it works with; `make_parts` builds them.
        max_epochs: Passes over the training data.
        max_steps: Optimizer steps; with max_epochs, whichever comes first.
        steps_per_epoch: Optimizer steps of an epoch, over an endless order. Default: once through the data.
        checkpoint_dir: The run folder. Default: runs/<experiment>.
        mirror_to: Where a process of its own copies the run folder: s3://bucket/name, gs://bucket/name, a folder.
        mirror_exit_timeout_seconds: At the end, how long the mirror is waited for at most.
        resume: auto | last | none | a checkpoint | a run folder | an MLflow run id.
        pre_trained: A checkpoint or weight file to start a new training from; or a mapping, to fit it to the model.
        monitor: The figure that 'best' means. Default: the first metric of the validation's first set, else its loss.
        mode: min | max, what is better of it. Default: as the metric says (`higher_is_better`), min for a loss.
        closure: Give the optimizer's step a closure that evaluates the loss again, as SAM needs. Default: where its
            signature asks for one, as that of LBFGS.
        precision: fp32 | bf16 | fp16. Default: accelerate's own setting, else fp32.
        accumulate: Batches per optimizer step.
        clip_grad_norm: The largest total gradient norm; larger ones are scaled down to it.
        log_grad_norm: Log the total gradient norm; with clip_grad_norm it is logged anyway.
        log_every_steps: train/loss is the mean since its last point; also at each epoch's end.
        validate_every_steps: Default: at each epoch's end.
        checkpoint_every_steps: Besides the checkpoints after each validation and epoch.
        checkpoint_every_minutes: The same by the clock.
        spare_memory_every_steps: Keep the newest state in the nodes' memory so often; the next start resumes from it.
        spare_memory_dir: A folder in memory, on each node, for that. Default: /dev/shm.
        keep_last: Newest checkpoints to keep.
        keep_best: Best checkpoints to keep besides.
        on_nonfinite: stop | skip, when a loss or gradient on any rank is NaN or infinite.
        early_stop_patience: Validations without a new best after which the training ends.
        ema_decay: Keep an exponential moving average of the weights, validate and test it.
        swa: Average the weights of epochs' ends (stochastic weight averaging): its settings as a mapping.
        limit_batches: So many batches of a phase, or such a share of them; a mapping for train, val and test.
        overfit_batches: Train on so many first batches again and again, and validate on the same.
        anomaly: torch's anomaly detection: where backward fails, the failure card names the line of forward.
        compile: true, a mode of torch.compile, or its arguments.
        activation_checkpointing: Parts that compute their activations again in backward: true, or patterns over
            modules' names or class names.
        channels_last: Convolutions' weights and inputs in channels_last (channels_last_3d) memory format.
        matmul_precision: highest | high | medium: of float32 matrix products. Default: torch's own setting.
        cudnn_benchmark: Let cuDNN time its algorithms for each shape of input. Default: torch's own setting.
        sync_batchnorm: BatchNorm over all ranks (GPU only).
        deterministic: torch's deterministic algorithms.
        profile: Leave a trace of a few steps, by torch's profiler: true, or its settings as a mapping.
        pictures: What is drawn at validations: its settings as a mapping; false or null: nothing.
        time_limit: After so long (seconds, 90m, 01:30:00) this start saves and ends, as before a batch system's limit.
        strategy: ddp | fsdp: each rank has the model, or a part. Default: accelerate's own setting, else ddp.
        ddp: Options of DistributedDataParallel, and backend and timeout_seconds of its process group.
        fsdp: Which parts of a sharded model are gathered at a time.
        hang_timeout_seconds: A rank that makes no progress for so long is named, and the job ends; 0: never.
        input_key: Which entry of a dict batch is the input.
        target_key: Which entry of a dict batch is the target; a list of several gives a dict of them.
        freeze: Patterns of parameters that are not trained; or mappings with match and until_epoch.

    A subclass, named by `trainer.name`, may override the methods without a leading underscore. It may read `step`,
    `epoch`, `position`, `state`, `trainables`, `module`, `model`, `evaluated`, `forward`, `optimizers`, `optimizer`,
    `scaler`, `loaders`, `ranks`, `device`, `journal` and `progress`. See docs/own-loop.md.
    """

    def __init__(  # noqa: PLR0913
        self,
        parts: Parts,
        *,
        max_epochs: int | None = None,
        max_steps: int | None = None,
        steps_per_epoch: int | None = None,
        checkpoint_dir: str | None = None,
        mirror_to: str | None = None,
        mirror_exit_timeout_seconds: float = 25.0,
        resume: str = "auto",
        pre_trained: str | dict | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] | None = None,
        closure: bool | None = None,
        precision: Literal["fp32", "bf16", "fp16"] | None = None,
        accumulate: int = 1,
        clip_grad_norm: float | None = None,
        log_grad_norm: bool = False,
        log_every_steps: int = 50,
        validate_every_steps: int | None = None,
        checkpoint_every_steps: int | None = None,
        checkpoint_every_minutes: float | None = None,
        spare_memory_every_steps: int | None = None,
        spare_memory_dir: str | None = None,
        keep_last: int = 2,
        keep_best: int = 1,
        on_nonfinite: Literal["stop", "skip"] = "stop",
        early_stop_patience: int | None = None,
        ema_decay: float | None = None,
        swa: dict | None = None,
        limit_batches: int | float | dict | None = None,
        overfit_batches: int | float | None = None,
        anomaly: bool = False,
        compile: bool | str | dict = False,
        activation_checkpointing: bool | str | list[str] = False,
        channels_last: bool = False,
        matmul_precision: Literal["highest", "high", "medium"] | None = None,
        cudnn_benchmark: bool | None = None,
        sync_batchnorm: bool = False,
        deterministic: bool = False,
        profile: bool | dict | None = None,
        pictures: bool | dict | None = True,
        time_limit: float | str | None = None,
        strategy: Literal["ddp", "fsdp"] | None = None,
        ddp: dict | None = None,
        fsdp: dict | None = None,
        hang_timeout_seconds: float = 1800.0,
        input_key: str | None = None,
        target_key: str | list[str] | None = None,
        freeze: str | list[str | dict] | dict | None = None,
    ) -> None:
        self._take_over(parts)
        self.max_epochs = math.inf if max_epochs is None else max_epochs
        self.max_steps = math.inf if max_steps is None else max_steps
        self.monitor, self.mode, self.on_nonfinite = monitor or "val/loss", mode or "min", on_nonfinite
        self.clip_grad_norm, self.hang_timeout_seconds = clip_grad_norm, hang_timeout_seconds
        self.logs_grad_norm, self.anomaly = log_grad_norm or clip_grad_norm is not None, anomaly
        self.log_every_steps, self.early_stop_patience = log_every_steps, early_stop_patience
        self.validate_every_steps = validate_every_steps or math.inf
        self.checkpoint_every_steps = checkpoint_every_steps or math.inf
        self.profiler: Profiler | None = None
        if profile not in (None, False) and self.ranks.is_main:
            settings: Any = {} if profile is True else profile
            self.profiler = Profiler(self.journal, self.progress.note, self.activity, self.throughput, settings)
        self.advisor = self._advisor(checkpoint_every_minutes)
        self._make_means(accumulate, closure, syncs_buffers=(ddp or {}).get("broadcast_buffers") is not False)

    def _take_over(self, parts: Parts) -> None:
        """The objects that it works with, and those that it makes whatever its settings."""
        given: Any = parts.trainables  # the purpose at hand has what it takes
        overrides = any(getattr(type(self), name) is not getattr(Trainer, name) for name in _SEE_GRADIENTS)
        hooked = any(getattr(item, "_post_accumulate_grad_hooks", None) for item in given.module.parameters())
        self.may_keep_gradients = overrides or hooked or any(map(may_keep_gradients, given.optimizers.values()))
        if self.may_keep_gradients and given.model is not None:
            given.model = parts.ranks.strategy.with_gradients_apart(given.model, given.compiled)
        self.parts, self.ranks, self.loaders, self.metrics = parts, parts.ranks, parts.loaders, parts.metrics
        self.trainables, self.module, self.model = parts.trainables, given.module, given.model
        self.optimizers, self.optimizer, self.schedule = given.optimizers, given.optimizer, given.schedule
        self.scaler = given.scaler
        self.swa: SWA | None = given.ema if isinstance(given.ema, SWA) else None
        self.ema: EMA | None = None if self.swa else given.ema  # of every step
        self.forward, self.saver, self.stop_request = parts.forward, parts.saver, parts.stop
        self.journal, self.progress = parts.journal, parts.progress
        self.train_loader: Any = parts.loaders.train
        self.device = self.ranks.device
        clock = clock_of(self.device)
        self.state, self.activity = TrainState(self.device), Activity(clock=clock)
        self._move, self.forward.to_device = mover(to_device, self.device), self._to_device
        self.inference = replace(parts.inference, asked_to_stop=self.asked_to_stop)
        self.vote = Vote(self.ranks)
        meets = meets_in_forward(self.module, self.ranks.strategy.is_sharded)
        self.throughput = Throughput(self.ranks.rank, self.ranks.world_size, clock, meets)
        self.ranks.strategy.clock = clock
        self._is_first_step = True  # of this start

    def _make_means(self, accumulate: int, closure: bool | None, syncs_buffers: bool) -> None:
        """What the loop does its steps with."""
        # A start with fewer ranks than the training began with has more batches in a step than `accumulate` says.
        batches = self.train_loader.accumulate if self.train_loader else accumulate
        self.last_step = LastStep(self.state, keeps_sums=batches > 1)
        self._collect_parameters(syncs_buffers)
        self.finite_step = FiniteStep(
            self.optimizer, self.scaler, self.state, self.on_nonfinite, self.progress.note, self.ranks
        )
        if closure or (closure is None and asks_for_closure(self.optimizer)):
            self.finite_step.closure = Closure(self.state, self.ranks, self._learn_again, self._clipped)

    def _collect_parameters(self, syncs_buffers: bool) -> None:
        """The parameters that are trained, now or later, and what the ranks have to do for those of a loss."""
        self.evaluated: torch.nn.Module = self.trainables.evaluated
        self.own = OwnStep(self.optimizers, self.ranks, self.scaler)
        loss: Any = self.trainables.loss
        trained = {
            id(item) for each in self.optimizers.values() for group in each.param_groups for item in group["params"]
        }
        self._loss_parameters = [item for item in loss.parameters() if id(item) in trained] if loss else []
        self._shares_loss = loss is not None and self.ranks.world_size > 1  # no wrapper does it
        self._shares_buffers = loss is not None and syncs_buffers and any(True for _ in loss.buffers())
        self._syncs_buffers = syncs_buffers and self.ranks.world_size > 1
        of_model = [item for item in self.module.parameters() if id(item) in trained]
        self._parameters = of_model + self._loss_parameters
        # Of a sharded model, shards and the loss's own cannot be scaled in one call.
        self._to_clip = [of_model, self._loss_parameters] if self._loss_parameters else [of_model]
        self._wants_norm = self.logs_grad_norm or self.scaler is not None
        self._is_on_cpu = self.device.type == "cpu"
        self._any_norm = torch.zeros((), device=self.device)  # of gradients that are finite, where nobody asks for it

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.state.step

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return self.state.epoch

    @property
    def position(self) -> int:
        """Samples of this epoch done, by all ranks together."""
        return self.state.position

    # ---------------------------------------------------------------------------------------------------- the loop

    def fit(self) -> FitResult:
        """Train to the end of max_epochs or max_steps, then test; resume where the last start ended.

        Returns:
            FINISHED, or KILLED when a signal ended it early (its checkpoint is written), as a string that holds what
            was reached: figures, best checkpoint, run folder, steps.

        Raises:
            NonFiniteError: A loss or gradient was not finite, and on_nonfinite is stop.
            ConfigError: Another training writes the same run folder.
        """
        start = self.parts.start
        if self.train_loader is None:
            raise ConfigError("loaders: has no 'train', so there is nothing to train on")
        if start.busy:
            raise ConfigError(start.busy)
        if start.finished:
            self.progress.note(start.finished)
            self.progress.ended(run_folder=str(start.folder), reason=start.finished)
            self.journal.deliver_later(start.folder)
            if self.parts.mirror:
                self.parts.mirror.send_later(start.folder)
            return self._reached("FINISHED")
        evidence = Evidence(self.parts, self.activity, self.state, self.last_step)
        with (
            session(self.parts, self.state) as ending,
            reported(evidence),
            watchdog(evidence, self.hang_timeout_seconds),
            self._rescuing(),
            detecting_anomalies(self.anomaly),
            self.profiler or contextlib.nullcontext(),
        ):
            self._check_that_it_can_be_saved()
            # A validation during which an earlier start was stopped comes first.
            if self.step and self.step % self.validate_every_steps == 0 and self.validate():
                self.save()
            self.finite_step.begin(self.trainables.all, self.trainables.loss_objects)
            while self.epoch < self.max_epochs and self.step < self.max_steps and not self.state.ended:
                self.train_epoch()
            self.after_last_step()
            if self.loaders.test is not None and not self.state.stopped:
                ending.test_figures = self.test()
        return self._reached(ending.status, ending.reason, ending.test_figures)

    def train_epoch(self) -> None:
        """One pass over the training data, or what is left of it. All ranks call it, equally often."""
        loader, state, activity = self.train_loader, self.state, self.activity
        end = loader.begin(state.epoch, state.position, state.order)
        self.progress.start_epoch(state.epoch + 1, *self._extent())
        self.freeze_and_thaw()
        if self.swa:
            self.swa.begin_epoch(self.trainables, state)
        self.model.train()
        self.throughput.restart()
        self.last_step.mark()
        activity.batch_start = state.position
        activity.enter("waiting for data")
        for micro in self.stop_request.waiting(loader.epoch(state.epoch, state.position, state.order)):
            activity.beats += 1
            if micro.batch is not None:
                self.learn(micro)
            if micro.closes:
                activity.enter("optimizer step")
                if not loader.may_leave_out or self._has_samples(micro):
                    self.take_step()
                self.after_step(micro.position)
                self.last_step.mark()
                self.saver.poll()
                if state.ended or state.step >= self.max_steps:
                    break
            activity.batch_start = micro.end
            activity.enter("waiting for data")
        if state.position >= end and not state.stopped:  # a stopped epoch ends when the training resumes
            self._after_epoch()
        self.progress.end_epoch()

    def freeze_and_thaw(self) -> None:
        """Before an epoch: freeze and thaw what `freeze` says of it. Called on every rank."""
        if self.trainables.freezing and self.trainables.freezing.apply(self.epoch):
            self.model = self.trainables.model = self.ranks.strategy.rewrap(self.model, self.trainables.compiled)

    def learn(self, micro: MicroBatch) -> None:
        """Forward and backward of one batch, or the steps that its `training_step` takes itself. On every rank."""
        activity, own = self.activity, self.own
        if self.finite_step.closure is not None:
            self.finite_step.closure.note(micro)
        with contextlib.nullcontext() if micro.closes else self.ranks.strategy.no_sync(self.model):
            activity.enter("forward")
            own.micro, own.loss = micro, None
            result = self.training_step(micro.batch)
            activity.enter("backward")
            if own.is_taken or own.has_several or type(result) is not tuple:
                self._follow(result, micro)
            else:
                loss, terms = result
                self.backward(loss, terms, micro)

    def _learn_again(self, micro: MicroBatch) -> None:
        """The same within an optimizer's step."""
        with self.activity.during("forward"):
            self.learn(micro)

    def take_step(self) -> None:
        """The optimizer's step, or what is left to do where `training_step` has taken it. On every rank."""
        if self.own.is_taken:
            self._finish_own_step()
        else:
            self.optimizer_step()

    def training_step(self, batch: Any) -> Any:
        """The loss of one batch. Called on every rank for each of its batches, with the model in train mode.

        Args:
            batch: As the loader gives it, on the CPU.

        Returns:
            The loss, a scalar that is the mean over the batch's samples: as a tensor; as (loss, terms), whose terms are
            logged as train/loss_<term>; or as a dict with 'loss', whose other numbers are logged as train/<name>, means
            over the samples of the batches that give them. Where it took its steps itself, with `minimize`, the figures
            alone, or nothing.
        """
        loss, terms, _ = self.forward(self.model, batch)
        return loss, terms

    def backward(self, loss: Tensor, terms: Mapping[str, Tensor], micro: MicroBatch) -> None:
        """Gradients of the mean over all ranks' samples of this step. Called on every rank after `training_step`."""
        # A number on the CPU; of one on a device the host would have to wait for it.
        value, seed = loss.item() if self._is_on_cpu else loss.detach(), None
        if micro.weight != 1 or not (self._is_on_cpu and math.isfinite(value)):
            # 0 * loss is NaN for a loss that is not finite; so then are its gradients, which every rank gets to see.
            weight = _tensor(micro.weight, dtype=loss.dtype, device=self.device)
            seed = torch.add(weight, loss.detach(), alpha=0)
        (self.scaler.scale(loss) if self.scaler else loss).backward(seed)
        self.state.add("loss", value, micro.samples)
        for name, term in terms.items():
            self.state.add(f"loss_{name}", term.detach(), micro.samples)
        if self._shares_loss and micro.closes:
            self._share_loss()

    def _follow(self, result: Any, micro: MicroBatch) -> None:
        """What follows a `training_step` that took its steps itself, or gave its figures in another form."""
        loss, figures = self.own.told(result)
        if not self.own.is_taken:
            if len(self.optimizers) > 1:
                self.own.optimizer(None)  # raises: there are several
            self.backward(loss, {}, micro)  # type: ignore[arg-type]
        elif loss is not None:
            self.state.add("loss", loss.detach(), micro.samples)
        for name, value in figures.items():
            self.state.add_figure(name, value, micro.samples)

    # ------------------------------------------------------------------------------- steps of a training_step's own

    def minimize(self, loss: Tensor, optimizer: str | None = None, retain_graph: bool = False) -> None:
        """A step of one optimizer, taken within `training_step`: `apply_gradients` of the loss's `gradients`.

        Args:
            loss: A scalar, the mean over the batch's samples. Only the optimizer's own parameters get gradients of it.
            optimizer: Its name, where the config has several.
            retain_graph: Whether another loss that is minimised later shares a part of its graph.
        """
        value = loss.detach()
        self.own.loss = value if self.own.loss is None else self.own.loss + value
        self.apply_gradients(self.gradients(loss, optimizer, retain_graph), optimizer)

    def gradients(self, loss: Tensor, optimizer: str | None = None, retain_graph: bool = False) -> list[Tensor | None]:
        """The gradients of the mean over all ranks' samples, for `parameters(optimizer)`. All ranks call it.

        They are new tensors, equal on all ranks; None for a parameter that the loss does not depend on.
        """
        with self.activity.during("backward"):
            return self.own.gradients(loss, optimizer, retain_graph)

    def apply_gradients(self, gradients: Sequence[Tensor | None], optimizer: str | None = None) -> None:
        """Step with these gradients, equal on all ranks, which are taken over; with `accumulate`, add them up first.

        The step is taken by `optimizer_step`: clipped, and left out where a gradient is not finite.
        """
        name, _ = self.own.optimizer(optimizer)
        if self.finite_step.closure is not None:
            raise ValueError("an optimizer with a closure evaluates training_step itself: let it return the loss")
        if not self.own.is_taken:
            self.finite_step.begin_parts()
        if self.own.add(name, list(gradients)):
            self._step_of(name)

    def parameters(self, optimizer: str | None = None) -> list[torch.nn.Parameter]:
        """What an optimizer trains now, in the order of its groups."""
        return trained(self.own.optimizer(optimizer)[1])

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which a model of one's own is called in `trainer.precision`; `forward` has it."""
        return self.forward.autocast()

    def frozen(self, module: torch.nn.Module, weights: str | Path | None = None) -> torch.nn.Module:
        """A module that is used and not trained, such as a teacher: in eval mode, without gradients, on the device.

        It is part of no checkpoint. `weights`: a checkpoint folder or a weight file that it takes them from; averaged
        ones where there are some.
        """
        if weights is not None:
            module.load_state_dict(load_weights(Path(weights), averaged=None))
        return module.to(self.device).eval().requires_grad_(False)

    def _step_of(self, name: str) -> None:
        """`optimizer_step` of one optimizer, while `optimizer` is that one."""
        kept = self.optimizer, self._parameters, self._to_clip
        self.optimizer = self.finite_step.optimizer = self.optimizers[name]
        if len(self.optimizers) > 1:
            self._parameters = trained(self.optimizer)
            self._to_clip = [self._parameters]
        factor = 1.0
        if self.train_loader.may_leave_out:  # the mean is over the samples that are left
            step_samples = self.own.micro.step_samples  # type: ignore[union-attr]
            factor = step_samples / max(1, step_samples - self.train_loader.left_out(step_samples).samples)
        self.own.prepare(self._gradients(), factor)
        self.finite_step.part = name
        with self.activity.during("optimizer step"):
            self.optimizer_step()
        self.optimizer, self._parameters, self._to_clip = kept

    def _finish_own_step(self) -> None:
        """What remains of a step that `training_step` has taken: gradients that wait, and what the ranks share."""
        for name in self.own.end():
            self._step_of(name)
        if self._syncs_buffers:  # which else the ranks' wrapper does, where the model is called through it
            self.ranks.agree_on_buffers(self.trainables.all)
        self.finite_step.finish_parts()

    def _share_loss(self) -> None:
        """What the ranks' wrapper does for the model: the mean of the gradients, and the main rank's buffers."""
        if self._loss_parameters:
            self.ranks.average_gradients(self._loss_parameters)
        if self._shares_buffers:
            self.ranks.agree_on_buffers(self.trainables.loss)  # type: ignore[arg-type]

    def _has_samples(self, micro: MicroBatch) -> bool:
        """Whether a step has any; where a collate_fn left some out, the gradients become the mean over the others."""
        state, step_samples = self.state, micro.step_samples
        left_out = self.train_loader.left_out(step_samples)
        state.step_left_out = left_out.samples
        if not left_out.samples:
            return True
        is_news = not state.left_out or (left_out.batches and not state.skipped_batches)
        state.left_out += left_out.samples
        state.skipped_batches += left_out.batches
        kept = step_samples - left_out.samples
        if is_news:
            text = f"collate_fn left out {left_out.samples} of the {step_samples} samples of step {state.step + 1}"
            text += f", all those of {left_out.batches} batch(es), which are skipped" if left_out.batches else ""
            text += "" if kept else ": the weights stay as they are"
            self.progress.note(f"warning: {text}; further ones are counted (left_out_samples, skipped_batches)")
        if kept and not self.own.is_taken:
            torch._foreach_mul_(self._gradients(), step_samples / kept)
        return kept > 0

    def optimizer_step(self) -> None:
        """Clip, and step unless a gradient is not finite. Called on every rank after a step's last `backward`.

        Where `training_step` takes the steps itself, it is called for each of them, while `optimizer` is the one.
        """
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        norm = self._any_norm
        if self._wants_norm or not self.ranks.strategy.are_finite(self._gradients()):
            self.state.grad_norm = norm = self._clipped()
        with self.schedule.rate_of(self.state.step) as self.state.rate:
            self.finite_step.take(norm)
        drop_gradients(self.optimizer)

    def _gradients(self) -> list[Tensor]:
        return [item.grad for item in self._parameters if item.grad is not None]

    def _clipped(self) -> Tensor:
        """Clip the gradients; their norm before."""
        norm = self.ranks.strategy.total_norm(self._gradients())
        if self.clip_grad_norm is not None:
            for parameters in self._to_clip:
                clip_grads_with_norm_(parameters, self.clip_grad_norm, norm)
        return norm

    def after_step(self, position: int) -> None:
        """What follows each optimizer step, in this order. Called on every rank.

        Args:
            position: Samples of the epoch that are done with this step, by all ranks together.
        """
        state, samples = self.state, position - self.state.position - self.state.step_left_out
        keeps = self.parts.spare is not None and self.parts.spare.is_due(state.step + 1)
        state.samples += samples
        self.throughput.step_done(samples)
        state.step, state.position = state.step + 1, position
        if self.ema:
            self.ema.update(self.module)
            if (loss := self.trainables.loss) is not None and self.trainables.loss_ema:
                self.trainables.loss_ema.update(loss)
        self.progress.step()
        if self._is_first_step:
            self._after_first_step()
        validates = state.step % self.validate_every_steps == 0
        if state.step % self.log_every_steps == 0:
            self.log()
        self.schedule.tick("step")
        if validates:
            self.validate()
        stop, save = self.vote.cast(self.stop_request.reason != "", self.saver.is_due)
        if save or validates or state.step % self.checkpoint_every_steps == 0:
            self.save()
        if keeps:
            self.keep_in_memory()
        if stop:
            self.stop()
        if self.profiler:
            self.profiler.step(state.step)

    def after_epoch(self) -> None:
        """What follows each epoch, in this order. Called on every rank, while `epoch` does not count it yet.

        Where a validation is stopped, the epoch ends when the training resumes.
        """
        self.log()
        if hint := self.advisor.advice(self.epoch + 1, self.throughput.end_epoch()):
            self.progress.note(f"hint: {hint}")
        if self.swa and self.swa.is_due(self.state) and not self.average_epoch():
            return
        if self.validate_every_steps == math.inf and not self.validate():
            return
        self.state.epoch, self.state.position, self.state.order = self.epoch + 1, 0, ORDER
        self.schedule.tick("epoch")
        self.save()

    def average_epoch(self) -> bool:
        """Take this epoch's last weights into the average of `swa`, with BatchNorm's statistics. On every rank.

        Returns:
            False where it was stopped meanwhile.
        """
        assert self.swa is not None
        self.last_step.mark()  # this step is whole, even where a rank is asked to stop
        with self.throughput.paused(), self.activity.during("BatchNorm's statistics"):
            is_done = self.swa.end_epoch(
                self.trainables, self.train_loader, self.forward, self.ranks, self.state, self.asked_to_stop
            )
        if not is_done:
            self.stop()
        return is_done

    def _after_epoch(self) -> None:
        """The name of before: a subclass that overrides it works as ever."""
        self.after_epoch()

    def after_last_step(self) -> None:
        """Leave nothing that is not logged, validated and saved, wherever in an epoch the end came. On every rank."""
        self.vote.settle()
        if not self.state.stopped:  # else the sums go into the checkpoint, and the next start logs what this one would
            self.log()
            self.finite_step.finish()
            self.validate()
        self.save()
        if self.profiler:
            self.profiler.finish(self.step)
        with self.activity.during("saving"):
            self.ranks.decide(self.saver.finish)

    def stop(self) -> None:
        """End early, with everything saved; the next start resumes. All ranks call it after the same step."""
        self.state.stopped = True
        self.state.ended = self.stop_request.reason or "another rank was asked to stop"

    # -------------------------------------------------------------------------------------------------- evaluation

    def validate(self) -> bool:
        """Validate, keep the best, count towards early stopping; once per step at most. All ranks call it.

        Returns:
            False where it was stopped meanwhile.
        """
        state = self.state
        if self.loaders.val is None or state.validated_step == state.step:
            return True
        self.last_step.mark()  # this step is whole, even where the validation waits for data and is asked to stop
        with self.throughput.paused(), self.activity.during("validation"):
            figures = self.evaluate("val")
            if state.stopped:
                return False
            score = figures.get(self.monitor)
            if score is None and self.inference.gives(self.monitor, self.loaders.of("val"), self.epoch):
                self.save()  # what was trained must not be lost for a name; the next start validates it
                raise ConfigError(not_given(self.monitor, figures))
            is_best = is_new_best(state, score, self.mode)
            self.progress.evaluation("val", state.step, figures, is_best)
            self.schedule.tick("validation", score)
            judge_patience(state, self.early_stop_patience, self.monitor)
        return True

    def evaluation_step(self, batch: Any) -> Any:
        """What is measured of one batch. Called for each of an evaluation's batches, without gradients, in eval mode.

        Each batch is one rank's; ranks call it as often as they have batches, so that it must not call a collective.
        `self.evaluated` is the module to call: the averaged weights where there are some, else the bare model.

        Args:
            batch: As the loader gives it, on the CPU.

        Returns:
            What `self.forward` gives: loss, terms and what metrics and pictures see, an `Outcome` of inputs, output
            and target; or a dict of figures, each the mean over the batch's samples, which are logged as val/<name>.
        """
        return self.forward(self.evaluated, batch)

    def _evaluate_batch(self, module: torch.nn.Module, batch: Any) -> Any:
        self.evaluated = module
        outcome = self.evaluation_step(batch)
        if self.parts.signature is None:
            self.parts.signature = signature_of(outcome)
        return outcome

    def evaluate(self, phase: str, module: torch.nn.Module | None = None) -> dict[str, float]:
        """Loss and metrics over a whole phase, written to the journal. All ranks call it and get the same.

        Args:
            phase: val or test.
            module: What to evaluate. Default: the averaged weights where there are some, else the model.

        Returns:
            The figures as <phase>/<name>, of several sets as <phase>/<label>/<name>; none where a request to stop came
            meanwhile.
        """
        module = module or self.trainables.evaluated
        figures: dict[str, float] = {}
        for name, loader in self.loaders.of(phase).items():
            self.activity.data_set = name
            of_volumes = self.inference.measures_volumes(name, self.epoch)
            means = (self._evaluate_volumes if of_volumes else self._evaluate_set)(name, loader, module)
            self.model.train()
            if means is None:
                self.stop()
                return {}
            kind = self.inference.kind(name, self.epoch)
            figures |= {f"{kind}{figure}": value for figure, value in means.items()}
            if self.metrics.tables and self.ranks.is_main:
                self._keep_tables(kind)
        self.journal.log(self.step, figures)
        return figures

    def _keep_tables(self, kind: str) -> None:
        """The confusion matrices of the set that was just evaluated: kept with a run, else printed."""
        if not self.journal.tracking_uri:
            tell_tables(self.metrics.tables, kind, self.progress.note)
            return
        folder = self.parts.start.folder
        keep_tables(self.metrics.tables, kind, folder, self.journal)
        of_val, drawers = kind.startswith("val"), self.parts.pictures.values()
        if drawer := next((each for each in drawers if (each.is_drawn if of_val else each.settings)), None):
            with drawer.time.spent_by_loop():
                draw_tables(self.metrics.tables, kind, self.step, folder, self.journal)

    def _album(self, name: str) -> Album | None:
        """The pictures of one set of a validation; None where there are none, or not of this one."""
        if (pictures := self.parts.pictures.get(name)) is None:
            return None
        is_within_epoch = self.validate_every_steps < math.inf and self.train_loader.steps(self.position)
        epochs = self.epoch if is_within_epoch else self.epoch + 1
        is_last = self.step >= self.max_steps or epochs >= self.max_epochs
        return pictures.album(self.step, self.journal, self.progress.note, is_last)

    def _evaluate_set(self, name: str, loader: Any, module: torch.nn.Module) -> dict[str, float] | None:
        """Loss and metrics over one set; None where a request to stop came meanwhile."""
        album, stop = self._album(name), self.asked_to_stop
        counted = loader.counted()
        # With shards all ranks wait.
        batches = counted if self.ranks.strategy.is_sharded else self.stop_request.waiting(counted)
        if self._shares_loss:
            self.ranks.agree_on_buffers(self.trainables.loss)  # type: ignore[arg-type]
        with self.trainables.evaluating(module):
            measured = evaluate(self._evaluate_batch, module, batches, self.metrics, self.ranks, stop, album)
        if measured and (left_out := loader.batch_sampler.size - measured.samples):
            return measured.figures | {"left_out_samples": left_out}
        return measured and measured.figures

    def _evaluate_volumes(self, name: str, loader: Any, module: torch.nn.Module) -> dict[str, float] | None:
        """Metrics over whole volumes, of a validation the loss as well."""
        is_val, album = name.startswith("val"), self._album(name)
        inference = self.inference.of_training(module, name) if is_val else self.inference
        if is_val and self._shares_loss:
            self.ranks.agree_on_buffers(self.trainables.loss)  # type: ignore[arg-type]
        # Without patches it would draw what the model makes of an item, which is a whole volume.
        if getattr(loader.dataset.dataset, "patch_shape", None) is None:
            album = None
        with self.trainables.evaluating(module):
            rest = (self.metrics, self.ranks, self.asked_to_stop, self.forward if is_val else None, album)
            return evaluate_volumes(module, logits(inference, loader), *rest)

    def test(self, checkpoint: Path | Sequence[Path] | None = None) -> dict[str, float]:
        """Loss and metrics on the test data, with the weights of a checkpoint. All ranks call it and get the same.

        The model keeps these weights.

        Args:
            checkpoint: A checkpoint folder, a weight file or a run folder; of several, an ensemble is tested, whose
                probabilities are the mean of theirs. Default: the best, else the last.
        """
        with self.activity.during("test"):
            self.saver.wait()
            called, criterion = self.trainables.compiled, self.trainables.criterion
            model, step, path = load_to_test(self.inference, called, self.saver.checkpoints, checkpoint, criterion)
            self.inference = replace(self.inference, model=model)
            if self.train_loader is None:  # else all phases were compared at the start
                for loader in self.loaders.of("test").values():
                    compare_with_training(self.inference, loader, path)
            figures = self.evaluate("test", model)
            if figures:
                self.progress.evaluation("test", step if self.train_loader is None else self.step, figures)
        return figures

    def predict(
        self,
        checkpoint: str | Path | Sequence[str | Path] | None = None,
        output_dir: str | Path | None = None,
        overwrite: bool = False,
        folds: Mapping[str, Any] | None = None,
    ) -> Result:
        """Predict what `loaders.predict` holds, else `loaders.test`, into files; see `dtrain.predict.run.predict`."""
        settings = checkpoint, output_dir, overwrite, folds
        with self.stop_request.listening():
            return predict(self.inference, self.loaders, self.saver.checkpoints, *settings)

    def asked_to_stop(self) -> bool:
        """Whether this rank, or during an evaluation any other, was asked to stop; costs no collective."""
        self.activity.beats += 1
        return self.ranks.mailbox.is_raised("stop", wish=bool(self.stop_request))

    # ------------------------------------------------------------------------------------- figures and checkpoints

    def log(self) -> None:
        """Reduce the sums since the last point, and give the figures to journal and progress. All ranks call it."""
        state = self.state
        if not state.samples:
            return
        with self.activity.during("logging"):
            self.finite_step.judge()
            trained, times = self._train_figures()
            figures = {name: value for name, value in trained.items() if math.isfinite(value)}
            if "train/loss" not in figures and self.on_nonfinite == "stop":
                raise NonFiniteError(f"train/loss is not finite at step {state.step}")
            figures |= {"lr": state.rate, "samples_per_second": self.throughput.samples_per_second}
            figures |= {f"lr/{name}": rate for name, rate in self.schedule.rates_by_group().items()}
            if self.logs_grad_norm and math.isfinite(norm := float(state.grad_norm)):
                figures["grad_norm"] = norm
            if state.skipped:
                figures["skipped_steps"] = state.skipped
            if state.left_out:
                figures |= {"left_out_samples": state.left_out, "skipped_batches": state.skipped_batches}
            state.clear()
            self.journal.log(state.step, figures | times)
            self.progress.figures(state.step, figures)
            self.stop_request.keep_listening(self.progress.note)
            self.throughput.restart(warm_up=False)

    def _train_figures(self) -> tuple[dict[str, float], dict[str, float]]:
        """The means over all samples since the last point, and where the time went."""
        sums = self.state.sums
        peaks = peak_gb(self.ranks)
        values = self.state.summed(self.ranks, [*self.throughput.row(), *peaks])
        if slow := self.throughput.judge(values[len(sums) :]):
            self.progress.note(f"warning: {slow}{cause_in_clock(self.ranks, self.throughput.slow_rank)}")
        if (rank := self.throughput.always_slow) is not None and self.ranks.is_main:
            note_nodes_of(self.ranks, self.parts.start.folder, [rank], f"slow: rank {rank}, step {self.state.step}")
        memory = {"gpu_memory_gb": max(values[-len(peaks) :])} if peaks else {}
        trained = means(dict(zip(sums, values, strict=False)), self.state.samples - self.state.unsummed)
        return memory | trained, self.throughput.figures(values[len(sums) :])

    def save(self) -> None:
        """Save all that the training is, unless nothing happened since the last time. All ranks call it.

        Raises:
            DriftError: The ranks' weights are no longer the same.
        """
        state, saver = self.state, self.saver
        keep_whole(self.parts)
        if saver.is_saved(state.place):
            return
        with self.activity.during("logging"):
            self.finite_step.judge()
        with self.activity.during("saving"), distrusted_after_error(self.parts):
            self.ranks.agree_on_buffers(self.trainables.all)
            captured = capture(state, self.trainables, self.ranks, self.parts.seed)
            if self.ranks.is_main or saver.writers is not None:
                saver.save(state.place, *captured, state.newest_score)
            else:
                saver.mark_saved(state.place)

    def keep_in_memory(self) -> None:
        """Keep all that the training is in the nodes' memory, where the next start finds it. All ranks call it."""
        with self.activity.during("logging"):
            self.finite_step.judge()
        with self.activity.during("saving"):
            keep(self.parts, self.state)

    def _check_that_it_can_be_saved(self) -> None:
        """A full disk, or a state that could not be loaded again, should show now rather than after the first epoch."""
        with self.activity.during("saving"):
            check_saving(self.parts, self.state)
            require_space(self.parts)

    def resume(self, loaded: Loaded | None) -> None:
        """Resume from a checkpoint, which only the main rank has looked into (None elsewhere). All ranks call it."""
        restore(loaded, self.state, self.trainables, self.ranks, self.parts.seed)
        if self.state.order != ORDER:
            self.progress.note("this epoch ends in the order of the version of dtrain that began it")
        judge_patience(self.state, self.early_stop_patience, self.monitor)
        self.saver.mark_saved(self.state.place)

    # -------------------------------------------------------------------------------------------------- when it fails

    @contextlib.contextmanager
    def _rescuing(self) -> Iterator[None]:
        """Where a rank is asked to stop while it waits for data that do not come: save the last whole step, and end."""
        try:
            yield
        except (StopWaiting, Exception) as error:
            judge = functools.partial(self.finite_step.judge, alone=True)
            if not rescue(error, self.parts, self.last_step, self.state, judge):
                raise
            self.stop()
            self.ranks.are_lost = self.ranks.world_size > 1

    # ------------------------------------------------------------------------------------------------ small change

    def _advisor(self, checkpoint_every_minutes: float | None) -> Advisor:
        loader: Any = getattr(self.train_loader, "loader", None)  # none where nothing is trained
        return Advisor(
            max(1, cores() // environment().local_world_size),
            getattr(loader, "num_workers", 0),
            getattr(loader, "pin_memory", False),
            self.log_every_steps,
            self.checkpoint_every_steps,
            checkpoint_every_minutes,
            self.validate_every_steps,
        )

    def _to_device(self, batch: Any, device: torch.device) -> Any:
        """A batch moved there; in a step that has a time of its own."""
        if self.activity.phase != "forward":
            return self._move(batch, device)
        self.activity.enter("transfer")
        batch = self._move(batch, device)
        self.activity.enter("forward")
        return batch

    def _reached(self, status: str, reason: str = "", test_figures: Mapping[str, float] | None = None) -> FitResult:
        folder, checkpoints = self.parts.start.folder, self.saver.checkpoints
        return fit_result(status, reason, test_figures or {}, self.state, folder, checkpoints)

    def _after_first_step(self) -> None:
        """Tell the launcher, and make the metrics: importing them takes seconds, but a mistake in them shows now."""
        self._is_first_step = False
        require_trained(self.optimizers.values(), self.module, self.trainables.loss_now)
        mark_first_step()
        batch, ranks_here = self.own.micro and self.own.micro.batch, environment().local_world_size
        if self.ranks.is_main and (text := too_little_for(batch, self.train_loader.loader, ranks_here)):
            self.progress.note(f"warning: {text}")
        with self.throughput.paused(), self.activity.during("making the metrics"):
            self.progress.waits_for("making the metrics")
            self.metrics.prepare()
            self.progress.waits_for("")
            gc.unfreeze()  # what was imported
            gc.collect()
            gc.freeze()  # what is there by now stays; looking through it for garbage would cost some steps 5 %

    def _extent(self) -> tuple[int | None, int, int]:
        """Epochs, steps of an epoch, and how many of them are done, for the progress bar."""
        loader, position = self.train_loader, self.position
        steps = int(min(loader.steps(position), self.max_steps - self.step))
        done = loader.steps_done(position)
        return None if math.isinf(self.max_epochs) else int(self.max_epochs), steps + done, done
