"""Small collectives by node: what torch's own give, for any form of nodes, with few messages; and no hang."""

import math
from typing import Any

import pytest
from whole_runs import Place, close, figures, last, said_by_ranks

from dtrain.distributed.by_node import nodes_of, tree_of

# ------------------------------------------------------------------------------------------------------ who is where


@pytest.mark.parametrize(
    ("places", "nodes"),
    [
        ([("a", "", 0), ("a", "", 1), ("b", "", 0)], [0, 0, 1]),
        ([("a", "", 0), ("b", "", 0), ("a", "", 1), ("b", "", 1)], [0, 1, 0, 1]),  # the order is not by node
        ([("vm", "0", 0), ("vm", "0", 1), ("vm", "1", 0)], [0, 0, 1]),  # one name for all; the launcher knows
        ([("vm", "", 0), ("vm", "", 1), ("vm", "", 0), ("vm", "", 1)], [0, 0, 1, 1]),  # nobody knows
        ([("vm", "", 0), ("vm", "", 0), ("vm", "", 1), ("vm", "", 1)], [0, 1, 0, 1]),
        ([("a", "0", 0), ("b", "0", 0)], [0, 1]),
    ],
)
def test_the_ranks_of_a_node_are_found(places: list[tuple[str, str, int]], nodes: list[int]) -> None:
    assert nodes_of(places) == nodes


@pytest.mark.parametrize(
    ("nodes", "below"),
    [
        ("a", [[]]),
        ("aabb", [[1, 2], [], [3], []]),
        ("aaab", [[1, 2, 3], [], [], []]),
        ("abbb", [[1], [2, 3], [], []]),
        ("abab", [[2, 1], [3], [], []]),
        ("abcd", [[1, 2, 3], [], [], []]),
        ("aaaaaa", [[1, 2, 3, 4], [], [], [], [5], []]),  # more than a group
        ("abcdef", [[1, 2, 3, 4], [], [], [], [5], []]),
    ],
)
def test_the_first_of_a_node_stands_above_it(nodes: str, below: list[list[int]]) -> None:
    assert tree_of(nodes, fan_out=4) == below


@pytest.mark.parametrize("sizes", [[8] * 1000, [8] * 999 + [3], [1] * 3000, [64] * 50, [4]])
def test_a_large_tree_is_flat_and_leaves_each_node_once(sizes: list[int]) -> None:
    nodes = [node for node, size in enumerate(sizes) for _ in range(size)]
    below = tree_of(nodes)
    above = {lower: upper for upper, lowers in enumerate(below) for lower in lowers}
    assert sorted(above) == list(range(1, len(nodes)))
    hops = [0] * len(nodes)
    for rank in above:
        at = rank
        while at:
            hops[rank] += 1
            at = above[at]
    assert max(hops) <= math.ceil(math.log(max(sizes), 2)) + math.ceil(math.log(len(sizes), 2)) + 1
    assert max(map(len, below)) <= 40  # connections of a rank
    crossing = [rank for rank, upper in above.items() if nodes[rank] != nodes[upper]]
    assert len(crossing) == len(sizes) - 1, "one message leaves a node, and one comes back"


# ------------------------------------------------------------------------------------------------------- real ranks

FORMS = {
    "2 and 2": [("x", "0", 0), ("x", "0", 1), ("x", "1", 0), ("x", "1", 1)],
    "3 and 1": [("a", "", 0), ("a", "", 1), ("a", "", 2), ("b", "", 0)],
    "1 and 3": [("a", "", 0), ("b", "", 0), ("b", "", 1), ("b", "", 2)],
    "1 each": [("a", "", 0), ("b", "", 0), ("c", "", 0), ("d", "", 0)],
    "not by node": [("a", "", 0), ("b", "", 0), ("a", "", 1), ("b", "", 1)],
    "alike": [("vm", "", 0), ("vm", "", 1), ("vm", "", 0), ("vm", "", 1)],
    "one node": None,
}

