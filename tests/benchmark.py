"""Measure what README.md and tests/results.md claim, all or one of the parts below."""

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
import timeit
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import mnist_helpers  # noqa: F401  before torch: it says how torch's threads are to wait for each other

# isort: split
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import MNIST

from mnist_helpers import data, plots, training
from mnist_helpers.augment import RandomWarp
from mnist_helpers.data import IMAGE_SIZE, TRANSFORM, Digits, make_loader
from mnist_helpers.evaluation import evaluate
from mnist_helpers.handwriting.ones import add_flags
from mnist_helpers.model import MLP, load_model
from mnist_helpers.training import OPTIMIZERS, Config, fit, train_epoch

FINAL = Config(
    hidden=(1024, 512, 512),
    batch_norm=True,
    optimizer="adamw",
    learning_rate=4e-3,
    one_cycle=True,
    weight_decay=0.2,
    augmentation=1.8,
    augmentation_fade=0.5,
    hard_fraction=0.25,
    batch_size=1024,
    epochs=170,
)
FLAGS = 0.35  # share of the training ones that `FINAL` sees with a flag or a base
# 99% in seconds: few steps, so a smaller network, milder warps, upright digits, a local start (`LocalMLP`)
FAST = replace(
    FINAL,
    hidden=(384, 256, 128),
    learning_rate=1e-2,
    weight_decay=0.05,
    augmentation=0.6,
    hard_fraction=0.2,
    batch_size=512,
    epochs=10,
)
# 98% sooner still, from the digits as they are: so few epochs learn none by heart, and warps only cost time
BRIEF = replace(FAST, hidden=(256, 128), augmentation=0.0, hard_fraction=0.3, epochs=6)
# Half as strong as in training, with more shift and less elastic deformation: chosen on held-out digits
VIEWS, VIEW = 48, {"strength": 0.5, "shift": 3.0, "elastic": 1.0}
PARALLEL = {
    "final recipe, 8 epochs": replace(FINAL, epochs=8),
    "784-256-128-10, batch 64, 1 epoch": Config(epochs=1),
}
USUAL = transforms.Compose(
    [transforms.ToTensor(), transforms.Normalize((data.MNIST_MEAN,), (data.MNIST_STD,)), nn.Flatten(0)]
)


def measure(action, repeats: int = 1) -> float:
    """The shortest of `repeats` runs, in seconds; a graphics card's work is waited for."""

    def act():
        action()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return min(timeit.repeat(act, number=1, repeat=repeats))


def train_once(loader, model: MLP, config: Config) -> None:
    optimizer = OPTIMIZERS[config.optimizer](model.parameters(), config.learning_rate)
    train_epoch(model, loader, nn.CrossEntropyLoss(reduction="none"), optimizer)


def compare_pipelines(root: Path, train: Digits) -> None:
    """The same network, optimizer and loop, fed one image after another, as is usual, and whole batches."""
    images, device = MNIST(root, train=True, transform=USUAL), train.images.device
    print(f"{'one epoch of 60,000 digits':<34}{'usual':>9}{'ours':>9}{'ratio':>8}")
    for batch_size in (64, 256):
        usual = DataLoader(images, batch_size, shuffle=True)
        ours = make_loader(train, batch_size, shuffle=True)

        def read(loader) -> Iterator[tuple[Tensor, Tensor]]:
            return ((pixels.to(device), labels.to(device)) for pixels, labels in loader)

        uses = {
            "loader alone": lambda loader: [None for _ in read(loader)],
            "784-256-128-10, Adam": lambda loader: train_once(read(loader), MLP().to(device), Config()),
        }
        for name, use in uses.items():
            before = measure(partial(use, ours), 2)
            slow = measure(partial(use, usual))
            fast = min(before, measure(partial(use, ours), 2))  # on both sides: the same machine for both
            print(f"{f'{name}, batch {batch_size}':<34}{slow:8.2f}s{fast:8.2f}s{slow / fast:7.1f}x")


