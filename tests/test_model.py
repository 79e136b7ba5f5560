"""The network's shapes and errors, and files that are saved, reloaded, damaged, foreign or hostile."""

import os
import pickle
import random
import re
import signal
import time
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from mnist_helpers import model as model_module
from mnist_helpers.data import TRANSFORM
from mnist_helpers.model import (
    ACTIVATIONS,
    MLP,
    ModelError,
    count_parameters,
    load_model,
    merge_models,
    save_model,
)

REFERENCE = {"relu": torch.relu, "gelu": nn.functional.gelu, "silu": nn.functional.silu, "tanh": torch.tanh}


def make_model(*args, seed: int = 0, **kwargs) -> MLP:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MLP(*args, **kwargs)
        for name, value in model.state_dict().items():  # so that no weight has the value of a fresh model
            if value.ndim == 1:
                value.copy_(torch.rand(len(value)) + (0.5 if name.endswith(("weight", "var")) else 0))
    return model.eval()


def random_pixels(count: int = 6) -> torch.Tensor:
    return torch.randn(count, 784, generator=torch.Generator().manual_seed(9))


# --- the network ------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("batch_norm", [False, True])
def test_network_by_hand(activation, batch_norm):
    """The logits equal those of the same weights multiplied by hand."""
    model = make_model((5, 4), activation, batch_norm)
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]
    assert [len(linears), len(norms)] == [3, 2 * batch_norm]
    values = random_pixels()
    for number, linear in enumerate(linears):
        values = values @ linear.weight.T + linear.bias
        if number < 2:
            if batch_norm:
                norm = norms[number]
                values = (values - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
                values = values * norm.weight + norm.bias
            values = REFERENCE[activation](values)
    torch.testing.assert_close(model(random_pixels()), values)


def test_logits_are_not_probabilities():
    logits = make_model((8,))(random_pixels(200))
    assert logits.shape == (200, 10)
    assert logits.min() < 0
    assert (logits.sum(dim=1) - 1).abs().max() > 0.1


def test_dropout_acts_in_training_only():
    model = make_model((64,), dropout=0.5)
    pixels = random_pixels()
    assert torch.equal(model(pixels), model(pixels))
    model.train()
    assert not torch.equal(model(pixels), model(pixels))


@pytest.mark.parametrize(
    ("hidden", "batch_norm", "count"),
    [((), True, 7850), ((512, 512), False, 669_706), ((512, 512), True, 671_754), ((2,), False, 1600)],
)
def test_parameter_count_by_hand(hidden, batch_norm, count):
    assert count_parameters(MLP(hidden, batch_norm=batch_norm)) == count


@pytest.mark.parametrize("sigma", [0.5, 2.0, 3.0])
def test_units_that_start_local_look_around_a_place_of_their_own(sigma):
    torch.manual_seed(0)
    weights = MLP((300,), receptive_field=sigma).layers[0].weight.detach()
    assert torch.allclose(weights.sum(dim=1), torch.zeros(300), atol=1e-5)
    usual = nn.Linear(784, 300).weight.detach()
    assert weights.norm(dim=1).sub(usual.norm(dim=1).mean()).abs().max() < 0.02
    energy = weights.square().unflatten(1, (28, 28))
    energy = energy / energy.sum(dim=(1, 2), keepdim=True)
    places = torch.arange(28.0)
    for profile in (energy.sum(dim=1), energy.sum(dim=2)):
        centre = profile @ places
        spread = ((places - centre[:, None]) ** 2 * profile).sum(dim=1).sqrt()
        assert (centre > 2).all()
        assert (centre < 25).all()
        assert centre.std() > 4  # all over the picture
        assert spread.mean() < sigma + 0.5


def test_units_start_everywhere_unless_asked():
    torch.manual_seed(0)
    plain = MLP((16,)).layers[0].weight
    torch.manual_seed(0)
    assert torch.equal(MLP((16,), receptive_field=0.0).layers[0].weight, plain)


def test_pictures_of_both_shapes_are_welcome(toy):
    model = make_model((8,))
    pixels = TRANSFORM(toy.images)
    assert torch.equal(model(pixels), model(pixels.unflatten(1, (28, 28))))
    assert model(TRANSFORM(toy.images[0])).shape == (1, 10)
    assert model(torch.zeros(0, 784)).shape == (0, 10)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (torch.zeros(784), "[784] float32"),
        (torch.zeros(28, 28), "[28, 28] float32"),
        (torch.zeros(3, 783), "[3, 783] float32"),
        (torch.zeros(3, 3, 28, 28), "[3, 3, 28, 28] float32"),
        (torch.zeros(()), "[] float32"),
        (torch.zeros(3, 784, dtype=torch.float64), "[3, 784] float64"),
        (torch.zeros(3, 28, 28, dtype=torch.uint8), "[3, 28, 28] uint8"),
        (torch.zeros(0, 5), "[0, 5] float32"),
    ],
)
def test_wrong_input_is_named(wrong, named):
    with pytest.raises(ValueError, match=r"expected .* got .* TRANSFORM") as caught:
        make_model((8,))(wrong)
    assert f"expected [batch, 784] or [batch, 28, 28] float32, got {named}" in str(caught.value)


