"""The decoder prepared for inference: channels last, its weights and activations allocated once, without gradients."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import torch
from torch import Tensor, nn

from var_kernels import (
    PackedConv3x3,
    backends,
    group_norm_silu,
)
from var_kernels.inference import huge_pages

from ..model.vqvae import VQVAE, Norm, ResnetBlock, Upsample
from . import memory


class Spaces:
    """Memory for the activations of a decoder, allocated once. malloc would take new pages for every large activation.

    `memory.DECODER_ACTIVATIONS` = 3 spaces are enough: a block's input, which is also the residual, its branch, and the
    result of a convolution. The convolution that adds the residual writes its result over it.
    """

    def __init__(self, elements: int, dtype: torch.dtype) -> None:
        self._flat = [huge_pages.zeros(elements, dtype=dtype) for _ in range(memory.DECODER_ACTIVATIONS)]

    @property
    def nbytes(self) -> int:
        return sum(space.nbytes for space in self._flat)

    def beside(self, shape: torch.Size, *used: Tensor) -> Tensor | None:
        """A tensor (B, C, H, W), channels last, in a space that holds none of the tensors `used`.

        None if every space is in use or the tensor is larger than a space.
        """
        batch, channels, height, width = shape
        taken = {tensor.data_ptr() for tensor in used}
        space = next((space for space in self._flat if space.data_ptr() not in taken), None)
        if space is None or shape.numel() > space.numel():
            return None
        return space[: shape.numel()].view(batch, height, width, channels).permute(0, 3, 1, 2)


class Conv3x3(nn.Module):
    """A 3×3 convolution with prepared weights. `forward(x, residual)` adds the residual and may write over it.

    Without a residual the result lies neither in the memory of x nor in that of a tensor in `kept`.
    """

    def __init__(self, prepared: PackedConv3x3, spaces: Spaces) -> None:
        super().__init__()
        self.prepared, self._spaces = prepared, spaces

    def forward(self, x: Tensor, residual: Tensor | None = None, kept: tuple[Tensor, ...] = ()) -> Tensor:
        if self.prepared.backend == "reference":
            return self.prepared(x, residual)
        if residual is not None:
            residual = residual.contiguous(memory_format=torch.channels_last)
            return self.prepared(x, residual, out=residual)
        return self.prepared(x, out=self._spaces.beside(self.prepared.shape_of(x), x, *kept))


class FusedNorm(nn.Module):
    """GroupNorm followed by SiLU, in one pass. Its parameters are fp32 for every dtype of the decoder."""

    def __init__(self, norm: Norm, spaces: Spaces, backend: str) -> None:
        super().__init__()
        # Not parameters of this module, so that `.to` leaves them fp32.
        self._affine = norm.weight.detach().float(), norm.bias.detach().float()
        self._options = {"groups": norm.num_groups, "eps": norm.eps, "backend": backend}
        self._spaces = spaces

    def forward(self, x: Tensor) -> Tensor:
        return group_norm_silu(x, *self._affine, silu=False, **self._options)

    def activated(self, x: Tensor, inplace: bool = False) -> Tensor:
        out = x if inplace else self._spaces.beside(x.shape, x)
        return group_norm_silu(x, *self._affine, out=out, **self._options)


class InPlaceResnetBlock(nn.Module):
    """A residual block that normalises its branch in place and whose second convolution adds the shortcut."""

    def __init__(self, block: ResnetBlock) -> None:
        super().__init__()
        self.norm1, self.norm2 = block.norm1, block.norm2
        self.conv1, self.conv2, self.nin_shortcut = block.conv1, block.conv2, block.nin_shortcut

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm2.activated(self.conv1(self.norm1.activated(x), kept=(x,)), inplace=True)
        return self.conv2(h, self.nin_shortcut(x))


def _replace(module: nn.Module, replacements: dict[type, Callable[[nn.Module], nn.Module]]) -> None:
    """Replace every submodule of one of these types by the prepared module made from it, then do so inside of it."""
    for name, child in module.named_children():
        if type(child) in replacements:
            child = replacements[type(child)](child)
            setattr(module, name, child)
        _replace(child, replacements)


class InferenceDecoder:
    """The decoder of `vqvae` in `dtype`, channels last. It holds a copy of the weights as they are now.

    A call takes any number of images. The memory for up to `batch_size` images at a time is allocated here, once.
    Calls from several threads (for example, one that displays partial images) wait for one another. `backend` serves
    every op; None means the backend of `vqvae`. With `pack=False` the reference computes the convolutions.
    """

    def __init__(
        self, vqvae: VQVAE, dtype: torch.dtype = torch.float32, *, batch_size: int = 1, backend: str | None = None,
        pack: bool = True,
    ) -> None:  # fmt: skip
        backend = vqvae.backend if backend is None else backend
        conv_backend = backends.for_op("winograd_conv", backend) if pack else "reference"
        norm_backend = backends.for_op("group_norm_silu", backend)
        self.dtype = dtype
        self.group = memory.decoded_at_a_time(vqvae.config, dtype.itemsize)
        self.image_shape = (3, vqvae.config.image_size, vqvae.config.image_size)
        device = vqvae.decoder.conv_in.weight.device
        in_our_kernels = backends.resolve("winograd_conv", conv_backend, device.type, dtype) == "cpu"
        elements = memory.widest_activation(vqvae.config) * min(batch_size, self.group) if in_our_kernels else 0
        self._spaces = Spaces(elements, dtype)
        self._lock = threading.Lock()

        def prepared(conv: nn.Conv2d, doubling: bool = False) -> nn.Module:
            if conv.kernel_size != (3, 3):
                return conv
            packed = PackedConv3x3(conv.weight, conv.bias, dtype=dtype, doubling=doubling, backend=conv_backend)
            return Conv3x3(packed, self._spaces)

        decoder = copy.deepcopy(nn.Sequential(vqvae.post_quant_conv, vqvae.decoder)).requires_grad_(False)
        _replace(
            decoder,
            {
                Upsample: lambda upsample: prepared(upsample.conv, doubling=True), nn.Conv2d: prepared,
                ResnetBlock: InPlaceResnetBlock, Norm: lambda norm: FusedNorm(norm, self._spaces, norm_backend),
            },
        )  # fmt: skip
        self._decoder = decoder.to(dtype=dtype, memory_format=torch.channels_last)

    @property
    def nbytes(self) -> int:
        """Bytes of the copy of the weights, and of the activations."""
        convs = [module.prepared for module in self._decoder.modules() if isinstance(module, Conv3x3)]
        return sum(held.nbytes for held in (*self._decoder.parameters(), *convs, self._spaces))

    def __call__(self, f_hat_BCHW: Tensor) -> Tensor:
        """Images (B, 3, H, W), fp32 in [−1, 1]."""
        images = f_hat_BCHW.new_empty(len(f_hat_BCHW), *self.image_shape)
        with self._lock:
            for f_hat, out in zip(f_hat_BCHW.split(self.group), images.split(self.group), strict=True):
                x = f_hat.to(dtype=self.dtype, memory_format=torch.channels_last)
                out.copy_(self._decoder(x)).clamp_(-1, 1)
        return images
