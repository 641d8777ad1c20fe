"""The parts of a training, made from the config in the order of need; behind them, nothing knows the config."""

import copy
import json
import math
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from subprocess import Popen
from typing import TYPE_CHECKING, Any, Literal

import torch
from ml_collections import ConfigDict
from torch import Tensor
from torch.nn import Module
from torch.nn.parameter import is_lazy

from dtrain.checkpoint.background_saver import Saver
from dtrain.checkpoint.checkpoint_files import (
    LOSS,
    Contents,
    Loaded,
    has_averaged,
    load,
    verify_share,
    verify_together,
)
from dtrain.checkpoint.checkpoint_folder import Checkpoints
from dtrain.checkpoint.contents import CheckpointError
from dtrain.checkpoint.device_copies import copies_of
from dtrain.checkpoint.resume import ResumeError, Start, damage_in, find_start, newer_in_memory, other_writer
from dtrain.checkpoint.spare_memory import MEMORY, SpareMemory, why_not_usable
from dtrain.checkpoint.weights import is_seen, load_weights, misfits_of, take_over
from dtrain.checkpoint.written_together import Writers
from dtrain.config.build import build, defaults
from dtrain.config.check import notes
from dtrain.config.errors import ConfigError, first_few, to_plain
from dtrain.config.load import place_of, run_folder, sources, to_yaml
from dtrain.config.metric_rules import (
    Monitored,
    can_be_monitored,
    higher_is_better,
    kinds_of_validation,
    measures_itself,
    mode_text,
    monitored,
)
from dtrain.config.optimizers import ONE
from dtrain.config.rules import strategy_mistakes
from dtrain.config.schema import PHASES, calls, refused
from dtrain.data import rng
from dtrain.data.shared_memory import too_little_at_all
from dtrain.data.space import difference, space_of
from dtrain.dataloader import Loaders, first_batch, get_train_loaders
from dtrain.distributed.device import device_name, set_kernels
from dtrain.distributed.environment import batch_job, environment, job_ends_at, launcher_precision, node_name
from dtrain.distributed.fsdp import FSDP, launcher_strategy, settings_of_accelerate
from dtrain.distributed.launched_rank import full_world_size, reason_to_stop
from dtrain.distributed.process_group import set_up
from dtrain.distributed.ranks import Ranks
from dtrain.distributed.stop_request import StopRequest
from dtrain.loss import Criterion, get_loss_criterion
from dtrain.metrics import Metrics, get_evaluation_metric
from dtrain.modelloader import Forward, get_model, parameter_count
from dtrain.predict.activation import activation_of
from dtrain.predict.inference import IDLE_SECONDS, Inference
from dtrain.predict.predictor import Predictor
from dtrain.predict.work_folder import digest
from dtrain.reporting import summary as report
from dtrain.reporting.picture_time import PictureTime
from dtrain.reporting.progress import Progress
from dtrain.reporting.terminal_progress import get_progress
from dtrain.reporting.validation_pictures import Pictures
from dtrain.tracking.journal import Journal, NoJournal, flatten
from dtrain.tracking.run_folder import RunFolder, file_instead, read_run, why_not_writable
from dtrain.tracking.run_lock import RunLock
from dtrain.tracking.secrets import redact, redacted_tree
from dtrain.tracking.start_mirror import Mirror
from dtrain.tracking.uri import run_address
from dtrain.training.activation_checkpointing import checkpoint_activations
from dtrain.training.closure import closure_mistake
from dtrain.training.ema import EMA
from dtrain.training.memory_format import to_channels_last
from dtrain.training.mirrored_run import MirrorMistakeError, mirrored
from dtrain.training.optimizer import freeze, fused, get_optimizers, shown
from dtrain.training.origins import data_sets, own_code
from dtrain.training.rate_text import rate_text
from dtrain.training.run_name import made_run_name
from dtrain.training.same_training import compared, other_settings
from dtrain.training.schedule import get_lr_scheduler, get_schedule
from dtrain.training.schedule_free import ScheduleFree, is_schedule_free
from dtrain.training.state import FORMAT, Trainables
from dtrain.training.swa import SWA

if TYPE_CHECKING:
    from dtrain.tracking.node_metrics import NodeMetrics

LOST_WRITER_SECONDS = 100.0  # a disk may keep the lock of a node that is gone for as long as a lease of NFS (90 s)


