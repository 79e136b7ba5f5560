"""Evaluation: accuracy, loss and confidence against hand-made cases, textbook numbers and PyTorch itself."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mnist_helpers.data import NUM_PIXELS, TRANSFORM, make_loader
from mnist_helpers.evaluation import Evaluation, compare_paired, evaluate, find_evidence
from mnist_helpers.model import MLP


def judge(answers: list[int], labels: list[int]) -> Evaluation:
    """The evaluation of a model that gives these answers, with a logit of 2 against nine of 0."""
    return Evaluation(2.0 * F.one_hot(torch.tensor(answers), 10), torch.tensor(labels))


def count_right(right: int, total: int) -> Evaluation:
    return judge([1] * right + [2] * (total - right), [1] * total)


@pytest.fixture
def noisy() -> Evaluation:
    """Random logits of 300 digits."""
    generator = torch.Generator().manual_seed(1)
    logits = 4 * torch.randn(300, 10, generator=generator)
    return Evaluation(logits, torch.randint(0, 10, (300,), generator=generator))


def test_answers_by_hand():
    result = judge([7, 2, 1, 0, 4, 1, 4, 9, 6, 9], [7, 2, 1, 0, 4, 1, 4, 9, 5, 3])
    assert result.predictions.tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 6, 9]
    assert result.right.tolist() == [True] * 8 + [False] * 2
    assert result.right.dtype == torch.bool
    assert result.accuracy == 0.8
    assert isinstance(result.accuracy, float)


def test_accuracy_per_digit_by_hand():
    # Each digit d stands here d + 1 times and is read right once; the others are read as the next digit.
    labels = [digit for digit in range(10) for _ in range(digit + 1)]
    firsts = [index == 0 or labels[index - 1] != label for index, label in enumerate(labels)]
    answers = [label if first else (label + 1) % 10 for label, first in zip(labels, firsts, strict=True)]
    result = judge(answers, labels)
    assert result.accuracy == pytest.approx(10 / 55)
    torch.testing.assert_close(result.accuracy_per_digit, 1 / torch.arange(1, 11))


def test_accuracy_per_digit_goes_by_the_true_digit():
    """Two of three threes are read as eights: that is the threes' fault, the eight itself is right."""
    labels = [*range(10), 3, 3]
    per_digit = judge([*range(10), 8, 8], labels).accuracy_per_digit
    torch.testing.assert_close(per_digit, torch.tensor([1, 1, 1, 1 / 3, 1, 1, 1, 1, 1, 1]))


