"""Memory in huge pages: its contents, its lifetime, and for which part the system is asked for huge pages."""

import errno
import gc
import mmap

import pytest
import torch

from var_kernels.inference import huge_pages

HUGE = 2 << 20


@pytest.mark.parametrize("elements", [0, 1, HUGE // 4 - 1, HUGE // 4, HUGE + 5])
def test_zeros(elements):
    x = huge_pages.zeros(elements, dtype=torch.float32)
    assert x.shape == (elements,) and x.dtype == torch.float32 and not x.any()
    x += 1
    assert x.sum(dtype=torch.float64) == elements
    assert huge_pages.zeros(2, 3, dtype=torch.float32, device="meta").device.type == "meta"


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="programs cannot ask this system for huge pages")
def test_whole_huge_pages_are_asked_for(monkeypatch):
    asked = []

    class Recorded(mmap.mmap):
        def madvise(self, *arguments):
            asked.append(arguments)
            raise OSError(errno.EINVAL, "a kernel without huge pages")

    monkeypatch.setattr(mmap, "mmap", Recorded)
    x = huge_pages.zeros(3, HUGE // 4 + 1, dtype=torch.bfloat16)
    assert x.data_ptr() % HUGE == 0 and x.is_contiguous() and not x.any()
    ((option, start, size),) = asked
    assert option == mmap.MADV_HUGEPAGE and 0 <= start < HUGE and size == HUGE


def test_a_view_keeps_the_memory():
    part = huge_pages.zeros(4, HUGE, dtype=torch.float32)[2:]
    part.fill_(3)
    gc.collect()
    other = huge_pages.zeros(4, HUGE, dtype=torch.float32)
    other.fill_(5)
    assert (part == 3).all()
