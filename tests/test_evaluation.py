"""Evaluation against hand-made cases and PyTorch itself."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mnist_helpers.data import TRANSFORM, make_loader
from mnist_helpers.evaluation import Evaluation, evaluate
from mnist_helpers.model import MLP


@pytest.fixture
def noisy() -> Evaluation:
    """Random logits of 300 images."""
    generator = torch.Generator().manual_seed(1)
    logits = 4 * torch.randn(300, 10, generator=generator)
    return Evaluation(logits, torch.randint(0, 10, (300,), generator=generator))


def test_answers_by_hand():
    logits = torch.tensor([[0.0, 2, 1], [3, 0, 0], [0, 0, 1], [5, 0, 0]])
    result = Evaluation(logits, torch.tensor([1, 0, 2, 2]))
    assert result.predictions.tolist() == [1, 0, 2, 0]
    assert result.correct.tolist() == [True, True, True, False]
    assert result.accuracy == 0.75
    assert isinstance(result.accuracy, float)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.logits = logits  # the figures that were worked out before would no longer belong to it


def test_loss_is_the_mean_cross_entropy_in_nats(noisy):
    assert noisy.loss == pytest.approx(F.cross_entropy(noisy.logits, noisy.labels).item())
    stated = noisy.probabilities[torch.arange(300), noisy.labels].double()
    assert noisy.loss == pytest.approx(-stated.log().mean().item(), rel=1e-5)
    assert isinstance(noisy.loss, float)
    assert Evaluation(torch.zeros(7, 10), torch.arange(7)).loss == pytest.approx(math.log(10))


def test_probabilities_are_the_softmax_of_the_logits(noisy):
    row = [math.exp(logit) for logit in noisy.logits[5].tolist()]
    assert noisy.probabilities[5].tolist() == pytest.approx([each / sum(row) for each in row], rel=1e-5)
    assert torch.equal(noisy.probabilities.argmax(dim=1), noisy.predictions)
    huge = Evaluation(torch.tensor([[1000.0] + [0.0] * 9]), torch.tensor([0]))
    assert (huge.probabilities.tolist(), huge.loss) == ([[1.0] + [0.0] * 9], 0)


class FirstPixel(nn.Linear):
    """Answers with the digit that the first pixel spells, so that answers can be told apart."""

    def forward(self, pixels):
        return F.one_hot(pixels[:, 0].long(), 10) * self.bias


def test_a_short_last_batch_counts_by_its_images_and_the_order_is_kept():
    spelled = torch.arange(25) % 10
    labels = (spelled + (torch.arange(25) >= 20)) % 10  # the last batch, of five, is all wrong
    batches = zip(spelled[:, None].split(10), labels.split(10), strict=True)
    result = evaluate(FirstPixel(1, 10), batches)
    assert torch.equal(result.labels, labels)
    assert len(result.logits) == 25
    assert (result.logits != 0).nonzero().tolist() == [[place, digit] for place, digit in enumerate(spelled)]


def test_accuracy_sums_over_images():
    """The mean of the batches' means would be 2/3."""
    answers = torch.arange(25) % 10
    labels = (answers + (torch.arange(25) >= 20)) % 10
    assert Evaluation(F.one_hot(answers, 10).float(), labels).accuracy == 0.8


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_switches_training_off_and_puts_the_mode_back(toy, training):
    model = MLP((16,), batch_norm=True, dropout=0.5).train(training)
    before = {name: value.clone() for name, value in model.named_buffers()}
    numbers = torch.get_rng_state()
    result = evaluate(model, make_loader(toy, 32))
    assert all(module.training is training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    assert torch.equal(torch.get_rng_state(), numbers)
    torch.testing.assert_close(result.logits, evaluate(model, make_loader(toy, 70)).logits)
    torch.testing.assert_close(result.logits, model.eval()(TRANSFORM(toy.images)).detach())
    assert not result.logits.requires_grad


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_evaluation_that_is_stopped_puts_the_mode_back_too(toy, error):
    class Stopped(list):
        def __iter__(self):
            raise error

    model = MLP((4,)).train()
    with pytest.raises(error):
        evaluate(model, Stopped())
    assert model.training
    assert torch.is_grad_enabled()
