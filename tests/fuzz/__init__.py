"""The readers of files and words from outside, under bad input: ``python -m tests.fuzz``."""
