"""Checks on a machine with a CUDA GPU what the tests cannot on a CPU; one line per check: ok, FAIL or skip, and why.

Started by gpu_check.sh, which sees to the environment. Each check runs the real command line in a folder of its own.

    python scripts/gpu_check.py [--device cuda] [--keep FOLDER] [CHECK ...]

`--device cpu` rehearses the same checks on the CPU, as far as they make sense there.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TIMEOUT_SECONDS = 240.0
WATCHED_AT_ONCE = 3  # trainings of one check
BALLAST = {"cuda": 20_000_000, "cpu": 100_000}  # parameters, so that a checkpoint's copy takes longer than a step
sys.path.insert(0, str(ROOT))  # dtrain need not be installed


class SkipError(Exception):
    """This machine lacks what the check needs."""


@dataclass
class Training:
    """What a command line left."""

    folder: Path
    rc: int
    output: str
    checkpoint: str = "last"

    @property
    def losses(self) -> list[float]:
        """train/loss at each log step."""
        lines = map(json.loads, (self.folder / "run" / "metrics.jsonl").read_text().splitlines())
        values = [line["values"] for line in lines if line["kind"] == "metrics"]
        return [float(value["train/loss"]) for value in values if "train/loss" in value]

    @property
    def last(self) -> Any:
        """The newest checkpoint, or the one that is named, loaded."""
        from dtrain.checkpoint.checkpoint_files import load

        return load(self.folder / "run" / "checkpoints" / self.checkpoint)


class Bench:
    """Starts trainings; all of one check share its folder."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device = folder, device

    def train(
        self, name: str, *overrides: str, ranks: int = 0, command: str = "train", device: str | None = None, rc: int = 0
    ) -> Training:
        """Run dtrain, under torchrun for ranks > 0; in the folder `name`, where an earlier training is gone on with.

        Raises:
            AssertionError: It ended with another status than `rc`.
        """
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
        wish = [f"device={device or self.device}"] if device != "" else []
        words = [sys.executable, *launcher, "-m", "dtrain", command, str(HERE / "gpu_check.yaml"), *wish, *overrides]
        done = subprocess.run(
            words, cwd=folder, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_SECONDS
        )
        output = done.stdout + done.stderr
        (folder / "output.txt").write_text(output)
        if done.returncode != rc:
            raise AssertionError(f"exit status {done.returncode}, expected {rc}: {told(output)}")
        return Training(folder, done.returncode, output)

    def python(self, code: str, ranks: int) -> str:
        """Run a piece of Python under torchrun; what it printed."""
        script = self.folder / "piece.py"
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(textwrap.dedent(code))
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={ranks}",
            str(script),
        ]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
        if done.returncode:
            raise AssertionError(told(done.stdout + done.stderr))
        return done.stdout.strip()