# --- several networks merged into one ----------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("hidden", [(6,), (6, 5, 4)])
def test_merged_logits_are_the_mean(hidden, activation, batch_norm, dropout):
    models = [make_model(hidden, activation, batch_norm, dropout, seed=seed) for seed in range(3)]
    pixels = random_pixels()
    merged = merge_models(models)
    mean = torch.stack([model(pixels) for model in models]).mean(dim=0)
    torch.testing.assert_close(merged(pixels), mean)
    assert not torch.allclose(mean, models[0](pixels))
    widths = [len(weight) for weight in merged.parameters() if weight.ndim == 2]
    assert widths == [*(3 * width for width in hidden), 10]
    assert not merged.training


def test_networks_of_different_widths_merge():
    models = [make_model((6, 5), seed=1), make_model((10, 3), seed=2)]
    pixels = random_pixels()
    torch.testing.assert_close(merge_models(models)(pixels), sum(model(pixels) for model in models) / 2)


def test_one_network_merges_to_itself_and_stays_as_it_was():
    model = make_model((6, 5))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    merged = merge_models([model])
    assert torch.equal(merged(random_pixels()), model(random_pixels()))
    for parameter in merged.parameters():
        parameter.data.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_merged_network_is_saved_and_loaded_like_any_other(tmp_path):
    merged = merge_models([make_model((6, 5), "silu", seed=seed) for seed in range(2)])
    save_model(merged, tmp_path / "model.pth")
    assert torch.equal(load_model(tmp_path / "model.pth")(random_pixels()), merged(random_pixels()))


@pytest.mark.parametrize(
    "models",
    [
        [],
        [make_model((6,)), make_model((6, 6))],
        [make_model((6,)), make_model((6,), "gelu")],
        [make_model((6,)), make_model((6,), batch_norm=False)],
        [make_model(()), make_model(())],
    ],
    ids=["none", "depths", "activations", "batch norm", "no hidden layer"],
)
def test_networks_that_do_not_merge(models):
    with pytest.raises(
        ValueError, match=r"expected networks with equally many hidden layers.*from one Config"
    ):
        merge_models(models)


# --- saving and loading -----------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("hidden", [(), (7,), (9, 5, 3)])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_reloaded_model_gives_the_same_logits(tmp_path, activation, batch_norm, hidden, dropout):
    model = make_model(hidden, activation, batch_norm, dropout)
    save_model(model, tmp_path / "model.pth")
    loaded = load_model(tmp_path / "model.pth")
    assert not loaded.training
    assert torch.equal(loaded(random_pixels()), model(random_pixels()))
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


def test_file_is_a_plain_state_dict(tmp_path):
    model = make_model((7,))
    save_model(model, str(tmp_path / "model.pth"))
    state = torch.load(tmp_path / "model.pth", weights_only=True)
    assert state.keys() == model.state_dict().keys()
    model.load_state_dict(state)
    torch.save(model.state_dict(), tmp_path / "plain.pth")  # and one written without our help loads as well
    assert torch.equal(load_model(tmp_path / "plain.pth")(random_pixels()), model(random_pixels()))


def test_model_saved_on_a_gpu(tmp_path):
    """Every tensor of such a file is tagged with its device; here the tag is put in by hand."""
    model = make_model((7,))
    save_model(model, tmp_path / "model.pth")
    tagged = tmp_path / "gpu.pth"
    with zipfile.ZipFile(tmp_path / "model.pth") as source, zipfile.ZipFile(tagged, "w") as target:
        for entry in source.infolist():
            content = source.read(entry)
            if entry.filename.endswith("data.pkl"):
                assert content.count(b"X\x03\x00\x00\x00cpu") == 1  # the later ones refer back to it
                content = content.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
            target.writestr(entry.filename, content)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):  # so the tag is really there
            torch.load(tagged, weights_only=True)
    loaded = load_model(tagged)
    assert {value.device.type for value in loaded.state_dict().values()} == {"cpu"}
    assert torch.equal(loaded(random_pixels()), model(random_pixels()))


