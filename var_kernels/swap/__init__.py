"""Swaps our ops into models of other repositories, by one line, and out again.

    from var_kernels import swap
    report = swap.apply(model)
    print(report)
    report.revert()

Nothing of another repository is imported or needed. docs/swaps.md says what is swapped and what changes.
"""

from . import flash_attn
from .flash_attn import provide_flash_attn
from .handle import Report, Skipped, Swapped, applied, apply
from .infinity import fused_ada_layer_norm

__all__ = [
    "Report", "Skipped", "Swapped", "applied", "apply", "flash_attn", "fused_ada_layer_norm", "provide_flash_attn",
]  # fmt: skip
