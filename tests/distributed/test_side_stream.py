"""A device's side stream, rehearsed on the CPU: it brings what a plain move brings; a CPU has none.

What it does on a GPU, scripts/gpu_check.py shows.
"""

from collections import OrderedDict, UserDict, namedtuple
from typing import Any

import torch
from torch.nn.utils.rnn import pack_sequence

from dtrain.data.batch import to_device
from dtrain.distributed.side_stream import SideStream, mover

CPU, ELSEWHERE = torch.device("cpu"), torch.device("meta")
Pair = namedtuple("Pair", ["image", "label"])


class Graph:
    """Moves itself, as torch_geometric's do."""

    def __init__(self, device: torch.device = CPU) -> None:
        self.device = device

    def to(self, device: torch.device) -> "Graph":
        return Graph(device)


def described(value: Any) -> Any:
    """Where everything in a batch lies, and in what."""
    if isinstance(value, torch.Tensor | Graph):
        return type(value), value.device
    if isinstance(value, dict | UserDict):
        return {key: described(item) for key, item in value.items()}
    return (type(value), [described(item) for item in value]) if isinstance(value, list | tuple) else value


def test_a_batch_of_any_form_is_brought_as_a_plain_move_brings_it() -> None:
    image, label = torch.ones(2, 3), torch.zeros(2, dtype=torch.long)
    bring = SideStream(CPU).bringing(to_device)
    packed = pack_sequence([torch.ones(3), torch.ones(2)])
    for batch in (
        image, [image, label], (image, (label, [image])), {"image": image, "name": ["a", "b"], "none": None},
        Pair(image, label), [Graph(), label], OrderedDict(image=image), UserDict(image=image),
        [torch.nn.Parameter(image)], [],
    ):  # fmt: skip
        assert described(bring(batch, ELSEWHERE)) == described(to_device(batch, ELSEWHERE))
    assert type(bring([packed], CPU)[0]) is type(packed) and bring([packed], CPU)[0].data.tolist() == [1] * 5
    assert torch.equal(bring([image], CPU)[0], image)


def test_on_a_cpu_there_is_none() -> None:
    assert mover(to_device, CPU) is to_device
