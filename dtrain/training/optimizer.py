"""freeze and get_optimizers: which parameters are trained, and one optimizer, or several by name, over them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from ml_collections import ConfigDict
from torch.optim import Optimizer

from dtrain.config.build import build
from dtrain.config.difference import defaults_of
from dtrain.config.errors import ConfigError, first_few
from dtrain.config.optimizers import ONE, frozen_entries, optimizer_keys, own_rate, rules, what_is_taken
from dtrain.config.schema import Call, Offer, calls, refused
from dtrain.training.freezing import Freezing
from dtrain.training.parameter_groups import (
    Group,
    Layers,
    Named,
    divided,
    layers_of,
    named_parameters,
    wrong_pattern,
)


@dataclass(frozen=True)
class Built:
    """An optimizer, and what its groups are."""

    optimizer: Optimizer
    groups: Sequence[Group]
    layers: Layers | None = None  # what `layer_decay` counts as layers

    def lines(self) -> list[tuple[str, str]]:
        """Each group's name, and what it holds, as it is shown before a training."""
        return [(group.name, group.described(made))
                for group, made in zip(self.groups, self.optimizer.param_groups, strict=True)]  # fmt: skip

    @property
    def names(self) -> list[str]:
        """The parameters' names in the order in which the optimizer numbers them."""
        return [item.name for group in self.groups for item in group.items]


def freeze(config: ConfigDict, model: torch.nn.Module, loss: torch.nn.Module | None = None) -> Freezing:
    """Freeze what `trainer.freeze` says of a training's first epoch.

    Raises:
        ConfigError: A pattern fits no parameter, or nothing is left to train.
    """
    entries = frozen_entries(config)
    if not entries:
        return Freezing(model, loss, ())
    every = named_parameters(model, loss)
    for entry in entries:
        if wrong := wrong_pattern(every, entry.match, entry.types):
            raise refused(config, entry.path, wrong[1])
    freezing = Freezing(model, loss, entries)
    freezing.apply(0)
    if not any(item.parameter.requires_grad for item in every):
        raise refused(config, ("trainer", "freeze"), "freezes all parameters, so there is nothing to train")
    return freezing


def get_optimizers(
    config: ConfigDict,
    model: torch.nn.Module,
    loss: torch.nn.Module | None = None,
    thawed_later: frozenset[str] = frozenset(),
) -> dict[str, Built]:
    """Build `optimizer` over the parameters that are trained, or each of several over its own ones.

    A single one is called `optimizer`. Parameters of a loss are a group of their own. On a GPU, torch's fused kernels
    are used where the optimizer has them and the config says nothing: they are the fastest, and skip a step with a
    non-finite gradient without asking the host.

    Args:
        config: Already checked.
        model: The model, on its device, or this rank's part of it.
        loss: What of the loss has parameters.
        thawed_later: Names of parameters that are frozen now, but will be trained.

    Raises:
        ConfigError: A name, an argument or a pattern is wrong, there is nothing to train, or a parameter has no
            optimizer or two of them.
    """
    every = named_parameters(model, loss)
    items = [item for item in every if item.parameter.requires_grad or item.name in thawed_later]
    if not items:
        raise refused(config, ("model",), "has no parameters to train")
    described = calls(config)
    keys = optimizer_keys(described)
    claims = _claims(config, keys, every, items)
    built = {name: _built(config, key, claims[name], every, model) for name, key in keys.items()}
    trained = {id(item) for each in built.values() for group in each.optimizer.param_groups for item in group["params"]}
    if left := [item.name for item in items if id(item.parameter) not in trained]:
        cure = "freeze them (trainer.freeze), or give them one"
        raise refused(
            config, ("optimizer",), f"{first_few(left, 5)} would be trained, but no optimizer has them; {cure}"
        )
    return built


