"""The files of pytorch-3dunet and its forks in dtrain's words, every key with its place.

Two steps. Names that mean the same are replaced file by file, so that files of several dialects can be merged. What
pytorch-3dunet means otherwise than dtrain is translated once, when everything is merged.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from dtrain.config.errors import ConfigError, KeyPath, Mistake, Place, dotted, found, shown

_ANYWHERE: tuple[KeyPath, ...] = (("trainer",), ("mlflow",), ())
# pytorch-3dunet's and its forks' names for the same settings, replaced in files and overrides alike.
RENAMES: dict[KeyPath, KeyPath] = {
    ("manual_seed",): ("seed",),
    ("eval_metric",): ("metrics",),
    ("metrics", "names"): ("metrics", "name"),
    ("trainer", "optimizer"): ("optimizer",),
    ("trainer", "lr_scheduler"): ("lr_scheduler",),
    ("optimizer", "learning_rate"): ("optimizer", "lr"),
    ("loaders", "dataset"): ("loaders", "name"),
    ("loaders", "valid"): ("loaders", "val"),
    **{("loaders", phase, "dataset"): ("loaders", phase, "name") for phase in ("train", "val", "test")},
    ("trainer", "max_num_epochs"): ("trainer", "max_epochs"),
    ("trainer", "max_num_iterations"): ("trainer", "max_steps"),
    ("trainer", "validate_after_iters"): ("trainer", "validate_every_steps"),
    ("trainer", "log_after_iters"): ("trainer", "log_every_steps"),
    ("trainer", "eval_score_higher_is_better"): ("trainer", "mode"),
    **{(*section, "mlflow_path"): ("mlflow", "tracking_uri") for section in _ANYWHERE},
    **{(*section, "experiment_name"): ("experiment",) for section in _ANYWHERE},
}
OTHER_NAMES = {"dataset": "name", "names": "name", "learning_rate": "lr"}  # which a class may take, too
MODES = {True: "max", False: "min"}  # of eval_score_higher_is_better

Values = dict[str, Any]
Places = dict[KeyPath, Place]


def canonical_key(path: KeyPath, value: Any, values: Values) -> tuple[KeyPath, Any]:
    """The key path and the value that an override of another dialect stands for, in a config with these values."""
    for old, new in RENAMES.items():
        if path[: len(old)] == old and not _is_argument(values, old, new, value if path == old else None):
            value = _canonical_value(old, value) if path == old else value
            path = (*new, *path[len(old) :])
    return path, value


def canonical_names(values: Values, places: Places) -> None:
    """Rename, in place, what another dialect calls otherwise; a ConfigError where a setting has both names."""
    mistakes = [wrong for old, new in RENAMES.items() for wrong in _rename(values, places, old, new)]
    if mistakes:
        raise ConfigError(mistakes)
    metrics = values.get("metrics")
    if isinstance(metrics, dict) and isinstance(metrics.get("multiple"), bool):
        del metrics["multiple"]  # a fork's flag for 'name is a list', which the list itself says


def _rename(values: Values, places: Places, old: KeyPath, new: KeyPath) -> Iterator[Mistake]:
    """Move a setting, unless something stands in its new place."""
    parent = _mapping_at(values, old[:-1])
    if parent is None or old[-1] not in parent or _is_argument(values, old, new, parent[old[-1]]):
        return
    target = _mapping_at(values, new[:-1], create=True)
    text = f"'{dotted(old)}' and '{dotted(new)}' are two names for one setting; keep one of them"
    if target is None:
        text = f"{dotted(old)}: stands for '{dotted(new)}', but '{dotted(new[:-1])}' is not a mapping"
    if target is None or new[-1] in target:
        yield Mistake(text, places.get(old))
    else:
        target[new[-1]] = _canonical_value(old, parent.pop(old[-1]))
        _move_places(places, old, new)


def _is_argument(values: Values, old: KeyPath, new: KeyPath, value: Any) -> bool:
    """Whether a key that looks like another name of ours is meant for the class, such as the dataset of a Subset.

    `valid` is a phase where it is a mapping, `dataset` a name where it is a text; beside `name` or `lr` both names of
    the same setting belong to whoever takes them.
    """
    if old[-1] == "valid":
        return not isinstance(value, dict | None)
    if old[-1] == "dataset" and isinstance(value, dict | list):
        return True
    parent = _mapping_at(values, old[:-1]) or {}
    return old[-1] in OTHER_NAMES and old[:-1] == new[:-1] and new[-1] in parent and old[-1] in parent


def _move_places(places: Places, old: KeyPath, new: KeyPath) -> None:
    """What stood at `old` and below stands at `new` now; a place that a replaced value left there is the user's own."""
    if old in places and new[:-1]:
        places.setdefault(new[:-1], places[old])
    places |= {(*new, *path[len(old) :]): where for path, where in places.items() if path[: len(old)] == old}


