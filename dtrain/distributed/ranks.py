"""This rank among the others: sum, gather, broadcast, agree."""

import contextlib
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dtrain.distributed.mailbox import Board

if TYPE_CHECKING:
    import torch

    from dtrain.distributed.fsdp import Shards


@dataclass
class Ranks:
    """This rank among the others. All ranks call the same methods in the same order."""

    rank: int
    local_rank: int
    world_size: int
    device: "torch.device"
    launcher: str = "none"
    accelerator: Any = None
    notes: list[str] = field(default_factory=list)
    host: str = field(default_factory=socket.gethostname)
    board: Board = field(default_factory=lambda: Board(0, 1))
    shards: "Shards | None" = None  # how models are shared out over the ranks, where they are
    are_lost: bool = False  # some are gone, so that nothing can be agreed on any more

    @property
    def is_main(self) -> bool:
        """Whether this rank is the one that writes."""
        return self.rank == 0

    def wrap(self, model: "torch.nn.Module") -> "torch.nn.Module":
        """The model as the ranks train it: DistributedDataParallel when there are several, or itself shared out."""
        if self.world_size == 1 or not any(item.requires_grad for item in model.parameters()):
            return model
        if not self.shards:
            return self.accelerator.prepare_model(model)
        if self.shards.syncs_buffers and any(True for _ in model.buffers()):
            model.register_forward_pre_hook(self._begin_with_same_buffers)
        return self.share_out(model)

    def share_out(self, model: "torch.nn.Module") -> "torch.nn.Module":
        """Where models are shared out, leave this rank its part of the main rank's weights."""
        if not self.shards:
            return model
        self.share_weights(model)
        return self.shards.share_out(model)

    def no_sync(self, model: Any) -> Any:
        """A context in which gradients add up on each rank alone, until the last batch of a step."""
        if self.shards:
            return self.shards.amid_step()
        return model.no_sync() if hasattr(model, "no_sync") else contextlib.nullcontext()

    def sum_(self, tensor: "torch.Tensor") -> "torch.Tensor":
        """Add a tensor up over the ranks, in place."""
        if self.world_size > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any] | None:
        """Every rank's value, in the order of ranks, on the main rank; None on the others."""
        if self.world_size == 1:
            return [value]
        import torch.distributed as dist

        values = [None] * self.world_size if self.is_main else None
        dist.gather_object(value, values)
        return values

    def broadcast(self, value: Any = None) -> Any:
        """The main rank's value, on every rank."""
        if self.world_size == 1:
            return value
        import torch.distributed as dist

        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def share_weights(self, model: "torch.nn.Module") -> None:
        """Give every rank the main rank's parameters and buffers."""
        if self.world_size > 1:
            import torch
            import torch.distributed as dist

            for value in model.state_dict().values():
                if isinstance(value, torch.Tensor):
                    dist.broadcast(value, src=0)

    def whole(self, tree: Any) -> Any:
        """A state_dict or the like as one process would have it: of shards, the main rank gets whole tensors."""
        return self.shards.whole(tree, self.is_main) if self.shards else tree

    def load_weights(self, model: "torch.nn.Module", weights: Mapping[str, Any] | None) -> None:
        """Give every rank these weights, which only the main rank has, or its own where it has none."""
        if self.shards:
            self.shards.load_weights(model, weights, self.broadcast)
            return
        if weights is not None:
            model.load_state_dict(weights)
        self.share_weights(model)

    def load_optimizer(self, optimizer: "torch.optim.Optimizer", state: "dict[str, Any] | None") -> None:
        """Give every rank's optimizer this state, which only the main rank has."""
        if self.shards:
            self.shards.load_optimizer(optimizer, state, self.broadcast)
        else:
            optimizer.load_state_dict(self.broadcast(state))

    def agree_on_buffers(self, model: "torch.nn.Module") -> None:
        """Give every rank the main rank's buffers: BatchNorm's running statistics differ between ranks."""
        if self.world_size > 1:
            import torch.distributed as dist

            for buffer in model.buffers():
                dist.broadcast(buffer.data, src=0)

    def _begin_with_same_buffers(self, model: "torch.nn.Module", _inputs: Any) -> None:
        """What DistributedDataParallel does before the first forward of each step."""
        assert self.shards
        if model.training and not self.shards.is_amid_step:
            self.agree_on_buffers(model)
        self.shards.is_amid_step = False

    def close(self) -> None:
        """Leave the process group; only after success, since it waits for the others."""
        if self.world_size > 1 and not self.are_lost:
            import torch.distributed as dist

            dist.destroy_process_group()


def is_lost_rank(error: BaseException) -> bool:
    """Whether an error is what a rank sees when another one has gone away in the middle of something in common."""
    import torch.distributed as dist

    lost = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed", "recvValue failed")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in lost)
    )


def lost_rank() -> Exception:
    """The error for a rank that is told of it before it sees it."""
    import torch.distributed as dist

    return dist.DistError("another rank has failed")