def shown(optimizers: Mapping[str, Built], most: int | None = None) -> list[tuple[str, str]]:
    """What is told of optimizers and groups before a training, as (label, text): of the only group nothing.

    Of an optimizer with more than `most` groups their range is told.
    """
    rows: list[tuple[str, str]] = []
    for name, built in optimizers.items():
        of = "" if name == ONE else f"{name}: "
        lines = built.lines() if len(built.groups) > 1 or name != ONE else []
        if most is not None and len(lines) > most:
            ends = {key: sorted({float(group[key]) for group in built.optimizer.param_groups if key in group})
                    for key in ("lr", "weight_decay")}  # fmt: skip
            texts = [f"{key} {values[0]:.3g} to {values[-1]:.3g}" for key, values in ends.items() if values]
            rows.append((f"{of}groups", f"{len(lines)}: {', '.join(texts)}; `dtrain check` lists them"))
        else:
            rows += [(f"{of}group {group}", text) for group, text in lines]
        if built.layers:
            rows.append((f"{of}layers", str(built.layers)))
    return rows


def fused(optimizers: Mapping[str, Optimizer]) -> str:
    """The optimizers that step with torch's fused kernels, in words; '' where none does."""
    names = [type(item).__name__ for item in optimizers.values() if any(g.get("fused") for g in item.param_groups)]
    return ", ".join(names)


def get_optimizer(config: ConfigDict, model: torch.nn.Module, loss: torch.nn.Module | None = None) -> Optimizer:
    """The only optimizer, or the first one. See `get_optimizers`."""
    return next(iter(get_optimizers(config, model, loss).values())).optimizer


def require_one_optimizer(config: ConfigDict) -> None:
    """Called where the trainer has no training_step of its own: a ConfigError where there are several optimizers."""
    names = [*optimizer_keys(calls(config))]
    if names != [ONE]:
        cure = "trainer.name must name a subclass of Trainer with its own training_step"
        raise refused(config, (ONE,), f"has several ({', '.join(names)}): {cure}")


def _claims(
    config: ConfigDict, keys: Mapping[str, str], every: Sequence[Named], items: Sequence[Named]
) -> dict[str, list[Named]]:
    """What each optimizer trains: what its `match` and `types` say, or what the others leave."""
    described = calls(config)
    claims: dict[str, list[Named]] = {}
    owners: dict[str, str] = {}
    for name, key in keys.items():
        match, types = (_texts(described[f"groups.{key}"].arguments.get(word)) for word in ("match", "types"))
        path = described[key].path
        if wrong := wrong_pattern(every, match, types):
            raise refused(config, (*path, wrong[0]), wrong[1])
        if match or types:
            claims[name] = [item for item in items if item.fits(match, types)]
            if not claims[name]:
                raise refused(config, path, "all of its parameters are frozen, so there is nothing to train")
            if twice := [item.name for item in claims[name] if item.name in owners]:
                text = f"{first_few(twice, 5)} is trained by '{owners[twice[0]]}' already"
                raise refused(config, (*path, "match" if match else "types"), text)
            owners |= {item.name: name for item in claims[name]}
    rest = [item for item in items if item.name not in owners]
    for name in keys:
        if name not in claims:
            claims[name] = rest
            if not rest:
                raise refused(config, described[keys[name]].path, "the other optimizers leave nothing to train")
    return {name: claims[name] for name in keys}


def _built(config: ConfigDict, key: str, items: list[Named], every: Sequence[Named], model: torch.nn.Module) -> Built:
    """One optimizer over these parameters."""
    call = calls(config)[key]
    groups, layers = _groups(config, key, items, every, model)
    parameters: list[Any] = [{"params": [item.parameter for item in group.items], **group.settings} for group in groups]
    if len(groups) == 1 and not groups[0].settings:
        parameters = parameters[0]["params"]
    named = [(item.name, item.parameter) for item in items]
    offer = Offer(params=parameters, named_parameters=named, model=model)
    optimizer = build(config, key, offer)
    if not isinstance(optimizer, Optimizer):
        text = f"{call.name} made a {type(optimizer).__name__}; expected a torch.optim.Optimizer"
        raise refused(config, call.path_of("name"), text)
    on_gpu = items[0].parameter.device.type == "cuda"
    chosen = {"fused", "foreach", "capturable", "differentiable"} & set(call.arguments)
    # A function of the user's own may take no `fused`, also where it makes an optimizer of torch.
    is_ours = not chosen and not call.stands_for_object and call.target.module.startswith("torch.")
    if on_gpu and is_ours and "fused" in optimizer.defaults:
        optimizer = build(config, key, offer, fused=True)
    _require_possible(config, key, groups)
    _add_loss(optimizer, call, items)
    start_momentum(optimizer)
    return Built(optimizer, _as_made(config, call, optimizer, groups, every), layers)


