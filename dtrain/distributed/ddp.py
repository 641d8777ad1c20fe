"""The strategy ddp: every rank has the whole model (DistributedDataParallel)."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Protocol

import torch
from torch.nn.parallel import DistributedDataParallel

from dtrain.distributed.collectives import Collectives, Forward

HOOKS = {  # torch's name of each `comm_hook`
    "no": "",
    "fp16": "FP16_COMPRESS",
    "bf16": "BF16_COMPRESS",
    "power_sgd": "POWER_SGD",
    "batched_power_sgd": "BATCHED_POWER_SGD",
}


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
        gradient_as_bucket_view: Let gradients live in the buckets, which spares a copy and its memory; the next step
            overwrites them. Default: true, but for optimizers that are not torch's, trainers with their own backward
            or step, and parameters with hooks that see gradients.
        static_graph: Promise that every step uses the same parameters.
        comm_hook: How gradients are compressed on the way.
    """
    return dict(locals())


def hook_mistake(hook: str | None, backend: str) -> str:
    """Why torch cannot compress gradients so; '' where it can."""
    if hook == "bf16" and backend == "gloo":
        return "bf16 needs NCCL, and these ranks use gloo"
    if hook == "batched_power_sgd":
        from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import _orthogonalize

        try:
            _orthogonalize(torch.ones(2, 1))  # what the hook does after its first thousand steps
        except AssertionError:
            return "batched_power_sgd fails in this version of torch after 1,000 steps"
    return ""