def test_accuracy_is_the_mean_of_the_digits_weighted_by_their_number(noisy):
    counts = torch.bincount(noisy.labels, minlength=10)
    weighted = (noisy.accuracy_per_digit * counts).sum() / counts.sum()
    assert noisy.accuracy == pytest.approx(weighted.item(), abs=1e-6)


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [  # Newcombe 1998, Statistics in Medicine 17, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_interval_as_in_the_textbook(right, total, low, high):
    assert count_right(right, total).interval == pytest.approx((low, high), abs=6e-5)


def test_interval_of_all_right_and_of_more_digits():
    low, high = count_right(20, 20).interval
    assert (low, high) == pytest.approx((1 - 0.1611, 1), abs=6e-5)  # the mirror image of none right
    widths = [high - low for low, high in (count_right(n * 9, n * 10).interval for n in (10, 40, 160))]
    assert widths[0] / widths[1] == pytest.approx(2, rel=0.03)  # four times the digits, half the width
    assert widths[1] / widths[2] == pytest.approx(2, rel=0.01)


def test_probabilities_are_the_softmax_of_the_logits(noisy):
    torch.testing.assert_close(noisy.probabilities.sum(dim=1), torch.ones(300))
    assert noisy.probabilities.min() >= 0
    row = [math.exp(logit) for logit in noisy.logits[5].tolist()]
    assert noisy.probabilities[5].tolist() == pytest.approx([each / sum(row) for each in row], rel=1e-5)
    assert torch.equal(noisy.probabilities.argmax(dim=1), noisy.predictions)


def test_huge_logits_are_still_probabilities():
    logits = torch.tensor([[1000.0] + [0.0] * 9])
    result = Evaluation(logits, torch.tensor([0]))
    assert result.probabilities.tolist() == [[1.0] + [0.0] * 9]
    assert result.loss == 0


def test_calibration_by_hand():
    """Twenty groups of one digit each: those stated at 60% are wrong, those at 90% right."""
    confidence = torch.tensor([0.9, 0.6] * 10)
    logits = torch.zeros(20, 10)
    logits[:, 3] = (9 * confidence / (1 - confidence)).log()
    result = Evaluation(logits, torch.tensor([3, 4] * 10))
    torch.testing.assert_close(result.confidence, confidence)
    stated, right = result.calibration
    torch.testing.assert_close(stated, torch.tensor([0.6] * 10 + [0.9] * 10))
    assert right.tolist() == [0.0] * 10 + [1.0] * 10
    assert result.calibration_error == pytest.approx((0.6 + 0.1) / 2, abs=1e-5)


def test_calibration_of_many_digits_takes_a_twentieth_of_them_each(noisy):
    confidence = noisy.probabilities.max(dim=1).values.sort()
    stated, right = noisy.calibration
    torch.testing.assert_close(stated, confidence.values.view(20, 15).mean(dim=1))
    torch.testing.assert_close(right, noisy.right[confidence.indices].view(20, 15).float().mean(dim=1))


def test_few_digits_can_be_calibrated_too():
    stated, right = judge([1, 2, 3], [1, 2, 4]).calibration
    assert len(stated) == len(right) == 3


def test_refusing_the_least_sure_answers_by_hand():
    logits = torch.diag(torch.arange(1.0, 11.0))  # digit 0 is read with the least confidence, 9 with the most
    result = Evaluation(logits, torch.tensor([5, 5, 2, 3, 4, 5, 6, 7, 8, 0]))  # 0, 1 and 9 are read wrong
    assert result.accuracy_of_surest(0) == result.accuracy == 0.7
    assert result.accuracy_of_surest(0.1) == pytest.approx(7 / 9)
    assert result.accuracy_of_surest(0.2) == pytest.approx(7 / 8)


def test_paired_comparison_against_the_table_of_the_binomial():
    """Six digits only the first reads right, none only the second: twice the chance of six heads in a row."""
    labels = [1] * 20
    first, second = judge([1] * 16 + [0] * 4, labels), judge([1] * 10 + [0] * 10, labels)
    assert compare_paired(first, second) == (6, 0, pytest.approx(2 / 2**6))
    assert compare_paired(second, first) == (0, 6, pytest.approx(2 / 2**6))


def test_paired_comparison_of_equals():
    first, second = judge([1, 0, 1], [1, 1, 1]), judge([0, 1, 1], [1, 1, 1])
    assert compare_paired(first, second) == (1, 1, pytest.approx(1))
    assert compare_paired(first, first) == (0, 0, 1.0)


def test_loss_is_the_cross_entropy_in_nats(noisy):
    assert noisy.loss == pytest.approx(F.cross_entropy(noisy.logits, noisy.labels).item())
    stated = noisy.probabilities[torch.arange(300), noisy.labels].double()
    assert noisy.loss == pytest.approx(-stated.log().mean().item(), rel=1e-5)
    assert isinstance(noisy.loss, float)
    blind = Evaluation(torch.zeros(7, 10), torch.arange(7))
    assert blind.loss == pytest.approx(math.log(10))


class Brightness(nn.Module):
    """Answers with the digit that the first pixel spells, so that answers can be told apart."""

    def forward(self, pixels):
        return F.one_hot(pixels[:, 0].long(), 10).float()


def test_evaluate_keeps_the_order_and_counts_a_short_last_batch():
    spelled = torch.arange(25) % 10
    pixels = spelled[:, None].expand(25, NUM_PIXELS).float()
    labels = (spelled + (torch.arange(25) >= 20)) % 10  # the last batch, of five, is all wrong
    loader = [(pixels[start : start + 10], labels[start : start + 10]) for start in (0, 10, 20)]
    result = evaluate(Brightness(), loader)
    assert torch.equal(result.predictions, spelled)
    assert torch.equal(result.labels, labels)
    assert result.accuracy == 0.8  # the mean of the batches' means would be 2/3
    assert not result.logits.requires_grad


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_switches_dropout_off_and_puts_the_mode_back(toy, training):
    model = MLP((16,), batch_norm=True, dropout=0.5).train(training)
    loader = make_loader(toy, 32)
    result = evaluate(model, loader)
    assert model.training is training
    assert all(layer.training is training for layer in model.layers)
    assert torch.equal(result.logits, evaluate(model, loader).logits)
    expected = model.eval()(TRANSFORM(toy.images)).detach()
    torch.testing.assert_close(result.logits, expected)


def test_evidence_of_a_linear_model_by_hand(toy):
    """For a linear model the lead of the winner has the same slope everywhere: a difference of weights."""
    model = nn.Linear(NUM_PIXELS, 10)
    pixels = TRANSFORM(toy.images[:6])
    before = pixels.clone()
    evidence = find_evidence(model, pixels)
    winners = model(pixels).argmax(dim=1)
    slope = model.weight[winners] - model.weight.mean(dim=0)
    expected = (slope * (pixels - pixels.min())).unflatten(1, (28, 28))
    torch.testing.assert_close(evidence, expected.detach())
    assert torch.equal(pixels, before)
    assert not pixels.requires_grad
    assert not evidence.requires_grad
    assert model.weight.grad is None


def test_paper_is_no_evidence(toy):
    images = toy.images.clone()
    images[:, :14] = 0
    evidence = find_evidence(MLP((16,)).eval(), TRANSFORM(images[:5]))
    assert evidence[:, :14].abs().max() == 0
    assert (evidence[:, 14:] != 0).any(dim=(1, 2)).all()