def _groups(
    config: ConfigDict, key: str, items: Sequence[Named], every: Sequence[Named], model: torch.nn.Module
) -> tuple[list[Group], Layers | None]:
    """The groups that the config describes, and what `layer_decay` counts as layers."""
    described = calls(config)
    call, listed = described[key], rules(described, key)
    for rule in listed:
        if wrong := wrong_pattern(every, rule.match, rule.types):
            raise refused(config, (*rule.path, wrong[0]), wrong[1])
    decay = described[f"groups.{key}"].arguments.get("layer_decay")
    layers = None if decay is None else layers_of(model)
    with_decay = None if layers is None or decay is None else (layers, float(decay))
    if decay is not None and layers is None:
        text = "the model has no list of equal blocks (a ModuleList or Sequential), so nothing says what its layers are"
        raise refused(config, (*call.path, "layer_decay"), text)
    defaults = defaults_of(call) | {name: call.arguments[name] for name in call.arguments}
    defaults = {name: tuple(value) if isinstance(value, list) else value for name, value in defaults.items()}
    defaults["lr"] = own_rate(call)
    return divided(items, listed, defaults, own_rate(call), with_decay), layers


def _require_possible(config: ConfigDict, key: str, groups: Sequence[Group]) -> None:
    """Let the constructor judge each group's settings, which torch's optimizers do for their own arguments alone."""
    call = calls(config)[key]
    for group in groups if what_is_taken(call) == "params" else ():
        if group.settings:
            try:
                build(config, key, Offer(params=[torch.nn.Parameter(torch.zeros(1))]), **group.settings)
            except ConfigError as error:
                text = str(error.__cause__ or error.mistakes[0].text)
                raise refused(config, (*call.path, "groups"), f"group {group.name}: {text}") from error


def _add_loss(optimizer: Optimizer, call: Call, items: Sequence[Named]) -> None:
    """Where an optimizer was given the model alone, it gets the loss's parameters as a further group."""
    held = {id(item) for group in optimizer.param_groups for item in group["params"]}
    of_loss = [item.parameter for item in items if item.is_of_loss and id(item.parameter) not in held]
    if of_loss and what_is_taken(call) == "model":
        optimizer.add_param_group({"params": of_loss})


def _as_made(
    config: ConfigDict, call: Call, optimizer: Optimizer, groups: Sequence[Group], every: Sequence[Named]
) -> list[Group]:
    """The groups that the optimizer has: those that it was given, or those that a function has made.

    Raises:
        ConfigError: It holds parameters that are not its own, or a group has a setting that groups do not have.
    """
    by_id = {id(item.parameter): item for item in every}
    own = {id(item.parameter) for group in groups for item in group.items}
    asked = {frozenset(id(item.parameter) for item in group.items): group for group in groups}
    result = []
    for number, made in enumerate(optimizer.param_groups):
        items = [by_id[id(item)] for item in made["params"] if id(item) in by_id]
        if strange := [item.name for item in items if id(item.parameter) not in own]:
            text = f"{call.name} also holds {first_few(strange, 5)}, which are frozen or another optimizer's"
            raise refused(config, call.path_of("name"), text)
        group = asked.get(frozenset(id(item.parameter) for item in items))
        result.append(group or Group(str(number), items, rate_name=str(number)))
        for name in group.settings if group else ():
            if name not in optimizer.defaults:
                text = f"{call.name} has no '{name}' of each group; possible: {', '.join(optimizer.defaults)}"
                raise refused(config, (*call.path, "groups"), text)
    return result


