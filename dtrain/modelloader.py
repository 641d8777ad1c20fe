"""get_model: the network that the config names; Forward: how it is called with a batch of any form."""

import inspect
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from ml_collections import ConfigDict
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dtrain.config.build import build
from dtrain.config.errors import ConfigError, mark_section
from dtrain.config.rules import REQUIRED
from dtrain.config.schema import refused
from dtrain.data import batch as batches
from dtrain.data.heads import output_of
from dtrain.distributed.fsdp import is_shard

_CURE = f"add a section such as loss: {REQUIRED['loss']}"


def get_model(config: ConfigDict) -> torch.nn.Module:
    """Build `model`.

    Raises:
        ConfigError: The name or an argument is wrong, or what was built is not a torch.nn.Module.
    """
    model = build(config, "model")
    if not isinstance(model, torch.nn.Module):
        text = f"{config.model.name} made a {type(model).__name__}; expected a torch.nn.Module"
        raise refused(config, ("model", "name"), text)
    return model


class Outcome(NamedTuple):
    """One batch and what the model made of it."""

    inputs: Any
    output: Any
    target: Any


@dataclass(eq=False)
class Forward:
    """How a model is called with a batch of any form, in the precision asked for; the weights stay float32."""

    module: nn.Module  # the bare model, whose signature tells how inputs are passed
    device: torch.device  # where the batch is moved
    precision: str = "fp32"  # fp32 | bf16 | fp16: of the forward pass and the loss, by torch.autocast
    input_key: str | None = None  # which entry of a dict batch is the input; see `data.batch.split`
    target_key: batches.TargetKey = None  # which is the target
    # Of output and target: the loss and its terms; not needed to predict.
    criterion: Callable[[Any, Any], tuple[Tensor, Mapping[str, Tensor]]] | None = None
    output_key: str | int | None = None  # which of several outputs is predicted; see `data.heads.output_of`
    sample_counts: Collection[int] = ()  # see `data.batch.call_form`
    say: Callable[[str], Any] = bool  # told once how a model is called that computes its own loss
    channels_last: bool = False  # the memory format of images and volumes among the inputs
    to_device: Callable[[Any, torch.device], Any] = batches.to_device  # how a batch gets there

    def __post_init__(self) -> None:
        self._name = type(self.module).__name__  # of now: sharding makes a class of another name
        self._is_on_cpu = self.device.type == "cpu"
        self._autocast = self.autocast()
        self._form: batches.Form | None = None  # of the inputs, once a batch was seen
        self._computes_loss: bool = getattr(self.criterion, "of_model", False)
        self._whole: batches.Form | None = None  # of whole batches, once a model was seen to take them
        self._has_result = False  # of a whole batch
        self.gives_several = False  # outputs, of which `predict` returns one
        self._check_target: Any = getattr(self.criterion, "check_target", None)

    def autocast(self) -> Any:
        """A context in which a model is called in this precision."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def __call__(self, model: nn.Module, batch: Any) -> tuple[Tensor, Mapping[str, Tensor], Outcome]:
        """The loss (mean over the batch), its terms, and what metrics look at.

        The model may be compiled or wrapped for the ranks, the batch of any form that `data.batch.split` takes.
        An error passes on with the config's section that it came from: model or loss. A model that computes its own
        loss may give none in eval mode; then it is None.
        """
        as_loaded = batch
        if not self._is_on_cpu:
            batch = self.to_device(batch, self.device)
        if self._computes_loss and self._takes_whole(model, batch):
            whole = batches.whole(batch)
            return self._with_own_loss(model, batches.in_channels_last(whole) if self.channels_last else whole)
        if type(batch) is list and len(batch) == 2:  # what torch's default_collate makes of pairs
            inputs, target = batch
        else:
            inputs, target = batches.split(batch, self.input_key, self.target_key)
        if self.channels_last:
            inputs = batches.in_channels_last(inputs)
        if self._form is None:
            self._form = batches.call_form(self.module, inputs, self.sample_counts)
        with self._autocast:
            section = "model"
            try:
                output = model(inputs) if self._form == "one" else batches.call(model, inputs, self._form)
                section = "loss"
                if self._check_target:  # on the CPU: to see the values on a device, each step would have to wait for it
                    self._check_target(output, batches.split(as_loaded, self.input_key, self.target_key)[1])
                loss, terms = self.criterion(output, target)  # type: ignore[misc]
            except Exception as error:
                mark_section(error, section)
                raise
        return loss, terms, Outcome(inputs, output, target)

    def only(self, model: nn.Module, batch: Any) -> None:
        """Call the model with a batch for what that does to it; where it can be without, no loss is computed."""
        if self._computes_loss:
            self(model, batch)
        else:
            self.run(model, self.inputs(batch))

    def run(self, model: nn.Module, inputs: Any) -> Any:
        """All that the model makes of inputs of any form, which are moved to the device."""
        if not self._is_on_cpu:
            inputs = batches.to_device(inputs, self.device)
        if self.channels_last:
            inputs = batches.in_channels_last(inputs)
        with self._autocast:
            return batches.call(model, inputs, batches.call_form(self.module, inputs, self.sample_counts))

    def _takes_whole(self, model: nn.Module, batch: Any) -> bool:
        """Whether the model is given whole batches, so that it can compute a loss; in a training it has to be."""
        if self._whole is None:
            batch = batches.whole(batch)
            self._whole = batches.whole_form(self.module, batch, model.training)
            if self._whole:
                called = self._name + batches.call_text(self.module, batch, self._whole)
                self.say(f"without a section loss the model computes it, called as {called}")
            elif model.training:
                takes = ", ".join(inspect.signature(self.module.forward).parameters)
                text = f"{self._name}.forward({takes}) does not take {batches.described(batch)}"
                raise ConfigError(f"loss: missing, and the model cannot compute it: {text}, a whole batch; {_CURE}")
        return self._whole is not None

    def _with_own_loss(self, model: nn.Module, batch: Any) -> tuple[Any, Mapping[str, Tensor], Outcome]:
        """The same for a model that is given the whole batch; without a loss in train mode a ConfigError."""
        if self.channels_last:
            batch = batches.in_channels_last(batch)
        with self._autocast:
            try:
                result = batches.call(model, batch, self._whole)  # type: ignore[arg-type]
            except Exception as error:
                mark_section(error, "model")
                raise
        if not self._has_result:
            self._has_result = True
            self._refuse_what_fsdp_cannot_follow(result)
        loss, terms, output = self.criterion.read(result)  # type: ignore[union-attr]
        if loss is None and model.training:
            called = self._name + batches.call_text(self.module, batch, self._whole)  # type: ignore[arg-type]
            text = f"{called} returned {batches.described(result)} in train mode, which holds no loss"
            raise ConfigError(f"loss: missing, and {text}; {_CURE}, or return a scalar, a dict of losses or a .loss")
        inputs, target = batches.parts_of_whole(batch, self.input_key, self.target_key)
        return loss, terms, Outcome(inputs, output, target)

    def _refuse_what_fsdp_cannot_follow(self, result: Any) -> None:
        """FSDP gathers a part's weights for the backward pass when a gradient reaches its output, if it finds it."""
        is_opaque = not isinstance(result, Tensor) and any(item is result for item in tree_leaves([result]))
        if is_opaque and any(map(is_shard, self.module.parameters())):
            text = f"returns a {type(result).__name__}, in which the tensors of a sharded model are not found"
            cure = "return a dict, a tuple or a scalar, or use trainer.strategy: ddp"
            raise ConfigError(f"model: {self._name} {text}; {cure}")

    def predict(self, model: nn.Module, inputs: Any) -> Tensor:
        """The output that is asked for, or the main one, for inputs of any form, which are moved to the device.

        Raises:
            ConfigError: Keys do not tell which of several outputs that is.
        """
        output = self.run(model, inputs)
        self.gives_several = not isinstance(output, Tensor)
        try:
            main = output_of(output, self.output_key)
        except ValueError as error:
            raise ConfigError(f"predictor: {error}") from None
        if not isinstance(main, Tensor):
            text = f"the model returned {batches.described(main)}, and what is written is one tensor per batch"
            of_samples = isinstance(main, list) and all(isinstance(each, Mapping) for each in main)  # a detector's
            cure = "a script can write them: dtrain.load_model" if of_samples else "name one with predictor.output_key"
            raise ConfigError(f"predictor: {text}; {cure}")
        return main

    def inputs(self, batch: Any) -> Any:
        """The input of a batch, with or without a target."""
        return batches.inputs(batch, self.input_key, self.target_key)


def parameter_count(model: torch.nn.Module) -> tuple[int, int]:
    """All parameters, and those that are trained."""
    sizes = [(item.numel(), item.requires_grad) for item in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)
