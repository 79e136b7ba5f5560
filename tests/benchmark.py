"""Measure what README.md and tests/results.md claim, all or one of the parts below."""

import argparse
import ast
import json
import os
import sys
import timeit
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import mnist_helpers  # noqa: F401  (before torch: it sets how torch's threads wait)

# isort: split
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision.datasets import MNIST
from torchvision.transforms.functional import gaussian_blur

from mnist_helpers import data, plots
from mnist_helpers.augment import PLACES, draw_styles
from mnist_helpers.data import IMAGE_SIZE, TRANSFORM, make_loader
from mnist_helpers.evaluation import evaluate
from mnist_helpers.model import load_model
from mnist_helpers.training import (
    Config,
    choose_device,
    fit,
    has_bfloat16,
    make_model,
)

# 99% in seconds, with upright digits and a first layer that starts local: few steps,
# so a smaller network and milder warps than in the notebook's final training.
FAST = Config(
    hidden=(384, 256, 128),
    batch_norm=True,
    optimizer="adamw",
    learning_rate=1e-2,
    one_cycle=True,
    weight_decay=0.05,
    augmentation=0.6,
    augmentation_fade=0.5,
    hard_fraction=0.2,
    bfloat16=True,
    batch_size=512,
    epochs=10,
)
# 98% sooner still, from the digits as they are: in so few epochs no network learns any
# of them by heart, and warps only cost time.
BRIEF = replace(FAST, hidden=(256, 128), augmentation=0.0, hard_fraction=0.3, epochs=6)


def read_final(notebook):
    """What the notebook's last run trained as its final network.

    Returns the hyperparameters, from the table below the cell `final`, and how many
    digits were drawn for it, `DRAWN` in the cell `hyper-study`.
    """
    book = json.loads(notebook.read_text("utf-8"))
    cells = {cell["id"]: cell for cell in book["cells"]}
    table = cells["final"]["outputs"][0]["data"]["text/markdown"]
    values = asdict(Config())
    for row in table[2:]:
        name, _, value = (cell.strip() for cell in row.strip("|\n").split("|"))
        is_text = isinstance(values[name], str)
        values[name] = value if is_text else ast.literal_eval(value)
    source = "".join(cells["hyper-study"]["source"])
    after = source.partition("DRAWN = ")[2].partition("#")[0]  # "600 if QUICK else ..."
    return Config(**values), int(after.split()[-1])


def measure(action):
    """How long it takes, in seconds."""
    return timeit.timeit(action, number=1)


def compare_pipelines(train):
    """The same digits read one after another, as is usual, and as whole batches."""
    usual = MNIST(data.find_root(), transform=TRANSFORM)
    loaders = {
        "usual": DataLoader(usual, batch_size=64, shuffle=True),
        "ours": make_loader(train, batch_size=64, shuffle=True),
    }
    for name, loader in loaders.items():
        seconds = measure(partial(list, loader))
        print(f"all digits once, in batches of 64, loader {name}: {seconds:.2f} s")


def remove_slant(digits):
    """The digits sheared until none leans: "deslanting" of LeCun et al. 1998.

    How far a digit leans is the covariance of its ink across and down, over the
    variance down. The middle of the ink stays where it is.
    """
    right, down = PLACES.to(digits.images.device)  # [784] each
    parts = []
    for part in digits.images.split(1000):  # faster than all at once
        images = part[:, None] / 255  # [batch, 1, 28, 28]
        ink = images.flatten(1) + 1e-6  # more than nothing, for an empty image
        middle = (ink @ down) / ink.sum(dim=1)
        below = down - middle[:, None]  # [batch, 784]
        covariance = (ink * below) @ right
        variance = (ink * below**2).sum(dim=1)
        slope = (covariance / variance).clamp(-1, 1)
        across = right + slope[:, None] * below
        places = torch.stack([across, down.expand_as(across)], dim=2)
        grid = places[:, None] / (IMAGE_SIZE / 2)  # as if each were one long row
        upright = F.grid_sample(images, grid, "bicubic", align_corners=False)
        parts.append((upright.clamp(0, 1) * 255).round().byte().view_as(part))
    return replace(digits, images=torch.cat(parts))