def _canonical_value(old: KeyPath, value: Any) -> Any:
    return MODES[value] if old[-1] == "eval_score_higher_is_better" and isinstance(value, bool) else value


def _mapping_at(values: Any, path: KeyPath, create: bool = False) -> dict[Any, Any] | None:
    for key in path:
        if isinstance(values, dict) and create and values.get(key) is None:
            values[key] = {}
        if isinstance(values, list) and isinstance(key, int) and key < len(values):
            values = values[key]
        else:
            values = values.get(key) if isinstance(values, dict) else None
    return values if isinstance(values, dict) else None


_DATASETS = ("StandardHDF5Dataset", "LazyHDF5Dataset", "DSB2018Dataset")
_FOREIGN = (".pytorch", ".pt", ".pth")  # files that hold a checkpoint; dtrain's own are folders
_PHASES = ("train", "val", "test")
_TRANSFORMS = "dtrain.components.transforms.pytorch3dunet.paired"

# What pytorch-3dunet takes where a file says nothing, and dtrain takes otherwise.
_DEFAULTS: dict[tuple[str, str], Any] = {
    ("loaders", "name"): "StandardHDF5Dataset",
    ("loaders", "num_workers"): 1,
    ("optimizer", "name"): "Adam",
    ("optimizer", "lr"): 1e-3,
    ("optimizer", "weight_decay"): 0,
    ("lr_scheduler", "interval"): "validation",
    ("trainer", "validate_every_steps"): 200,
    ("trainer", "log_every_steps"): 100,
    ("trainer", "mode"): "max",
}
# torch's losses that know none of these keys; dtrain's own know them all.
_BARE_LOSSES = ("BCEWithLogitsLoss", "CrossEntropyLoss", "MSELoss", "L1Loss", "SmoothL1Loss")
_MASK_KEYS = ("ignore_index", "skip_last_target", "squeeze_channel")
_CROSS_ENTROPIES = ("CrossEntropyLoss", "WeightedCrossEntropyLoss")
_METRICS: dict[str, Values] = {  # with what pytorch-3dunet takes where the file says nothing, and dtrain otherwise
    "MeanIoU": {},
    "DiceCoefficient": {"absent": "zero"},
    "AdaptedRandError": {"threshold": None, "use_last_target": False},
    "BoundaryAdaptedRandError": {"thresholds": [0.3, 0.4, 0.5, 0.6]},
    "BoundaryAveragePrecision": {"thresholds": [0.3, 0.4, 0.5, 0.6], "input_channel": 0},
    "BlobsAveragePrecision": {"thresholds": [0.4, 0.5, 0.6, 0.7, 0.8], "input_channel": 0, "invert_pmaps": False},
    "PSNR": {},
    "MSE": {},
}
_WEIGHTED = ("WeightedCrossEntropyLoss", "WeightedSmoothL1Loss")
_LOSSES = (*_BARE_LOSSES, "BCEDiceLoss", "DiceLoss", "GeneralizedDiceLoss", *_WEIGHTED)
_HALO = "what is read around a patch is slice_builder.halo_shape"
_IGNORED: dict[KeyPath, str] = {  # published settings that change no result, there or here, and why
    ("trainer", "skip_train_validation"): "metrics are computed on validation data alone, never on training batches",
    ("trainer", "max_val_images"): "the number of samples drawn is set by trainer.pictures",
    ("trainer", "tensorboard_formatter"): "pictures go to MLflow, not to TensorBoard, and have one fixed form",
    ("loaders", "mirror_padding"): _HALO,
    ("predictor", "patch_halo"): _HALO,
}
_PLOTS = "instances are not plotted; trainer.pictures draws the validation"
_THRESHOLDS = "pytorch-3dunet reads thresholds, a list"
_LAST = "the last channel of the target holds the instances, always"
_IGNORED_BY_METRICS: dict[str, dict[str, str]] = {  # "": by all of them
    "": {"use_first_input": "the channel is input_channel", "save_plots": _PLOTS, "plots_dir": _PLOTS},
    "AdaptedRandError": {"threshold": "the output's classes are compared as they are"},
    "BoundaryAdaptedRandError": {"threshold": _THRESHOLDS},
    "BoundaryAveragePrecision": {
        "threshold": _THRESHOLDS,
        "use_last_target": _LAST,
        "metric": "it is the average precision, always",
    },
    "BlobsAveragePrecision": {"threshold": _THRESHOLDS, "use_last_target": _LAST},
    "PSNR": {"ignore_index": "all voxels count"},
    "MSE": {"ignore_index": "all voxels count"},
}


