"""Samplers of one family: where the host's sampling begins, under a name of its own."""

from backend.sampling.sampling_function import sampling_cleanup, sampling_prepare

__all__ = ["sampling_cleanup", "sampling_prepare"]