def compare_with_matrix_product(train: Digits) -> None:
    """How much of a training's time goes into the matrix products that it cannot do without."""
    batch, width, device = FINAL.batch_size, 1024, train.images.device
    loader = make_loader(train[: batch * 24], batch, shuffle=True)
    model = MLP((width, width, width), batch_norm=True).to(device)
    weights = [weight for weight in model.parameters() if weight.ndim == 2]
    # Forwards, and backwards to weights and inputs; the pixels need no gradient.
    work = 2 * (3 * sum(map(torch.numel, weights)) - weights[0].numel()) * len(loader.dataset)
    a, b = torch.randn(batch, width, device=device), torch.randn(width, width, device=device)

    def multiply():
        for _ in range(200):
            a @ b

    peak = 200 * 2 * batch * width * width / measure(multiply, 6)
    loop = work / measure(lambda: train_once(loader, model, FINAL), 6)
    print(f"matrix products alone   {peak / 1e9:6.0f} GFLOP/s")
    print(f"training loop, 3x1024   {loop / 1e9:6.0f} GFLOP/s, {loop / peak:.0%} of that")


def remove_slant(digits: Digits) -> Digits:
    """The digits sheared until none leans: "deslanting", preprocessing of LeCun et al. 1998.

    How far a digit leans is the covariance of its ink across and down, over the variance down.
    """
    images = digits.images[:, None].float() / 255
    place = (2 * torch.arange(IMAGE_SIZE, device=images.device) + 1) / IMAGE_SIZE - 1  # as in grid_sample
    ink = images.squeeze(1) / images.sum(dim=(2, 3)).clamp(min=1e-6)[:, :, None]
    across, down = ink.sum(dim=1) @ place, ink.sum(dim=2) @ place  # the centre of mass
    covariance, variance = ink @ place @ place - across * down, ink.sum(dim=2) @ place**2 - down**2
    slope = (covariance / variance.clamp(min=1e-6)).clamp(-1, 1)
    shear = torch.eye(2, 3, device=images.device).repeat(len(images), 1, 1)
    shear[:, 0, 1], shear[:, 0, 2] = slope, -slope * down
    places = F.affine_grid(shear, images.shape, align_corners=False)
    upright = F.grid_sample(images, places, mode="bicubic", align_corners=False).squeeze(1).clamp(0, 1)
    return Digits((upright * 255).round().to(torch.uint8), digits.labels, digits.name)


def draw_local_weights(units: int, sigma: float = 2.0) -> Tensor:
    """First-layer weights `[units, 784]` to start from: each unit looks at the surroundings of one place.

    A smooth random pattern of sum 0 under a Gaussian window of `sigma` pixels, as long as `nn.Linear` has it.
    Convolutional networks have such windows built in, a fully connected one is free to leave them (compare
    d'Ascoli et al. 2019, "Finding the Needle in the Haystack with Convolutions").
    """
    places = torch.arange(IMAGE_SIZE)
    centres = 4 + torch.rand(2, units, 1) * 20  # digits leave a margin of four pixels
    down, across = torch.exp(-((places - centres) ** 2) / (2 * sigma**2))
    window = (down[:, :, None] * across[:, None, :]).flatten(1)
    blur = torch.exp(-((places[:, None] - places) ** 2) / 2)
    patterns = window * (blur @ torch.randn(units, IMAGE_SIZE, IMAGE_SIZE) @ blur).flatten(1)
    patterns -= window * (patterns.sum(dim=1) / window.sum(dim=1))[:, None]
    return F.normalize(patterns) / 3**0.5


