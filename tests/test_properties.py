"""Things that hold for every input, tried on inputs that Hypothesis thinks up."""

import math
import string

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mnist_helpers.config import OPTIMIZERS, SCHEDULES, Config
from mnist_helpers.data import (
    MNIST_MEAN,
    MNIST_STD,
    TRANSFORM,
    Digits,
    invert_transform,
    make_loader,
    split_digits,
)
from mnist_helpers.model import ACTIVATIONS, MLP

settings.register_profile("ours", deadline=None, derandomize=True, max_examples=60, database=None)
settings.load_profile("ours")

batches = arrays.arrays(np.uint8, st.tuples(st.integers(0, 4), st.just(28), st.just(28))).map(
    torch.from_numpy
)
values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.integers(),
    st.floats(),
    st.text(string.printable, max_size=8),
    st.sampled_from([*ACTIVATIONS, *OPTIMIZERS, *SCHEDULES]),
    st.lists(st.integers(-2, 40), max_size=3),
)


@given(batches)
def test_inverse_undoes_the_transform(images):
    pixels = TRANSFORM(images)
    assert pixels.shape == (len(images), 784)
    assert pixels.dtype == torch.float32
    assert torch.equal(invert_transform(pixels), images)


@given(batches)
def test_a_batch_is_transformed_like_its_pictures_one_by_one(images):
    singly = [TRANSFORM(image) for image in images]
    assert torch.equal(TRANSFORM(images), torch.cat(singly) if singly else torch.zeros(0, 784))


@given(batches)
def test_transform_is_one_affine_formula(images):
    wanted = (images.flatten(1).double() / 255 - MNIST_MEAN) / MNIST_STD
    torch.testing.assert_close(TRANSFORM(images).double(), wanted, rtol=0, atol=1e-6)


@given(st.integers(0, 400), st.floats(0, 1))
def test_split_loses_and_doubles_nothing(count, fraction):
    digits = Digits(torch.zeros(count, 28, 28, dtype=torch.uint8), torch.arange(count), "toy")
    train, validation = split_digits(digits, fraction)
    assert train.labels.tolist() + validation.labels.tolist() == list(range(count))
    assert abs(len(validation) - count * fraction) <= 0.5


@given(st.integers(1, 200), st.integers(1, 70), st.booleans(), st.integers(0, 99))
def test_loader_shows_every_digit_once(count, batch_size, shuffle, seed):
    digits = Digits(torch.zeros(count, 28, 28, dtype=torch.uint8), torch.arange(count), "toy")
    seen = [labels for _, labels in make_loader(digits, batch_size, shuffle, seed)]
    assert all(len(labels) == batch_size for labels in seen[:-1])
    shown = torch.cat(seen).tolist() if seen else []
    lonely = shuffle and count % batch_size == 1  # a single last digit is left out of training
    assert len(set(shown)) == len(shown) == count - lonely


@given(st.dictionaries(st.sampled_from(sorted(Config.__dataclass_fields__)), values, max_size=3))
def test_config_accepts_or_names_the_knob(knobs):
    """Whatever is asked for: a config to build a network from, or one ValueError about a knob."""
    try:
        config = Config(**knobs)
    except ValueError as error:
        config, message = None, str(error)
    if config is None:
        assert message.split()[0] in knobs
        return
    assert 0 < config.learning_rate < math.inf
    assert config.epochs >= 1
    assert config.batch_size >= 2
    assert all(0 <= share < 1 for share in (config.dropout, config.label_smoothing, config.averaging))
    torch.Generator().manual_seed(config.seed)
    if all(width < 100 for width in config.hidden):
        MLP(config.hidden, config.activation, config.batch_norm, config.dropout)


@given(
    st.lists(st.integers(0, 30), max_size=4),
    st.sampled_from([torch.float32, torch.float64, torch.float16, torch.uint8, torch.int64, torch.bool]),
)
def test_network_answers_or_names_what_it_got(shape, dtype):
    model = MLP((4,)).eval()
    pixels = torch.zeros(shape, dtype=dtype)
    if dtype == torch.float32 and len(shape) > 1 and math.prod(shape[1:]) == 784:
        assert model(pixels).shape == (shape[0], 10)
        return
    with pytest.raises(ValueError, match="expected") as caught:
        model(pixels)
    assert f"got {shape} {str(dtype).removeprefix('torch.')}" in str(caught.value)
