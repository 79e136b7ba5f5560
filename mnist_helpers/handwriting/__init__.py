"""Digits that people write: any picture -> the 28x28 of MNIST -> an answer."""
