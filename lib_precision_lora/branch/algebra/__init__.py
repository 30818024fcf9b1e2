"""The effective weight: what a stack of adapters makes of a stored weight."""