def further_keys() -> list[KeyPath]:
    """The keys of pytorch-3dunet's files, beside those renamed, that dtrain reads there and nowhere else."""
    metrics = {key for keys in _IGNORED_BY_METRICS.values() for key in keys}
    trainer = ("epochs", "iters", "validate_iters")
    return [
        ("model_path",),
        *_IGNORED,
        *(("metrics", key) for key in sorted(metrics)),
        *(("trainer", key) for key in trainer),
        *(("loss", key) for key in (*_MASK_KEYS, "beta")),
        *(("loaders", key) for key in ("output_dir", "expand_dims", "transformer")),
        ("predictor", "name"),
    ]


def translate(values: Values, places: Places) -> list[str]:
    """Turn a train or test file of pytorch-3dunet, in place, into the settings of dtrain that do the same.

    A file is taken for one of pytorch-3dunet's if a phase of its `loaders` has a `transformer` and the dataset is one
    of pytorch-3dunet's. Returns lines about what was filled in and what has no effect here; a ConfigError has every key
    that cannot be supported.
    """
    work = _Translation(values, places)
    phases = [work.section(*path) for path in work.phases()]
    is_its_own = work.section("loaders").get("name", _DATASETS[0]) in _DATASETS
    if is_its_own and any("transformer" in phase for phase in phases):
        for step in (work.ignored, work.fill, work.trainer, work.loaders, work.loss, work.metrics, work.predictor):
            step()
    if work.mistakes:
        raise ConfigError(work.mistakes)
    return work.notes