@dataclass
class Parts:
    """What a trainer works with; what the purpose at hand does not need is None."""

    ranks: Ranks
    start: Start  # the run folder, and where in the training it begins
    seed: int  # of the training
    trainables: Trainables
    forward: Forward
    loaders: Loaders
    metrics: Metrics
    monitor: str  # the figure that 'best' means
    mode: Literal["min", "max"]
    saver: Saver
    stop: StopRequest
    progress: Progress
    pictures: Mapping[str, Pictures]  # of each set of the validation, by name
    inference: Inference
    record: Mapping[str, Any]  # what the journal is given at the start
    places: Mapping[str, str]  # where each section of the config stands, as file:line
    texts: Mapping[str, str]  # what goes into the run folder as it is: the config, resolved and as written
    journal: Journal = field(default_factory=NoJournal)
    table: Mapping[str, str] = field(default_factory=dict)  # what is shown before the first step
    loaded: Loaded | None = None  # the checkpoint to resume from, on the main rank
    spare: SpareMemory | None = None  # where the newest steps are kept in memory, if they are
    lock: RunLock | None = None  # on the run folder, on the main rank while it trains
    mirror: Mirror | None = None  # of the run folder, on the main rank of a training that has one
    node_metrics: "NodeMetrics | None" = None  # on the first rank of each machine but the main rank's
    signature: Mapping[str, Any] | None = None  # what the model takes and gives, once a validation has shown it
    own_code: Mapping[str, list[str]] = field(default_factory=dict)  # which the model's classes come from


def make_parts(
    config: ConfigDict,
    package: str | Path | None,
    sender: Popen[bytes] | None,
    purpose: Literal["train", "test", "predict"],
) -> Parts:
    """Build model, loaders, loss, metrics, optimizer and scheduler as the config, already checked, names them.

    Every rank calls it. The arguments are those of `create_trainer`.

    Raises:
        ConfigError: With what can only be found by building.
    """
    options = defaults(config, "trainer")
    options["precision"] = options["precision"] or launcher_precision() or "fp32"
    seed, phases = config.get("seed") or 0, _phases(config, purpose)
    ranks, progress = _ranks(config, options, purpose)
    spare = _spare_memory(config, options, ranks, progress) if purpose == "train" else None
    start, mirror, contents = _start(config, options, ranks, package, purpose, progress.note, spare)
    for line, _ in start.new_values.values() if ranks.is_main and not start.busy else ():
        progress.note(f"changed since the last start: {redact(line)}")

    rng.seed_all(seed)
    module = get_model(config)
    loaders, spaces = _loaders(config, options, ranks, start, purpose, progress.note if ranks.is_main else bool)
    loss = get_loss_criterion(config) if config.get("loss") or purpose != "predict" else None
    keys, counts = (options["input_key"], options["target_key"]), loaders.sample_counts()
    make_lazy_parts(Forward(module, torch.device("cpu"), "fp32", *keys, loss, sample_counts=counts), loaders)
    module = _prepared_model(config, module, options, ranks, start, progress.note)
    compiled = module if ranks.strategy.is_sharded else _compiled(module, options["compile"])
    loss = loss and loss.to(ranks.device)
    predictor = _predictor(config, ranks, progress, purpose)
    forward = Forward(
        module, ranks.device, options["precision"], *keys, loss, predictor.output_key, counts, progress.note
    )
    forward.channels_last = options["channels_last"]
    metrics = get_evaluation_metric(config, ranks, ranks.device)
    figure = _monitor(config, options, metrics)
    has_validation = purpose == "train" and loaders.val is not None
    mode = options["mode"] or _mode(config, figure, metrics, must_know=has_validation)
    checkpoints = Checkpoints(
        RunFolder(start.folder).checkpoints, keep_last=options["keep_last"], keep_best=options["keep_best"], mode=mode
    )
    inference = Inference(
        predictor, forward, compiled, ranks, progress, start.folder,
        _identity(config, options, phases), has_weights=bool(options["pre_trained"]) and start.checkpoint is None,
        **_whole_volumes(config, loaders, predictor),
    )  # fmt: skip
    parts = Parts(
        ranks, start, seed, _untrained(module, compiled, loss, metrics), forward, loaders, metrics, figure.figure, mode,
        _saver(checkpoints, options, ranks, progress),
        StopRequest(options["time_limit"], job_ends_at(), alone=ranks.world_size == 1, told=reason_to_stop),
        progress, _pictures(config, options, loaders, start, ranks), inference,
        record=_record(config, options, ranks, start) | {"space": spaces.get("train")},
        places={key: str(place) for key in config if (place := place_of(config, (key,)))},
        texts=_texts(config), own_code=own_code(config), mirror=mirror, spare=spare,
    )  # fmt: skip
    if purpose == "train":
        _add_training(config, options, parts, sender)
        parts.loaded = _loaded(config, parts, contents)
    return parts


def _saver(checkpoints: Checkpoints, options: Mapping[str, Any], ranks: Ranks, progress: Progress) -> Saver:
    """What saves the training; whole weights that were gathered from shards are nobody else's, and need no copy."""
    writers = None
    if ranks.strategy.saves_shards:
        writers = Writers(ranks.mailbox, ranks.rank, ranks.world_size, ranks.broadcast(uuid.uuid4().hex))
    has_copies = ranks.strategy.is_sharded and writers is None
    every_minutes = options["checkpoint_every_minutes"]
    memory = None if has_copies else copies_of(ranks.device)
    return Saver(checkpoints, every_minutes, progress.note, memory, progress.saved, writers)


