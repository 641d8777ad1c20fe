"""get_loss_criterion: the loss that the config names, as one number to minimise and its terms."""

import contextlib
import functools
import types
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from ml_collections import ConfigDict

from dtrain.config.build import build
from dtrain.config.rules import SUMMED
from dtrain.config.schema import refused
from dtrain.config.signatures import is_standard
from dtrain.data.heads import main_pair
from dtrain.data.kept_attributes import KeptAttributes

_LIBRARIES = ("torch.", "monai.", "dtrain.components.")
# Buffers of these losses themselves are constants that the config gives, such as class weights; a layer within one has
# a state (running statistics, spectral_norm's vectors).
_LOSSES = ("torch.nn.modules.loss", "monai.losses.", "dtrain.components.losses.")
_SCALARS = (type(None), bool, int, float, complex, str, bytes)


class Criterion:
    """A loss of any form, called as `total, terms = criterion(output, target)`.

    A loss may return a tensor or a dict of terms; a dict is summed, and each of its terms is logged. PyTorch's own
    losses take tensors only, so of several outputs they are given the main one; other losses get all of them.

    `module` holds what of it is trained, shared and saved as a model is: its parameters and buffers, also where a loss
    that is not a module has them. It is None where there is nothing of the kind. `objects` are all that may keep
    something in plain attributes, by name.

    Raises:
        TypeError: The loss returned something else, or more than one number.
    """

    of_model = False  # whether a model computes it itself

    def __init__(self, loss: Any) -> None:
        self.loss = loss
        function = getattr(loss, "func", loss)  # with arguments, a function is a partial
        self.name = getattr(function, "__name__", type(function).__name__)  # in messages
        self.main_only = (getattr(function, "__module__", None) or "").startswith("torch.")
        if self.main_only:  # (N, 1) less (N) is (N, N), of which torch says no more than that it is likely wrong
            own = r"torch\.nn\.modules\.loss|dtrain\.loss"
            warnings.filterwarnings("error", "Using a target size", UserWarning, module=own)
        self._modules = self.modules_now()
        for part in self._modules.modules():
            if type(part).__module__.startswith(_LOSSES):
                part._non_persistent_buffers_set.update(part._buffers)
        self.module = self._modules if self._modules.state_dict() else None
        self.objects = {"loss": loss}
        if self._modules is not loss:
            inner = {f"loss.{name}": part for name, part in _parts(loss) if name and not _is_of_torch(part)}
            self.objects |= inner | {"held": self._modules}
        self.kept = KeptAttributes(torch.device("cpu"))
        binary = isinstance(loss, torch.nn.BCEWithLogitsLoss | torch.nn.BCELoss)
        # Given output and target, refuses a target that the loss cannot mean; None: it takes any.
        self.check_target = _refuse_no_share if binary else getattr(loss, "check_target", None)

    def __call__(self, output: Any, target: Any) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """The value to minimise (a scalar) and its named terms (none for a plain loss)."""
        if self.main_only and not (isinstance(output, torch.Tensor) and isinstance(target, torch.Tensor)):
            output, target = self._pair(output, target)
        value = self.loss(output, target)
        return (value, {}) if type(value) is torch.Tensor and value.dim() == 0 else self._number(value)

    def _number(self, value: Any) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """A scalar, or the sum of a dict of scalars, and these."""
        if not isinstance(value, Mapping):
            return self._scalar(value), {}
        terms = {name: self._scalar(term, name) for name, term in value.items()}
        if not terms:
            raise TypeError(f"the loss {self.name} returned an empty dict; expected its terms")
        return sum(terms.values()), terms  # type: ignore[return-value]

    def _pair(self, output: Any, target: Any) -> tuple[Any, Any]:
        """Which of several outputs and targets a loss of torch compares."""
        try:
            return main_pair(output, target)
        except ValueError as error:
            found = str(error).partition(";")[0]
            cure = "give both to a loss of your own, or call the main output 'out' or 'logits'"
            raise ValueError(f"{self.name} compares one output with one target, but {found}; {cure}") from None

    def _scalar(self, value: Any, term: str = "") -> torch.Tensor:
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            return value if value.dim() == 0 else value.reshape(())
        of = f" for {term!r}" if term else ""
        found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        expected = "one number as a tensor (the mean over the batch, as with reduction: mean), or a dict of such terms"
        raise TypeError(f"the loss {self.name} returned {found}{of}; expected {expected}")

    def to(self, device: torch.device) -> "Criterion":
        """Move the loss's own tensors, such as class weights."""
        for part in self.objects.values():
            held = {} if isinstance(part, torch.nn.Module) else attributes_of(part)
            for name, value in held.items():
                if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter):
                    held[name] = value.to(device)
        self._modules.to(device)
        # A buffer that a forward makes has no file of its own where there was nothing to save before.
        self.kept = KeptAttributes(device, with_buffers=self.module is None)
        self.kept.begin(self.objects)
        return self

    def modules_now(self) -> torch.nn.Module:
        """What the loss holds by now of modules and parameters: a forward may have made some."""
        return self.loss if isinstance(self.loss, torch.nn.Module) else _Held(self.loss)

    def train(self, mode: bool = True) -> None:
        """Put the loss into train mode, or into eval mode."""
        self._modules.train(mode)


