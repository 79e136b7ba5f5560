"""Evaluation against numbers worked out by hand and the model itself."""

import math

import pytest
import torch

from mnist_helpers.data import TRANSFORM, make_loader
from mnist_helpers.evaluation import Evaluation, evaluate
from mnist_helpers.model import MLP


def test_answers_by_hand():
    wanted = torch.tensor([[0.1, 0.7, 0.2], [0.6, 0.4, 0], [0.8, 0.1, 0.1]])
    result = Evaluation(100 + wanted.log(), torch.tensor([1, 0, 2]))
    assert result.predictions.tolist() == [1, 0, 0]
    assert result.accuracy == pytest.approx(2 / 3)
    assert result.loss == pytest.approx(-math.log(0.7 * 0.6 * 0.1) / 3)


def test_every_digit_is_evaluated_as_in_use_and_the_model_stays_as_it_is(toy):
    model = MLP((16,), batch_norm=True, dropout=0.5).train()
    model.layers[1].eval()  # a layer that is frozen stays so
    modes = [layer.training for layer in model.modules()]
    statistics = model.layers[1].running_mean.clone()
    numbers = torch.get_rng_state()
    result = evaluate(model, make_loader(toy, 33))  # the last batch has one digit
    assert [layer.training for layer in model.modules()] == modes
    assert torch.equal(model.layers[1].running_mean, statistics)
    assert torch.equal(torch.get_rng_state(), numbers)
    assert torch.is_grad_enabled()
    assert not result.logits.requires_grad
    assert torch.equal(result.labels, toy.labels)
    torch.testing.assert_close(result.logits, model.eval()(TRANSFORM(toy.images)).data)


def test_no_digits_to_evaluate_are_named(toy):
    with pytest.raises(ValueError, match="the loader has no digits"):
        evaluate(MLP(()), make_loader(toy[:0], 10))