def test_committed_model_is_as_good_as_promised(mnist):
    path = Path(model_module.__file__).parents[1] / "model.pth"
    if not path.exists():
        pytest.skip("no model.pth: the notebook has not been run yet")
    with torch.no_grad():
        predictions = load_model(path)(TRANSFORM(mnist[1].images)).argmax(dim=1)
    accuracy = (predictions == mnist[1].labels).float().mean().item()
    assert 0.985 < accuracy < 0.9999  # nobody honest reaches 100%


# --- files that are no model ------------------------------------------------------------------------


class Malicious:
    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


def good_file(folder: Path) -> bytes:
    save_model(make_model((7,)), folder / "good.pth")
    return (folder / "good.pth").read_bytes()


def saved(what) -> callable:
    return lambda path: torch.save(what, path)


def state_without(key: str) -> dict:
    return {name: value for name, value in make_model((7,)).state_dict().items() if name != key}


def write_other_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("letter.txt", "Dear reader")


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2700848\n"
NOT_MODELS = {  # name: (how it gets there, words of the message)
    "HTML": (lambda path: path.write_bytes(b"\n<!DOCTYPE html><html>Sign in</html>"), "web page"),
    "LFS pointer": (lambda path: path.write_bytes(LFS_POINTER), "git lfs pull"),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "text": (lambda path: path.write_bytes(b"hello"), "is no model file"),
    "half a file": (lambda path: path.write_bytes(good_file(path.parent)[:6000]), "cut short, damaged"),
    "last byte lost": (lambda path: path.write_bytes(good_file(path.parent)[:-1]), "cut short, damaged"),
    "another zip": (write_other_zip, "another kind of archive"),
    "plain pickle": (lambda path: path.write_bytes(pickle.dumps({"a": 1})), "is no model file"),
    "old torch format": (
        lambda path: torch.save(make_model((7,)).state_dict(), path, _use_new_zipfile_serialization=False),
        "is no model file",
    ),
    "whole module": (saved(make_model((7,))), "more than weights"),
    "a list": (saved([torch.zeros(3)]), "holds a list"),
    "a tensor": (saved(torch.zeros(3)), "holds a Tensor"),
    "an empty dictionary": (saved({}), "no MLP for digits"),
    "numbers": (saved({"activation": 1, "weight": 2.0}), "no MLP for digits"),
    "a checkpoint": (saved({"epoch": 3, "model": make_model((7,)).state_dict()}), "no MLP for digits"),
    "a convolutional net": (saved(nn.Sequential(nn.Conv2d(1, 8, 3)).state_dict()), "no MLP for digits"),
    "another MLP": (saved(nn.Sequential(nn.Linear(784, 10)).state_dict()), "no MLP for digits"),
    "another size": (
        saved(make_model(()).state_dict() | {"layers.0.weight": torch.zeros(10, 100)}),
        "no MLP for digits",
    ),
    "a missing bias": (saved(state_without("layers.0.bias")), "no MLP for digits"),
    "an unknown activation": (
        saved(make_model(()).state_dict() | {"activation": torch.tensor(99.0)}),
        "no MLP for digits",
    ),
    "no activation": (saved(make_model(()).state_dict() | {"activation": None}), "no MLP for digits"),
}


@pytest.mark.parametrize("kind", NOT_MODELS)
def test_file_that_is_no_model(tmp_path, kind):
    path = tmp_path / "model.pth"
    write, cause = NOT_MODELS[kind]
    write(path)
    check_refused(path, cause)


@pytest.mark.parametrize("wrapped", [True, False], ids=["torch.save", "pickle"])
def test_malicious_pickle_is_not_run(tmp_path, wrapped):
    path, trace = tmp_path / "model.pth", tmp_path / "trace"
    if wrapped:
        torch.save({"activation": Malicious(trace)}, path)
    else:
        path.write_bytes(pickle.dumps(Malicious(trace)))
    check_refused(path, "its code was not run" if wrapped else "is no model file")
    assert not trace.exists()
    pickle.loads(pickle.dumps(Malicious(trace)))  # it would have worked
    assert trace.exists()


def test_missing_file(tmp_path):
    check_refused(tmp_path / "model.pth", "cannot be read (No such file or directory)")
    (tmp_path / "folder").mkdir()
    check_refused(tmp_path / "folder", "cannot be read")


