"""Every command that measures something, on toy digits; and what only the benchmark has is right."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_toy_digits
from PIL import Image

from mnist_helpers import data, training
from mnist_helpers.data import Digits
from mnist_helpers.model import MLP
from mnist_helpers.training import Config
from tests import benchmark

TEXTS = [(data.PROJECT_ROOT / name).read_text("utf-8") for name in ("README.md", "tests/results.md")]
COMMANDS = sorted({command for text in TEXTS for command in re.findall(r"tests/benchmark\.py[^`\n]*", text)})
EXPECTED = {  # option: what the command prints, line by line
    "": ["loader alone, batch 64", "784-256-128-10, Adam, batch 256", "of that", "brief: mean", "fast: mean"],
    "--ablation": ["the whole recipe", "without flags", "without augmentation", "with GELU"],
    "--split": ["held out in one piece", "held out drawn at random"],
    "--parallel": ["alone", "tiny"],
    "--picture": [],
}
TINY = Config(hidden=(8,), hard_fraction=0.5, batch_size=16, epochs=2)


def test_final_recipe_is_what_the_notebook_trains():
    notebook = (data.PROJECT_ROOT / "notebook.ipynb").read_text("utf-8")
    assert f'"{benchmark.FINAL}\\n"' in notebook  # printed by 4.6 in the committed run
    assert f"FLAGS = {benchmark.FLAGS} " in notebook


def test_commands_are_named():
    """All the parts, and both forms of the whole; an unknown option would fail below."""
    used = {word for command in COMMANDS for word in command.split()[1:] if word.startswith("--")}
    assert {*EXPECTED, "--short"} - {""} <= used
    assert "tests/benchmark.py" in COMMANDS


@pytest.fixture(autouse=True)
def one_thread():
    """Toy digits are not worth a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command, monkeypatch, capsys, tmp_path):
    """All of it that this command asks for, with trainings of two epochs."""
    train, test = make_toy_digits(120), make_toy_digits(40)
    monkeypatch.setattr(data, "load_mnist", lambda download: (train, test))
    monkeypatch.setattr(training, "choose_device", lambda: (torch.device("cpu"), "this is a test"))
    for name in ("BRIEF", "FAST", "FINAL"):
        tiny = {field: getattr(TINY, field) for field in ("hidden", "hard_fraction", "batch_size", "epochs")}
        monkeypatch.setattr(benchmark, name, replace(getattr(benchmark, name), **tiny))
    monkeypatch.setattr(benchmark, "VIEWS", 2)
    usual = [(benchmark.USUAL(Image.fromarray(image.numpy())), 0) for image in train.images]
    monkeypatch.setattr(benchmark, "MNIST", lambda *args, **kwargs: usual)
    counts = []

    def train_together(count, config, digits):
        counts.append((count, os.environ["GOMP_SPINCOUNT"]))
        return float(count)

    monkeypatch.setattr(benchmark, "PARALLEL", {"tiny": TINY})
    monkeypatch.setattr(benchmark, "train_together", train_together)
    monkeypatch.setenv("GOMP_SPINCOUNT", "77")
    monkeypatch.setattr(data, "PROJECT_ROOT", tmp_path)
    torch.save(MLP((8,)).state_dict(), tmp_path / "model.pth")
    drawn = []
    monkeypatch.setattr(benchmark.plots.NotebookFigure, "savefig", lambda self, path: drawn.append(path))
    monkeypatch.setattr(sys, "argv", re.sub(r"--epochs \d+", "--epochs 1", command).split())

    benchmark.main()

    printed = capsys.readouterr().out
    option = next((word for word in command.split() if word in EXPECTED), "")
    for part in EXPECTED[option]:
        assert part in printed
    assert ("final: mean" in printed) == (option == "" and "--short" not in command)
    assert drawn == [tmp_path / ".github" / "mistakes.png"] * (option == "--picture")
    values = command.split()[2:] or ["77"]
    assert counts == [(n, value) for value in values * (option == "--parallel") for n in (1, 1, 2, 1)]
    assert option != "--parallel" or re.search(r"tiny +1\.00s +2\.00s +2\.0x +1\.00s +1\.0x", printed)


def test_training_side_by_side_loads_torch_anew_with_the_spin_count_asked_for(monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", "77")
    assert 0 < benchmark.train_together(2, TINY, make_toy_digits(40)) < 60


def test_spin_count_is_set_before_torch_is_loaded():
    """Later it does nothing, so the package is imported first, whatever the alphabet says."""
    script = "import runpy, sys; sys.modules['torch'] = None; runpy.run_path(sys.argv[1])"
    kept = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    command = [sys.executable, "-c", script, benchmark.__file__]
    done = subprocess.run(command, env=kept, capture_output=True, text=True)
    assert "mnist_helpers/__init__.py" in Path(done.stderr).as_posix()  # it is who misses torch
    assert "To mend it" in done.stderr


def make_bar(slope: float) -> Digits:
    """A stroke three pixels wide, above the middle, that leans by so many columns a row."""
    row, column = torch.arange(28)[:, None] - 11, torch.arange(28) - 14
    stroke = ((column - slope * row).abs() < 2) & (row.abs() < 9)
    return Digits(stroke[None].to(torch.uint8) * 255, torch.ones(1, dtype=torch.int64))


def test_slant_is_removed_and_nothing_else():
    upright, leaning = make_bar(slope=0.0), make_bar(slope=0.5)
    assert torch.equal(benchmark.remove_slant(upright).images, upright.images)
    across = benchmark.remove_slant(leaning).images.float()[0].sum(dim=0)
    assert leaning.images.float()[0].sum(dim=0)[12:17].sum() < 0.6 * across.sum()
    assert across[12:17].sum() > 0.95 * across.sum()  # in the same place
    assert across.sum() == pytest.approx(leaning.images.sum().item(), rel=0.05)
    blank = Digits(torch.zeros(1, 28, 28, dtype=torch.uint8), torch.zeros(1))
    assert benchmark.remove_slant(blank).images.sum() == 0


def test_local_start_looks_at_one_place_and_keeps_the_usual_length():
    torch.manual_seed(0)
    local = benchmark.LocalMLP((64,)).layers[0].weight.detach()
    usual = MLP((64,)).layers[0].weight.detach()
    assert local.norm(dim=1).tolist() == pytest.approx([3**-0.5] * 64)
    assert usual.norm(dim=1).mean() == pytest.approx(3**-0.5, rel=0.02)
    assert local.sum(dim=1).abs().max() < 1e-4
    strength = local.square().view(64, 28, 28)
    heights = torch.arange(28.0)
    middle = (strength.sum(dim=2) * heights).sum(dim=1) / strength.sum(dim=(1, 2))
    spread = (strength.sum(dim=2) * (heights - middle[:, None]) ** 2).sum(dim=1) / strength.sum(dim=(1, 2))
    assert spread.sqrt().max() < 4  # over the whole image it would be 8
    assert middle.std() > 3  # not all at the same place


def test_only_recipes_that_ask_for_it_start_local(toy):
    once = replace(TINY, learning_rate=1e-12)
    local, usual = (benchmark.train_recipe(once, toy, local=local) for local in (True, False))
    assert (
        local.layers[0].weight.sum(dim=1).abs().max() < 1e-4 < usual.layers[0].weight.sum(dim=1).abs().max()
    )
    assert training.MLP is MLP