def _loaders(
    config: ConfigDict,
    options: Mapping[str, Any],
    ranks: Ranks,
    start: Start,
    purpose: str,
    note: Callable[[str], Any],
) -> tuple[Loaders, dict[str, Any]]:
    """The loaders of the phases that are needed, and the space of each set, with what is worth knowing of both."""
    loaders = get_train_loaders(
        config, ranks.rank, ranks.world_size, config.get("seed") or 0, ranks.device.type == "cuda",
        options["accumulate"], _phases(config, purpose), start.batch_ranks,
    )  # fmt: skip
    _tell_of_data(loaders, note)
    spaces = {name: space_of(dataset) for name, dataset in loaders.datasets().items()}
    if purpose == "train" and (line := difference(spaces)):
        note(f"loaders: {line}")
    return loaders, spaces


def _texts(config: ConfigDict) -> dict[str, str]:
    """The config, resolved and as it was written, without secrets."""
    resolved = {"config.yaml": to_yaml(redacted_tree(to_plain(config)))}
    return resolved | {f"config/{name}": redact(text) for name, text in sources(config).items()}


def _untrained(module: Module, compiled: Module, loss: Criterion | None, metrics: Metrics) -> Trainables:
    """What has weights or a state of its own, before anything is trained."""
    if loss is None:
        return Trainables(module, compiled, compiled, kept={"metrics": metrics.kept})
    kept = {"loss": loss.kept, "metrics": metrics.kept}
    return Trainables(module, compiled, compiled, criterion=loss, loss=loss.module, kept=kept)


def make_lazy_parts(forward: Forward, loaders: Loaders) -> None:
    """Give lazy modules their shapes, which one batch tells: before weights are loaded and the optimizer is made."""
    criterion: Any = forward.criterion
    of_loss = criterion is not None and criterion.module is not None and _is_lazy(criterion.module)
    if not of_loss and not _is_lazy(forward.module):
        return
    module = forward.module.eval()  # else it would begin with statistics of this batch
    with torch.no_grad():
        if of_loss or (criterion is not None and criterion.of_model):
            criterion.train(False)
            forward(module, first_batch(loaders))
            criterion.train()
        else:
            forward.predict(module, forward.inputs(first_batch(loaders)))
    module.train()


def _is_lazy(module: Module) -> bool:
    return any(map(is_lazy, (*module.parameters(), *module.buffers())))


def _ranks(config: ConfigDict, options: dict[str, Any], purpose: str) -> tuple[Ranks, Progress]:
    """This rank among the others, and what shows its progress, which begins with what is worth knowing of both."""
    ddp = ({"timeout_seconds": IDLE_SECONDS} if purpose == "predict" else {}) | (options["ddp"] or {})
    fsdp = _fsdp(config, options) if purpose == "train" else None  # else each rank has a whole model
    ranks = set_up(config.get("device", "auto"), ddp, options["deterministic"], fsdp)
    set_kernels(options["matmul_precision"], options["cudnn_benchmark"])
    progress = get_progress(ranks.is_main)
    for line in (ranks.notes + notes(config)) if ranks.is_main else ():
        progress.note(line)
    progress.waits_for("building the data and the model")
    return ranks, progress


def _spare_memory(
    config: ConfigDict, options: Mapping[str, Any], ranks: Ranks, progress: Progress
) -> SpareMemory | None:
    """Where the newest steps are kept in memory; None where that is not asked for, a ConfigError where it cannot be."""
    every_steps, memory = options["spare_memory_every_steps"], Path(options["spare_memory_dir"] or MEMORY)
    if every_steps is None:
        return None
    why = (why for why in ranks.gather(why_not_usable(memory)) or () if why)
    if problem := ranks.broadcast(next(why, "")):
        key = "spare_memory_dir" if options["spare_memory_dir"] else "spare_memory_every_steps"
        raise refused(config, ("trainer", key), problem)
    return SpareMemory(ranks, every_steps, memory, progress.note)


def _predictor(config: ConfigDict, ranks: Ranks, progress: Progress, purpose: str) -> Predictor:
    """The predictor; where its section names no activation, with the one that the training uses."""
    predictor: Predictor = build(config, "predictor")
    sections = (to_plain(config.get(key)) for key in ("loss", "metrics"))
    if predictor.activation is not None or (known := activation_of(*sections)) is None:
        return predictor
    activation, key = known
    if activation == "softmax":  # which several channels get anyway
        return predictor
    if ranks.is_main and purpose == "predict":
        progress.note(f"predictor.activation: {activation}, as {key} has it")
    return replace(predictor, activation=activation)


