"""Things that hold for every input, tried on inputs that Hypothesis thinks up."""

import math
import string

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mnist_helpers.data import (
    MNIST_MEAN,
    MNIST_STD,
    TRANSFORM,
    BatchSampler,
    Digits,
    invert_transform,
    make_loader,
    split_digits,
)
from mnist_helpers.model import ACTIVATIONS, MLP
from mnist_helpers.training import OPTIMIZERS, Config

settings.register_profile("ours", deadline=None, derandomize=True, max_examples=50, database=None)
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
    st.sampled_from([*ACTIVATIONS, *OPTIMIZERS]),
    st.lists(st.integers(-2, 40), max_size=3),
    arrays.from_dtype(np.dtype("float32")),
    arrays.from_dtype(np.dtype("int16")),
)


def numbered(count: int) -> Digits:
    return Digits(torch.zeros(count, 28, 28, dtype=torch.uint8), torch.arange(count), "numbered")


@given(batches)
def test_transform_is_one_affine_formula_that_can_be_undone(images):
    pixels = TRANSFORM(images)
    wanted = (images.flatten(1).double() / 255 - MNIST_MEAN) / MNIST_STD
    torch.testing.assert_close(pixels.double(), wanted, rtol=0, atol=1e-6)
    assert pixels.dtype == torch.float32
    assert torch.equal(invert_transform(pixels), images)
    assert torch.equal(pixels, torch.cat([torch.zeros(0, 784), *map(TRANSFORM, images)]))  # as one by one


@given(st.integers(0, 400), st.floats(0, 1))
def test_split_loses_and_doubles_nothing_or_refuses(count, fraction):
    try:
        train, validation = split_digits(numbered(count), fraction)
    except ValueError:
        assert round(count * fraction) in (0, count)
        return
    assert train.labels.tolist() + validation.labels.tolist() == list(range(count))
    assert abs(len(validation) - count * fraction) <= 0.5
    assert min(len(train), len(validation)) > 0


@given(st.integers(1, 200), st.integers(1, 70), st.booleans(), st.integers(0, 99))
def test_loader_shows_every_digit_once(count, batch_size, shuffle, seed):
    loader = make_loader(numbered(count), batch_size, shuffle, seed)
    seen = [labels.tolist() for _, labels in loader]
    assert len(seen) == len(loader)
    assert all(len(labels) == batch_size for labels in seen[:-1])
    assert sorted(label for labels in seen for label in labels) == list(range(count))


@given(st.integers(2, 200), st.integers(2, 70))
def test_no_batch_of_one_image_where_none_should_be(count, batch_size):
    sampler = BatchSampler(count, batch_size)
    sampler.drop_single = True
    lengths = [len(batch) for batch in sampler]
    assert min(lengths) > 1
    assert sum(lengths) == count - (count % batch_size == 1)
    assert len(lengths) == len(sampler)


@given(st.dictionaries(st.sampled_from(sorted(Config.__dataclass_fields__)), values, max_size=3))
def test_config_accepts_or_names_the_hyperparameter(fields):
    """Whatever is asked for: a config to build a network from, or one ValueError about a field."""
    config, message = None, ""
    try:
        config = Config(**fields)
    except ValueError as error:
        message = str(error)
    if config is None:
        assert message.split()[0] in fields
        return
    assert 0 < config.learning_rate < math.inf
    assert config.epochs >= 1
    assert config.batch_size >= 2
    assert 0 <= config.dropout < 1
    assert 0 < config.hard_fraction <= 1
    torch.Generator().manual_seed(config.seed * 1000 + config.epochs)
    assert Config(**vars(config)) == config
    kinds = {type(value) for value in vars(config).values()} | {type(width) for width in config.hidden}
    assert kinds <= {bool, int, float, str, tuple}
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
