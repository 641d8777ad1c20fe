"""The most memory that a GPU had allocated since figures were last logged."""

import torch

from dtrain.distributed.ranks import Ranks


def peak_gb(ranks: Ranks) -> list[float]:
    """This rank's peak in GB (10^9 bytes) in a row for all ranks', which adding up completes; nothing without CUDA.

    The next peak begins now. Asking takes microseconds, and waits for no device.
    """
    if ranks.device.type != "cuda":
        return []
    row = [0.0] * ranks.world_size
    row[ranks.rank] = torch.cuda.max_memory_allocated(ranks.device) / 1e9
    torch.cuda.reset_peak_memory_stats(ranks.device)
    return row
