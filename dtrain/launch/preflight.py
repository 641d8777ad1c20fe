"""`dtrain doctor --preflight`: are the nodes of a job sound, the same, and equally fast? It names those that are not.

Every rank of the job runs it. Nothing is a collective of all ranks, so that one that never comes, or stops on the way,
is named by the others: what each finds it leaves on the launcher's store, and the network is measured by two nodes at a
time. Rank 0 judges; where it is silent, another rank does.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from dtrain.config.errors import ConfigError, one_line, to_plain
from dtrain.config.load import run_folder
from dtrain.distributed.device import choose_device
from dtrain.distributed.environment import Environment, environment, node_name, node_number
from dtrain.distributed.exit_status import DONE, FAILED
from dtrain.distributed.meeting import open_store
from dtrain.launch import node_checks
from dtrain.launch.code_copy import named_modules
from dtrain.launch.doctor import LOCAL_SECONDS, disk_speeds, existing_part, in_time, node_probes
from dtrain.launch.preflight_verdict import Notes, judge, text_of
from dtrain.tracking.bad_nodes import note_bad_node
from dtrain.tracking.environment import installed_packages

COME, MEASURED, JUDGED = 0.45, 0.75, 0.85  # of the limit: until then ranks come, measure, and are judged
GRACE = 0.1  # of the limit: so much later another rank does what rank 0 has not
PARTNERS = 6  # nodes with which each node measures the network
MESSAGE_MB = {"nccl": 256, "gloo": 16}
REPEATS, TICKS, TICK_SECONDS = 5, 5, 5.0


class Asked(NamedTuple):
    """What the command line asks for."""

    seconds: float = 120.0  # for all of it
    slow_below: float | None = None  # what is slower than this part of the median is bad; None: 0.7, of CPUs 0.3
    as_json: bool = False
    notes_bad_nodes: bool = False  # into the run folder


def preflight(config: Mapping[str, Any], asked: Asked) -> int:
    """Check this rank and its node beside all others; the exit status, equal on all: 0 good, 1 bad nodes were named."""
    here, began = environment(), time.monotonic()
    if here.world_size == 1 and (gpus := _gpus(config)) > 1:
        words = ["--standalone", f"--nproc-per-node={gpus}", "-m", "dtrain", *sys.argv[1:]]
        return subprocess.run([sys.executable, "-m", "torch.distributed.run", *words]).returncode
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # else torch shows its own stack for a rank that is gone
    watch = threading.Timer(asked.seconds, _give_up, (here, asked.seconds))
    watch.daemon = True
    watch.start()
    try:
        import torch  # noqa: F401  which may take long, so that less is left to wait

        store = open_store(here, max(1.0, began + COME * asked.seconds - time.monotonic()))
    except Exception as error:
        late = f"rank 0 did not come within {COME * asked.seconds:.0f} s to {_place()}"
        return _say(here, f"{late}: {one_line(str(error))[:200]}")
    try:
        return Preflight(here, store, config, asked, began).run()
    except Exception as error:
        from dtrain.distributed.ranks import is_lost_rank

        if not is_lost_rank(error):
            raise
        return _say(here, f"rank 0's node ({_place()}) is gone: {one_line(str(error))[:200]}")


def _gpus(config: Mapping[str, Any]) -> int:
    """How many this process alone would leave idle, and itself use."""
    import torch

    return torch.cuda.device_count() if (config.get("device") or "auto") in ("auto", "cuda") else 0


def _place() -> str:
    return f"{os.environ.get('MASTER_ADDR', 'this machine')}:{os.environ.get('MASTER_PORT', '')}"


def _say(here: Environment, text: str) -> int:
    with suppress(OSError):
        os.write(2, f"dtrain doctor: rank {here.rank}: {text}\n".encode())
    return FAILED


def _give_up(here: Environment, seconds: float) -> None:
    """The store itself does not answer: it is rank 0's, or its launcher's, and that one is frozen or gone."""
    os._exit(_say(here, f"not done within {seconds:.0f} s: rank 0's node ({_place()}) does not answer any more"))


class Preflight:
    """One rank's part in it; times are those of its own clock, from its own start on."""

    def __init__(self, here: Environment, store: Any, config: Mapping[str, Any], asked: Asked, began: float) -> None:
        self.here, self.store, self.config, self.asked, self.began = here, store, config, asked, began
        self.run_folder = run_folder(config)
        self.folder = existing_part(self.run_folder)

    def run(self) -> int:
        """All of it, in order."""
        place = {"node": node_name(), "number": node_number(self.here), "local_rank": self.here.local_rank}
        self._post("here", place | {"pid": os.getpid(), "local_world_size": self.here.local_world_size})
        self._post("alone", self._alone())
        plan = self._led("plan", self._plan, COME)
        mark = Path(plan["mark"])
        try:
            self._post("together", self._together(plan))
            status: int = self._led("verdict", lambda: self._verdict(plan), MEASURED)
            self._post("done", True)
            if self.here.rank == 0:  # whose store it may be
                self._notes("done", JUDGED + GRACE, self._planned(plan))
        finally:
            if plan["maker"] == self.here.rank:
                mark.unlink(missing_ok=True)
        return status

    # Notes

    def _post(self, name: str, value: Any) -> None:
        self.store.set(f"preflight/{name}/{self.here.rank}", json.dumps(value))

    def _notes(self, name: str, until: float = 0.0, ranks: Sequence[int] | None = None) -> dict[int, Any]:
        """The notes of all ranks, or some; those that are there at that part of the limit."""
        keys = {rank: f"preflight/{name}/{rank}" for rank in ranks or range(self.here.world_size)}
        if not self._wait([*keys.values()], until):
            keys = {rank: key for rank, key in keys.items() if self.store.check([key])}
        return {rank: json.loads(self.store.get(key)) for rank, key in keys.items()}

    def _wait(self, keys: list[str], until: float) -> bool:
        """Whether all keys are there, at that part of the limit at the latest."""
        left = self.began + until * self.asked.seconds - time.monotonic()
        try:
            self.store.wait(keys, timedelta(seconds=max(left, 0.01)))
        except Exception:  # torch's DistStoreError, of HashStore a RuntimeError
            return bool(self.store.check(keys))
        return True

    def _led(self, name: str, make: Callable[[], Any], until: float) -> Any:
        """What one rank makes for all: rank 0, or, where it has not in time, the first one that misses it."""
        key = f"preflight/{name}"
        is_there = self.here.rank != 0 and self._wait([key], until + GRACE)
        if not is_there and self.store.add(f"{key}/made", 1) == 1:
            self.store.set(key, json.dumps(make()))
        elif not is_there:
            self._wait([key], 1.0)
        return json.loads(self.store.get(key))

    # What a rank finds alone

    def _alone(self) -> dict[str, Any]:
        """Figures and findings of this rank, its first one's of the node; digests of what must be the same."""
        import torch

        findings: list[tuple[str, str]] = []
        found: dict[str, Any] = {"figures": {}, "findings": findings, "backend": "gloo", "device": "cpu"}
        packages = node_checks.software(installed_packages())
        found["packages"] = self._shared(packages)
        if self.here.local_rank == 0:
            self._node(found)
        try:
            wish = self.config.get("device") or "auto"
            backend = ((self.config.get("trainer") or {}).get("ddp") or {}).get("backend")
            device, _ = choose_device(wish, self.here, torch.cuda.device_count(), backend)
        except ConfigError as error:
            findings.append(("bad", str(error)))
            return found
        self.device = device if device.type in node_checks.MATRIX else torch.device("cpu")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            found["device"] = torch.cuda.get_device_name(self.device)
            found["backend"] = "nccl" if torch.distributed.is_nccl_available() and backend != "gloo" else "gloo"
        try:
            kept_gb, copied, wrong = node_checks.memory(self.device)
            teraflops, different = node_checks.compute(self.device)
        except RuntimeError as error:  # of CUDA
            findings.append(("bad", f"{type(error).__name__}: {str(error).splitlines()[0]}"))
            return found
        found["figures"] |= {"compute": teraflops, "memory": copied, "kept_gb": kept_gb}
        findings += [("bad", text) for text in (*wrong, *different)]
        return found

    def _node(self, found: dict[str, Any]) -> None:
        """What the first rank of a node finds for all of it."""
        found["code"] = self._shared(node_checks.code_digests({"dtrain", *named_modules(to_plain(self.config))}))
        findings = found["findings"]
        levels = {"ok": "note", "warn": "warn", "fail": "bad"}
        for one in in_time(node_probes(self.here), LOCAL_SECONDS):
            if one.status != "ok":
                findings.append((levels[one.status], f"{one.probe}: {'; '.join(filter(None, (one.found, one.cure)))}"))
        findings += node_checks.driver_notes()
        try:
            found["figures"]["written"], found["figures"]["read"] = disk_speeds(self.folder)
        except OSError as error:
            findings.append(("bad", f"disk: {self.folder}: {error.strerror}"))

    def _shared(self, values: dict[str, str]) -> str:
        """Leave a list by its digest, which it returns, so that equal ones are there once."""
        digest = node_checks.digest_of(values)
        if not self.store.check([key := f"preflight/list/{digest}"]):
            self.store.set(key, json.dumps(values))
        return digest

    # What nodes find together

    def _plan(self) -> dict[str, Any]:
        """Who is there: the ranks of each node, how they communicate; and a file that all are to see."""
        alone = self._notes("alone", COME)
        here = self._notes("here")
        nodes: dict[int, list[int]] = {}
        for rank in sorted(alone):
            nodes.setdefault(here[rank]["number"], []).append(rank)
        backends = {note["backend"] for note in alone.values()}
        handle, mark = tempfile.mkstemp(prefix=".dtrain-preflight-", dir=self.folder)
        os.close(handle)
        return {
            "nodes": [nodes[number] for number in sorted(nodes)],
            "backend": "nccl" if backends == {"nccl"} else "gloo",
            "maker": self.here.rank,
            "mark": mark,
        }

    @staticmethod
    def _planned(plan: Mapping[str, Any]) -> list[int]:
        return [rank for ranks in plan["nodes"] for rank in ranks]

    def _together(self, plan: Mapping[str, Any]) -> dict[str, Any]:
        """What is found with others; what takes too long is abandoned, and ends with this process."""
        found: dict[str, Any] = {"findings": [], "failed": {}}
        own = next((index for index, ranks in enumerate(plan["nodes"]) if self.here.rank in ranks), None)
        if own is None or not hasattr(self, "device"):  # too late for it, or without a device
            return found
        if self.here.rank == plan["maker"]:
            self._ask_clocks(plan)
        elif self.here.rank == plan["nodes"][own][0]:
            self._tell_clock()
        if self.here.rank == plan["nodes"][own][0] and (text := node_checks.missed_mark(Path(plan["mark"]))):
            found["findings"].append(("bad", text))
        thread = threading.Thread(target=self._measure, args=(plan, own, found), daemon=True)
        thread.start()
        thread.join(max(0.0, self.began + MEASURED * self.asked.seconds - time.monotonic()))
        return json.loads(json.dumps(found))  # a copy: the thread may still write

    def _ask_clocks(self, plan: Mapping[str, Any]) -> None:
        """Leave each node's clock against this rank's, and how exactly that is known: the fastest of a few answers."""
        first = {ranks[0] for ranks in plan["nodes"]} - {self.here.rank}
        best = dict.fromkeys(first, (math.inf, 0.0))
        for tick in range(TICKS if first else 0):
            asked = time.time()
            self.store.set(f"preflight/tick/{tick}", "")
            keys = {rank: f"preflight/clock/{tick}/{rank}" for rank in first}
            with suppress(Exception):
                self.store.wait([*keys.values()], timedelta(seconds=TICK_SECONDS))
            read = time.time()
            first = {rank for rank in first if self.store.check([keys[rank]])}
            for rank in first:
                said = float(self.store.get(keys[rank]))
                best[rank] = min(best[rank], ((read - asked) / 2, said - (asked + read) / 2))
        self.store.set("preflight/clocks", json.dumps({rank: one for rank, one in best.items() if rank in first}))

    def _tell_clock(self) -> None:
        for tick in range(TICKS):
            try:
                self.store.wait([f"preflight/tick/{tick}"], timedelta(seconds=2 * TICK_SECONDS))
            except Exception:  # who asks is gone
                return
            self.store.set(f"preflight/clock/{tick}/{self.here.rank}", repr(time.time()))

    def _measure(self, plan: Mapping[str, Any], own: int, found: dict[str, Any]) -> None:
        """GB/s within the node, and the best with other nodes, rank by rank."""
        nodes = plan["nodes"]
        rounds = partners(len(nodes), PARTNERS)
        place = nodes[own].index(self.here.rank)
        groups = [("in node", None, nodes[own])] if len(nodes[own]) > 1 else []
        for other in (one[own] for one in rounds):
            if other is not None and place < len(nodes[other]):
                groups.append(("network", nodes[other][place], [self.here.rank, nodes[other][place]]))
        for number, (kind, other, ranks) in enumerate(groups):
            left = self.began + MEASURED * self.asked.seconds - time.monotonic()
            patience = max(1.0, left / (len(groups) - number + 1))
            try:
                speed = self._reduced(sorted(ranks), plan["backend"], patience)
                found[kind] = max(speed, found.get(kind, 0.0))
            except Exception as error:
                text = (str(error).strip().splitlines() or [type(error).__name__])[0]
                found["failed"][f"{kind} {other}"] = text[:200]

    def _reduced(self, ranks: list[int], backend: str, seconds: float) -> float:
        """GB/s of an all-reduce among some ranks; an error where it fails, or its sum is wrong."""
        import torch
        import torch.distributed as dist

        os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"  # a limit is an error here, not this process's end
        device = self.device if backend == "nccl" else torch.device("cpu")
        tensor = torch.empty(MESSAGE_MB[backend] * 250_000, device=device)
        store = dist.PrefixStore(f"preflight/group/{'-'.join(map(str, ranks))}", self.store)  # type: ignore[attr-defined]
        index = ranks.index(self.here.rank)
        limit = timedelta(seconds=seconds)
        dist.init_process_group(backend, timeout=limit, store=store, rank=index, world_size=len(ranks))
        try:
            best = math.inf
            for _ in range(REPEATS):
                tensor.fill_(index + 1.0)
                began = time.perf_counter()
                dist.all_reduce(tensor)
                is_right = bool((tensor == len(ranks) * (len(ranks) + 1) / 2).all())  # which waits for the device
                best = min(best, time.perf_counter() - began)
                if not is_right:
                    raise ArithmeticError("the sum is wrong")
        finally:
            dist.destroy_process_group()
        return 2 * (len(ranks) - 1) / len(ranks) * MESSAGE_MB[backend] / 1e3 / best

    # The verdict

    def _verdict(self, plan: Mapping[str, Any]) -> int:
        """Judge all nodes by their notes, print what is found; returns the exit status."""
        together = self._notes("together", JUDGED, self._planned(plan))
        key = "preflight/clocks"
        notes = Notes(
            here=self._notes("here"),
            alone=self._notes("alone"),
            together=together,
            clocks=json.loads(self.store.get(key)) if self.store.check([key]) else {},
            planned=self._planned(plan),
            world_size=self.here.world_size,
            come_seconds=COME * self.asked.seconds,
        )
        nodes = judge(
            notes, self.asked.slow_below, lambda digest: json.loads(self.store.get(f"preflight/list/{digest}"))
        )
        bad = [node for node in nodes if node.verdict == "bad"]
        print(text_of(nodes, time.monotonic() - self.began, self.asked.as_json), flush=True)
        if self.asked.notes_bad_nodes:
            for node in bad:
                note_bad_node(self.run_folder, node.name, f"preflight: {node.reasons[0]}")
        return FAILED if bad else DONE


def partners(nodes: int, most: int) -> list[list[int | None]]:
    """Who measures with whom: a list of rounds, in each every node's partner, None for one that has none.

    Rounds of a round-robin tournament, evenly spread, so that in each every node has another one.
    """
    size = nodes + nodes % 2  # the circle method: one stays, the others turn
    rounds: list[list[int | None]] = []
    for number in range(min(most, size - 1) if nodes > 1 else 0):
        turn = number * (size - 1) // min(most, size - 1)
        circle = [0, *(1 + (index + turn) % (size - 1) for index in range(size - 1))]
        pairs = {circle[index]: circle[size - 1 - index] for index in range(size)}
        rounds.append([other if (other := pairs[node]) < nodes else None for node in range(nodes)])
    return rounds
