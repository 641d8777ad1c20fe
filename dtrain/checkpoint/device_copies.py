"""Copies of a GPU's tensors for a checkpoint, which the GPU makes while it computes the next step."""

from collections.abc import Callable

import torch
from torch import Tensor

from dtrain.checkpoint.contents import HostMemory
from dtrain.distributed.side_stream import SideStream

_SHARE_OF_FREE = 0.5  # of a device's free memory that a snapshot may take for a moment


def copies_of(device: torch.device) -> HostMemory:
    """The memory for copies of what lies on a device."""
    return DeviceCopies(device) if device.type == "cuda" else HostMemory()


class DeviceCopies(HostMemory):
    """Pinned memory, to which a side stream copies while the loop continues.

    Whatever changes a tensor afterwards, an optimizer, a forward pass with its statistics or a loop of the user's own,
    must not reach the copy. So each tensor is first cloned on the device, which takes a hundredth of the way to the
    host, and is ordered with all else that is computed there. The clones are freed as they are copied: the allocator
    itself waits for that where it is short of memory. What does not fit beside the training is copied in the order of
    its work, before the next step: that takes no memory, and the next step waits for it on the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._side = device, SideStream(device)
        self._clones: list[tuple[Tensor, Tensor]] = []  # of this snapshot: where to, what
        self._room: float | None = None  # bytes on the device that it may still take

    def empty_like(self, tensor: Tensor) -> Tensor:
        """Pinned memory, where a device copies to it by itself; where there is none left, the ordinary kind."""
        if tensor.is_cuda:
            try:
                return torch.empty_like(tensor, device="cpu", pin_memory=True)
            except RuntimeError:  # the system has no more that it would lock
                pass
        return super().empty_like(tensor)

    def copy(self, host: Tensor, tensor: Tensor) -> None:
        """A clone now, which is copied later; or a copy in the order of the device's work."""
        if tensor.device != self._device or (tensor.is_cuda and not host.is_pinned()):
            super().copy(host, tensor)
            return
        if self._room is None:
            self._room = _SHARE_OF_FREE * self._side.free_bytes()
        if tensor.nbytes <= self._room:
            self._room -= tensor.nbytes
            try:
                self._clones.append((host, tensor.clone()))
                return
            except torch.OutOfMemoryError:  # what is free lies in pieces
                self._room = 0
        host.copy_(tensor, non_blocking=True)

    def finish(self) -> Callable[[], None]:
        """Begin to copy the clones."""
        clones, self._clones, self._room = self._clones, [], None
        return self._side.to_host(clones)
