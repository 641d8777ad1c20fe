"""What docs/own-loop.md shows: each example trains on two ranks as on one, and resumes in the middle bit for bit."""

import itertools
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import REPOSITORY
from whole_runs import Place, close, equal, figures, last

from dtrain.components.datasets import Digits
from dtrain.config.load import load_config
from dtrain.data import rng
from dtrain.modelloader import get_model

pytestmark = pytest.mark.timeout(600)

PAGE = REPOSITORY / "docs" / "own-loop.md"
# 1,257 images make three steps of an epoch, the last one of 417: 209 on one rank and 208 on the other.
SHORT = ["loaders.global_batch_size=420", "lr_scheduler=null", "trainer.log_every_steps=1", "trainer.pictures=false"]
PLAIN = ["model.dropout=0", "model.emb_dropout=0"]  # nothing that differs between ranks


def code_of_page() -> dict[str, str]:
    """The files that the page has, by name."""
    found = re.findall(r"^```\w+\n(# file: (\S+)\n.*?)^```$", PAGE.read_text(), re.M | re.S)
    return {name: text for text, name in found}


@pytest.fixture
def page(place: Place) -> Place:
    shutil.copytree(REPOSITORY / "configfiles", place.folder / "configfiles", dirs_exist_ok=True)
    for name, text in code_of_page().items():
        (place.folder / name).write_text(text)
    return place


def train(page: Place, config: str, run: str, steps: int, *more: str, ranks: int = 2) -> Path:
    settings = [f"trainer.checkpoint_dir=run-{run}", f"trainer.max_steps={steps}", *SHORT, *more]
    page.run(config, *settings, ranks=ranks)
    return page.path(run)


def resumes(page: Place, config: str, name: str, *more: str) -> Path:
    """Seven steps on two ranks, and the same stopped after the fourth, which is within an epoch."""
    whole = train(page, config, f"{name}-whole", 7, *more)
    train(page, config, f"{name}-parts", 4, *more)
    parts = train(page, config, f"{name}-parts", 7, *more)
    one, other = last(whole), last(parts)
    assert equal(one.weights, other.weights) and equal(one.ema, other.ema)
    # The stopped training has validated once more, and counted that.
    keys = ("optimizer", "scaler", "rng", "step", "epoch", "position", "sums")
    assert {key for key in keys if not equal(one.state[key], other.state[key])} == set()
    assert len(one.state["rng"]) == 2
    return whole


def model_and_data() -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """The model as it begins, and the training images."""
    config = load_config(REPOSITORY / "configfiles" / "digits.yaml", ["model.dropout=0", "model.emb_dropout=0"])
    rng.seed_all(0)
    x, y = zip(*(Digits(split="train")[index] for index in range(1257)), strict=True)
    return get_model(config), torch.stack(x), torch.tensor(y)


def batches() -> Iterator[slice]:
    """Those of seven steps, in the order of the data."""
    return itertools.islice(itertools.cycle([slice(0, 420), slice(420, 840), slice(840, 1257)]), 7)


def same_weights(run: Path, model: torch.nn.Module) -> None:
    found = last(run).weights
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=2e-5)


def test_sam_is_what_a_plain_loop_computes(page: Place) -> None:
    order = ["loaders.shuffle=false", *PLAIN, "optimizer={name: SGD, lr: 0.05}"]
    one = train(page, "sam.yaml", "sam-one", 7, *order, ranks=1)
    two = resumes(page, "sam.yaml", "sam", *order)
    close(figures(one), figures(two))
    model, x, y = model_and_data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for rows in batches():
        F.cross_entropy(model(x[rows]), y[rows], label_smoothing=0.1).backward()
        gradients = [item.grad.clone() for item in model.parameters()]
        norm = torch.cat([item.flatten() for item in gradients]).norm()
        kept = [item.detach().clone() for item in model.parameters()]
        for item, gradient in zip(model.parameters(), gradients, strict=True):
            item.data += 0.1 * gradient / norm
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows], label_smoothing=0.1).backward()
        for item, before in zip(model.parameters(), kept, strict=True):
            item.data.copy_(before)
        optimizer.step()
        optimizer.zero_grad()
    same_weights(two, model)