class LocalMLP(MLP):
    """An `MLP` whose first layer starts with `draw_local_weights`; everything else is the same."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        with torch.no_grad():
            self.layers[0].weight.copy_(draw_local_weights(self.layers[0].out_features))


def train_recipe(config: Config, train: Digits, local: bool = False) -> MLP:
    """The trained network of `config`; `local`: with a first layer that starts local."""
    with patch.object(training, "MLP", LocalMLP if local else MLP):
        *_, last = fit(config, train)
    return last.model


def run_recipe(name: str, config: Config, train: Digits, test: Digits, seeds: int, local=False) -> None:
    """Accuracy on the test set, of a single pass and of `VIEWS`, after training with several seeds."""
    results = []
    for seed in range(seeds):
        start = time.perf_counter()
        model = train_recipe(replace(config, seed=seed), train, local)
        seconds = time.perf_counter() - start
        single = evaluate(model, make_loader(test, 1000))
        warp = RandomWarp(**VIEW, device=test.images.device)
        warped = make_loader(test, 1000, transform=transforms.Compose([warp, TRANSFORM]))
        averaged = sum(evaluate(model, warped).probabilities for _ in range(VIEWS))
        views = (averaged.argmax(dim=1) == single.labels).double().mean().item()
        results.append((single.accuracy, views, seconds))
        print(f"  {name}, seed {seed}: {single.accuracy:.2%}, views {views:.2%}, {seconds:.1f} s")
    single, views, seconds = map(statistics.mean, zip(*results, strict=True))
    print(f"{name}: mean {single:.3%} of {seeds} seeds, views {views:.3%}, {seconds:.1f} s of training")


def leave_out(train: Digits, seeds: int, epochs: int) -> None:
    """Each ingredient of the final recipe left out or exchanged once, for as many digits shown.

    Trained on the first 50,000 digits; judged on the last 10,000, and on their ones with flags drawn on.
    """
    full = replace(FINAL, epochs=epochs)
    all_digits = {"hard_fraction": 1.0, "epochs": max(1, round(epochs * full.hard_fraction))}
    variants = {
        "the whole recipe": {},
        "without flags": {},
        "without augmentation": {"augmentation": 0.0},
        "augmentation that does not fade": {"augmentation": 1.35, "augmentation_fade": 0.0},
        "all digits equally often": all_digits,
        "without batch norm": {"batch_norm": False, "learning_rate": full.learning_rate / 4},
        "constant learning rate": {"one_cycle": False},
        "without weight decay": {"weight_decay": 0.0},
        "two hidden layers": {"hidden": full.hidden[:2]},
        "half as wide": {"hidden": tuple(width // 2 for width in full.hidden)},
        "with dropout 0.1": {"dropout": 0.1},
        "with GELU": {"activation": "gelu"},
    }
    fitting, validation = data.split_digits(train, fraction=1 / 6)
    flagged = add_flags(validation[validation.labels == 1], share=1.0, seed=1)
    print(f"{'':34}{'accuracy of each seed':<24}{'mean loss':>9}{'flagged ones':>14}{'seconds':>9}")
    for name, changes in variants.items():
        start, results, ones = time.perf_counter(), [], []
        for seed in range(seeds):
            shown = fitting if name == "without flags" else add_flags(fitting, FLAGS)
            model = train_recipe(replace(full, seed=seed, **changes), shown)
            results.append(evaluate(model, make_loader(validation, 1000)))
            ones.append(evaluate(model, make_loader(flagged, 1000)).accuracy)
        seconds = (time.perf_counter() - start) / seeds
        listed = "  ".join(f"{result.accuracy:.2%}" for result in results)
        loss, ones = statistics.mean(result.loss for result in results), statistics.mean(ones)
        print(f"{name:<34}{listed:<24}{loss:9.4f}{ones:14.1%}{seconds:9.1f}")


def compare_splits(train: Digits, seeds: int) -> None:
    """How lenient a validation split is that shares its writers with the training digits.

    Each sixth of the digits is held out once, cut out of the file in one piece (writers stay together) and
    drawn at random; so both ways are judged by all digits.
    """
    drawn = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    for name, order in {"in one piece": torch.arange(len(train)), "drawn at random": drawn}.items():
        results = []
        for seed in range(seeds):
            for held_out in order.chunk(6):
                kept = torch.ones(len(train), dtype=torch.bool)
                kept[held_out] = False
                model = train_recipe(replace(FAST, seed=seed), train[kept], local=True)
                results.append(evaluate(model, make_loader(train[held_out], 1000)))
        accuracy = statistics.mean(result.accuracy for result in results)
        loss = statistics.mean(result.loss for result in results)
        print(f"held out {name:<16} {accuracy:.3%} right, loss {loss:.4f} ({seeds} x 6 trainings)")


def time_training(config: Config, train: Digits) -> float:
    """Seconds of one training, begun when all processes of `train_together` are ready."""
    list(fit(replace(config, epochs=2), train[: config.batch_size * 8]))  # what only a first training pays
    time_training.start.wait(timeout=300)
    return measure(lambda: list(fit(config, train)))


def _keep_barrier(barrier) -> None:
    time_training.start = barrier


def train_together(count: int, config: Config, train: Digits) -> float:
    """Seconds of the slowest of `count` trainings at once, each in a new process that loads torch anew."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context, _keep_barrier, (context.Barrier(count),)) as pool:
        return max(pool.map(time_training, [config] * count, [train] * count))


