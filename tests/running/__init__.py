"""Tests of a running WebUI, over its API and in its page."""