SCRIPT = """
import json, os, sys, torch
from types import SimpleNamespace
import torch.distributed as dist
import torchmetrics
from dtrain.config.errors import ConfigError
from dtrain.distributed import by_node
from dtrain.distributed.collectives import Collectives
from dtrain.distributed.process_group import _refuse_shared_gpus
from dtrain.distributed.vote import Vote
from dtrain.data.confusion import Batch
from dtrain.metrics import _Reduced

rank, folder, forms = int(os.environ["RANK"]), sys.argv[1], json.loads(sys.argv[2])
torch.set_num_threads(1)
store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), 4, rank == 0)
own = torch.tensor([0.1, 1e9, -1e-9, 3.3], dtype=torch.float64) * (1 + rank) ** 3


def seen(ranks, tree):
    flat = dist.all_reduce  # torch's own, on the default group
    begun = dist.distributed_c10d._get_default_group()._get_sequence_number_for_group
    of_tree = tree._group._get_sequence_number_for_group if tree else lambda: 0
    before, messages, asked = begun(), of_tree(), by_node.begun()
    total = ranks.sum_(own.clone())
    found = {"sum": [each.hex() for each in total.tolist()], "messages": of_tree() - messages,
             "flat begun": begun() - before, "begun": by_node.begun() - asked}
    flat(expected := own.clone())
    whole = torch.arange(5) * (rank + 1)
    largest = torch.tensor([rank, -rank])
    by_node.all_reduce(largest, dist.ReduceOp.MAX)
    first, second = torch.tensor([rank]), torch.tensor([1])
    works = [by_node.all_reduce(item, async_op=True) for item in (first, second)]
    gathered = ranks.gather({"rank": rank, "bytes": b"x" * (10 ** 5 * rank)})
    for work in works:
        work.wait()
    vote, votes = Vote(ranks), []
    while not votes or not any(votes[-1]):
        votes.append(vote.cast(rank == 3 and len(votes) > 4, False))
    vote.settle()

    def wrong():
        raise KeyError("rank 0 says so")

    try:
        ranks.decide(wrong)
    except KeyError as error:
        found["error"] = str(error)
    classes = torchmetrics.ConfusionMatrix(task="multiclass", num_classes=3, sync_on_compute=False)
    metrics = {"classes": _Reduced(classes), "mean": _Reduced(torchmetrics.MeanMetric(sync_on_compute=False))}
    if rank != 2:  # which has no batch
        metrics["classes"].update(Batch(torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([rank % 3])), 0, 1)
        metrics["mean"].metric.update(torch.tensor(float(rank)))
    found["metrics"] = [metric.compute(ranks) for metric in metrics.values()]
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(uuid="shared" if rank in (1, 3) else rank)
    try:
        _refuse_shared_gpus(ranks) if tree else None
    except ConfigError as error:
        found["gpus"] = str(error)
    large = torch.ones(by_node.SMALL_BYTES)
    ranks.sum_(large)
    return found | {
        "expected": expected.tolist(), "integers": ranks.sum_(whole).tolist(), "largest": largest.tolist(),
        "started": [first.item(), second.item()], "votes": votes, "large": [large.min().item(), large.max().item()],
        "gathered": gathered and [(item["rank"], len(item["bytes"])) for item in gathered],
        "told": [ranks.broadcast(f"of {rank}" * 900 if rank == source else None, source) for source in range(4)],
        "in step": by_node.begun(), "sums": [ranks.sum_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]).T).tolist()],
    }


results = {}
for name, places in forms.items():
    if places:
        by_node.expect_several_nodes()
    dist.init_process_group("gloo", store=dist.PrefixStore(name, store), rank=rank, world_size=4)
    if places:
        by_node.join(dist.distributed_c10d._get_default_store(), rank, 4, tuple(places[rank]))
    ranks = Collectives(rank, 0, 4, torch.device("cpu"))
    results[name] = seen(ranks, by_node.tree())
    by_node.leave()
    dist.destroy_process_group()
open(f"{folder}/{rank}.json", "w").write(json.dumps(results))
store.set(f"done {rank}", "1")
store.wait([f"done {each}" for each in range(4)])
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of four ranks has seen, by form."""
    folder = tmp_path_factory.mktemp("nodes")
    return said_by_ranks(4, SCRIPT, folder, FORMS)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_all_ranks_get_what_torch_gives_them_without_nodes(found: list[dict[str, Any]], form: str) -> None:
    own = [each[form] for each in found]
    assert len({tuple(each["sum"]) for each in own}) == 1, "the same bits on every rank"
    cubes = [1, 8, 27, 64]
    exact = [math.fsum(value * cube for cube in cubes) for value in (0.1, 1e9, -1e-9, 3.3)]
    for each in own:
        assert [float.fromhex(value) for value in each["sum"]] == pytest.approx(exact, rel=1e-14)
        assert each["expected"] == pytest.approx(exact, rel=1e-14)
        assert each["integers"] == [0, 10, 20, 30, 40]
        assert each["sums"] == [[[4.0, 12.0], [8.0, 16.0]]], "a tensor with strides"
        assert each["largest"] == [3, 0]
        assert each["started"] == [6, 4], "two at once, and a gather meanwhile"
        assert each["large"] == [4.0, 4.0]
        if FORMS[form]:
            assert each["gpus"].startswith("device: ranks 1, 3 have the same GPU")
        # Ranks 0, 1 and 3 have seen one of class 0, 1 and 0, and took it for class 1.
        assert each["metrics"] == [[[0.0, 2.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]], pytest.approx(4 / 3)]
        assert each["told"] == [f"of {source}" * 900 for source in range(4)]
        assert each["error"] == "'rank 0 says so'"
        assert each["votes"][-1] == [True, False]
        assert len(each["votes"]) == len(own[0]["votes"]) > 5, "after the same step"
    assert own[0]["gathered"] == [[rank, 10**5 * rank] for rank in range(4)]
    assert [each["gathered"] for each in own[1:]] == [None] * 3


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_a_rank_talks_with_its_neighbours_alone(found: list[dict[str, Any]], form: str) -> None:
    own = [each[form] for each in found]
    places = FORMS[form]
    if places is None:  # nothing changes, bit by bit
        assert [(each["messages"], each["flat begun"], each["begun"]) for each in own] == [(0, 1, 0)] * 4
        assert [float.fromhex(value) for value in own[0]["sum"]] == own[0]["expected"]
        return
    neighbours = [len(lowers) + (rank > 0) for rank, lowers in enumerate(tree_of(nodes_of(places)))]
    # Each sends a neighbour one message, and gets one; the watch counts one collective on each.
    assert [each["messages"] for each in own] == [2 * count for count in neighbours]
    assert [(each["flat begun"], each["begun"]) for each in own] == [(0, 1)] * 4
    assert len({each["in step"] for each in own}) == 1, "by which the watch sees that no rank is behind"