def environment() -> dict[str, str]:
    """This process's, with the checkout first and nobody else's ranks or MLflow in it."""
    foreign = ("MLFLOW_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "ACCELERATE_", "TORCHELASTIC_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
    paths = [str(HERE), str(ROOT), *filter(None, [kept.get("PYTHONPATH")])]
    return {**kept, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": kept.get("OMP_NUM_THREADS", "1")}


def told(output: str) -> str:
    """The line of an output that says what went wrong: the last that names an error, else the last."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line and not line.startswith(("File", "raise", "torch.distributed"))]
    return ([*errors, *lines[-1:]] or ["it said nothing"])[0]


def same(one: Training, other: Training) -> str:
    """Bit for bit the same weights, else an error that names the first that differ."""
    a, b = one.last.weights, other.last.weights
    differing = [name for name in a if not torch.equal(a[name], b[name])]
    if a.keys() != b.keys() or differing:
        raise AssertionError(f"weights differ: {', '.join(differing[:3]) or 'other names'}")
    return f"{len(a)} tensors equal bit for bit"


def close(one: list[float], other: list[float], relative: float) -> str:
    """Losses equal to a relative tolerance; returns the greatest difference in words."""
    if len(one) != len(other) or not one:
        raise AssertionError(f"{len(one)} and {len(other)} losses")
    differences = [abs(a - b) / abs(b) for a, b in zip(one, other, strict=True)]
    if not all(difference <= relative for difference in differences):  # a NaN is greater than nothing
        raise AssertionError(f"losses differ: {one} and {other}")
    return f"{len(one)} losses equal to {max(differences):.0e}"


def falls(training: Training) -> str:
    """The loss got smaller."""
    first, last = training.losses[0], training.losses[-1]
    if not last < first:  # a NaN is not, either
        raise AssertionError(f"the loss went from {first:.4g} to {last:.4g}")
    return f"loss {first:.3f} to {last:.3f}"


def needs_gpus(bench: Bench, number: int = 1) -> None:
    """Skip where there are fewer."""
    found = torch.cuda.device_count() if bench.device == "cuda" else 0
    if found < number:
        raise SkipError(f"needs {number} GPU(s), found {found}")


# The checks. What is said in their first line is printed beside the name when they fail.


def fallback(bench: Bench) -> str:
    """With `device` left at auto, one process takes cuda:0 and says so."""
    done = bench.train("auto", device="")
    where = "cuda:0" if bench.device == "cuda" else "the CPU"
    if f"one process on {where}" not in done.output:
        raise AssertionError(f"no line says 'one process on {where}'")
    return f"one process on {where}, {falls(done)}"


def one_rank(bench: Bench) -> str:
    """device: cuda under torchrun with one rank."""
    return falls(bench.train("one", ranks=1))


def nccl(bench: Bench) -> str:
    """dtrain's process group: tensors of the GPU over NCCL, of the CPU and objects over gloo, and DDP."""
    needs_gpus(bench)
    piece = """
        import torch, torch.distributed as dist
        from dtrain.distributed.ranks import Ranks
        from dtrain.distributed.process_group import _join
        from dtrain.distributed.environment import environment
        from dtrain.distributed.vote import Vote

        found, device = environment(), torch.device("cuda", 0)
        torch.cuda.set_device(device)
        _join(found, device, None, 60.0, {})
        ranks = Ranks(0, 0, 2, device, "torchrun")  # told two, so that it talks to the group of one
        assert ranks.sum_(torch.ones(3, device=device)).tolist() == [1, 1, 1]
        assert ranks.broadcast({"a": 1}) == {"a": 1} and ranks.gather(5) == [5, None]
        vote = Vote(ranks)
        assert [*vote.cast(True), *vote.cast(False), *vote.cast(False)] == [False, True, False]
        vote.settle()
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 2).to(device), device_ids=[0])
        model(torch.ones(4, 3, device=device)).sum().backward()
        ranks.share_weights(model.module)
        print(dist.get_backend_config(), "NCCL", ".".join(map(str, torch.cuda.nccl.version())))
        ranks.close()
    """
    return bench.python(piece, ranks=1)


def nccl_two_ranks(bench: Bench) -> str:
    """Two ranks on two GPUs over NCCL: the losses of one process."""
    needs_gpus(bench, 2)
    losses = bench.train("one", "model.dropout=0").losses
    return close(bench.train("two", "model.dropout=0", "trainer.sync_batchnorm=true", ranks=2).losses, losses, 1e-3)


def gloo_shared(bench: Bench) -> str:
    """Two gloo ranks share the GPU (trainer.ddp.backend=gloo): the losses of one process."""
    options = ("model.dropout=0", "model.batch_norm=false")
    losses = bench.train("one", *options).losses
    done = bench.train("two", *options, "trainer.ddp.backend=gloo", ranks=2)
    if bench.device == "cuda" and torch.cuda.device_count() == 1 and "share" not in done.output:
        raise AssertionError("no line says that ranks share the GPU")
    return close(done.losses, losses, 1e-4)


def bf16(bench: Bench) -> str:
    """precision: bf16; the network computes in bfloat16, its weights stay float32."""
    done = bench.train("bf16", "trainer.precision=bf16", "model.expects=bfloat16")
    assert all(value.dtype == torch.float32 for value in done.last.weights.values() if value.is_floating_point())
    return falls(done)


def fp16(bench: Bench) -> str:
    """precision: fp16; the scaler's state goes on after a resume, bit for bit."""
    options = ("trainer.precision=fp16", "model.expects=float16", "trainer.deterministic=true")
    bad = ("trainer.on_nonfinite=skip", "model.poison=4")  # so that the scale changes
    whole = bench.train("whole", *options, *bad)
    bench.train("parts", *options, *bad, "trainer.max_steps=13")
    parts = bench.train("parts", *options, "trainer.on_nonfinite=skip")
    before, after = whole.last.state["scaler"], parts.last.state["scaler"]
    if before != after or not after:
        raise AssertionError(f"scaler uninterrupted {before}, resumed {after}")
    tracker = after["_growth_tracker"]
    return f"{same(whole, parts)}, scale {after['scale']:g}, {tracker} steps since it changed, {falls(whole)}"


def compiled(bench: Bench) -> str:
    """trainer.compile: the losses of the same training without it."""
    if bench.device == "cuda":
        try:
            import triton  # noqa: F401
        except ImportError as error:
            raise SkipError("needs triton") from error
    losses = bench.train("eager", "model.dropout=0").losses
    return close(bench.train("compiled", "model.dropout=0", "trainer.compile=true").losses, losses, 1e-3)


def bitwise_resume(bench: Bench) -> str:
    """trainer.deterministic: stopped in mid-epoch and resumed, with 2 loader workers and dropout: bit for bit."""
    options = ("trainer.deterministic=true", "loaders.num_workers=2", "lr_scheduler={name: CosineAnnealingLR}")
    whole = bench.train("whole", *options)
    bench.train("parts", *options, "trainer.max_steps=13", "lr_scheduler.T_max=2")
    parts = bench.train("parts", *options, "lr_scheduler.T_max=2")
    return same(whole, parts)


WATCHED = {
    "fp32": (),
    "bf16": ("trainer.precision=bf16", "model.expects=bfloat16"),
    "fp16": ("trainer.precision=fp16", "model.expects=float16"),
    "clip": ("trainer.clip_grad_norm=0.1",),
    "accumulate": ("trainer.accumulate=2", "model.accumulate=2", "loaders.global_batch_size=16"),
    "ema": ("trainer.ema_decay=0.9",),
    "warm-up": ("lr_scheduler={name: CosineAnnealingLR, interval: step, warmup_steps: 8}",),
    "SGD": ("optimizer={name: SGD, lr: 0.01, momentum: 0.9}",),
    "workers": ("loaders.num_workers=2",),
    "non-finite": ("model.poison=4", "trainer.on_nonfinite=skip"),
}


def no_waiting(bench: Bench) -> str:
    """Between log steps the host never waits for the device (torch.cuda.set_sync_debug_mode("error"))."""
    needs_gpus(bench)

    def watched(name: str) -> str:
        try:
            bench.train(name, "model.watch_every_steps=5", *WATCHED[name])
        except AssertionError as error:
            return f"{name}: {error}"
        return ""

    with ThreadPoolExecutor(WATCHED_AT_ONCE) as pool:
        failed = [*filter(None, pool.map(watched, WATCHED))]
    if failed:
        raise AssertionError("; ".join(failed))
    return ", ".join(WATCHED)


def watch_sees(bench: Bench) -> str:
    """The check above can fail: an optimizer without fused kernels has to ask for the gradient's norm."""
    needs_gpus(bench)
    done = bench.train("RMSprop", "model.watch_every_steps=5", "optimizer={name: RMSprop, lr: 1e-3}", rc=1)
    if "synchroniz" not in done.output:
        raise AssertionError(f"it failed of something else: {told(done.output)}")
    return "RMSprop is caught"


def skipped_step(bench: Bench) -> str:
    """A step whose gradient is not finite is left out by the fused optimizer itself, and counted."""
    texts = []
    for name, optimizer in {
        "AdamW": "{name: AdamW, lr: 1e-3, fused: true}",
        "SGD": "{name: SGD, lr: 0.01, momentum: 0.9, fused: true}",
    }.items():
        for step in (1, 4):
            options = (f"optimizer={optimizer}", f"model.poison={step}", "trainer.on_nonfinite=skip")
            done = bench.train(f"{name}-{step}", *options)
            state, weights = done.last.state, done.last.weights
            largest = max(float(value.abs().max()) for value in weights.values() if value.is_floating_point())
            if state["skipped"] != 1 or not largest < 100:
                raise AssertionError(f"{name}, step {step} bad: {state['skipped']} skipped, largest weight {largest}")
        texts.append(name)
    return f"{', '.join(texts)}: the first step and a later one"


def stopped_step(bench: Bench) -> str:
    """on_nonfinite: stop ends the training with a message and exit status 1."""
    done = bench.train("stop", "model.poison=4", rc=1)
    if "NonFiniteError" not in done.output:
        raise AssertionError(told(done.output))
    return told(done.output)[:100]


def fsdp(bench: Bench) -> str:
    """trainer.strategy: fsdp: the losses of DDP, and bit for bit after a resume."""
    options = ("model.dropout=0", "model.batch_norm=false", "trainer.deterministic=true")
    losses = bench.train("ddp", *options, ranks=1).losses
    options = (*options, "trainer.strategy=fsdp")
    whole = bench.train("whole", *options, ranks=1)
    bench.train("parts", *options, "trainer.max_steps=13", ranks=1)
    return f"{close(whole.losses, losses, 1e-4)}, {same(whole, bench.train('parts', *options, ranks=1))}"


def fsdp_options(bench: Bench) -> str:
    """trainer.fsdp: host memory and compiled parts give the losses of plain shards; messages in bf16 nearly so."""
    options = ("model.dropout=0", "model.batch_norm=false", "trainer.strategy=fsdp")
    losses = bench.train("plain", *options, ranks=1).losses
    host = bench.train("host", *options, "trainer.fsdp={min_parameters: 100, cpu_offload: true}", ranks=1).losses
    bench.train("host", *options, "trainer.fsdp={cpu_offload: true}", "trainer.max_steps=22", ranks=1)  # it resumes
    compiled = bench.train("compiled", *options, "trainer.compile=true", ranks=1)
    small = ("trainer.fsdp={param_dtype: bf16, reduce_dtype: bf16}", "trainer.precision=bf16", "model.expects=bfloat16")
    bf16 = bench.train("bf16", *options, *small, ranks=1)
    texts = [close(host, losses, 1e-4), close(compiled.losses, losses, 1e-3), close(bf16.losses, losses, 0.1)]
    return f"host memory: {texts[0]}; compiled: {texts[1]}; bf16: {texts[2]}"


def memory_formats(bench: Bench) -> str:
    """trainer.channels_last and cudnn_benchmark: the losses of without; matmul_precision: nearly so."""
    losses = bench.train("plain", "model.dropout=0").losses
    last = bench.train("last", "model.dropout=0", "trainer.channels_last=true", "trainer.cudnn_benchmark=true").losses
    tf32 = bench.train("tf32", "model.dropout=0", "trainer.matmul_precision=high").losses
    return f"channels_last: {close(last, losses, 1e-3)}; TF32: {close(tf32, losses, 1e-2)}"


def activations_again(bench: Bench) -> str:
    """trainer.activation_checkpointing: bit for bit the weights of without."""
    plain = bench.train("plain", "trainer.deterministic=true")
    again = bench.train("again", "trainer.deterministic=true", "trainer.activation_checkpointing=[features, head]")
    return same(plain, again)


def memory_figure(bench: Bench) -> str:
    """gpu_memory_gb is among the figures of each log step."""
    needs_gpus(bench)
    done = bench.train("memory")
    lines = map(json.loads, (done.folder / "run" / "metrics.jsonl").read_text().splitlines())
    values = [line["values"] for line in lines if line["kind"] == "metrics" and "train/loss" in line["values"]]
    peaks = [float(value["gpu_memory_gb"]) for value in values]
    if not all(0 < peak < 10 for peak in peaks):
        raise AssertionError(f"peaks of {peaks} GB")
    return f"{len(peaks)} figures, {max(peaks):.4f} GB at most"


def copied_beside(bench: Bench) -> str:
    """Checkpoints are copied while the next steps change the weights: they hold their own step's, bit for bit."""
    model = f"model={{name: Large, ballast: {BALLAST[bench.device]}}}"
    options = ("trainer.deterministic=true", model, "trainer.keep_last=4")
    whole = bench.train("whole", *options, "trainer.max_steps=8", "trainer.checkpoint_every_steps=1")
    short = bench.train("short", *options, "trainer.max_steps=6")
    within = Training(whole.folder, 0, "", checkpoint="step-00000006")
    differing = [key for key in ("exp_avg", "exp_avg_sq") for number, state in _moments(within).items()
                 if not torch.equal(state[key], _moments(short)[number][key])]  # fmt: skip
    if differing:
        raise AssertionError(f"the optimizer's state differs: {', '.join(sorted(set(differing)))}")
    return same(within, short)


def _moments(training: Training) -> Any:
    return training.last.state["optimizer"]["state"]


def batches_ahead(bench: Bench) -> str:
    """Batches that a side stream brings from pinned memory: bit for bit the weights of those from ordinary memory."""
    options = ("trainer.deterministic=true", "loaders.num_workers=2")
    plain = bench.train("plain", *options, "loaders.pin_memory=false")
    return same(plain, bench.train("pinned", *options, f"loaders.pin_memory={str(bench.device == 'cuda').lower()}"))


def fused_by_default(bench: Bench) -> str:
    """The optimizer has torch's fused kernels, unless the config says otherwise; the table before the steps says so."""
    needs_gpus(bench)
    said = "torch's fused kernels"
    found = {name: said in bench.train(name, *options).output for name, options in {
        "default": (), "fused": ("optimizer.fused=false",), "foreach": ("optimizer.foreach=true",),
    }.items()}  # fmt: skip
    if found != {"default": True, "fused": False, "foreach": False}:
        raise AssertionError(f"fused kernels: {found}")
    return "AdamW; not with fused: false, nor with foreach: true"


def launch(bench: Bench) -> str:
    """dtrain launch: its rank is killed, started again and goes on from the last checkpoint, bit for bit."""
    options = ("trainer.deterministic=true", "trainer.checkpoint_every_steps=5", "--nproc-per-node=1")
    whole = bench.train("whole", *options, command="launch")
    again = bench.train("again", *options, "model.killed=13", "--max-restarts=1", command="launch")
    if not (again.folder / "killed").exists():
        raise AssertionError("the rank was not killed")
    return f"started again, {same(whole, again)}"


def doctor(bench: Bench) -> str:
    """dtrain doctor: GPUs, NCCL, fabric and the all-reduce of two ranks."""
    needs_gpus(bench)
    command = [sys.executable, "-m", "dtrain", "doctor", str(HERE / "gpu_check.yaml"), "--json"]
    bench.folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        command, cwd=bench.folder, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_SECONDS
    )
    found = {one["probe"]: one for one in json.loads(done.stdout)["findings"]}
    probes = {name: found.get(name, {"status": "missing"}) for name in ("gpus", "nccl", "fabric", "all-reduce")}
    if wrong := [f"{name}: {probe}" for name, probe in probes.items() if probe["status"] not in ("ok", "warn")]:
        raise AssertionError("; ".join(wrong))
    return "; ".join(f"{name}: {probe['status']} {probe['found']}" for name, probe in probes.items())


CHECKS: dict[str, Callable[[Bench], str]] = {
    "fallback": fallback,
    "torchrun-one-rank": one_rank,
    "nccl": nccl,
    "nccl-two-ranks": nccl_two_ranks,
    "gloo-shared": gloo_shared,
    "bf16": bf16,
    "fp16-scaler-resumed": fp16,
    "compile": compiled,
    "bitwise-resume": bitwise_resume,
    "no-waiting": no_waiting,
    "no-waiting-sees": watch_sees,
    "skipped-step": skipped_step,
    "stopped-step": stopped_step,
    "fsdp": fsdp,
    "fsdp-options": fsdp_options,
    "memory-formats": memory_formats,
    "activations-again": activations_again,
    "memory-figure": memory_figure,
    "copied-beside": copied_beside,
    "batches-ahead": batches_ahead,
    "fused-by-default": fused_by_default,
    "launch": launch,
    "doctor": doctor,
}


def judged(name: str, folder: Path, device: str) -> tuple[str, str]:
    """A check's verdict, and what it says, with the time that it took."""
    began = time.monotonic()
    try:
        verdict, said = "ok", CHECKS[name](Bench(folder / name, device))
    except SkipError as error:
        return "skip", str(error)
    except subprocess.TimeoutExpired as error:
        verdict, said = "FAIL", f"still running after {error.timeout:g} s"
    except Exception as error:  # a check that itself breaks is a failed one
        said = f"{error if isinstance(error, AssertionError) else repr(error)} [{CHECKS[name].__doc__}]"
        verdict = "FAIL"
    return verdict, f"{said} ({time.monotonic() - began:.0f} s)"


def machine(device: str) -> str:
    """Where this runs."""
    versions = f"torch {torch.__version__}, Python {sys.version.split()[0]}"
    if device == "cpu":
        return f"a rehearsal on the CPU, {versions}"
    names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    return f"{names}, CUDA {torch.version.cuda}, {versions}"


def main() -> int:
    """Run the checks; 1 if one failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=f"default: all of {', '.join(CHECKS)}")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave the runs there (default: they are deleted)")
    at_once = max(1, min(6, (os.cpu_count() or 1) // 2))
    parser.add_argument("--jobs", type=int, default=at_once, help=f"checks side by side (default here: {at_once})")
    options = parser.parse_args()
    if unknown := set(options.checks) - set(CHECKS):
        parser.error(f"no such check: {', '.join(sorted(unknown))}; possible: {', '.join(CHECKS)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        print(f"skip everything: torch {torch.__version__} sees no CUDA GPU on this machine")
        return 0
    print(f"dtrain on {machine(options.device)}", flush=True)
    began, failed, names = time.monotonic(), 0, options.checks or [*CHECKS]
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as temporary, ThreadPoolExecutor(options.jobs) as pool:
        folder = options.keep or Path(temporary)
        results = pool.map(lambda name: judged(name, folder, options.device), names)
        for name, (verdict, said) in zip(names, results, strict=True):
            failed += verdict == "FAIL"
            print(f"{verdict} {name}: {' '.join(said.split())}", flush=True)
    print(f"{len(names)} checks, {options.jobs} at once, {time.monotonic() - began:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
