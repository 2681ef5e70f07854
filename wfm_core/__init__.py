"""The world foundation model: data, tokenizers, dynamics, training, shipped weights."""

DEFAULT_WORLD_MODEL = "bridge-nano-ar"
"""Shipped checkpoint that is taken where none is named."""
