"""Digits that people write themselves: any picture -> the 28x28 that the model knows -> an answer."""