class Own(NamedTuple):
    """What a model that computes its own loss returned."""

    loss: torch.Tensor | None  # None: there is none, as of a detector in eval mode
    terms: Mapping[str, torch.Tensor]
    output: Any  # the predictions, for metrics; None: there are none


class ModelLoss(Criterion):
    """Without a section `loss`: the model is called with the whole batch, and what it returns holds its loss.

    Nothing of it is trained or saved.
    """

    of_model = True

    def __init__(self) -> None:
        super().__init__(_of_model)
        self.name = "of the model"

    def __call__(self, output: Any, target: Any) -> tuple[Any, Mapping[str, torch.Tensor]]:
        """Of a model that gives no loss: none."""
        return None, {}

    def read(self, result: Any) -> Own:
        """Loss, terms and predictions in what a model returned.

        A scalar is the loss. Of a mapping, or an object with an attribute `loss`, the entry `loss` is: a scalar, or a
        dict of scalars, which is summed; other scalars there whose name contains `loss` are its terms. A mapping of
        nothing but scalars is a dict of losses. Of a sequence, the only scalar in it is the loss. What is left are the
        predictions. Terms are named without `loss_` in front, which their figures have anyway.

        Raises:
            TypeError: The loss is not one number.
        """
        entries = _entries(result)
        if entries is None:
            return self._in_sequence(result)
        if entries and "loss" not in entries and all(map(_is_scalar, entries.values())):
            return Own(*self._number(_short(entries)), None)
        rest = {key: value for key, value in entries.items() if key != "loss" and value is not None}
        if entries.get("loss") is None:
            return Own(None, {}, rest if "loss" in entries else result)
        terms = {key: value for key, value in rest.items() if "loss" in str(key) and _is_scalar(value)}
        output = {key: value for key, value in rest.items() if key not in terms} or None
        if isinstance(entries["loss"], Mapping):
            return Own(*self._number(_short(entries["loss"])), output)
        return Own(self._scalar(entries["loss"]), _short(terms), output)

    def _in_sequence(self, result: Any) -> Own:
        items = list(result) if isinstance(result, list | tuple) else [result]
        losses = [item for item in items if _is_scalar(item)]
        if len(losses) != 1:
            return Own(None, {}, result)
        rest = [item for item in items if item is not losses[0]]
        return Own(losses[0], {}, rest[0] if len(rest) == 1 else rest or None)


def _of_model(output: Any, target: Any) -> None:
    """What stands for the loss where a model computes it."""


def _entries(result: Any) -> Mapping[str, Any] | None:
    """A mapping's entries, a named tuple's fields, the attributes of an object with a `loss`; None of anything else."""
    if isinstance(result, Mapping):
        return result
    if hasattr(result, "_asdict"):
        return dict(result._asdict())
    return dict(vars(result)) if hasattr(result, "loss") and hasattr(result, "__dict__") else None


