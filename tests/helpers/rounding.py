"""Judging results of a swapped model by those of plain PyTorch and by exact ones."""

import torch


def assert_as_near(found, plain, exact, unit=2.0**-24):
    """The output and every gradient are as near to the exact ones as those of plain PyTorch, up to a factor of 3.

    Each argument is a pair (output, gradients by name). A gradient of few elements, or one that sums to nearly 0, may
    be wrong by a rounding of all gradients together.
    """
    whole = torch.cat([grad.flatten() for grad in exact[1].values()]).norm()
    assert found[1].keys() == exact[1].keys()
    pairs = [(found[0], plain[0], exact[0], exact[0].norm())]
    pairs += [(found[1][name], plain[1][name], grad, whole) for name, grad in exact[1].items()]
    for ours, theirs, right, norm in pairs:
        assert (ours - right).norm() <= 3 * (theirs - right).norm() + unit * norm