def compare_parallel(train: Digits, spin_counts: list[str]) -> None:
    """One training alone, two at once, and one while another process keeps a core busy, all on the CPU."""
    for count in spin_counts:
        os.environ["GOMP_SPINCOUNT"] = count  # new processes take it over
        print(f"{f'GOMP_SPINCOUNT={count}':<36}{'alone':>9}{'two at once, each':>22}{'one core busy':>18}")
        for name, config in PARALLEL.items():
            alone = min(train_together(1, config, train) for _ in range(2))
            two = train_together(2, config, train)
            busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            try:
                beside = train_together(1, config, train)
            finally:
                busy.kill()
                busy.wait()
            ratios = f"{two:13.2f}s{two / alone:7.1f}x{beside:9.2f}s{beside / alone:7.1f}x"
            print(f"{name:<36}{alone:8.2f}s{ratios}")


def draw_mistakes(test: Digits) -> None:
    """The picture of the README: every test digit that `model.pth` reads wrong."""
    result = evaluate(load_model(data.PROJECT_ROOT / "model.pth"), make_loader(test, 1000))
    wrong = (~result.correct).nonzero().flatten()
    captions = [f"{result.labels[i]}, read {result.predictions[i]}" for i in wrong]
    title = f"All {len(wrong)} of {len(test):,} test digits that are read wrong, the true label first"
    figure = plots.plot_digits(test.images[wrong], captions, title)
    figure.savefig(data.PROJECT_ROOT / ".github" / "mistakes.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each recipe (default 3)")
    parser.add_argument("--short", action="store_true", help="leave out the final recipe (minutes per seed)")
    parser.add_argument("--ablation", action="store_true", help="leave out each ingredient of it once")
    parser.add_argument("--epochs", type=int, default=24, help="of each training of --ablation (default 24)")
    parser.add_argument("--split", action="store_true", help="validation by known and by unknown writers")
    own = os.environ["GOMP_SPINCOUNT"]
    explained = f"trainings side by side, with each GOMP_SPINCOUNT (default {own}; torch's own is 300000)"
    parser.add_argument("--parallel", nargs="*", metavar="COUNT", help=explained)
    parser.add_argument("--picture", action="store_true", help="draw the picture of the README")
    chosen = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # every line at once, into a file too
    train, test = data.load_mnist(download=False)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    if chosen.parallel is not None:
        return compare_parallel(train, chosen.parallel or [own])
    if chosen.picture:
        return draw_mistakes(test)
    device, reason = training.choose_device()
    print(f"trained on {device}: {reason}")
    train, test = train.to(device), test.to(device)
    if chosen.split:
        return compare_splits(train, chosen.seeds)
    if chosen.ablation:
        return leave_out(train, chosen.seeds, chosen.epochs)
    compare_pipelines(data.find_root(), train)
    compare_with_matrix_product(train)
    run_recipe("brief", BRIEF, train, test, chosen.seeds, local=True)
    print(f"removing the slant of 60,000 digits: {measure(lambda: remove_slant(train)):.1f} s")
    run_recipe("fast", FAST, remove_slant(train), remove_slant(test), chosen.seeds, local=True)
    if not chosen.short:
        run_recipe("final", FINAL, add_flags(train, FLAGS), test, chosen.seeds)


if __name__ == "__main__":
    main()
