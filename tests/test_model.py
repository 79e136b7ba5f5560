"""The network against the same sums by hand, and files saved, damaged, or hostile."""

import random
import re
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from mnist_helpers.data import PROJECT_ROOT, make_loader
from mnist_helpers.evaluation import evaluate
from mnist_helpers.model import ACTIVATIONS, MLP, ModelError, load_model

PIXELS = torch.randn(6, 784, generator=torch.Generator().manual_seed(9))


def make_model(*arguments):
    """An `MLP`, always the same; none of its numbers has the value of a fresh one."""
    torch.manual_seed(0)
    model = MLP(*arguments)
    for value in model.state_dict().values():
        if value.ndim == 1:
            value.uniform_(0.5, 1.5)
    return model.eval()


@pytest.fixture
def path(tmp_path):
    """Where a good model is saved."""
    torch.save(make_model((7,), "gelu").state_dict(), tmp_path / "model.pth")
    return tmp_path / "model.pth"


def check_loaded(path):
    """It is that model."""
    wanted = make_model((7,), "gelu")(PIXELS)
    assert torch.equal(load_model(path)(PIXELS), wanted)


# --- the network


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("batch_norm", [False, True])
def test_network_by_hand_and_reloaded(tmp_path, activation, batch_norm):
    """The logits equal those of the same weights multiplied by hand."""
    model = make_model((5, 4), activation, batch_norm, 0.3)
    state = iter(model.state_dict().values())
    values = PIXELS
    for layer in range(3):
        values = values @ next(state).T + next(state)
        if layer == 2:
            break
        if batch_norm:
            scale, shift, mean, variance, _ = (next(state) for _ in range(5))
            values = (values - mean) / (variance + 1e-5).sqrt() * scale + shift
        values = getattr(nn.functional, activation)(values)
    assert not list(state)
    torch.testing.assert_close(model(PIXELS), values)  # logits, not probabilities
    torch.save(model.train().state_dict(), tmp_path / "model.pth")
    loaded = load_model(str(tmp_path / "model.pth"))
    assert not loaded.training
    assert torch.equal(loaded(PIXELS), model.eval()(PIXELS))


def test_defaults_and_dropout():
    assert str(MLP()) == str(MLP((256, 128), "relu", False, 0.0))
    silenced = nn.Sequential(
        nn.Linear(784, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 10)
    )
    assert str(MLP((8,), dropout=0.3).layers) == str(silenced)


def test_images_of_both_shapes_are_welcome():
    model = make_model((8,))
    assert torch.equal(model(PIXELS), model(PIXELS.view(6, 28, 28)))
    assert model(PIXELS[:0]).shape == (0, 10)


def test_wrong_input_is_named():
    for shape, dtype in (
        ([784], torch.float32),
        ([28, 28], torch.float32),
        ([3, 783], torch.float32),
        ([3, 784], torch.float64),
        ([3, 28, 28], torch.uint8),
    ):
        got = f"[batch, 784] or [batch, 28, 28] float32, got Tensor {shape} {dtype}"
        with pytest.raises(ValueError, match=re.escape(got)):
            MLP()(torch.zeros(shape, dtype=dtype))
    with pytest.raises(ValueError, match=re.escape("got ndarray [6, 784] float32")):
        MLP()(PIXELS.numpy())


# --- files


def test_plain_layers_load_the_file(path):
    layers = nn.Sequential(nn.Linear(784, 7), nn.GELU(), nn.Linear(7, 10))
    state = torch.load(path, weights_only=True)
    nn.ModuleDict({"layers": layers}).load_state_dict(state)
    assert torch.equal(layers(PIXELS), load_model(path)(PIXELS))


def test_weights_of_a_wrapped_model_load(path):
    """As `DataParallel` and `torch.compile` put something before their names."""
    model = nn.ModuleDict({"module": load_model(path)})
    torch.save(model.state_dict(), path)
    check_loaded(path)


def test_model_saved_on_a_gpu(path):
    """Every tensor of such a file is tagged with its device; here by hand."""
    with zipfile.ZipFile(path) as source:
        contents = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(path, "w") as target:
        for name, content in contents.items():
            tag = b"X\x06\x00\x00\x00cuda:0"
            target.writestr(name, content.replace(b"X\x03\x00\x00\x00cpu", tag))
    assert b"cuda:0" in path.read_bytes()
    check_loaded(path)


def test_committed_model_is_as_good_as_promised(mnist):
    model = load_model(PROJECT_ROOT / "model.pth")
    assert 0.985 < evaluate(model, make_loader(mnist[1], 1000)).accuracy < 0.9999


def check_refused(path, cause):
    with pytest.raises(ModelError) as caught:
        load_model(path)
    message = str(caught.value)
    assert message.startswith(f"{path} ")
    assert cause in message
    assert message.endswith("Run the notebook again, or take an intact copy.")
    assert "weights_only" not in message  # the unsafe switch is nobody's cure
    assert len(message) < 350 + len(str(path))


def alter(name, value):
    """The weights of a good model, but for one."""
    state = make_model((7,)).state_dict()
    state[name] = value
    return state


@pytest.mark.parametrize(
    "content",
    [
        b"<!DOCTYPE html><html>Sign in</html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n",
        {"epoch": 3},
        nn.Conv2d(1, 8, 3).state_dict(),
        dict(make_model((7,)).state_dict()),  # nothing tells the activation
        alter("layers.0.weight", torch.zeros(7, 100)),
        alter("more", torch.zeros(3)),
    ],
)
def test_file_that_is_no_model(path, content):
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    check_refused(path, " cannot be read, or holds no MLP of this project (")


def test_code_in_a_file_is_not_run(path):
    trace = path.with_name("trace")

    class Malicious:
        def __reduce__(self):
            return Path.touch, (trace,)

    torch.save(Malicious(), path)
    check_refused(path, "holds more than weights; its code was not run")
    assert not trace.exists()


def test_damage_never_changes_the_model_silently(path):
    right = path.read_bytes()
    path.write_bytes(right[:6000])
    check_refused(path, "cannot be read")
    check_refused(path.with_name("absent"), "No such file")
    refused = 0
    for place in random.Random(0).sample(range(len(right)), 60):
        damaged = bytearray(right)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        try:
            check_loaded(path)
        except ModelError:
            refused += 1
    assert refused > 30