def dense(gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    """Gradients with the same norms, none of them sparse: of those the numbers that they store."""
    return [item.coalesce().values() if item.layout == torch.sparse_coo else item for item in gradients]


class PhaseClock(Protocol):
    """What takes the times of a step's phases."""

    phase: str

    def enter(self, phase: str) -> None:
        """From now on it is this phase."""


def _leave_out_label(wrapped: Any) -> None:
    """Have a wrapper's forward do without its label for profilers where there is none: it takes a third of its time."""
    labelled = wrapped.forward

    def forward(*inputs: Any, **kwargs: Any) -> Any:
        if torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
            return labelled(*inputs, **kwargs)
        inputs, kwargs = wrapped._pre_forward(*inputs, **kwargs)
        return wrapped._post_forward(wrapped._run_ddp_forward(*inputs, **kwargs))

    if isinstance(wrapped, DistributedDataParallel):
        wrapped.forward = forward  # type: ignore[method-assign]


class _InFixedBuckets(DistributedDataParallel):
    """Reduces gradients in the same buckets from the first step on, those of the layers that backward reaches first.

    Torch sorts them anew after the first step of each start, by the order in which gradients came. From three ranks on,
    another place in a bucket is another order of summation, so a start that resumes would differ in the last bits from
    a training that was not interrupted.
    """

    def __init__(self, model: torch.nn.Module, **options: Any) -> None:
        super().__init__(model, **options)
        self.reducer._push_all_rebuilt_params()
        self.reducer._rebuild_buckets()

    def _build_params_for_reducer(self) -> tuple[list[torch.nn.Parameter], list[bool]]:
        parameters, gives_sparse_gradient = super()._build_params_for_reducer()
        return parameters[::-1], gives_sparse_gradient[::-1]


class DDP:
    """Every rank has the whole model and the ranks average its gradients; also one process on its own.

    Its methods are those of `FSDP`. All ranks call them in the same order.

    Args:
        ranks: This rank among the others.
        options: Of DistributedDataParallel, and its `comm_hook`.
        accelerator: accelerate's, which wraps the model as its launcher's settings say. Default: torch alone does.
    """

    is_sharded = saves_shards = must_save_shards = False

    def __init__(self, ranks: Collectives, options: Mapping[str, Any] | None = None, accelerator: Any = None) -> None:
        self._ranks, self._options, self._accelerator = ranks, dict(options or {}), accelerator
        self._in_buckets: bool | None = self._options.pop("gradient_as_bucket_view", None)  # None: it does not say
        self._found_inf, self._one = torch.zeros(()), torch.ones(())
        self.parameters: dict[str, torch.nn.Parameter] = {}  # by name, in the order in which the wrapper numbers them
        self.clock: PhaseClock | None = None

    def wrap(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model as the ranks train it: in DistributedDataParallel, where there are several."""
        if self._ranks.world_size == 1 or not any(item.requires_grad for item in model.parameters()):
            return model
        # Those of now: the wrapper keeps its list where some are frozen later.
        named = [
            (name.replace("_orig_mod.", ""), item) for name, item in model.named_parameters() if item.requires_grad
        ]
        in_buckets = self._in_buckets is not False
        if self._accelerator is None:
            wrapped = self._distributed(model, in_buckets)
        else:
            self._accelerator.ddp_handler.gradient_as_bucket_view = in_buckets
            wrapped = self._accelerator.prepare_model(model)
        self.parameters = dict(named[::-1] if isinstance(wrapped, _InFixedBuckets) else named)
        self._set_waiting_apart(wrapped)
        _leave_out_label(wrapped)
        return wrapped

    def _distributed(self, model: torch.nn.Module, in_buckets: bool) -> torch.nn.Module:
        options, device = {**self._options, "gradient_as_bucket_view": in_buckets}, self._ranks.device
        hook = HOOKS[options.pop("comm_hook", "no")]
        devices = [device.index] if device.type == "cuda" else None
        # Where parameters may be left out, torch keeps the buckets that it begins with.
        wrapper = DistributedDataParallel if options.get("find_unused_parameters") else _InFixedBuckets
        wrapped = wrapper(model, device_ids=devices, **options)
        if hook:
            from torch.distributed.algorithms.ddp_comm_hooks import DDPCommHookType, register_ddp_comm_hook

            register_ddp_comm_hook(DDPCommHookType[hook], wrapped)
        return wrapped

    def _set_waiting_apart(self, wrapped: Any) -> None:
        """Have the clock tell the forward from the wait for other ranks with which it begins, for rank 0's buffers.

        By its forward a rank is judged, and rank 0 waits there for each rank that is late.
        """
        if (sync := getattr(wrapped, "_sync_buffers", None)) is None:
            return

        def sync_buffers() -> None:
            if (clock := self.clock) is None:
                sync()
                return
            phase = clock.phase
            clock.enter("waiting for ranks")
            try:
                sync()
            finally:  # what fails there has failed in a forward
                clock.enter(phase)

        wrapped._sync_buffers = sync_buffers

    def rewrap(self, wrapped: Any, model: torch.nn.Module) -> torch.nn.Module:
        """The model as the ranks train it from now on, where parameters were frozen or thawed.

        The wrapper reduces what required a gradient when it was made. Its hooks on the parameters go with its reducer,
        also where reference cycles keep the wrapper itself.
        """
        if wrapped is not model:
            wrapped.reducer = wrapped.logger = None
        return self.wrap(model)

    def with_gradients_apart(self, wrapped: torch.nn.Module, model: torch.nn.Module) -> torch.nn.Module:
        """The same with gradients that no later step overwrites, unless the options say where they live."""
        if self._in_buckets is not None:
            return wrapped
        self._in_buckets = False
        return self.rewrap(wrapped, model)

    def divide(self, module: torch.nn.Module) -> torch.nn.Module:
        """The module as it is: every rank has all of it."""
        return module

    def no_sync(self, model: Any) -> AbstractContextManager[None]:
        """A context in which gradients add up on each rank alone, until the last batch of a step."""
        return model.no_sync() if hasattr(model, "no_sync") else nullcontext()

    def gradients(
        self, loss: torch.Tensor, seed: torch.Tensor, parameters: list[torch.nn.Parameter], retain_graph: bool
    ) -> list[torch.Tensor | None]:
        """The mean over the ranks of a loss's gradients, beside the wrapper, which knows of no part of a model.

        What is None was used on no rank.
        """
        found = torch.autograd.grad(loss, parameters, seed, retain_graph=retain_graph, allow_unused=True)
        return self._ranks.average(list(found), parameters)

    def are_finite(self, gradients: list[torch.Tensor]) -> bool:
        """Whether all of them are known to be finite, equally on all ranks, in a third of the time of their norm.

        False as well where only the norm would tell, as on a device, for which the host does not wait.
        """
        found = self._found_inf
        if not gradients or gradients[0].device.type != "cpu":
            return False
        try:  # torch's own search for fp16's overflows, which multiplies them by 1
            torch._amp_foreach_non_finite_check_and_unscale_(gradients, found.zero_(), self._one)
        except RuntimeError:  # sparse ones, or complex numbers
            return False
        return not found.item()

    def total_norm(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        """The 2-norm of all gradients as one vector; torch's own function sorts them first, and takes twice as long."""
        if len({item.dtype for item in gradients}) > 1:
            return torch.nn.utils.get_total_norm(dense(gradients))
        try:
            return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        except NotImplementedError:  # of a sparse gradient there is no norm
            return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(dense(gradients))))

    def whole(self, tree: Any) -> Any:
        """A state_dict or the like as one process has it: as it is."""
        return tree

    def to_save(self, tree: Any) -> Any:
        """The same as a checkpoint takes it: as it is."""
        return tree

    def here(self, tree: Any) -> Any:
        """What this rank has of it: all."""
        return tree

    def load_weights(self, module: torch.nn.Module, weights: Mapping[str, Any] | None) -> None:
        """Give every rank these weights, which only the main rank has, or the main rank's own where they are None."""
        if weights is not None:
            module.load_state_dict(weights)
        self._ranks.share_weights(module)

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any] | None) -> None:
        """Give every rank's optimizer this state, which only the main rank has."""
        optimizer.load_state_dict(self._ranks.broadcast(state))

    def rounds(self, loader: Iterable[tuple[Any, int]], stop: Callable[[], bool]) -> Iterator[tuple[Any, int, bool]]:
        """This rank's batches (None: one without samples), each with its samples and whether to stop before it."""
        for batch, samples in loader:
            yield batch if samples else None, samples, stop()

    def lead(self, module: torch.nn.Module, forward: Forward, work: Callable[[Forward], None]) -> None:
        """Let the main rank do `work(forward)` alone, which calls `forward(module, batch)`."""
        if self._ranks.is_main:
            work(forward)
