"""This rank among the others: its collectives, the strategy by which they train together, and notes for them."""

import socket
from dataclasses import dataclass, field

import torch.distributed as dist

from dtrain.distributed import by_node
from dtrain.distributed.collectives import Collectives
from dtrain.distributed.ddp import DDP
from dtrain.distributed.fsdp import FSDP
from dtrain.distributed.mailbox import Mailbox


@dataclass
class Ranks(Collectives):
    """This rank among the others. All ranks call the same methods in the same order."""

    launcher: str = "none"
    notes: list[str] = field(default_factory=list)
    host: str = field(default_factory=socket.gethostname)
    mailbox: Mailbox = field(default_factory=Mailbox)
    are_lost: bool = False  # some are gone, so that nothing can be agreed on any more

    def __post_init__(self) -> None:
        self.strategy: DDP | FSDP = DDP(self)

    def close(self) -> None:
        """Leave the process group; only after success, since it waits for the others."""
        if self.world_size > 1 and not self.are_lost:
            by_node.leave()
            dist.destroy_process_group()


def is_lost_rank(error: BaseException) -> bool:
    """Whether an error is what a rank sees when another one has gone away in the middle of something in common."""
    lost = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed", "recvValue failed")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in lost)
    )
