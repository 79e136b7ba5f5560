"""Each part of the benchmark on toy digits; what only the benchmark has is right."""

import json
import re
import sys
from dataclasses import asdict, replace

import pytest
import torch

from mnist_helpers import data
from mnist_helpers.model import MLP, load_model
from mnist_helpers.training import Config, make_model
from tests import benchmark

ROOT = data.PROJECT_ROOT
TEXTS = (ROOT / "README.md").read_text() + (ROOT / "tests/results.md").read_text()
COMMANDS = set(re.findall(r"`python tests/benchmark\.py ?([^`]*)`", TEXTS))
FINAL = Config((64,), "gelu", batch_norm=True, hard_fraction=0.5, epochs=12)
SHORT = ["loader usual", "loader ours", "fast: "]
EXPECTED = {  # what each command prints, by its options
    "": [*SHORT, "final: mean 100.000% of 1 seeds"],
    "--short": SHORT,
    "--parallel 1000 3000 8000": [
        "final network, 8 epochs: alone 1.00 s, two at once 2.0"
    ],
    "--picture": [],
}


@pytest.fixture
def project(tmp_path, toy_mnist, monkeypatch):
    """A folder with a tiny MNIST, a network that reads nothing, and a notebook."""
    table = [f"| {name}  | 0 | {value} |\n" for name, value in asdict(FINAL).items()]
    outputs = [{"data": {"text/markdown": ["| a | b | c |\n", "|---|\n", *table]}}]
    drawn = {"id": "hyper-study", "source": ["DRAWN = 6 if QUICK else 1_0  # a\n"]}
    book = {"cells": [drawn, {"id": "final", "outputs": outputs}]}
    (tmp_path / "notebook.ipynb").write_text(json.dumps(book))
    (tmp_path / ".github").mkdir()
    torch.save(MLP().state_dict(), tmp_path / "model.pth")
    monkeypatch.setattr(data, "PROJECT_ROOT", tmp_path)
    monkeypatch.setenv("MNIST_ROOT", str(tmp_path))
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")
    return tmp_path


@pytest.mark.parametrize("options", sorted(COMMANDS))
def test_commands(options, project, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "train_together", lambda count, *_: float(count))
    monkeypatch.setattr(sys, "argv", ["", "--seeds", "1", *options.split()])
    benchmark.main()
    printed = capsys.readouterr().out
    for part in EXPECTED[options]:
        assert part in printed
    assert ("final: mean" in printed) == (options == "")
    assert (project / ".github/mistakes.png").exists() == (options == "--picture")
    assert benchmark.read_final(project / "notebook.ipynb") == (FINAL, 10)


def test_final_network_is_the_one_that_the_notebook_has_saved():
    final, _ = benchmark.read_final(ROOT / "notebook.ipynb")
    assert str(make_model(final).eval()) == str(load_model(ROOT / "model.pth"))


def test_trainings_at_once(toy):
    assert benchmark.train_together(2, replace(FINAL, epochs=1), toy) > 0


def make_bar(slope):
    """A stroke `[28, 28]` above the middle that leans by so many columns a row."""
    right, down = benchmark.PLACES.view(2, 28, 28)
    down = down + 2.5
    ink = (1.5 - (right - slope * down).abs()).clamp(0, 1) * (down.abs() < 9)
    return (255 * ink).round().byte()


def test_slant_is_removed_and_nothing_else():
    bars = torch.stack([make_bar(0), make_bar(0.5), make_bar(-0.5)])
    mended = benchmark.remove_slant(data.Digits(bars, torch.ones(3))).images
    assert torch.equal(mended[0], bars[0])
    assert (mended - bars[0].float()).abs().mean() < 2


def test_local_start_looks_at_one_place_and_keeps_the_usual_length():
    torch.manual_seed(0)
    local = benchmark.draw_local_weights(200)
    assert local.norm(dim=1).tolist() == pytest.approx([3**-0.5] * 200)
    assert local.sum(dim=1).abs().max() < 1e-4
    strongest = benchmark.PLACES.T[local.abs().argmax(dim=1)]  # [200, 2]
    distances = torch.cdist(strongest, benchmark.PLACES.T)
    assert (3 * local**2 * distances).sum(dim=1).max() < 5
    assert strongest.amin(dim=0).max() < -8
