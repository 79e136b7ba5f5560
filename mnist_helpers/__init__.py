"""Reusable parts of the MNIST notebook: one module per stage, imported one by one."""
