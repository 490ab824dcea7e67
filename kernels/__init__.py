"""Operators of recurrent language models, each with several interchangeable backends."""

from kernels.dispatch import explain

__all__ = ["explain"]
