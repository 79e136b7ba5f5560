"""Trainings worth naming, chosen on the validation split alone, used by notebook and benchmark alike."""

from dataclasses import replace

from mnist_helpers.config import Config

# The accuracy of a whole afternoon in minutes, a plain MLP all the same.
FINAL = Config(
    hidden=(1024, 1024, 1024),
    batch_norm=True,  # each layer's inputs keep mean 0 and deviation 1: larger steps, less fuss
    optimizer="adamw",
    learning_rate=3e-3,
    schedule="one-cycle",  # warm up, then slow down to almost nothing
    weight_decay=0.05,
    averaging=0.1,  # the weights' mean over the last tenth of the steps is steadier than the last weights
    warp=1.0,  # new handwriting in every batch
    practice=0.25,  # each epoch shows a quarter of the digits, the hard ones first
    batch_size=512,
    epochs=130,
)

# Nearly ninety-nine in a hundred in seconds: few steps, so milder warps and a smaller network.
FAST = replace(
    FINAL,
    hidden=(512, 512),
    learning_rate=4e-3,
    warp=0.4,
    practice=0.35,
    batch_size=256,
    epochs=12,
)

# About ninety-eight in a hundred in a breath.
BRIEF = replace(FAST, warp=0.2, epochs=4)
