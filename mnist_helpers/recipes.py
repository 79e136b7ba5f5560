"""Trainings worth naming, chosen on the validation split alone, used by notebook and benchmark alike."""

from dataclasses import replace

from mnist_helpers.config import Config

# The accuracy of a whole afternoon in minutes, a plain MLP all the same.
FINAL = Config(
    hidden=(1024, 512, 512),
    batch_norm=True,  # each layer's inputs keep mean 0 and deviation 1: larger steps, less fuss
    optimizer="adamw",
    learning_rate=3e-3,
    schedule="one-cycle",  # warm up, then slow down to almost nothing
    weight_decay=0.2,
    averaging=0.1,  # the weights' mean over the last tenth of the steps is steadier than the last weights
    warp=1.8,  # new handwriting in every batch, strongly warped at first
    warp_fade=0.5,  # and milder and milder, towards what people really write
    practice=0.25,  # each epoch shows a quarter of the digits, the hard ones first
    batch_size=512,
    epochs=300,
)

# For whoever has half an hour: so many networks from different seeds, merged into one (see `merge_models`).
MEMBERS = 6

# Ninety-nine in a hundred in seconds: few steps, so milder warps, a smaller network, upright digits, and
# units that start out around places of their own (over hundreds of epochs they find them unaided).
FAST = replace(
    FINAL,
    hidden=(384, 256, 128),
    receptive_field=2.0,
    learning_rate=5e-3,
    weight_decay=0.05,
    warp=0.6,
    practice=0.3,
    batch_size=256,
    epochs=6,
)

# Ninety-eight in a hundred in a breath.
BRIEF = replace(FAST, hidden=(256, 128), warp=0.2, warp_fade=0.0, epochs=4)
