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
from whole_runs import Place, equal, figures, last

from dtrain.components.datasets import Digits
from dtrain.config.load import load_config
from dtrain.data import rng
from dtrain.modelloader import get_model

pytestmark = pytest.mark.timeout(600)

PAGE = REPOSITORY / "docs" / "own-loop.md"
# 1,257 images make three steps of an epoch, the last one of 417: 209 on one rank and 208 on the other.
SHORT = ["loaders.global_batch_size=420", "lr_scheduler=null", "trainer.log_every_steps=1", "trainer.pictures=false"]
LIGHT = ["metrics=null", "trainer.monitor=val/loss", "trainer.mode=min", "model.depth=1", "model.mlp_dim=32"]
PLAIN = ["model.dropout=0", "model.emb_dropout=0"]  # nothing that differs between ranks


def code_of_page() -> dict[str, str]:
    """The files that the page has, by name."""
    found = re.findall(r"^```\w+\n(# file: (\S+)\n.*?)^```$", PAGE.read_text(), re.M | re.S)
    return {name: text for text, name in found}


@pytest.fixture
def page(place: Place) -> Place:
    place.once("own-loop", lambda: str(shutil.copytree(REPOSITORY / "configfiles", place.folder / "configfiles")))
    for name, text in code_of_page().items():
        place.write(name, text)
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
    config = load_config(REPOSITORY / "configfiles" / "digits.yaml", [*PLAIN, *LIGHT])
    rng.seed_all(0)
    x, y = zip(*Digits(split="train"), strict=True)
    return get_model(config), torch.stack(x), torch.tensor(y)


def batches() -> Iterator[slice]:
    """Those of seven steps, in the order of the data."""
    return itertools.islice(itertools.cycle([slice(0, 420), slice(420, 840), slice(840, 1257)]), 7)


def same_weights(run: Path, model: torch.nn.Module) -> None:
    found = last(run).weights
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=2e-5)


def test_sam_is_what_a_plain_loop_computes(page: Place) -> None:
    order = ["loaders.shuffle=false", *PLAIN, *LIGHT, "optimizer={name: SGD, lr: 0.05}"]
    run = resumes(page, "sam.yaml", "sam", *order)
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
    same_weights(run, model)


def test_mixup_and_a_teacher_resume_together(page: Place) -> None:
    """Mixup hands a mixed batch to the distillation behind it, and draws from the generator of its rank."""
    teacher, _, _ = model_and_data()
    torch.save(teacher.state_dict(), page.folder / "teacher.pt")
    own = ["trainer.name=[Mixup, Distillation]", "trainer.alpha=0.3", "modules=[my_mixup, my_distillation]"]
    sizes = ["trainer.teacher.depth=1", "trainer.teacher.mlp_dim=32", "trainer.weights=teacher.pt"]
    run = resumes(page, "distillation.yaml", "pupil", *own, *sizes, *LIGHT)
    found, logged = last(run), figures(run)
    first, second = (state["torch"] for state in found.state["rng"])
    assert not torch.equal(first, second)
    assert not any("teacher" in name for name in (*found.weights, *found.others, *found.state))
    for step in (1, 7):  # the two figures, and the loss of them that is minimised
        parts = logged["train/hard"][step] + logged["train/soft"][step]
        assert abs(logged["train/loss"][step] - parts / 2) < 1e-5 * parts
    assert logged["train/loss"][7] < logged["train/loss"][1]


def test_a_teacher_says_what_the_pupil_learns(page: Place) -> None:
    """The figure of the first step, from the two models as they begin."""
    teacher, x, y = model_and_data()
    torch.save({name: 3 * value for name, value in teacher.state_dict().items()}, page.folder / "loud.pt")
    sizes = ["trainer.teacher.depth=1", "trainer.teacher.mlp_dim=32", "trainer.weights=loud.pt", *PLAIN, *LIGHT]
    run = train(page, "distillation.yaml", "teacher-first", 1, "model.dim=64", "loaders.shuffle=false", *sizes)
    with torch.no_grad():
        pupil = teacher(x[:420])
        teacher.load_state_dict({name: 3 * value for name, value in teacher.state_dict().items()})
        wanted = (teacher.eval()(x[:420]) / 2).softmax(1)
    distance = 4 * (wanted * (wanted.log() - (pupil / 2).log_softmax(1))).sum(1).mean()
    assert figures(run)["train/soft"][1] == pytest.approx(float(distance), rel=1e-4)
    hard = F.cross_entropy(pupil, y[:420], label_smoothing=0.1)
    assert figures(run)["train/hard"][1] == pytest.approx(float(hard), rel=1e-5)


def step_of(optimizer: torch.optim.Optimizer, model: torch.nn.Module, loss: torch.Tensor) -> None:
    model.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 0.05)
    optimizer.step()


def test_a_gan_is_what_a_plain_loop_computes(page: Place) -> None:
    """On two ranks, with noise that is made of the images, since ranks draw different numbers."""
    source = code_of_page()["my_gan.py"]
    drawn = "torch.randn(len(real), self.module.noise, device=self.device)"
    assert source.count(drawn) == 1
    page.write("even_gan.py", source.replace(drawn, "real.detach().flatten(1)[:, 20:36]"))
    own = ["loaders.shuffle=false", "modules=[even_gan]", "trainer.ema_decay=null", "trainer.clip_grad_norm=0.05"]
    run = train(page, "gan.yaml", "gan-even", 7, *own)
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
    same_weights(run, model)
    noise = torch.randn(500, 16, generator=torch.Generator().manual_seed(0))
    images = torch.stack([image for image, _ in Digits(split="val")])
    with torch.no_grad():
        distance = torch.cdist(images.flatten(1), model.generator(noise).flatten(1)).amin(1).mean()
    assert figures(run)["val/distance"][7] == pytest.approx(float(distance), rel=1e-5)


def test_a_gan_resumes_with_all_its_optimizers(page: Place) -> None:
    run = last(resumes(page, "gan.yaml", "gan"))
    assert [*run.state["optimizer"]] == ["generator", "critic"]
    assert run.ema is not None
