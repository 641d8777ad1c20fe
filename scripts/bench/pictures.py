"""What the pictures of a validation cost beside an epoch of a UNet3D: the loop's part, and the thread's.

    python scripts/bench/pictures.py [--rounds 7] [--patch 32 64 64] [--samples 4] [--steps 100] [--f-maps 8 16 32]

Each round times, in processor time of the thread itself and with one thread for computations: a training step (one
patch, forward, loss, backward, AdamW), and one validation's pictures: what the loop waits for (the chosen samples once
more through the model, and their copies) and what the thread draws and writes meanwhile. Shares are of an epoch of
`--steps` steps, medians over the rounds; that of the model's own forward is shown, since nothing else can be smaller.
Then, for shorter and longer epochs, what dtrain's choice by time makes of these figures: which validations are drawn of
a training of 200 epochs, and the pictures' share of all of it; on a clock that these figures move.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from overhead import HERE, machine
from torch.utils.data import TensorDataset

MOST_SHARE = 0.02


class Timed:
    """A call that adds up the processor time of the thread that makes it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.seconds = function, 0.0

    def __call__(self, *given: Any, **keys: Any) -> Any:
        begin = time.thread_time()
        try:
            return self.function(*given, **keys)
        finally:
            self.seconds += time.thread_time() - begin


def loader_of(data: TensorDataset) -> Any:
    """The validation's, as a training has it."""
    from dtrain.data.samplers import EvaluationShard
    from dtrain.data.seeded_samples import batch_loader
    from dtrain.dataloader import loader_settings

    options = loader_settings()
    for key in ("batch_size", "global_batch_size", "shuffle", "drop_last"):
        del options[key]
    return batch_loader(data, 0, EvaluationShard(len(data), 0, 1, 1), {**options, "pin_memory": False})


def measure(wish: argparse.Namespace, folder: Path) -> list[dict[str, float]]:
    """Seconds, by round."""
    from dtrain.components.models.unet import UNet3D
    from dtrain.modelloader import Outcome
    from dtrain.reporting.validation_pictures import Pictures

    torch.manual_seed(0)
    data = TensorDataset(torch.randn(16, 1, *wish.patch), torch.randint(2, (16, 1, *wish.patch)).float())
    model = UNet3D(1, 1, f_maps=wish.f_maps, num_groups=min(8, wish.f_maps[0] // 2))
    optimizer = torch.optim.AdamW(model.parameters())
    pictures = Pictures(loader_of(data), folder, {"samples": wish.samples, "every_validations": 1})
    journal, found = SimpleNamespace(image=lambda *_: None), []
    for number in range(wish.rounds + 1):

        def step() -> None:
            optimizer.zero_grad()
            image, target = (tensor[:1] for tensor in data.tensors)
            torch.nn.functional.binary_cross_entropy_with_logits(model.train()(image), target).backward()
            optimizer.step()

        album: Any = pictures.album(number, journal, print)
        called, stepped, drawn = Timed(model), Timed(step), Timed(album._draw_all)
        album._draw_all = drawn

        def forward(_: Any, batch: Any, called: Timed = called) -> Any:
            return None, {}, Outcome(batch[0], called(batch[0]), batch[1])

        stepped()
        model.eval()
        with torch.no_grad():
            album.see(forward(model, [tensor[:1] for tensor in data.tensors])[2], 0, 1)
            called.seconds = 0.0
            waited = Timed(album.draw)
            waited([album.seen()], model, forward)
        pictures.finish()
        found.append(
            {"step": stepped.seconds, "loop": waited.seconds, "forward": called.seconds, "thread": drawn.seconds}
        )
    return found[1:]


def by_time(epoch: float, loop: float, thread: float, epochs: int = 200) -> tuple[int, float]:
    """Of a training whose epochs and pictures take so many seconds: validations that are drawn, and their share."""
    from dtrain.reporting.picture_time import PictureTime

    now, worked, drawn = 0.0, 0.0, 0

    def draw() -> None:
        nonlocal worked
        worked += thread

    chosen = PictureTime(None, lambda: now, lambda: worked)
    for number in range(epochs):
        now += epoch
        if chosen.allows(number, is_last=number == epochs - 1):
            drawn += 1
            with chosen.spent_by_loop():
                now += loop
            chosen.in_thread(draw)()
    return drawn, drawn * (loop + thread) / now


def main() -> None:
    """Measure, and print what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="(default 7)")
    parser.add_argument("--patch", type=int, nargs=3, default=[32, 64, 64], help="voxels (default 32 64 64)")
    parser.add_argument("--samples", type=int, default=4, help="panels of a validation (default 4)")
    parser.add_argument("--steps", type=int, default=100, help="of an epoch, a patch each (default 100)")
    parser.add_argument("--f-maps", type=int, nargs="+", default=[8, 16, 32], help="channels (default 8 16 32)")
    wish = parser.parse_args()
    sys.path.insert(0, str(HERE.parent.parent))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="pictures-") as folder:
        rounds = measure(wish, Path(folder))
    median = {name: statistics.median(times[name] for times in rounds) * 1e3 for name in rounds[0]}
    epoch = median["step"] * wish.steps
    print(f"{wish.rounds} rounds, {wish.samples} panels of {wish.patch}; {machine()}\n")
    print(f"a step {median['step']:.1f} ms, an epoch of {wish.steps} steps {epoch / 1e3:.1f} s")
    for name, what in (("loop", "the loop waits"), ("forward", "of which the model"), ("thread", "the thread works")):
        print(f"{what:<20} {median[name]:8.1f} ms  {median[name] / epoch:7.2%} of the epoch")
    share = (median["loop"] + median["thread"]) / epoch
    print(f"{'ok' if share <= MOST_SHARE else 'MISS'}: all of it {share:.2%} of the epoch (<= {MOST_SHARE:.0%})")
    for steps in (1, 10, 50, 100, 1000):
        seconds = median["step"] * steps / 1e3
        drawn, share = by_time(seconds, median["loop"] / 1e3, median["thread"] / 1e3)
        is_kept = "ok" if share <= MOST_SHARE else "MISS"  # of a training of a minute, the first and the last are more
        print(f"{is_kept}: by time, of 200 epochs of {seconds:.1f} s {drawn} are drawn: {share:.2%} of all")


if __name__ == "__main__":
    main()
