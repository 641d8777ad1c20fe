"""DistributedDataParallel: every rank has the whole model."""

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    pass


def ddp_options(  # noqa: PLR0913
    *,
    backend: Literal["gloo", "nccl"] | None = None,
    timeout_seconds: float | None = None,
    broadcast_buffers: bool | None = None,
    bucket_cap_mb: int | None = None,
    find_unused_parameters: bool | None = None,
    gradient_as_bucket_view: bool | None = None,
    static_graph: bool | None = None,
    comm_hook: Literal["no", "fp16", "bf16", "power_sgd", "batched_power_sgd"] | None = None,
) -> dict[str, Any]:
    """The keys under `trainer.ddp`: DistributedDataParallel's own, and two of the process group.

    Args:
        backend: gloo lets several ranks share a GPU. Default: NCCL on GPUs, gloo on CPUs.
        timeout_seconds: After so long a wait for another rank, a collective fails.
        broadcast_buffers: Give all ranks rank 0's buffers before each forward (default true).
        bucket_cap_mb: Size of the buckets in which gradients are reduced.
        find_unused_parameters: For models that leave some parameters out of some steps.
        gradient_as_bucket_view: Let gradients live in the buckets, which saves memory.
        static_graph: Promise that every step uses the same parameters.
        comm_hook: How gradients are compressed on the way.
    """
    return dict(locals())
