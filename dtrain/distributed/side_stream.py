"""A second stream of a device: copies to and from it, beside what it computes.

Nothing here makes the host wait, and nothing changes what is computed: one stream waits for the other on the device.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

Move = Callable[[Any, torch.device], Any]  # a batch to a device


def mover(move: Move, device: torch.device) -> Move:
    """What brings batches to a device: on a GPU by a stream of its own, under the step before; else `move` itself."""
    return SideStream(device).bringing(move) if device.type == "cuda" else move


class SideStream:
    """The stream, and copies on it."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._of = device, torch.get_device_module(device)
        self._stream = self._of.Stream(device=device) if device.type == "cuda" else self._of.Stream()

    def free_bytes(self) -> float:
        """Of the device's memory, what nobody has, and what this process has without using it."""
        if self._device.type != "cuda":
            return float("inf")
        unused = self._of.memory_reserved(self._device) - self._of.memory_allocated(self._device)
        return float(self._of.mem_get_info(self._device)[0] + unused)

    def bringing(self, move: Move) -> Move:
        """`move`, whose copies of tensors are put on this stream: they begin when the host asks for them.

        The host is ahead of a device, so that the step before is computed meanwhile. What in a batch is not a tensor,
        and moves itself, does so in the order of the device's work.
        """

        def bring(batch: Any, device: torch.device) -> Any:
            leaves, form = tree_flatten(batch, is_leaf=_moves_itself)
            with self._of.stream(self._stream):
                moved = [leaf.to(device, non_blocking=True) if type(leaf) is Tensor else leaf for leaf in leaves]
            computing = self._of.current_stream()
            computing.wait_stream(self._stream)
            for number, (leaf, new) in enumerate(zip(leaves, moved, strict=True)):
                if type(leaf) is not Tensor:
                    moved[number] = move(leaf, device)
                elif new is not leaf and new.is_cuda:
                    new.record_stream(computing)  # its memory is free when the step is done, not when Python drops it
            return tree_unflatten(moved, form)

        return bring

    def to_host(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Callable[[], None]:
        """Copy tensors of the device to pinned memory, each pair as (where to, what); returns what waits for them.

        All that was asked of the device before is done first.
        """
        self._stream.wait_stream(self._of.current_stream())
        done = self._of.Event(blocking=True) if self._device.type == "cuda" else self._of.Event()
        with self._of.stream(self._stream):
            for host, tensor in pairs:
                host.copy_(tensor, non_blocking=True)
                if tensor.is_cuda:
                    tensor.record_stream(self._stream)
            done.record(self._stream)
        return done.synchronize


def _moves_itself(value: Any) -> bool:
    """A packed sequence, a graph, or what else a collate function made."""
    return type(value) is not Tensor and hasattr(value, "to")
