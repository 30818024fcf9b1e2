"""Products of activations and factors: their types, their parts, and how many tokens at a time."""
