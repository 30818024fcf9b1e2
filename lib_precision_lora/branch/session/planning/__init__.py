"""Chosen and predicted before anything is placed: which layers are merged, and what a branch takes."""
