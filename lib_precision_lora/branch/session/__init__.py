"""Attaches a patch set to a model, changes it, and takes it off again."""