# ------------------------------------------------------------------------------------------------------- trainings

STEADY = {"loaders.batch_size": 1, "trainer.max_steps": 5, "trainer.log_every_steps": 1}


def test_nodes_train_as_one_process_does(place: Place) -> None:
    place.run(place.config("one-process", **STEADY | {"loaders.batch_size": 4}))
    place.run(place.config("three-and-one", **STEADY), ranks=[3, 1])
    one, other = place.path("one-process"), place.path("three-and-one")
    close(figures(one), figures(other))
    assert figures(other)["train/loss"], "each step is logged"
    assert len(last(other).state["rng"]) == 4


def test_the_end_of_the_first_rank_of_a_node_ends_the_others(place: Place) -> None:
    """Rank 1 is the one that its node's other rank hears from."""
    file = place.config("leaderless", **STEADY, **{"trainer.hang_timeout_seconds": 500})
    results = [each.result(200) for each in place.start(file, ranks=[1, 2], do="train 3 rank 1 KILL")]
    assert [result.rc for result in results] == [1, -9, 1], "".join(result.text for result in results)
    assert "rank 1" in results[0].text


def test_the_watch_names_the_rank_that_all_nodes_wait_for(place: Place) -> None:
    file = place.config("node-waiting", **STEADY, **{"trainer.hang_timeout_seconds": 15})
    place.run(file, expect=None, ranks=[1, 2], do="eval 1 rank 2 sleep")
    text = (place.path("node-waiting") / "hang.txt").read_text()
    assert text.startswith("no progress for 15 s; rank 2 is stuck\n"), text
