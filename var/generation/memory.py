"""How much memory a generation takes and how much is free, so that a batch that does not fit is refused in advance."""

from __future__ import annotations

import ctypes
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..model.config import VARConfig, VQVAEConfig

if TYPE_CHECKING:
    import torch

_CGROUP = Path("/sys/fs/cgroup")
DECODER_ACTIVATIONS = 3  # activations that are alive at the same time: input, branch, result of a convolution
# Images are decoded in groups whose widest activation takes at most this many bytes (one image may take more). Larger
# groups would not stay in a common last-level cache (32 MiB).
_DECODE_BYTES = 24 << 20


def keep_freed_memory() -> bool:
    """Make glibc's malloc keep the memory that this process frees. Returns whether malloc accepts the setting.

    By default malloc returns a block of more than 32 MiB to the system as soon as it is freed, and the next activation
    of that size is fetched again page by page. The setting is for the whole process, so only a program should choose
    it: `python -m var` calls this function, and a program that uses the library may call it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    m_trim_threshold, m_mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    return bool(mallopt(m_mmap_max, 0) and mallopt(m_trim_threshold, 2**31 - 1))


def available_bytes(device: str | torch.device = "cpu") -> int | None:
    """Bytes that a program may still allocate on this device. None if unknown."""
    if str(device).startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(device)[0]
    try:
        free = next(int(line.split()[1]) << 10 for line in Path("/proc/meminfo").read_text().splitlines()
                    if line.startswith("MemAvailable:"))  # fmt: skip
    except (OSError, StopIteration, ValueError):
        try:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError, AttributeError):
            return None
    limit = _cgroup_room()
    return free if limit is None else min(free, limit)


def _cgroup_room() -> int | None:
    """Bytes that the limit of a container (cgroup) leaves. None if there is no limit."""
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return None if limit == "max" else max(0, int(limit) - int(used))
    except (OSError, ValueError):
        return None


def widest_activation(vqvae: VQVAEConfig) -> int:
    """Number of elements of the decoder's widest activation, for one image."""
    widths, side = [vqvae.ch * mult for mult in vqvae.ch_mult], vqvae.image_size
    # A level of the decoder begins with as many channels as the next coarser level has.
    return max(max(widths[i : i + 2]) * (side >> i) ** 2 for i in range(len(widths)))


def decoded_at_a_time(vqvae: VQVAEConfig, itemsize: int) -> int:
    """How many images the decoder takes at a time. Groups keep its memory from growing with the batch."""
    return max(1, _DECODE_BYTES // (widest_activation(vqvae) * itemsize))


def cache_shape(var: VARConfig, rows: int) -> tuple[int, int, int, int]:
    """Shape (rows, H, L, D) of the keys, and of the values, of one layer in the KV cache."""
    return rows, var.heads, var.schedule.length, var.head_dim


def cache_bytes(var: VARConfig, rows: int, itemsize: int) -> int:
    """Bytes of the KV cache of `rows` sequences: keys and values of all layers."""
    return 2 * var.depth * math.prod(cache_shape(var, rows)) * itemsize


def fixed_bytes(
    var: VARConfig, vqvae: VQVAEConfig, precision_bytes: int, device: str | torch.device = "cpu", backend: str = "auto"
) -> int:
    """Bytes of the weights that a `Generator` of this backend holds in addition to the model, for any batch size."""
    if backend == "reference" and precision_bytes == 4:
        return 0  # the reference uses the model's own weights

    import torch

    from var_kernels import backends
    from var_kernels.inference.winograd_conv import prepared_bytes

    from ..model.vqvae import Decoder, Upsample

    width = var.width
    modulation = 6 * width * width * (1 if var.shared_aln else var.depth)
    per_block = (4 + 2 * var.mlp_ratio) * width * width
    # A projection that is not packed is the model's own weight if that has the same dtype, else a converted copy.
    linear, conv = (backends.for_op(op, backend) for op in ("packed_linear", "winograd_conv"))
    fp32_copied = backends.resolve("packed_linear", linear, torch.device(device).type, torch.float32) == "cpu"
    packed = 4 * width * var.vocab_size if fp32_copied else 0  # the head, which is fp32
    if precision_bytes != 4 or fp32_copied:
        packed += precision_bytes * (var.depth * per_block + modulation + 2 * width * width)
    with torch.device("meta"):
        post_quant_conv = torch.nn.Conv2d(vqvae.z_channels, vqvae.z_channels, 3)
        decoder = torch.nn.Sequential(post_quant_conv, Decoder(vqvae))
    doubling = {module.conv for module in decoder.modules() if isinstance(module, Upsample)}
    dtype = torch.float32 if precision_bytes == 4 else torch.bfloat16
    for module in decoder.modules():
        if not isinstance(module, torch.nn.Conv2d):
            continue
        if module.kernel_size == (3, 3):
            packed += prepared_bytes(module.out_channels, module.in_channels, dtype, module in doubling, device, conv)
        else:
            packed += module.weight.numel() * precision_bytes
    return int(packed)


def batch_bytes(var: VARConfig, vqvae: VQVAEConfig, batch: int, precision_bytes: int) -> int:
    """Bytes that a `Generator` takes for a batch: KV cache, activations of the largest scale and of the decoder.

    The activations of the largest scale are an upper bound: they are not all alive at the same time.
    """
    rows, width, longest = 2 * batch, var.width, max(var.schedule.lengths)
    cache = cache_bytes(var, rows, precision_bytes)
    block = rows * longest * width * (4 * 4 + precision_bytes * (3 + 1 + var.mlp_ratio))
    sampling = (rows + batch) * longest * var.vocab_size * 4  # logits, noise
    image = 3 * vqvae.image_size**2 * 4
    group = min(batch, decoded_at_a_time(vqvae, precision_bytes))
    decoder = DECODER_ACTIVATIONS * group * widest_activation(vqvae) * precision_bytes
    return int(cache + block + sampling + decoder + 2 * batch * image)


def check_batch(
    var: VARConfig, vqvae: VQVAEConfig, batch: int, precision_bytes: int, device: str | torch.device,
    backend: str = "auto",
) -> None:
    """Raise ValueError if this batch does not fit into memory. The message names the largest batch that does."""
    room = available_bytes(device)
    if room is None:
        return
    fixed = fixed_bytes(var, vqvae, precision_bytes, device, backend)
    needed = fixed + batch_bytes(var, vqvae, batch, precision_bytes)
    if needed <= room:
        return
    fits = batch
    while fits and fixed + batch_bytes(var, vqvae, fits, precision_bytes) > room:
        fits -= 1 if fits <= 64 else fits // 16
    advice = f"a batch of at most {fits}" if fits else "a smaller model, or precision bf16"
    raise ValueError(
        f"batch_size: expected {advice}: {batch} images at a time need {needed / 2**30:.1f} GiB beside the model, "
        f"and {room / 2**30:.1f} GiB are free"
    )
