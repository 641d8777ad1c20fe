"""create_trainer: every part of a training, built in the order of need; knows the config, but not how one trains."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from ml_collections import ConfigDict
from torch.optim import Optimizer

from dtrain.checkpoint.files import Loaded, load, load_weights
from dtrain.checkpoint.resume import CHECKPOINTS, ResumeError, Start, find_start
from dtrain.checkpoint.snapshot import CheckpointError
from dtrain.checkpoint.store import Checkpoints
from dtrain.checkpoint.weights import misfits_of, take_over
from dtrain.config.build import build, defaults
from dtrain.config.check import check, notes
from dtrain.config.errors import ConfigError, to_plain
from dtrain.config.load import from_mapping, place_of, run_folder, sources, to_yaml
from dtrain.config.rules import strategy_mistakes
from dtrain.config.schema import PHASES, calls, refused
from dtrain.data import rng
from dtrain.dataloader import Loaders, get_train_loaders
from dtrain.distributed.environment import batch_job, environment, launcher_precision
from dtrain.distributed.fsdp import launcher_strategy, settings_of_accelerate
from dtrain.distributed.ranks import Ranks
from dtrain.distributed.setup import set_up
from dtrain.loss import get_loss_criterion
from dtrain.metrics import Metrics, get_evaluation_metric
from dtrain.modelloader import get_model
from dtrain.predict.run import IDLE_SECONDS, Use
from dtrain.reporting import summary as report
from dtrain.reporting.pictures import Pictures
from dtrain.reporting.terminal import get_progress
from dtrain.tracking.journal import Journal, NoJournal, flatten
from dtrain.tracking.secrets import keep_secret, redact, redacted_tree
from dtrain.trainer import Parts, Trainer
from dtrain.training.optimizer import get_optimizer
from dtrain.training.schedule import Schedule, end_points, get_lr_scheduler
from dtrain.training.state import FORMAT, restore

if TYPE_CHECKING:
    from subprocess import Popen


def create_trainer(
    config: ConfigDict | Mapping[str, Any],
    package: str | Path | None = None,
    sender: "Popen[bytes] | None" = None,
    purpose: Literal["train", "test", "predict"] = "train",
) -> Trainer:
    """Build model, loaders, loss, metrics, optimizer and scheduler as the config names them, and a trainer of them.

    Every rank calls it. What an earlier start of the same training left is read, so that `fit` goes on from there.

    Args:
        config: From `load_config`, or a mapping of the same form.
        package: A file or folder against which a relative `checkpoint_dir` resolves. Default: the current folder.
        sender: A process that waits for the run, from `prepare_sender`. Default: one is started with the run.
        purpose: For test and predict the config need not have what only a training needs, and only their data are
            read; a trainer made for training can test and predict as well.

    Raises:
        ConfigError: With every mistake that can be found.
    """
    config = from_mapping(config)
    keep_secret(to_plain(config))
    check(config, purpose)
    options = defaults(config, "trainer")
    options["precision"] = options["precision"] or launcher_precision() or "fp32"
    seed = config.get("seed") or 0
    ddp = ({"timeout_seconds": IDLE_SECONDS} if purpose == "predict" else {}) | (options["ddp"] or {})
    fsdp = _fsdp(config, options) if purpose == "train" else None  # else each rank has a whole model
    ranks = set_up(config.get("device", "auto"), ddp, options["deterministic"], fsdp)
    progress = get_progress(ranks.is_main)
    for line in (ranks.notes + notes(config)) if ranks.is_main else ():
        progress.note(line)
    start = _start(config, options, ranks, package)

    rng.seed_all(seed)
    module = _prepared_model(config, options, ranks, start, progress.note)
    compiled = _compiled(module, options["compile"])
    pin_memory = ranks.device.type == "cuda"
    accumulate, phases = options["accumulate"], _phases(config, purpose)
    loaders = get_train_loaders(config, ranks.rank, ranks.world_size, seed, pin_memory, accumulate, phases)
    loss = get_loss_criterion(config).to(ranks.device) if config.get("loss") else None
    metrics = get_evaluation_metric(config, ranks, ranks.device)
    monitor = _monitor(config, options, metrics)
    mode = options["mode"] or ("min" if monitor.endswith(("loss", "Error")) else "max")
    checkpoints = Checkpoints(
        start.folder / CHECKPOINTS, keep_last=options["keep_last"], keep_best=options["keep_best"], mode=mode
    )
    model, average, optimizer, schedule, table = compiled, None, None, None, dict[str, str]()
    use = _use(config, options, start, phases)
    journal: Journal | NoJournal = NoJournal()
    if purpose == "train":
        if ranks.shards and loaders.test is not None and use.whole_volumes(loaders.test):
            text = "tests whole volumes, which a model that is shared out cannot; train without, then `dtrain test`"
            raise refused(config, ("loaders", "test"), text)
        average = None if options["ema_decay"] is None else ranks.share_out(copy.deepcopy(module))
        model, journal = ranks.wrap(compiled), _journal(config, ranks, start, sender)
        optimizer, schedule, plan = _plan(config, options, module, loaders, mode)
        table = _table(config, module, loaders, ranks, journal, start, plan)
    parts = Parts(
        ranks, module, compiled, model, average, loaders, loss, metrics, optimizer, schedule, checkpoints,
        journal, progress, _pictures(config, options, loaders, start), use,
        start, seed,
        places={key: str(place) for key in config if (place := place_of(config, (key,)))},
        table=table,
        record=_record(config, options, ranks),
        texts={"config.yaml": to_yaml(redacted_tree(to_plain(config)))}
        | {f"config/{name}": redact(text) for name, text in sources(config).items()},
    )  # fmt: skip
    trainer: Trainer = build(config, "trainer", parts, monitor=monitor, mode=mode, precision=options["precision"])
    rng.seed_all(seed, 1 + ranks.rank)  # dropout differs between ranks; the weights, drawn before, do not
    if purpose == "train":
        _restore(config, trainer, ranks, start)
    return trainer


def _fsdp(config: ConfigDict, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """The options of sharing the model out; None where it is not.

    Raises:
        ConfigError: They, or other settings, do not go with it.
    """
    told = launcher_strategy()
    strategy = options["strategy"] or told or "ddp"
    if mistakes := strategy_mistakes(config, {**options, "strategy": strategy}):
        raise ConfigError(mistakes)
    if strategy == "ddp":
        return None
    own = {key: value for key, value in (options["fsdp"] or {}).items() if value is not None}
    return (settings_of_accelerate() if told else {}) | own


def _phases(config: ConfigDict, purpose: str) -> tuple[str, ...]:
    """The phases whose data are read."""
    if purpose == "train":
        return PHASES
    return ("predict",) if purpose == "predict" and config.loaders.get("predict") is not None else ("test",)


def _use(config: ConfigDict, options: Mapping[str, Any], start: Start, phases: Sequence[str]) -> Use:
    """How the model predicts, and what its predictions depend on besides weights and files."""
    described = calls(config)
    read = next((phase for phase in ("predict", "test") if phase in phases and f"loaders.{phase}" in described), "")
    data = described[f"loaders.{read}"] if read else None
    arguments = {key: to_plain(value) for key, value in data.arguments.items()} if data else {}
    identity = {
        "model": to_plain(config.model),
        "dataset": str(data.name) if data else "",
        "arguments": {key: value for key, value in arguments.items() if not _are_paths(value)},
    }
    has_weights = bool(options["pre_trained"]) and start.checkpoint is None
    return Use(build(config, "predictor"), identity, config.get("predictor") is not None, has_weights)


def _are_paths(value: Any) -> bool:
    """Whether a value names files or folders that are there: each prediction knows its own file."""
    values = value if isinstance(value, list) and value else [value]
    return all(isinstance(item, str) and Path(item).exists() for item in values)


def _plan(
    config: ConfigDict, options: Mapping[str, Any], module: torch.nn.Module, loaders: Loaders, mode: str
) -> tuple[Optimizer, Schedule, dict[str, Any]]:
    """Optimizer and schedule, and what the table says of them."""
    optimizer = get_optimizer(config, module)
    steps, epochs = _length(options, loaders)
    schedule = get_lr_scheduler(config, optimizer, steps, epochs, mode)
    rates = end_points(config, optimizer, schedule, steps, epochs)
    return optimizer, schedule, {"steps": steps, "rates": rates, "precision": options["precision"]}


def _start(config: ConfigDict, options: Mapping[str, Any], ranks: Ranks, package: str | Path | None) -> Start:
    """Where to begin, decided by rank 0 and told to the others: what one rank sees on a disk, another may not yet."""
    found: Start | str | None = None
    if ranks.is_main:
        base = Path(package or ".")
        base = base.parent if base.is_file() else base
        folder = base / run_folder(config)
        run_name = config.get("run_name") or report.default_run_name(config.get("experiment") or "run")
        uri = config.mlflow.get("tracking_uri") if config.get("mlflow") else None
        try:
            found = find_start(folder, options["resume"], run_name, options, uri, environment().restarts > 0)
        except (ResumeError, CheckpointError, OSError) as error:
            found = str(error)
    found = ranks.broadcast(found)
    if isinstance(found, str):
        raise refused(config, ("trainer", "resume"), found)
    assert isinstance(found, Start)
    return found


def _prepared_model(
    config: ConfigDict, options: Mapping[str, Any], ranks: Ranks, start: Start, say: Callable[[str], None]
) -> torch.nn.Module:
    """The bare model on its device, with pre-trained weights where a new training asks for them."""
    module = get_model(config)
    if options["pre_trained"] and start.checkpoint is None:
        if ranks.is_main:
            _load_pre_trained(config, module, options["pre_trained"], say)
        module = module if ranks.shards else module.to(ranks.device)
        ranks.share_weights(module)
    if options["sync_batchnorm"] and ranks.world_size > 1:
        if ranks.device.type != "cuda":
            raise refused(config, ("trainer", "sync_batchnorm"), "needs GPUs; torch has none of it for the CPU")
        module = torch.nn.SyncBatchNorm.convert_sync_batchnorm(module)
    return module if ranks.shards else module.to(ranks.device)  # part by part, where it is too large for a device


def _load_pre_trained(
    config: ConfigDict, module: torch.nn.Module, wish: str | Mapping[str, Any], say: Callable[[str], None]
) -> None:
    rules = {"path": wish} if isinstance(wish, str) else dict(wish)
    path = rules.pop("path")
    try:
        lines = take_over(module, load_weights(Path(path)), **rules)
    except (CheckpointError, OSError) as error:
        raise refused(config, ("trainer", "pre_trained"), str(error)) from error
    except ValueError as error:
        raise refused(config, ("trainer", "pre_trained"), f"{path} {error}") from error
    for line in [f"{path}: {len(lines)} entries were not taken over", *lines] if lines else []:
        say(line)


def _told(misfits: list[str]) -> str:
    """The first few of a list, and how many more there are."""
    return "; ".join(misfits[:10]) + (f"; and {len(misfits) - 10} more" if len(misfits) > 10 else "")


def _compiled(module: torch.nn.Module, wish: bool | str | dict[str, Any]) -> torch.nn.Module:
    if not wish:
        return module
    options = wish if isinstance(wish, dict) else {"mode": wish} if isinstance(wish, str) else {}
    return torch.compile(module, **options)  # type: ignore[return-value]


def _length(options: Mapping[str, Any], loaders: Loaders) -> tuple[int, int]:
    """Steps and epochs of the whole training."""
    assert loaders.train is not None
    per_epoch = loaders.train.steps()
    steps = min(options["max_steps"] or math.inf, (options["max_epochs"] or math.inf) * per_epoch)
    return int(steps), -(-int(steps) // per_epoch)


def _monitor(config: ConfigDict, options: Mapping[str, Any], metrics: Metrics) -> str:
    """The figure that 'best' means, known to be one that the validation gives."""
    wish = options["monitor"]
    names = [f"val/{name}" for name in (*metrics.names, "loss")]
    if wish is None:
        return names[0]
    if not wish.startswith("val/"):
        wish = f"val/{wish}"
    if not any(wish == name or wish.startswith(f"{name}_") for name in names):
        text = f"{options['monitor']!r} is no figure of the validation; possible: {', '.join(names)}"
        raise refused(config, ("trainer", "monitor"), text)
    return wish


def _journal(config: ConfigDict, ranks: Ranks, start: Start, sender: "Popen[bytes] | None") -> Journal | NoJournal:
    if not ranks.is_main:
        return NoJournal()
    experiment = config.get("experiment") or "default"
    return build(config, "mlflow", folder=start.folder, experiment=experiment, run_name=start.run_name, sender=sender)


def _pictures(config: ConfigDict, options: Mapping[str, Any], loaders: Loaders, start: Start) -> Pictures:
    wish = options["pictures"]
    settings = wish if isinstance(wish, dict) else {} if wish else None
    try:
        return Pictures(loaders.val, start.folder, settings, (options["input_key"], options["target_key"]))
    except ValueError as error:
        raise refused(config, ("trainer", "pictures"), str(error)) from None


def _record(config: ConfigDict, options: Mapping[str, Any], ranks: Ranks) -> dict[str, Any]:
    """What the journal is told at the start."""
    return {
        "params": flatten(to_plain(config)),
        "tags": {"launcher": ranks.launcher, "device": ranks.device.type, **batch_job()},
        "artifacts": [("config.yaml", "config"), ("config", "config/as-written")],
        "world_size": ranks.world_size,
        "max_epochs": options["max_epochs"],
        "max_steps": options["max_steps"],
    }


def _table(
    config: ConfigDict, module: torch.nn.Module, loaders: Loaders, ranks: Ranks, journal: Any, start: Start,
    plan: Mapping[str, Any],
) -> dict[str, str]:  # fmt: skip
    """What is shown before the first step."""
    train = loaders.train
    assert train is not None
    sizes = {phase: len(loader.loader.dataset if phase == "train" else loader.dataset)
             for phase, loader in loaders._asdict().items() if loader is not None}  # fmt: skip
    table = {
        "model": report.model_line(str(config.model.name), module),
        "data": report.data_line(sizes),
        "global batch": f"{train.global_batch} = {train.shard.batch_size} x {ranks.world_size} rank(s)"
        + (f" x {train.accumulate} accumulated" if train.accumulate > 1 else ""),
        "steps": f"{train.steps():,} per epoch, {plan['steps']:,} in all",
        "learning rate": plan["rates"],
        "device": f"{ranks.device}, {plan['precision']}" + (", the model shared out (fsdp)" if ranks.shards else ""),
        "run folder": str(start.folder),
    }
    if isinstance(journal, Journal):
        table["tracking"] = redact(journal.tracking_uri)
    if start.checkpoint:
        table["goes on from"] = str(start.checkpoint.resolve())
    return table


def _restore(config: ConfigDict, trainer: Trainer, ranks: Ranks, start: Start) -> None:
    """Go on from the checkpoint, if there is one and it is one of this model and optimizer."""
    if start.checkpoint is None:
        return
    loaded, wrong = None, ""
    if ranks.is_main:
        loaded = load(start.checkpoint)
        wrong = _unfit(trainer, loaded)
    if wrong := ranks.broadcast(wrong):
        cure = "trainer.resume=none begins again, trainer.pre_trained takes over weights alone"
        raise refused(config, ("trainer", "resume"), f"{start.checkpoint} is {wrong}; {cure}")
    restore(trainer, loaded)


def _unfit(trainer: Trainer, loaded: Loaded) -> str:
    """Of what a checkpoint is that cannot be gone on from; '' where it can."""
    if (written := loaded.state.get("format")) != FORMAT:
        return f"of another version of dtrain (its state has the format {written}, here it is {FORMAT})"
    misfits = misfits_of(trainer.module, loaded.weights)
    before, now = loaded.state["optimizer_name"], type(trainer.optimizer).__name__
    if before != now:
        misfits.insert(0, f"its optimizer is {before}, the config's {now}")
    return f"of another training: {_told(misfits)}" if misfits else ""
