"""The recipes: valid knobs of a plain MLP, and networks of the widths that they name."""

from dataclasses import asdict, fields
from itertools import pairwise

import pytest
from conftest import make_toy_digits
from torch import nn

from mnist_helpers.config import KNOBS, Config
from mnist_helpers.model import count_parameters
from mnist_helpers.recipes import FAST, FINAL
from mnist_helpers.training import fit

RECIPES = {"FINAL": (FINAL, [1024, 512, 512]), "FAST": (FAST, [384, 256, 128])}
PICTURES = make_toy_digits(20)


@pytest.fixture(params=RECIPES)
def recipe(request) -> tuple[Config, list[int]]:
    return RECIPES[request.param]


def test_valid_config(recipe):
    config, widths = recipe
    assert isinstance(config, Config)
    assert config == Config(**asdict(config))  # building it anew checks every knob
    assert list(config.hidden) == widths


def test_network_is_a_plain_mlp_of_these_widths(recipe):
    config, widths = recipe
    short = Config(**asdict(config) | {"epochs": 1, "batch_size": 20, "practice": 1.0, "warp": 0.0})
    (record,) = fit(short, PICTURES, None)
    layers = list(record.model.layers)
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    assert [layer.in_features for layer in linear] == [784, *widths]
    assert [layer.out_features for layer in linear] == [*widths, 10]
    allowed = (nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Dropout)
    assert all(isinstance(layer, allowed) for layer in layers)
    sizes = [784, *widths, 10]
    matrices = sum(a * b + b for a, b in pairwise(sizes))
    scales = 2 * sum(widths) if config.batch_norm else 0
    assert count_parameters(record.model) == matrices + scales


def test_fast_is_the_smaller_training():
    def work(config: Config) -> float:
        sizes = [784, *config.hidden, 10]
        weights = sum(a * b for a, b in pairwise(sizes))
        return weights * config.epochs * config.practice

    assert work(FAST) < work(FINAL) / 20


def test_every_knob_is_checked():
    """A knob without a check of its own would let nonsense into a recipe."""
    assert {field.name for field in fields(Config)} == set(KNOBS)


@pytest.mark.parametrize(
    ("knob", "value"),
    [("hidden", (1024, 0)), ("practice", 0), ("averaging", 1.0), ("warp", -1.0), ("learning_rate", 0.0)],
)
def test_a_recipe_spoiled_is_refused(recipe, knob, value):
    with pytest.raises(ValueError, match=f"^{knob} must be "):
        Config(**asdict(recipe[0]) | {knob: value})