def draw_local_weights(units):
    """Weights `[units, 784]` for a first layer: each unit looks at one place.

    A smooth random pattern of sum 0 under a Gaussian window, as long as `nn.Linear` has
    it. Convolutional networks have such windows built in; a fully connected one is free
    to leave them (compare d'Ascoli et al. 2019, "Finding the Needle in the Haystack
    with Convolutions").
    """
    centres = 20 * torch.rand(units, 2, 1) - 10  # digits leave a margin of four pixels
    distances = (PLACES - centres).square().sum(dim=1)
    windows = torch.exp(-distances / 8)  # a standard deviation of two pixels
    noise = torch.randn(units, IMAGE_SIZE, IMAGE_SIZE)
    patterns = windows * gaussian_blur(noise, 7, 1.0).flatten(1)
    excess = patterns.sum(dim=1) / windows.sum(dim=1)
    patterns -= windows * excess[:, None]
    return F.normalize(patterns) / 3**0.5


def run_recipe(name, config, train, test, seeds, local=False):
    """Accuracy on the test set after training with several seeds.

    With `local`, the first layer starts local.
    """
    device = train.labels.device
    accuracies = []
    for seed in range(seeds):
        config = replace(config, seed=seed)
        model = make_model(config)
        if local:
            torch.manual_seed(seed)
            model.layers[0].weight.data = draw_local_weights(config.hidden[0])
        seconds = measure(partial(list, fit(model.to(device), config, train)))
        accuracy = evaluate(model, make_loader(test, 1000)).accuracy
        print(f"  {name}, seed {seed}: {accuracy:.2%}, trained in {seconds:.1f} s")
        accuracies.append(accuracy)
    print(f"{name}: mean {sum(accuracies) / seeds:.3%} of {seeds} seeds")


def time_training(config, train, barrier):
    """Seconds of one training, begun when all processes are ready."""
    model = make_model(config)
    list(fit(model, replace(config, epochs=1), train))  # what only a first one pays
    barrier.wait(timeout=300)
    return measure(partial(list, fit(model, config, train)))


def train_together(count, config, train):
    """Seconds of the slowest of `count` trainings at once, each in a new process."""
    context = get_context("spawn")  # they load torch anew
    with context.Manager() as manager, ProcessPoolExecutor(count, context) as pool:
        job = partial(time_training, config, train, manager.Barrier(count))
        jobs = [pool.submit(job) for _ in range(count)]
        return max(job.result() for job in jobs)


def compare_parallel(final, train, spin_counts):
    """One training alone and two at once, on the CPU."""
    trainings = {
        "final network, 8 epochs": replace(final, epochs=8),
        "784-256-128-10, batch 64, 1 epoch": Config(epochs=1),
    }
    for spin_count in spin_counts:
        os.environ["GOMP_SPINCOUNT"] = spin_count  # new processes take it over
        for name, config in trainings.items():
            alone = train_together(1, config, train)
            both = train_together(2, config, train)
            times = f"alone {alone:.2f} s, two at once {both / alone:.1f} times that"
            print(f"spin count {spin_count}, {name}: {times}")


def draw_mistakes(test):
    """The picture of the README: every test digit that `model.pth` reads wrong."""
    model = load_model(data.PROJECT_ROOT / "model.pth")
    result = evaluate(model, make_loader(test, 1000))
    wrong = (result.predictions != result.labels).nonzero().flatten()
    captions = [f"{result.labels[i]}, read {result.predictions[i]}" for i in wrong]
    title = f"All {len(wrong)} of {len(test):,} test digits that are read wrong"
    figure = plots.plot_digits(test.images[wrong], captions, title)
    picture = data.PROJECT_ROOT / ".github/mistakes.png"
    picture.write_bytes(figure._repr_png_())


def main():
    """Everything by default, one part where an option names it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parallel", nargs="+", metavar="GOMP_SPINCOUNT")
    for option in ("--short", "--picture"):
        parser.add_argument(option, action="store_true")
    chosen = parser.parse_args()
    final, drawn = read_final(data.PROJECT_ROOT / "notebook.ipynb")
    on_cpu, test = data.load_mnist(download=False)
    device, _ = choose_device()
    train = on_cpu.to(device)
    number = "bfloat16" if has_bfloat16(device) else "float32"
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {threads} threads, {device}, {number}")
    if chosen.parallel:
        compare_parallel(final, on_cpu, chosen.parallel)
    elif chosen.picture:
        draw_mistakes(test)
    else:
        compare_pipelines(on_cpu)
        run_recipe("brief", BRIEF, train, test, chosen.seeds, local=True)
        seconds = measure(partial(remove_slant, on_cpu))
        print(f"making all digits upright: {seconds:.1f} s")
        upright = remove_slant(train)
        run_recipe("fast", FAST, upright, remove_slant(test), chosen.seeds, local=True)
        if not chosen.short:
            train += draw_styles(train, drawn).to(device)
            run_recipe("final", final, train, test, chosen.seeds)


if __name__ == "__main__":
    main()