def test_mixup_draws_from_the_generator_of_its_rank(page: Place) -> None:
    """A resume continues the draws, as it does dropout's; two ranks do not draw the same."""
    run = resumes(page, "mixup.yaml", "mixup")
    first, second = (state["torch"] for state in last(run).state["rng"])
    assert not torch.equal(first, second)
    losses = figures(run)["train/loss"]
    assert losses[7] < losses[1]


def test_a_teacher_is_neither_trained_nor_saved(page: Place) -> None:
    train(page, "mixup.yaml", "teacher", 6, ranks=1)
    weights = f"trainer.weights={page.path('teacher') / 'checkpoints' / 'last'}"
    run = resumes(page, "distillation.yaml", "pupil", weights)
    found = last(run)
    assert (
        found.weights["mlp_head.weight" if "mlp_head.weight" in found.weights else "linear_head.weight"].shape[1] == 16
    )
    assert not any("teacher" in name for name in (*found.weights, *found.others, *found.state))
    logged = figures(run)
    for step in (1, 7):  # the two figures, and the loss of them that is minimised
        parts = logged["train/hard"][step] + logged["train/soft"][step]
        assert abs(logged["train/loss"][step] - parts / 2) < 1e-5 * parts


def step_of(optimizer: torch.optim.Optimizer, model: torch.nn.Module, loss: torch.Tensor) -> None:
    model.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 0.05)
    optimizer.step()


def test_a_gan_is_what_a_plain_loop_computes(page: Place) -> None:
    """On one rank and on two, where the noise is of the images, since ranks draw different numbers."""
    source = code_of_page()["my_gan.py"]
    drawn = "torch.randn(len(real), self.module.noise, device=self.device)"
    assert source.count(drawn) == 1
    (page.folder / "even_gan.py").write_text(source.replace(drawn, "real.detach().flatten(1)[:, 20:36]"))
    own = ["loaders.shuffle=false", "modules=[even_gan]", "trainer.ema_decay=null", "trainer.clip_grad_norm=0.05"]
    one = train(page, "gan.yaml", "gan-one", 7, *own, ranks=1)
    two = train(page, "gan.yaml", "gan-two", 7, *own)
    close(figures(one), figures(two))
    _, x, _ = model_and_data()
    rng.seed_all(0)
    sys.path.insert(0, str(page.folder))
    import even_gan

    model = even_gan.DigitsGAN()
    optimizers = [torch.optim.Adam(part.parameters(), 5e-4, (0.5, 0.99)) for part in (model.generator, model.critic)]
    for rows in batches():
        real = x[rows].clone().requires_grad_()
        fake = model.generator(real.detach().flatten(1)[:, 20:36])
        of_real, of_fake = model.critic(real), model.critic(fake.detach())
        (slope,) = torch.autograd.grad(of_real.sum(), real, create_graph=True)
        critic = F.softplus(-of_real).mean() + F.softplus(of_fake).mean()
        step_of(optimizers[1], model, critic + 0.1 * slope.square().sum((1, 2, 3)).mean())
        step_of(optimizers[0], model, F.softplus(-model.critic(fake)).mean())
    for run in (one, two):
        same_weights(run, model)
    noise = torch.randn(500, 16, generator=torch.Generator().manual_seed(0))
    images = torch.stack([image for image, _ in Digits(split="val")])
    with torch.no_grad():
        distance = torch.cdist(images.flatten(1), model.generator(noise).flatten(1)).amin(1).mean()
    assert figures(two)["val/distance"][7] == pytest.approx(float(distance), rel=1e-5)


def test_a_gan_resumes_with_all_its_optimizers(page: Place) -> None:
    run = last(resumes(page, "gan.yaml", "gan"))
    assert [*run.state["optimizer"]] == ["generator", "critic"]
    assert run.ema is not None
