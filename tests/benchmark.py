"""Measure what the README claims: `python tests/benchmark.py` (see --help for the longer parts)."""

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import MNIST

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from mnist_helpers import data, plots, recipes
from mnist_helpers.config import Config
from mnist_helpers.evaluation import evaluate
from mnist_helpers.model import MLP, load_model, merge_models, save_model
from mnist_helpers.predict import predict_probabilities
from mnist_helpers.training import fit, make_optimizer, train_epoch

USUAL = transforms.Compose(
    [transforms.ToTensor(), transforms.Normalize((data.MNIST_MEAN,), (data.MNIST_STD,)), nn.Flatten(0)]
)
# What digits held out liked best: more shift and less elastic deformation than in training, at half strength.
VIEWS = {"views": 48, "strength": 0.5, "shift": 3.0, "elastic": 1.0}


def measure(action, repeats: int = 1) -> float:
    """The shortest of `repeats` runs, in seconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)


def read_all(loader: DataLoader) -> None:
    for _ in loader:
        pass


def train_usual(loader: DataLoader) -> None:
    """One epoch as most notebooks write it."""
    model = MLP((256, 128), batch_norm=False)
    loss_function = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model.train()
    for pixels, labels in loader:
        optimizer.zero_grad()
        loss = loss_function(model(pixels), labels)
        loss.backward()
        optimizer.step()


def train_ours(loader: DataLoader, config: Config) -> None:
    model = MLP(config.hidden, batch_norm=config.batch_norm)
    train_epoch(model, loader, nn.CrossEntropyLoss(reduction="none"), make_optimizer(config, model))


def compare_pipelines(root: Path, train: data.Digits) -> None:
    """The same network and optimizer, fed one picture after another and fed whole batches."""
    pictures = MNIST(root, train=True, transform=USUAL)
    print(f"{'one epoch of 60,000 digits':<34}{'usual':>9}{'ours':>9}{'ratio':>8}")
    for batch_size in (64, 256):
        config = Config(hidden=(256, 128), batch_norm=False, batch_size=batch_size)
        usual = DataLoader(pictures, batch_size, shuffle=True)
        ours = data.make_loader(train, batch_size, shuffle=True)
        rows = {
            f"loader alone, batch {batch_size}": (lambda u=usual: read_all(u), lambda o=ours: read_all(o)),
            f"784-256-128-10, Adam, batch {batch_size}": (
                lambda u=usual: train_usual(u),
                lambda o=ours, c=config: train_ours(o, c),
            ),
        }
        for name, (theirs, mine) in rows.items():
            before = measure(mine, 2)
            slow = measure(theirs)
            fast = min(before, measure(mine, 2))  # measured on both sides of the slow one: a fair machine
            print(f"{name:<34}{slow:8.2f}s{fast:8.2f}s{slow / fast:7.1f}x", flush=True)


def compare_with_matrix_product(train: data.Digits) -> None:
    """How much of the time of a training goes into the matrix products that it cannot do without."""
    config = replace(recipes.FINAL, hidden=(1024, 1024, 1024), practice=1.0, warp=0.0)
    loader = data.make_loader(train[: config.batch_size * 24], config.batch_size, shuffle=True)
    model = MLP(config.hidden)
    weights = [weight for weight in model.parameters() if weight.ndim == 2]
    products = (
        3 * sum(map(torch.numel, weights)) - weights[0].numel()
    )  # no gradient with respect to the pixels
    work = 2 * products * len(loader.dataset)
    optimizer, loss_function = make_optimizer(config, model), nn.CrossEntropyLoss(reduction="none")
    a, b = torch.randn(config.batch_size, 1024), torch.randn(1024, 1024)

    def multiply():
        for _ in range(200):
            a @ b

    speeds, peaks = [], []
    for _ in range(6):
        peaks.append(200 * 2 * config.batch_size * 1024 * 1024 / measure(multiply))
        speeds.append(work / measure(lambda: train_epoch(model, loader, loss_function, optimizer)))
    loop, peak = max(speeds[1:]), max(peaks[1:])
    print(f"matrix products alone   {peak / 1e9:6.0f} GFLOP/s")
    print(f"training loop, 3x1024   {loop / 1e9:6.0f} GFLOP/s, {loop / peak:.0%} of that")


def run_recipe(
    name: str, config: Config, train: data.Digits, test: data.Digits, seeds: int, members: int = 1
) -> None:
    """Train on all 60,000 digits with several seeds, and read the test set once for each.

    With `members` above 1 each time so many networks, no seed twice, merged into one that is kept in `runs/`.
    Besides the single pass, the accuracy of answers averaged over `VIEWS` of every digit.
    """
    loader, results = data.make_loader(test, 1000), []
    for seed in range(seeds):
        start = time.perf_counter()
        models = []
        for member in range(members):
            *_, last = fit(replace(config, seed=seed * members + member), train, None)
            models.append(last.model)
        model = merge_models(models)
        seconds = time.perf_counter() - start
        if members > 1:
            (data.PROJECT_ROOT / "runs").mkdir(exist_ok=True)
            save_model(model, data.PROJECT_ROOT / "runs" / f"{name}-{seed}.pth")
        averaged = predict_probabilities(model, test.images, **VIEWS)
        right = (averaged.argmax(dim=1) == test.labels).double().mean().item()
        results.append((evaluate(model, loader).accuracy, right, seconds))
        print(
            f"  {name}, seed {seed}: {results[-1][0]:.2%}, views {right:.2%}, {seconds:.1f} s",
            flush=True,
        )
    single, views, seconds = map(statistics.mean, zip(*results, strict=True))
    print(f"{name}: mean {single:.3%} of {seeds} seeds, views {views:.3%}, {seconds:.1f} s of training")


def leave_out(train: data.Digits, seeds: int, epochs: int) -> None:
    """Each ingredient of the final recipe left out once, for the same number of digits shown."""
    full = replace(recipes.FINAL, epochs=epochs)
    all_digits = {"practice": 1.0, "epochs": max(1, round(epochs * full.practice))}
    variants = {
        "the whole recipe": {},
        "without warps": {"warp": 0.0},
        "warps that do not fade": {"warp": full.warp * (1 - full.warp_fade / 2), "warp_fade": 0.0},
        "without practice of hard digits": all_digits,
        "without either": {"warp": 0.0, **all_digits},
        "without batch norm": {"batch_norm": False, "learning_rate": full.learning_rate / 4},
        "without schedule": {"schedule": "constant"},
        "without averaging": {"averaging": 0.0},
        "without weight decay": {"weight_decay": 0.0},
        "two hidden layers": {"hidden": full.hidden[:2]},
        "half as wide": {"hidden": tuple(width // 2 for width in full.hidden)},
        "three hidden layers of 1024": {"hidden": (1024, 1024, 1024)},
        "with units that start local": {"receptive_field": 2.0},
        "with label smoothing 0.05": {"label_smoothing": 0.05},
        "with dropout 0.1": {"dropout": 0.1},
        "with gelu": {"activation": "gelu"},
    }
    fitting, validation = data.split_digits(train, fraction=1 / 6)
    print(f"{'':34}{'validation accuracy of each seed':<34}{'mean loss':>10}{'seconds':>9}")
    for name, knobs in variants.items():
        start, results = time.perf_counter(), []
        for seed in range(seeds):
            *_, last = fit(replace(full, seed=seed, **knobs), fitting, None)
            results.append(evaluate(last.model, data.make_loader(validation, 1000)))
        seconds = (time.perf_counter() - start) / seeds
        listed = "  ".join(f"{result.accuracy:.2%}" for result in results)
        loss = statistics.mean(result.loss for result in results)
        print(f"{name:<34}{listed:<34}{loss:10.4f}{seconds:9.1f}", flush=True)


def compare_splits(train: data.Digits, seeds: int) -> None:
    """How lenient a validation split is that shares its writers with the training digits.

    Each sixth of the digits is held out once from a training, cut out of the file in one piece (writers stay
    together) and drawn at random; so both are judged by all digits.
    """
    drawn = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    for name, order in {"in one piece": torch.arange(len(train)), "drawn at random": drawn}.items():
        results = []
        for seed in range(seeds):
            for held_out in order.chunk(6):
                kept = torch.ones(len(train), dtype=torch.bool)
                kept[held_out] = False
                *_, last = fit(replace(recipes.FAST, seed=seed), train[kept], train[held_out])
                results.append((last.validation_accuracy, last.validation_loss))
        accuracy, loss = map(statistics.mean, zip(*results, strict=True))
        print(
            f"held out {name:<16} {accuracy:.3%} right, loss {loss:.4f} ({seeds} x 6 trainings)", flush=True
        )


def draw_mistakes(test: data.Digits) -> None:
    """The picture of the README: every test digit that `model.pth` reads wrong."""
    result = evaluate(load_model(data.PROJECT_ROOT / "model.pth"), data.make_loader(test, 1000))
    wrong = (~result.right).nonzero().flatten()
    captions = [f"{result.labels[i]}, read {result.predictions[i]}" for i in wrong]
    title = f"All {len(wrong)} of {len(test):,} test digits that are read wrong, the true label first"
    figure = plots.plot_digits(test.images[wrong], captions, title)
    figure.savefig(data.PROJECT_ROOT / ".github" / "mistakes.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each recipe (default 3)")
    parser.add_argument("--short", action="store_true", help="leave out the final recipe (minutes per seed)")
    parser.add_argument(
        "--long", action="store_true", help="only the merged networks (half an hour per seed)"
    )
    parser.add_argument("--ablation", action="store_true", help="leave out each ingredient of it once")
    parser.add_argument("--epochs", type=int, default=24, help="of each training of --ablation (default 24)")
    parser.add_argument("--split", action="store_true", help="validation by known and by unknown writers")
    parser.add_argument("--picture", action="store_true", help="draw the picture of the README")
    chosen = parser.parse_args()
    train, test = data.load_mnist(download=False)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    if chosen.picture:
        draw_mistakes(test)
    elif chosen.long:
        run_recipe("merged", recipes.FINAL, train, test, chosen.seeds, recipes.MEMBERS)
    elif chosen.split:
        compare_splits(train, chosen.seeds)
    elif chosen.ablation:
        leave_out(train, chosen.seeds, chosen.epochs)
    else:
        compare_pipelines(data.find_root(), train)
        compare_with_matrix_product(train)
        run_recipe("brief", recipes.BRIEF, train, test, chosen.seeds)
        upright = [data.remove_slant(digits) for digits in (train, test)]
        print(f"removing the slant of 60,000 digits: {measure(lambda: data.remove_slant(train)):.1f} s")
        run_recipe("fast", recipes.FAST, *upright, chosen.seeds)
        if not chosen.short:
            run_recipe("final", recipes.FINAL, train, test, chosen.seeds)


if __name__ == "__main__":
    main()