class _Translation:
    """One file's way from pytorch-3dunet to dtrain; collects every mistake before any is raised."""

    def __init__(self, values: Values, places: Places) -> None:
        self.values, self.places = values, places
        self.notes: list[str] = []
        self.mistakes: list[Mistake] = []

    def phases(self) -> list[KeyPath]:
        """Where each phase of the loaders is; of several sets each."""
        loaders = self.section("loaders")
        listed = [(phase, loaders.get(phase)) for phase in _PHASES]
        return [
            ("loaders", phase, *index)
            for phase, own in listed
            for index in ([(number,) for number in range(len(own))] if isinstance(own, list) else [()])
        ]

    def section(self, *path: str | int) -> Values:
        """The settings at a path; where there are none, a mapping that nobody else sees."""
        settings = _mapping_at(self.values, path)
        return {} if settings is None else settings

    def wrong(self, path: KeyPath, text: str) -> None:
        """A key that cannot be supported."""
        where = next((self.places[path[:end]] for end in range(len(path), -1, -1) if path[:end] in self.places), None)
        self.mistakes.append(Mistake(f"{dotted(path)}: {text}", where))

    def ignore(self, path: KeyPath, why: str) -> None:
        """Drop a key, if it is there, and say that it has no effect; null is the same as none."""
        section = self.section(*path[:-1])
        if section.pop(str(path[-1]), None) is not None:
            self.notes.append(f"{dotted(path)}: has no effect: {why}")

    def ignored(self) -> None:
        """What pytorch-3dunet reads past."""
        for path, why in _IGNORED.items():
            self.ignore(path, why)
        name = self.section("metrics").get("name")
        if isinstance(name, str) and name in _METRICS:
            for key, why in (_IGNORED_BY_METRICS[""] | _IGNORED_BY_METRICS.get(name, {})).items():
                self.ignore(("metrics", key), why)
        if self.section("loss").get("name") == "BCEDiceLoss":
            self.ignore(("loss", "beta"), "alpha is the one weight that pytorch-3dunet reads")

    def fill(self) -> None:
        filled = []
        for (name, key), value in _DEFAULTS.items():
            section = _mapping_at(self.values, (name,))
            # AdamW is the one of torch's optimizers whose own weight decay is not 0.
            if section is None or key in section or (key == "weight_decay" and section.get("name") != "AdamW"):
                continue
            section[key] = value
            filled.append(f"{name}.{key}: {shown(value)}")
        if filled:
            self.notes.append(f"pytorch-3dunet's defaults, where the file sets nothing: {', '.join(filled)}")

    def trainer(self) -> None:
        trainer = self.section("trainer")
        _drop_nulls(trainer, ("resume", "validate_iters"))
        _drop_nulls(self.section("model"), ("num_groups",))
        for old, new in (("epochs", "max_epochs"), ("iters", "max_steps")):  # in older files
            self.mistakes += _rename(self.values, self.places, ("trainer", old), ("trainer", new))
        resume = str(trainer.get("resume", ""))
        if resume.endswith(_FOREIGN):
            text = "a checkpoint of pytorch-3dunet lacks what a training needs to resume (the schedule's state, the "
            text += f"random numbers', the place in the epoch); to start from its weights: pre_trained: {resume}"
            self.wrong(("trainer", "resume"), text)
        if "validate_iters" in trainer:
            self.wrong(("trainer", "validate_iters"), "a validation always covers all of loaders.val; remove it")

    def loaders(self) -> None:
        loaders = self.values["loaders"]
        self._weights()
        for path in self.phases():
            own = self.section(*path)
            if "transformer" in own:
                self._transformer(own, path)
            if path[1] == "test" and loaders["name"] != "DSB2018Dataset":
                own |= {"label_internal_path": None, "weight_internal_path": None}
        if loaders["name"] == "DSB2018Dataset" and loaders.pop("expand_dims", None) is not None:
            text = "an image is (C, H, W) here, and a 2-D network takes it as it is"
            self.notes.append(f"loaders.expand_dims: has no effect: {text}")

    def _weights(self) -> None:
        """Weights of voxels are read where a loss of one's own may take them; pytorch-3dunet's losses cannot."""
        name = self.section("loss").get("name")
        has_use = name is not None and name not in _LOSSES
        for section in (("loaders",), *self.phases()):
            _drop_nulls(self.section(*section), ("weight_internal_path",))
            if not has_use:
                self.ignore((*section, "weight_internal_path"), f"{name or 'a prediction'} takes no weights of voxels")
        for path in self.phases():
            if "weight_internal_path" not in {**self.section("loaders"), **self.section(*path)}:
                self.ignore((*path, "transformer", "weight"), "no weights of voxels are read")

    def _transformer(self, phase: Values, path: KeyPath) -> None:
        """The lists for image and label become one transform of both; what is in them is checked where it is built."""
        lists = phase.pop("transformer")
        path = (*path, "transformer")
        if not isinstance(lists, dict):
            self.wrong(path, f"expected a mapping of the lists raw and label, {found(lists)}")
            return
        for key in [key for key in lists if key not in ("raw", "label", "weight")]:
            self.wrong((*path, key), "possible: raw, label, weight")
        if "raw" not in lists:
            self.wrong(path, "has no list 'raw' for the image")
            return
        if path[1] == "test":  # where pytorch-3dunet itself reads no label
            lists = {"raw": lists["raw"]}
        phase["transforms"] = {"name": _TRANSFORMS, "label": None} | lists
        _move_places(self.places, path, (*path[:-1], "transforms"))

    def loss(self) -> None:
        """What pytorch-3dunet wraps around torch's losses is a loss around them here as well."""
        loss = self.section("loss")
        _drop_nulls(loss, ("weight", "pos_weight", *_MASK_KEYS))
        name = loss.get("name")
        if name == "BCEWithLogitsLoss":
            self._binary_weights(loss)
        if name not in _BARE_LOSSES:
            return
        own = ("ignore_index",) if name == "CrossEntropyLoss" else ()
        outer = {key: loss.pop(key) for key in _MASK_KEYS if key in loss and key not in own}
        if not any(value is not False for value in outer.values()):
            return
        for key in loss:
            _move_places(self.places, ("loss", key), ("loss", "loss", key))
        self.values["loss"] = {"name": "MaskedLoss", "loss": loss} | outer

    def _binary_weights(self, loss: Values) -> None:
        if "weight" in loss:
            text = "pytorch-3dunet does not use it; remove it, or weight the foreground with pos_weight"
            self.wrong(("loss", "weight"), text)
        weight = loss.get("pos_weight")
        if isinstance(weight, int | float) and not isinstance(weight, bool):
            loss["pos_weight"] = [weight]
        elif isinstance(weight, list) and len(weight) != 1:
            text = "weights along the last axis of a volume, not along its channels; give one"
            self.wrong(("loss", "pos_weight"), f"torch applies {len(weight)} {text}")

    def metrics(self) -> None:
        metrics = self.section("metrics")
        _drop_nulls(metrics, list(metrics))
        name = metrics.get("name")
        if not isinstance(name, str) or name not in _METRICS:
            return
        self.values["metrics"] = metrics = _METRICS[name] | {"activation": self._activation()} | metrics
        if name == "MeanIoU":  # how it reads an output depends on the target's form, unlike dtrain's of this name
            metrics["name"] = "dtrain.components.metrics.pytorch3dunet.MeanIoU"
        if name != "BlobsAveragePrecision":
            return
        # The average precision of insides is that of boundaries, with the probabilities the other way round.
        kind = metrics.pop("metric", "ap")
        if kind not in ("ap", "acc"):
            self.wrong(("metrics", "metric"), f"{shown(kind)} is not a metric of instances; possible: ap, acc")
        if kind == "acc":
            metrics["iou_thresholds"] = [0.5]
        label = metrics["name"]
        for key in list(metrics):
            _move_places(self.places, ("metrics", key), ("metrics", label, key))
        self.values["metrics"] = {label: metrics | {"name": "BoundaryAveragePrecision"}}

    def _activation(self) -> str:
        """What pytorch-3dunet's model does to its logits; its metrics are given that."""
        model, loss = self.section("model"), self.section("loss")
        if model.get("is_segmentation", True) is False:
            return "none"
        classes = model.get("final_sigmoid", True) is False or loss.get("name") in _CROSS_ENTROPIES
        return "softmax" if classes else "sigmoid"

    def predictor(self) -> None:
        """What the phase `test` is for there is prediction, with a file's own place for weights and outputs."""
        if self.values.get("model_path") is not None:
            self.mistakes += _rename(self.values, self.places, ("model_path",), ("predictor", "checkpoint"))
        loaders = self.section("loaders")
        _drop_nulls(loaders, ("output_dir",))
        self.mistakes += _rename(self.values, self.places, ("loaders", "output_dir"), ("predictor", "output_dir"))
        self.mistakes += _rename(self.values, self.places, ("loaders", "test"), ("loaders", "predict"))
        _mapping_at(self.values, ("predictor",), create="predict" in loaders)
        predictor = self.section("predictor")
        _drop_nulls(predictor, list(predictor))
        predictor.setdefault("activation", self._activation())
        if "predict" in loaders and "blend" not in predictor and loaders["name"] != "DSB2018Dataset":
            predictor["blend"] = "last"
            text = (
                "where patches overlap the later one wins, as in pytorch-3dunet; gaussian averages them, without seams"
            )
            self.notes.append(f"predictor.blend: 'last': {text}")
        if predictor.get("save_segmentation") is True and "prediction_channel" in predictor:
            self.ignore(("predictor", "prediction_channel"), "save_segmentation takes the largest of all channels")
        if predictor.get("name") != "DSB2018Predictor":
            return
        del predictor["name"]  # it means to write one HDF5 file for each image
        predictor.setdefault("format", "hdf5")
        segments = predictor.get("save_segmentation", True)
        if isinstance(segments, bool):
            predictor.pop("save_segmentation", None)
        if segments is True:
            predictor |= {"instances": "foreground", "connectivity": 2, "output_dataset": "segmentation"} | predictor
            text = "DSB2018Predictor writes the numbered instances alone; for probabilities: save_segmentation: false"
            self.notes.append(f"predictor.name: {text}")


def _drop_nulls(mapping: Values, keys: Iterable[str]) -> None:
    """A null is the same as no key for what pytorch-3dunet reads with `get`."""
    for key in keys:
        if key in mapping and mapping[key] is None:
            del mapping[key]
