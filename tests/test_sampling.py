"""The sampler of hard digits: how many, which, how often, and whose losses it learns from."""

import pytest
import torch
import torch.nn.functional as F

from mnist_helpers.data import TRANSFORM, make_loader
from mnist_helpers.model import MLP
from mnist_helpers.sampling import HardDigits
from mnist_helpers.training import train_epoch


def make_sampler(size: int, fraction: float, seed: int = 0, losses=None) -> HardDigits:
    sampler = HardDigits(size, fraction, torch.Generator().manual_seed(seed))
    if losses is not None:
        sampler.losses = torch.as_tensor(losses, dtype=torch.float32)
    return sampler


def share_of_first_half(losses: tuple[float, float], epochs: int = 300) -> float:
    """How much of what is drawn comes from the first 1,000 digits, whose loss is the first of the two."""
    halves = torch.tensor(losses).repeat_interleave(1000)
    sampler = make_sampler(2000, 0.01, losses=halves)  # few of many: leaving out repeats hardly matters
    drawn = torch.tensor([index for _ in range(epochs) for index in sampler])
    return (drawn < 1000).double().mean().item()


@pytest.mark.parametrize(
    ("size", "fraction", "count"), [(100, 0.25, 25), (1000, 0.5, 500), (7, 0.5, 4), (40, 1.0, 40)]
)
def test_an_epoch_has_its_count_without_repeats(size, fraction, count):
    sampler = make_sampler(size, fraction, losses=torch.rand(size))
    for _ in range(5):
        drawn = list(sampler)
        assert len(drawn) == len(sampler) == count
        assert len(set(drawn)) == count
        assert set(drawn) <= set(range(size))
        assert all(type(index) is int for index in drawn)


def test_seed_decides_and_every_epoch_is_another_draw():
    def draw(seed: int) -> list[list[int]]:
        sampler = make_sampler(200, 0.25, seed)
        return [list(sampler) for _ in range(3)]

    torch.manual_seed(1)
    first = draw(seed=5)
    torch.manual_seed(2)  # the global random numbers have no say, nor are they moved
    state = torch.get_rng_state()
    assert draw(seed=5) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert draw(seed=6) != first
    assert first[0] != first[1] != first[2]


@pytest.mark.parametrize(("hard", "easy"), [(1.6, 0.4), (0.5, 0.25), (0.9, 0.1), (1.0, 1.0)])
def test_drawn_in_proportion_to_the_loss(hard, easy):
    assert share_of_first_half((hard, easy)) == pytest.approx(hard / (hard + easy), abs=0.02)


def test_digits_not_yet_seen_count_as_hard():
    sampler = make_sampler(2000, 0.5)
    drawn = list(sampler)
    sampler.update(torch.full((1000,), 0.1))  # those drawn were easy
    again = list(sampler)
    new = len(set(again) - set(drawn))
    assert new > 850  # in equal shares it would be 500
    unseen = make_sampler(1, 1.0).losses.item()
    assert share_of_first_half((unseen, 2.0)) == pytest.approx(1 / 2, abs=0.02)  # as hard as can be


def test_mislabelled_digits_do_not_take_over():
    assert share_of_first_half((100.0, 2.0)) == pytest.approx(1 / 2, abs=0.02)


def test_easy_digits_come_back():
    assert share_of_first_half((0.0, 0.02)) == pytest.approx(1 / 2, abs=0.02)
    sampler = make_sampler(100, 0.2, losses=[0.0] * 80 + [2.0] * 20)
    returned = {index for _ in range(300) for index in sampler if index < 80}
    assert returned == set(range(80))


def test_epoch_is_full_even_when_nothing_is_hard():
    assert len(set(make_sampler(50, 0.5, losses=torch.zeros(50)))) == 25


def test_update_maps_the_losses_to_the_digits_drawn():
    sampler = make_sampler(60, 0.5)
    drawn = list(sampler)
    losses = torch.arange(30) / 100
    before = sampler.losses.clone()
    sampler.update(losses)
    assert sampler.losses[drawn].tolist() == losses.tolist()
    others = [index for index in range(60) if index not in drawn]
    assert torch.equal(sampler.losses[others], before[others])


def test_update_with_a_last_batch_left_out():
    sampler = make_sampler(60, 0.5)
    drawn = list(sampler)
    sampler.update(torch.zeros(29))
    assert sampler.losses[drawn[:29]].tolist() == [0] * 29
    assert sampler.losses[drawn[29]] == 3.0  # still as one not seen


def test_losses_of_training_arrive_at_their_digits(toy):
    """Through loader and training loop: each digit drawn ends with the loss of its own picture."""
    sampler = make_sampler(100, 0.4)
    loader = make_loader(toy, 16, order=sampler)
    model = MLP((16,), batch_norm=False)
    frozen = torch.optim.SGD(model.parameters(), lr=0.0)
    sampler.update(train_epoch(model, loader, torch.nn.CrossEntropyLoss(reduction="none"), frozen))
    with torch.no_grad():
        expected = F.cross_entropy(model(TRANSFORM(toy.images)), toy.labels, reduction="none")
    drawn = sampler.order
    assert drawn.unique().numel() == 40
    torch.testing.assert_close(sampler.losses[drawn], expected[drawn])
    assert (sampler.losses == 3.0).sum() == 60