def _whole_volumes(config: ConfigDict, loaders: Loaders, predictor: Predictor) -> dict[str, Any]:
    """The sets that measure whole volumes, in every how many epochs, and which validations mirror them.

    A ConfigError where a validation of them is asked for and there are none, or patches do not fit.
    """
    datasets = loaders.datasets()
    tests = [name for name in loaders.of("test") if config.get("predictor") is not None]
    found = {name: 1 for name in tests if hasattr(datasets[name], "volumes")}
    mirrored = set()
    for name in loaders.of("val"):
        settings, dataset = defaults(config, f"loaders.{name}.loader"), datasets[name]
        if not settings["whole_volumes"]:
            continue
        volumes = getattr(dataset, "volumes", ())
        without = [str(volume.path) for volume in volumes if not volume.has_label]
        if without or not volumes:
            why = f"{without[0]} is read without label" if without else f"{type(dataset).__name__} has no volumes"
            path = calls(config)[f"loaders.{name}.loader"].path_of("whole_volumes")
            raise refused(config, path, f"{why}, so that none can be measured whole")
        predictor.source(dataset)
        found[name] = settings["every_epochs"] or 1
        mirrored |= {name} if settings["whole_volumes"] == "mirrored" else set()
    return {"whole_volumes": found, "mirrored": frozenset(mirrored)}


