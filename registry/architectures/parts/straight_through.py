"""A value with the gradient of another (straight-through estimator, Bengio et al. 2013, arXiv 1308.3432)."""

from torch import Tensor


def straight_through(value: Tensor, gradient_of: Tensor) -> Tensor:
    """`value` to the bit, with the gradient of `gradient_of`, of the same shape."""
    # gradient_of + (value - gradient_of).detach() would be rounded.
    return value.detach() + (gradient_of - gradient_of.detach())
