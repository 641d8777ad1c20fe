"""What all ranks do together."""

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dtrain.distributed import by_node

Forward = Callable[[torch.nn.Module, Any], Any]
T = TypeVar("T")


@dataclass
class Collectives:
    """A rank's number, its device and its collectives. All ranks call the same methods in the same order."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this rank is the one that writes."""
        return self.rank == 0

    @property
    def has_several_nodes(self) -> bool:
        """Whether ranks are on several nodes."""
        return by_node.tree() is not None

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add a tensor up over the ranks, in place."""
        if self.world_size > 1:
            by_node.all_reduce(tensor)
        return tensor

    def max_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Take the largest of each number over the ranks, in place."""
        if self.world_size > 1:
            by_node.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def gather(self, value: Any) -> list[Any] | None:
        """Every rank's value, in the order of ranks, on the main rank; None on the others."""
        if self.world_size == 1:
            return [value]
        if tree := by_node.tree():
            return tree.gather(value)
        values = [None] * self.world_size if self.is_main else None
        dist.gather_object(value, values)
        return values

    def broadcast(self, value: Any = None, source: int = 0) -> Any:
        """The main rank's value, or another rank's, on every rank."""
        if self.world_size == 1:
            return value
        if tree := by_node.tree():
            return tree.broadcast(value, source)
        values = [value]
        dist.broadcast_object_list(values, source)
        return values[0]

    def decide(self, function: Callable[[], T]) -> T:
        """What `function` returns or raises on the main rank, on every rank; the others do not call it."""
        if self.world_size == 1:
            return function()
        result: Any = None
        error: Exception | None = None
        if self.is_main:
            try:
                result = function()
            except Exception as raised:
                error = raised
        result, heard = self.broadcast((result, error and _picklable(error)))
        if heard:
            raise error or heard
        return result

    def consult(self, function: Callable[[Callable[[Any], list[Any]]], T], answer: Callable[[Any], Any]) -> T:
        """`decide` for a `function(ask)` that may ask all ranks: `ask(question)` gives each one's `answer(question)`.

        An answer must not raise.
        """
        if self.world_size == 1:
            return function(lambda question: [answer(question)])

        def ask(question: Any) -> list[Any]:
            self.broadcast((question,))
            return self.gather(answer(question)) or []

        if self.is_main:
            return self.decide(lambda: function(ask))
        while len(heard := self.broadcast()) == 1:
            self.gather(answer(heard[0]))
        result, error = heard
        if error:
            raise error
        return result

    def share_weights(self, model: torch.nn.Module) -> None:
        """Give every rank the main rank's parameters and buffers."""
        if self.world_size > 1:
            for value in model.state_dict().values():
                if isinstance(value, torch.Tensor):
                    dist.broadcast(value, src=0)

    def average_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """Make gradients the mean over the ranks, where no strategy does: those of a loss's own parameters.

        A rank without a gradient counts as one of zeros. Where no rank has one, it stays None.
        """
        owned = torch.tensor([float(item.grad is not None) for item in parameters], device=self.device)
        dist.all_reduce(owned)
        for number, parameter in enumerate(parameters):
            had_one = parameter.grad is not None
            gradient = parameter.grad.to_dense() if had_one else torch.zeros_like(parameter)  # type: ignore[union-attr]
            dist.all_reduce(gradient.div_(self.world_size))
            # The host waits for the device only where this rank cannot know.
            parameter.grad = gradient if had_one or owned[number].item() else None

    def average(
        self, gradients: list[torch.Tensor | None], parameters: Sequence[torch.Tensor]
    ) -> list[torch.Tensor | None]:
        """The mean over the ranks of each gradient of these parameters, in one message for each dtype.

        A rank without a gradient counts as one of zeros. Where no rank has one, it stays None.
        """
        if self.world_size == 1:
            return gradients
        means = list(gradients)
        for dtype in dict.fromkeys(item.dtype for item in parameters):
            numbers = [number for number, item in enumerate(parameters) if item.dtype == dtype]
            own = [torch.zeros_like(parameters[number]) if (item := gradients[number]) is None else item.to_dense()
                   for number in numbers]  # fmt: skip
            has_one = torch.tensor([gradients[number] is not None for number in numbers], dtype=dtype)
            flat = torch.cat([*(item.reshape(-1) for item in own), has_one.to(self.device)])
            dist.all_reduce(flat.div_(self.world_size))
            *parts, owned = flat.split([*(item.numel() for item in own), len(own)])
            for place, (number, part) in enumerate(zip(numbers, parts, strict=True)):
                # The host waits for the device only where this rank cannot know.
                if gradients[number] is not None or owned[place].item():
                    means[number] = part.view_as(own[place])
        return means

    def agree_on_buffers(self, model: torch.nn.Module) -> None:
        """Give every rank the main rank's buffers: BatchNorm's running statistics differ between ranks."""
        if self.world_size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer.data, src=0)


def _picklable(error: Exception) -> Exception:
    """The error itself, or a RuntimeError of its text where another process could not read it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