def _texts(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())


def require_trained(
    optimizers: Iterable[Optimizer], module: torch.nn.Module, of_loss: torch.nn.Module | None = None
) -> None:
    """Called after a forward pass, which may have made parameters: RuntimeError for those no optimizer can know.

    `of_loss` is what the loss holds after that pass, also where it held nothing before.
    """
    known = {id(item) for each in optimizers for group in each.param_groups for item in group["params"]}
    modules = {"": module} | ({"loss: ": of_loss} if of_loss is not None else {})
    late = [f"{of}{name}" for of, part in modules.items() for name, item in part.named_parameters()
            if item.requires_grad and id(item) not in known]  # fmt: skip
    if late:
        raise RuntimeError(
            f"made after the optimizer, and so never trained: {first_few(late, 10)}. Make parameters in __init__, or "
            "with torch's lazy modules (LazyLinear, ...) where shapes are not known before the first batch"
        )


def in_the_way_of(optimizer: Optimizer, state: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """A saved state for an optimizer that may compute in another way: fused on a GPU what began on a CPU.

    By these keys torch finds the way that it goes in a step, and the device of a step's number, while what the fused
    way alone understands (`found_inf`) follows from how the optimizer was made.
    """
    if state is None or len(state["param_groups"]) != len(optimizer.param_groups):  # which torch refuses
        return state
    ways = ("fused", "foreach", "capturable", "differentiable")
    own = [{key: group[key] for key in ways if key in group} for group in optimizer.param_groups]
    return {**state, "param_groups": [saved | way for saved, way in zip(state["param_groups"], own, strict=True)]}


def regrouped(built: Built, state: Mapping[str, Any], names: Sequence[str]) -> Mapping[str, Any]:
    """A saved state for an optimizer that divides the parameters otherwise, or trains some more or fewer of them.

    What it keeps of a parameter goes with the parameter's name; the groups' settings are those of now. What was not
    trained before has no state yet. The rate so far is the first saved group's, see `Schedule.load_state_dict`.

    Args:
        built: What is about to load it.
        state: As `Optimizer.state_dict` gave it.
        names: The parameters' names in the order in which the saved optimizer numbered them.
    """
    saved = state["param_groups"]
    numbers = [number for group in saved for number in group["params"]]
    if len(names) != len(numbers):  # of an older checkpoint, in which some of the parameters were not trained
        return state
    number_of = dict(zip(names, numbers, strict=True))
    name_of = dict(zip(numbers, names, strict=True))
    before = [[name_of[number] for number in group["params"]] for group in saved]
    if before == [[item.name for item in group.items] for group in built.groups]:
        return state
    groups: list[dict[str, Any]] = []
    kept: dict[int, Any] = {}
    for group, own in zip(built.groups, built.optimizer.param_groups, strict=True):
        start = sum(len(each["params"]) for each in groups)
        places = range(start, start + len(group.items))
        groups.append({**own, "lr": saved[0]["lr"], "params": list(places)})
        for place, item in zip(places, group.items, strict=True):
            if number_of.get(item.name) in state["state"]:
                kept[place] = state["state"][number_of[item.name]]
    return {**state, "state": kept, "param_groups": groups}


def start_momentum(optimizer: Optimizer) -> None:
    """Let fused SGD's momentum begin at zero, from which the first step makes the gradient, as without it.

    torch leaves it as whatever lay in memory where the first step is skipped (torch/optim/sgd.py, _fused_sgd), as
    fp16's often is. With dampening zero would be another beginning: there the host looks before it steps.
    """
    for group in optimizer.param_groups if isinstance(optimizer, torch.optim.SGD) else []:
        if not group["fused"] or not group["momentum"]:
            continue
        if group["dampening"]:
            optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
            continue
        for parameter in group["params"]:
            if optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