def _add_training(config: ConfigDict, options: Mapping[str, Any], parts: Parts, sender: Popen[bytes] | None) -> None:
    """Add what only a training needs: what is trained, and the journal."""
    ranks, start, train = parts.ranks, parts.start, parts.loaders.train
    assert train is not None
    if ranks.strategy.is_sharded and (phases := {name.partition("/")[0] for name in parts.inference.whole_volumes}):
        phase, does = ("test", "tests") if "test" in phases else ("val", "measures")
        text = f"{does} whole volumes, which a sharded model cannot; train without, then `dtrain test`"
        raise refused(config, ("loaders", phase), text)
    per_epoch = train.steps()
    most, passes = (math.inf if options[key] is None else options[key] for key in ("max_steps", "max_epochs"))
    steps = int(min(most, passes * per_epoch))
    length, epochs = max(1, steps), max(1, -(-steps // per_epoch))  # of a schedule, which has no length of 0

    trainables, decay = parts.trainables, options["ema_decay"]
    if decay is not None or options["swa"]:
        trainables.ema = _average(ranks.strategy.divide(_copied(trainables.module)), options)
    _checkpoint_activations(config, options, parts)
    trainables.freezing = freezing = freeze(config, trainables.module, trainables.loss)
    trainables.model = ranks.strategy.wrap(trainables.compiled)
    if isinstance(ranks.strategy, FSDP) and options["compile"]:
        ranks.strategy.compile(trainables.model, _compile_options(options["compile"]))
    if (own := trainables.loss) is not None:
        ranks.share_weights(own)
        trainables.loss_ema = _average(_copied(own), options) if trainables.ema else None
    trainables.built = get_optimizers(config, trainables.module, own, freezing.thawed_later)
    if wrong := closure_mistake(options, trainables.optimizers.values(), ranks.strategy.is_sharded):
        raise refused(config, ("optimizer",), wrong)
    _add_averages(config, options, trainables, ranks)
    trainables.schedule = get_schedule(config, trainables.built, length, epochs, parts.mode)
    if options["precision"] == "fp16":
        trainables.scaler = torch.amp.GradScaler(ranks.device.type)
    if ranks.is_main:
        of_run = {"experiment": config.get("experiment") or "default", "run_name": start.run_name}
        parts.journal = build(config, "mlflow", folder=start.folder, sender=sender, say=parts.progress.note, **of_run)
    else:
        parts.node_metrics = _node_metrics(config, parts)
    rates = rate_text(partial(get_lr_scheduler, config), trainables.schedule, length, epochs)
    parts.table = _table(config, options, parts, steps, rates)
    parts.record = _with_length(config, parts, steps, per_epoch)
    if parts.mirror is not None:
        seconds = parts.mirror.exit_timeout_seconds
        parts.record = {**parts.record, "mirror_to": redact(parts.mirror.address), "mirror_seconds": seconds}


def _node_metrics(config: ConfigDict, parts: Parts) -> "NodeMetrics | None":
    """What samples this machine for the run in MLflow, if this rank is to: the first of a machine without rank 0."""
    here, own = environment(), node_name()
    settings = defaults(config, "mlflow") if config.get("mlflow") else {}
    if here.local_rank > 0 or not settings.get("system_metrics"):
        return None
    if parts.ranks.mailbox.notes("node", ranks=[0]).get(0, own) == own:
        return None
    from dtrain.tracking.node_metrics import NodeMetrics  # and with it what the other ranks need not hold

    return NodeMetrics(parts.start.folder, own, here.world_size // here.local_world_size)


def _average(module: Module, options: Mapping[str, Any]) -> EMA:
    """The average of weights that is asked for, which begins with a copy of them."""
    return SWA(module, **options["swa"]) if options["swa"] else EMA(module, options["ema_decay"])


def _checkpoint_activations(config: ConfigDict, options: Mapping[str, Any], parts: Parts) -> None:
    try:
        names = checkpoint_activations(parts.trainables.module, options["activation_checkpointing"])
    except ValueError as error:
        raise refused(config, ("trainer", "activation_checkpointing"), str(error)) from None
    if names and parts.ranks.is_main:
        parts.progress.note(f"activations are computed again in backward: {first_few(names, 5)}")


def _add_averages(config: ConfigDict, options: Mapping[str, Any], trainables: Trainables, ranks: Ranks) -> None:
    """The averages that a schedule-free optimizer keeps, where there is one."""
    optimizers = [*trainables.optimizers.values()]
    name = next((type(item).__name__ for item in optimizers if is_schedule_free(item)), "")
    if not name:
        return
    if key := next((key for key in ("ema_decay", "swa") if options[key] is not None), ""):
        raise refused(config, ("trainer", key), f"{name} averages the weights itself; remove one of the two")
    if ranks.strategy.is_sharded:
        text = f"{name} averages the weights itself, which has not been tried with a sharded model; possible: ddp"
        raise refused(config, ("optimizer",), text)
    trainables.ema = ScheduleFree(_copied(trainables.module), trainables.module, optimizers)
    if trainables.loss is not None:
        trainables.loss_ema = ScheduleFree(_copied(trainables.loss), trainables.loss, optimizers)


def _copied(module: Module) -> Module:
    """A deep copy, also of weights that are computed from others before each call (weight_norm): torch copies none."""
    attributes = [value for part in module.modules() for value in vars(part).values() if isinstance(value, Tensor)]
    return copy.deepcopy(module, {id(value): value.detach().clone() for value in attributes if not value.is_leaf})


def _fsdp(config: ConfigDict, options: dict[str, Any]) -> dict[str, Any] | None:
    """The options of sharding the model; None where it is not. A ConfigError says what does not go with it.

    What accelerate's settings say of activation checkpointing goes into the trainer's options.
    """
    asked_by_launcher = launcher_strategy()
    strategy = options["strategy"] or asked_by_launcher or "ddp"
    if mistakes := strategy_mistakes(config, {**options, "strategy": strategy}):
        raise ConfigError(mistakes)
    if strategy == "ddp":
        return None
    own = {key: value for key, value in (options["fsdp"] or {}).items() if value is not None}
    given = settings_of_accelerate() if asked_by_launcher else {}
    if given.pop("activation_checkpointing", False) and not options["activation_checkpointing"]:
        options["activation_checkpointing"] = given.get("layers") or True
    return given | own


def _phases(config: ConfigDict, purpose: str) -> tuple[str, ...]:
    """The phases whose data are read."""
    if purpose == "train":
        return PHASES
    return ("predict",) if purpose == "predict" and config.loaders.get("predict") is not None else ("test",)


def _identity(config: ConfigDict, options: Mapping[str, Any], phases: Sequence[str]) -> dict[str, str]:
    """What predictions depend on besides weights, the predictor's settings and input files."""
    described = calls(config)
    read = next((phase for phase in ("predict", "test") if phase in phases and f"loaders.{phase}" in described), "")
    data = described[f"loaders.{read}"] if read else None
    arguments = {key: to_plain(value) for key, value in data.arguments.items()} if data else {}
    model_and_data = {
        "model": to_plain(config.model),
        "dataset": str(data.name) if data else "",
        "arguments": {key: value for key, value in arguments.items() if not _are_paths(value)},
    }
    return {"model and data": digest(model_and_data), "precision": options["precision"]}


def _are_paths(value: Any) -> bool:
    """Whether a value names files or folders that are there: each prediction knows its own file."""
    values = value if isinstance(value, list) and value else [value]
    return all(isinstance(item, str) and Path(item).exists() for item in values)


def _start(
    config: ConfigDict,
    options: Mapping[str, Any],
    ranks: Ranks,
    package: str | Path | None,
    purpose: str,
    say: Callable[[str], None],
    spare: SpareMemory | None = None,
) -> tuple[Start, Mirror | None, Contents | None]:
    """Where to begin, decided by rank 0: what one rank sees on a disk, another may not yet; and its run's mirror.

    With what is in the files of the checkpoint, which are read to verify them, for a training to resume from.
    """
    contents: Contents | None = {} if purpose == "train" else None
    folder = _base_folder(package) / run_folder(config)
    mirror = _mirror(config, options, ranks, folder, purpose, say)
    overrides = sources(config).get("overrides.txt", "").splitlines()
    run_name = config.get("run_name") or made_run_name(config.get("experiment") or "run", overrides)
    uri = config.mlflow.get("tracking_uri") if config.get("mlflow") else None
    is_restart = environment().restarts > 0
    kept = spare.look(folder) if spare else None

    def decided(ask: Callable[[Path], list[Any]]) -> Start:
        if file := file_instead(folder):
            raise refused(config, ("trainer", "checkpoint_dir"), f"{file} is a file, expected a folder")
        busy = other_writer(folder) if purpose == "train" else ""
        until = time.monotonic() + (LOST_WRITER_SECONDS if is_restart else 0.0)
        while busy and time.monotonic() < until:  # a lost node's lock lives on for a while
            time.sleep(1.0)
            busy = other_writer(folder)
        if busy:  # its checkpoints come and go
            return Start(folder, run_name=run_name, busy=busy)
        verify = partial(verify_together, ask, contents=contents)
        start = find_start(folder, options["resume"], run_name, options, uri, is_restart, verify)
        if purpose != "train" or start.busy:
            return start
        if kept is not None and start.folder == folder:
            start = newer_in_memory(start, kept, options["resume"], is_restart)
        if not start.finished and (problem := why_not_writable(start.folder)):
            raise refused(config, ("trainer", "checkpoint_dir"), f"{start.folder} cannot be written: {problem}")
        if start.checkpoint is None and not start.moves_aside and (damage := damage_in(start.folder)):
            raise ResumeError(damage)
        return compared(config, start, options["resume"], full_world_size() or ranks.world_size)

    try:
        start = ranks.consult(decided, _share_of_verifying(ranks))
        return start, mirror if ranks.is_main and purpose == "train" else None, contents
    except (ResumeError, CheckpointError, OSError) as error:
        is_asked = options["resume"] not in ("auto", "none", "last") or not isinstance(error, OSError)
        raise refused(config, ("trainer", "resume" if is_asked else "checkpoint_dir"), str(error)) from error


def _share_of_verifying(ranks: Ranks) -> Callable[[Path], Any]:
    return partial(verify_share, rank=ranks.rank, world_size=ranks.world_size)


def _mirror(
    config: ConfigDict, options: Mapping[str, Any], ranks: Ranks, folder: Path, purpose: str, say: Callable[[str], None]
) -> Mirror | None:
    """The mirror, from which the run folder has what is ahead there."""
    try:
        other = partial(other_settings, config)
        return mirrored(folder, options, ranks, purpose, environment().restarts > 0, say, other)
    except MirrorMistakeError as error:
        raise refused(config, ("trainer", "mirror_to"), str(error)) from None


def _base_folder(package: str | Path | None) -> Path:
    """What a relative run folder resolves against; never where packages are installed: an upgrade would remove it."""
    base = Path(package or ".")
    folder = base.parent if base.is_file() else base
    return Path() if {"site-packages", "dist-packages"} & set(folder.resolve().parts) else folder


def _tell_of_data(loaders: Loaders, note: Callable[[str], Any]) -> None:
    if loaders.train and (text := too_little_at_all(loaders.train.loader.num_workers)):
        note(f"warning: {text}")
    if seeded := loaders.seeded():
        note(f"generators that are seeded for each sample: {first_few(seeded, 5)}")
    if cut := loaders.not_searched():
        text = f"the search for generators to seed for each sample saw only a part of the datasets of {', '.join(cut)}"
        note(f"{text}; it passes over objects with `seeds_itself = True`, see docs/data.md")
    for name, dataset in loaders.datasets().items():
        for line in getattr(getattr(dataset, "places", None), "notes", ()):
            note(f"loaders.{name}: {line}")


def _prepared_model(
    config: ConfigDict,
    module: Module,
    options: Mapping[str, Any],
    ranks: Ranks,
    start: Start,
    say: Callable[[str], None],
) -> Module:
    """The bare model on its device, with pre-trained weights where a new training asks for them."""
    if options["pre_trained"] and start.checkpoint is None:
        if ranks.is_main:
            _load_pre_trained(config, module, options["pre_trained"], say)
        module = module if ranks.strategy.is_sharded else module.to(ranks.device)
        ranks.share_weights(module)
    if options["sync_batchnorm"] and ranks.world_size > 1:
        if ranks.device.type != "cuda":
            raise refused(config, ("trainer", "sync_batchnorm"), "requires CUDA; PyTorch has no CPU implementation")
        module = torch.nn.SyncBatchNorm.convert_sync_batchnorm(module)
    # A model that is too large for a device goes there part by part.
    module = module if ranks.strategy.is_sharded else module.to(ranks.device)
    if options["channels_last"] and not ranks.strategy.is_sharded:  # a shard has no channels
        to_channels_last(module)
    return module


def _load_pre_trained(
    config: ConfigDict, module: Module, wish: str | Mapping[str, Any], say: Callable[[str], None]
) -> None:
    rules: dict[str, Any] = {"path": wish} if isinstance(wish, str) else dict(wish)
    path, averaged = rules.pop("path"), {None: None, "raw": False, "averaged": True}[rules.pop("weights", None)]
    try:
        lines = take_over(module, load_weights(Path(path), averaged), **rules)
    except (CheckpointError, OSError, ValueError) as error:
        text = str(error) if isinstance(error, CheckpointError | OSError) else f"{path} {error}"
        raise refused(config, ("trainer", "pre_trained"), text) from error
    if averaged is None and has_averaged(Path(path)):
        say(f"{path}: its averaged weights, as it was validated and tested; pre_trained.weights: raw takes the others")
    for line in [f"{path}: {len(lines)} entries were not taken over", *lines] if lines else []:
        say(line)


def _compiled(module: Module, wish: bool | str | dict[str, Any]) -> Module:
    return torch.compile(module, **_compile_options(wish)) if wish else module  # type: ignore[return-value]


def _compile_options(wish: bool | str | dict[str, Any]) -> dict[str, Any]:
    return wish if isinstance(wish, dict) else {"mode": wish} if isinstance(wish, str) else {}


def _monitor(config: ConfigDict, options: Mapping[str, Any], metrics: Metrics) -> Monitored:
    """The figure that 'best' means, known to be one that the validation gives."""
    kinds = kinds_of_validation(calls(config))
    figure = monitored(options["monitor"], metrics.names, kinds, measures_itself(config))
    if figure is None:
        possible = ", ".join(can_be_monitored(metrics.names, kinds))
        text = f"{options['monitor']!r} is not a metric of the validation; possible: {possible}"
        raise refused(config, ("trainer", "monitor"), text)
    return figure


def _mode(config: ConfigDict, figure: Monitored, metrics: Metrics, must_know: bool) -> Literal["min", "max"]:
    """What is best of a figure: as its metric's source says, else the metric itself, which is then made at once.

    A ConfigError where neither says so and it must be known: something will be validated. (Who tests or predicts takes
    the best checkpoint that the training chose.)
    """
    higher = higher_is_better(calls(config), figure)
    if higher is ... and must_know:
        higher = metrics.higher_is_better(figure.label, figure.part)
    if higher is None and must_know:
        raise refused(config, ("trainer", "mode"), mode_text(calls(config), figure))
    return "max" if higher is True else "min"


def _pictures(
    config: ConfigDict, options: Mapping[str, Any], loaders: Loaders, start: Start, ranks: Ranks
) -> dict[str, Pictures]:
    """What draws the validation, by the name of the set."""
    wish = options["pictures"]
    settings = wish if isinstance(wish, dict) else {} if wish else None
    try:
        keys = options["input_key"], options["target_key"]
        named, time = loaders.of("val").items(), PictureTime(ranks)
        return {name: Pictures(loader, start.folder, settings, keys, name, time) for name, loader in named}
    except ValueError as error:
        raise refused(config, ("trainer", "pictures"), str(error)) from None


def _record(config: ConfigDict, options: Mapping[str, Any], ranks: Ranks, start: Start) -> dict[str, Any]:
    """What the journal is told at the start."""
    new_values = {key: value for key, (_, value) in start.new_values.items()}
    return {
        "params": flatten(to_plain(config)),
        "tags": {
            "launcher": ranks.launcher,
            "device": ranks.device.type,
            "dtrain.directory": str(Path.cwd()),
            **batch_job(),
            **new_values,
        },
        "artifacts": [("config.yaml", "config"), ("config", "config/as-written")],
        "world_size": ranks.world_size,
        "batch_ranks": start.batch_ranks or ranks.world_size,
        "max_epochs": options["max_epochs"],
        "max_steps": options["max_steps"],
        "directory": str(Path.cwd()),
        "device": ranks.device.type,
        "is_named_by_dtrain": not config.get("run_name"),
        "trackers": [str(call.name) for key, call in calls(config).items() if key.startswith("trackers.")],
    }


def _with_length(config: ConfigDict, parts: Parts, steps: int, per_epoch: int) -> dict[str, Any]:
    """The record with what tells how far a training is, and which figure to look at; MLflow has it in tags."""
    sizes = {name: len(dataset) for name, dataset in parts.loaders.datasets().items()}
    facts = {"steps": steps, "steps_per_epoch": per_epoch, "monitor": parts.monitor, "mode": parts.mode}
    facts["samples"] = sizes
    datasets = data_sets(config, parts.loaders.datasets())
    tags = {f"dtrain.{key}": json.dumps(value) if key == "samples" else str(value) for key, value in facts.items()}
    return {**parts.record, "tags": {**parts.record["tags"], **tags}, "datasets": datasets, **facts}


def _table(config: ConfigDict, options: Mapping[str, Any], parts: Parts, steps: int, rates: str) -> dict[str, str]:
    """What is shown before the first step."""
    ranks, start = parts.ranks, parts.start
    train: Any = parts.loaders.train
    sizes = {name: len(dataset) for name, dataset in parts.loaders.datasets().items()}
    table = {
        "model": report.model_line(str(config.model.name), *parameter_count(parts.trainables.module)),
        "data": ", ".join(f"{phase} {size:,}" for phase, size in sizes.items()) + " samples",
        "global batch": train.step_size,
        "steps": f"{train.steps():,} per epoch, {steps:,} in all",
        "learning rate": rates,
        "device": device_name(ranks.device) + (", the model sharded (fsdp)" if ranks.strategy.is_sharded else ""),
        "precision": options["precision"] + (", compiled" if options["compile"] else ""),
        "workers": report.workers_line(defaults(config, "loaders.train.loader")["num_workers"]),
        "run folder": str(start.folder),
    }
    if options["ema_decay"] is not None:
        table["EMA"] = f"decay {options['ema_decay']:g}; validated and tested"
    if (freezing := parts.trainables.freezing) and (frozen := "; ".join(freezing.lines())):
        table["frozen"] = frozen
    if names := fused(parts.trainables.optimizers):
        table["optimizer"] = f"{names}, torch's fused kernels"
    table |= dict(shown(parts.trainables.built, most=8))
    if train.sampler is not None:
        table["sampler"] = train.described
    if options["limit_batches"] or options["overfit_batches"]:
        table["data"] += f", of which are used {parts.loaders.used()}"
    if trained := parts.trainables.loss and parameter_count(parts.trainables.loss)[1]:
        table["loss"] = f"{config.loss.name}, {trained:,} parameters trained"
    if parts.journal.tracking_uri:
        uri, known = parts.journal.tracking_uri, read_run(start.folder) if start.checkpoint else {}
        table["tracking"] = run_address(uri, known) or redact(uri)
    if parts.mirror is not None:
        table["mirror"] = redact(parts.mirror.address)
    if start.checkpoint:
        table["resumes from"] = str(start.checkpoint.resolve())
    return table


def _loaded(config: ConfigDict, parts: Parts, contents: Contents | None) -> Loaded | None:
    """The checkpoint to resume from, on the main rank, if there is one; all ranks refuse one that does not fit."""
    start, ranks = parts.start, parts.ranks
    if start.checkpoint is None:
        return None
    path, loaded = start.checkpoint, None
    kept = parts.spare.fetch(start.kept) if parts.spare and start.kept else None
    # Of one that some ranks do not see, the main rank reads all, and the others are given their parts.
    reads_parts = ranks.strategy.is_sharded and not start.kept and ranks.consult(lambda ask: all(ask(path)), is_seen)

    def read(ask: Callable[[Path], list[Any]]) -> str:
        nonlocal loaded
        if kept is None and not start.is_verified and (problems := verify_together(ask, path, contents)):
            return f"{path} is not a whole checkpoint: {'; '.join(problems)}"
        loaded = kept or load(path, is_verified=True, as_stored=reads_parts, contents=contents)
        return f"{path} is {found}" if (found := _misfit(parts.trainables, loaded)) else ""

    try:
        misfit = ranks.consult(read, _share_of_verifying(ranks))
    except CheckpointError as error:
        misfit = str(error)
    if misfit:
        cure = "trainer.resume=none begins again, trainer.pre_trained takes over weights alone"
        raise refused(config, ("trainer", "resume"), f"{misfit}; {cure}")
    return loaded


def _misfit(trainables: Trainables, loaded: Loaded) -> str:
    """What keeps a training from resuming from a checkpoint; '' where nothing does."""
    if (written := loaded.state.get("format")) != FORMAT:
        return f"of another version of dtrain (its state has the format {written}, here it is {FORMAT})"
    misfits = misfits_of(trainables.module, loaded.weights)
    if (loss := trainables.loss) is not None and (LOSS in loaded.others or [*loss.parameters()]):
        misfits += [f"of the loss, {line}" for line in misfits_of(loss, loaded.others.get(LOSS, {}))]
    names = {name: type(optimizer).__name__ for name, optimizer in trainables.optimizers.items()}
    before, now = loaded.state["optimizer_name"], names.get(ONE, names)
    if before != now:
        misfits.insert(0, f"its optimizer is {before}, the config's {now}")
    return f"of another training: {first_few(misfits, 10, '; ')}" if misfits else ""