def _is_scalar(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 0 and value.is_floating_point()


def _short(losses: Mapping[str, Any]) -> Mapping[str, Any]:
    """Losses by name without `loss_` in front, unless two would then have one name."""
    names = [str(name).removeprefix("loss_") for name in losses]
    return dict(zip(names if len(set(names)) == len(losses) else losses, losses.values(), strict=True))


class _Held(torch.nn.Module):
    """The modules and parameters in a loss that is not a module: in arguments, attributes, and whatever these hold."""

    def __init__(self, loss: Any) -> None:
        super().__init__()
        for place, item in _parts(loss):
            name = place.replace(".", "_")  # which the key of a dict may have, and a module's name may not
            while hasattr(self, name):
                name += "_"
            if isinstance(item, torch.nn.Parameter):
                self.register_parameter(name, item)
            elif isinstance(item, torch.nn.Module):
                self.add_module(name, item)


def _parts(loss: Any) -> Iterator[tuple[str, Any]]:
    """The loss and all objects, modules and parameters within it, by the names of the places where they lie.

    Looked through are lists, tuples, mappings, and what objects and functions hold, but for those of the standard
    library, torch and numpy; what is within a module is the module's own.
    """
    pending, seen = [("", loss)], set()
    while pending:
        place, value = pending.pop()
        if _is_of_torch(value):
            yield place, value
            continue
        if id(value) in seen:
            continue
        seen.add(id(value))
        inner: Mapping[Any, Any]
        if isinstance(value, Mapping):
            inner = value
        elif isinstance(value, list | tuple):
            inner = dict(enumerate(value))
        elif place and not _is_own(value):
            continue
        else:
            yield place, value
            inner = {f"{name}_": item for name, item in _held_by(value).items()}
        before = place if not place or place.endswith("_") else f"{place}_"
        found = [(f"{before}{key}", item) for key, item in inner.items() if type(item) not in _SCALARS]
        pending += reversed(found)


def _is_of_torch(value: Any) -> bool:
    return isinstance(value, torch.nn.Module | torch.nn.Parameter)


def _is_own(value: Any) -> bool:
    """Whether an object within a loss is looked through: of a class or a function that somebody wrote."""
    if isinstance(value, functools.partial | types.FunctionType | types.MethodType):
        return True
    module = type(value).__module__
    return not (isinstance(value, type) or is_standard(module) or module.partition(".")[0] in ("torch", "numpy"))


def attributes_of(value: Any) -> dict[str, Any]:
    """The arguments of a function, the attributes of an object; what is put there takes effect."""
    found: dict[str, Any] = value.keywords if isinstance(value, functools.partial) else getattr(value, "__dict__", {})
    return found


def _held_by(value: Any) -> dict[str, Any]:
    """All that an object or a function holds: also what it has in slots, in a closure, or is bound to."""
    held: dict[str, Any] = {}
    if isinstance(value, functools.partial):
        held = {"partial_func": value.func, "partial_args": value.args}
    elif isinstance(value, types.MethodType):
        held = {"bound_to": value.__self__}
    elif isinstance(value, types.FunctionType):
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # it is empty
                held[name] = cell.cell_contents
    else:
        slots = [getattr(base, "__slots__", ()) for base in type(value).__mro__]
        names = [name for item in slots for name in ([item] if isinstance(item, str) else item)]
        held = {name: getattr(value, name) for name in names if name != "__dict__" and hasattr(value, name)}
    return attributes_of(value) | held


def _adds_up(loss: Any) -> bool:
    """Whether a library's loss, or one of which it is made, is the sum over its samples.

    monai's DiceCELoss(reduction="sum") says of itself that it is a mean, and has two losses that are sums.
    """
    function = getattr(loss, "func", loss)
    if not (getattr(function, "__module__", None) or "").startswith(_LIBRARIES):
        return False
    reduction = getattr(loss, "keywords", {}).get("reduction") or getattr(loss, "reduction", None)
    parts = [*getattr(loss, "losses", ()), getattr(loss, "loss", None)]  # functions among them
    if isinstance(loss, torch.nn.Module):
        parts += loss.children()
    return reduction == "sum" or any(map(_adds_up, parts))


def _refuse_no_share(output: Any, target: Any) -> None:
    """Binary cross entropies of torch take any target: for 255 in a mask the loss is far below 0.

    Raises:
        ValueError: A value is not from 0 to 1; its sample is the error's `sample_in_batch`.
    """
    if not isinstance(target, torch.Tensor) or target.device.type != "cpu" or not target.numel():
        return  # a device is not waited for
    low, high = target.aminmax()
    if low.item() >= 0 and high.item() <= 1:
        return
    sample, *voxel = (~((target >= 0) & (target <= 1))).nonzero()[0].tolist()
    value = target[(sample, *voxel)].item()
    where = f"sample {sample} of the batch" + (f" at {tuple(voxel)}" if voxel else "")
    error = ValueError(f"{where}: the target has the value {value:g}; expected 0 to 1")
    error.sample_in_batch = sample  # type: ignore[attr-defined]
    raise error


def get_loss_criterion(config: ConfigDict) -> Criterion:
    """Build `loss`; without that section, what reads the loss that the model computes.

    Raises:
        ConfigError: The name or an argument is wrong, or the loss is a sum over its samples.
    """
    if config.get("loss") is None:
        return ModelLoss()
    loss = build(config, "loss")
    if _adds_up(loss):
        raise refused(config, ("loss",), f"{config.loss.name} {SUMMED}")
    return Criterion(loss)