def check_refused(path: Path, cause: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_model(path)
    message = str(caught.value)
    assert str(path) in message
    assert cause in message
    assert "weights_only" not in message
    assert len(message.splitlines()) == 1
    assert len(message) < 350 + len(str(path))
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_one_flipped_bit_never_changes_the_model_silently(tmp_path):
    """A flip anywhere in the file is either noticed or without effect: 400 random ones."""
    right = bytearray(good_file(tmp_path))
    model = make_model((7,))
    draw, outcomes = random.Random(0), set()
    ends = range(
        len(right) - 1500, len(right)
    )  # where the directory of the archive lies: headers, not weights
    for place in [draw.randrange(len(right)) for _ in range(250)] + draw.sample(ends, 150):
        damaged = right.copy()
        damaged[place] ^= 1 << draw.randrange(8)
        (tmp_path / "model.pth").write_bytes(damaged)
        try:
            outcomes.add("loaded")
            state = load_model(tmp_path / "model.pth").state_dict()
            assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
        except ModelError:
            outcomes.add("refused")
    assert outcomes == {"loaded", "refused"}


@pytest.mark.parametrize("bit", range(8))
def test_one_flipped_bit_of_a_weight_is_noticed(tmp_path, bit):
    damaged = bytearray(good_file(tmp_path))
    weights = make_model((7,)).state_dict()["layers.0.weight"].numpy().tobytes()
    damaged[damaged.find(weights) + 1234] ^= 1 << bit
    (tmp_path / "model.pth").write_bytes(damaged)
    check_refused(tmp_path / "model.pth", "damaged")


def test_a_tensor_marked_as_a_folder_is_noticed(tmp_path):
    """One bit in the directory of the archive, and PyTorch silently reads zeros in place of a tensor."""
    right = good_file(tmp_path)
    entries = [match.start() for match in re.finditer(b"PK\x01\x02", right)]
    assert len(entries) > 10
    for entry in entries:
        damaged = bytearray(right)
        damaged[entry + 38] |= 0x10
        (tmp_path / "model.pth").write_bytes(damaged)
        check_refused(tmp_path / "model.pth", "damaged")


# --- interrupted saving -----------------------------------------------------------------------------


@pytest.mark.parametrize("culprit", ["torch.save", "os.fsync", "os.replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_saving_that_fails_leaves_the_old_file(tmp_path, monkeypatch, culprit, error):
    path = tmp_path / "model.pth"
    old, new = make_model((7,), seed=1), make_model((7,), seed=2)
    save_model(old, path)

    def fail(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(culprit, fail)
        with pytest.raises(type(error)):
            save_model(new, path)
    assert torch.equal(load_model(path)(random_pixels()), old(random_pixels()))
    save_model(new, path)  # what the failure left behind is not in the way
    assert torch.equal(load_model(path)(random_pixels()), new(random_pixels()))


def test_content_is_on_the_disk_before_the_name_changes(tmp_path, monkeypatch):
    calls = []

    def recording(name, original):
        return lambda *args: (calls.append(name), original(*args))

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, recording(name, getattr(os, name)))
    save_model(make_model((7,)), tmp_path / "model.pth")
    assert calls == ["fsync", "replace"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_process_killed_while_saving_leaves_the_old_or_the_new_file(tmp_path):
    """50 children are killed at random moments of `save_model`; the file always holds a whole model."""
    path, draw = tmp_path / "model.pth", random.Random(0)
    models = [make_model((256,), seed=seed) for seed in (1, 2)]
    answers = [model(random_pixels()) for model in models]
    save_model(models[0], path)
    current, patience, seen = 0, 0.01, []
    for _ in range(50):
        child = fork_saver(models[1 - current], path)
        time.sleep(draw.uniform(0, patience))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        logits = load_model(path)(random_pixels())
        assert any(torch.equal(logits, answer) for answer in answers)
        seen.append(torch.equal(logits, answers[1 - current]))
        current = 1 - current if seen[-1] else current
        patience *= (
            0.8 if seen[-1] else 1.25
        )  # stay around the moment of the change, however slow the machine
    assert 5 < sum(seen) < 45  # killed before it as well as after


def fork_saver(model: MLP, path: Path) -> int:
    """A child process that saves `model` and then waits for its end."""
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # fork beside threads
        child = os.fork()
    if child == 0:
        try:
            save_model(model, path)
            time.sleep(60)
        finally:
            os._exit(0)
    return child
