"""The decoder prepared for inference: channels last, its weights packed once, its activations allocated once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from var_kernels import (
    PackedConv3x3,
    backends,
    group_norm_silu,
)
from var_kernels.inference import huge_pages

from ..model.modules import dtype_of, is_plain
from ..model.vqvae import VQVAE, AttnBlock, Decoder, Level, Middle, Norm, ResnetBlock, Upsample
from . import memory


class Spaces:
    """Memory for the activations of a decoder, allocated once. malloc would take new pages for every large activation.

    `memory.DECODER_ACTIVATIONS` = 3 spaces are enough: a block's input, which is also the residual, its branch, and the
    result of a convolution. The convolution that adds the residual writes its result over it.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._flat: list[Tensor] = []

    @property
    def nbytes(self) -> int:
        return sum(space.nbytes for space in self._flat)

    def reserve(self, elements: int) -> None:
        """Make each space at least as large. What lies in the spaces is lost if they grow."""
        if elements > 0 and (not self._flat or self._flat[0].numel() < elements):
            self._flat = []
            self._flat = [huge_pages.zeros(elements, dtype=self._dtype) for _ in range(memory.DECODER_ACTIVATIONS)]

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


class Conv3x3:
    """A 3×3 convolution with prepared weights. A call with a residual adds it and may write over it.

    Without a residual the result lies neither in the memory of x nor in that of a tensor in `kept`.
    """

    def __init__(self, prepared: PackedConv3x3, spaces: Spaces) -> None:
        self._prepared, self._spaces = prepared, spaces
        self.nbytes = prepared.nbytes

    def __call__(self, x: Tensor, residual: Tensor | None = None, kept: tuple[Tensor, ...] = ()) -> Tensor:
        if self._prepared.backend == "reference":
            return self._prepared(x, residual)
        if residual is not None:
            residual = residual.contiguous(memory_format=torch.channels_last)
            return self._prepared(x, residual, out=residual)
        return self._prepared(x, out=self._spaces.beside(self._prepared.shape_of(x), x, *kept))


class Conv1x1:
    """A 1×1 convolution with a converted copy of its weights."""

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype) -> None:
        self._weight = conv.weight.detach().to(dtype, memory_format=torch.channels_last, copy=True)
        self._bias = None if conv.bias is None else conv.bias.detach().to(dtype, copy=True)
        self.nbytes = self._weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self._weight, self._bias)


class CalledLayer:
    """A module of the model that is not what it was built as, see `is_plain`: it is called as it is.

    Its input and its result are copies, because hooks may keep them, and the layers around it work in place.
    """

    nbytes = 0

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self._module, self._dtype = module, dtype

    def __call__(self, x: Tensor, residual: Tensor | None = None, kept: tuple[Tensor, ...] = ()) -> Tensor:
        y = self._module(x.to(dtype_of(self._module), copy=True))
        y = y.to(self._dtype, memory_format=torch.channels_last, copy=True)
        return y if residual is None else y + residual

    def activated(self, x: Tensor, inplace: bool = False) -> Tensor:
        return F.silu(self(x))


class FusedNorm:
    """GroupNorm, and in `activated` SiLU after it, in one pass. Its parameters are fp32 for every dtype of x."""

    def __init__(self, norm: Norm, spaces: Spaces, backend: str) -> None:
        self._affine = norm.weight.detach().float().clone(), norm.bias.detach().float().clone()
        self._options = {"groups": norm.num_groups, "eps": norm.eps, "backend": backend}
        self._spaces = spaces

    def __call__(self, x: Tensor) -> Tensor:
        return group_norm_silu(x, *self._affine, silu=False, **self._options)

    def activated(self, x: Tensor, inplace: bool = False) -> Tensor:
        out = x if inplace else self._spaces.beside(x.shape, x)
        return group_norm_silu(x, *self._affine, out=out, **self._options)


class InPlaceResnetBlock:
    """A residual block that normalises its branch in place and whose second convolution adds the shortcut."""

    def __init__(self, block: ResnetBlock, prepare: Preparation) -> None:
        self._norm1, self._norm2 = prepare.norm(block.norm1), prepare.norm(block.norm2)
        self._conv1, self._conv2 = prepare.conv(block.conv1), prepare.conv(block.conv2)
        self._shortcut = prepare.conv(block.nin_shortcut)

    def __call__(self, x: Tensor) -> Tensor:
        h = self._norm2.activated(self._conv1(self._norm1.activated(x), kept=(x,)), inplace=True)
        return self._conv2(h, self._shortcut(x))


class Attention:
    """`AttnBlock.forward` with prepared layers, which have the names of the module's."""

    def __init__(self, block: AttnBlock, prepare: Preparation) -> None:
        self.norm = prepare.norm(block.norm)
        self.qkv, self.proj_out = prepare.conv(block.qkv), prepare.conv(block.proj_out)

    __call__ = AttnBlock.forward


class Preparation:
    """Turns the modules of a decoder into the functions that an `InferenceDecoder` calls."""

    def __init__(self, dtype: torch.dtype, conv_backend: str, norm_backend: str, spaces: Spaces) -> None:
        self._dtype, self._spaces = dtype, spaces
        self._conv_backend, self._norm_backend = conv_backend, norm_backend
        self.nbytes = 0  # of the weights

    def layers(self, module: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
        """The functions whose composition is `module`."""
        if is_plain(module, Level) or is_plain(module, Middle):
            for layer in module.layers():
                yield from self.layers(layer)
        elif is_plain(module, ResnetBlock):
            yield InPlaceResnetBlock(module, self)
        elif is_plain(module, AttnBlock):
            yield Attention(module, self)
        elif is_plain(module, Upsample) and _is_3x3(module.conv):
            yield self.conv(module.conv, doubling=True)
        else:
            yield self.conv(module)

    def conv(self, module: nn.Module, doubling: bool = False) -> Callable[..., Tensor]:
        if is_plain(module, nn.Identity):
            return module
        if _is_3x3(module):
            weight = PackedConv3x3(
                module.weight, module.bias, dtype=self._dtype, doubling=doubling, backend=self._conv_backend
            )
            prepared = Conv3x3(weight, self._spaces)
        elif _is_conv(module, size=1, padding=0):
            prepared = Conv1x1(module, self._dtype)
        else:
            prepared = CalledLayer(module, self._dtype)
        self.nbytes += prepared.nbytes
        return prepared

    def norm(self, module: nn.Module) -> FusedNorm | CalledLayer:
        if is_plain(module, Norm):
            return FusedNorm(module, self._spaces, self._norm_backend)
        return CalledLayer(module, self._dtype)


def _is_conv(module: nn.Module, size: int, padding: int) -> bool:
    return (
        is_plain(module, nn.Conv2d)
        and module.kernel_size == (size, size)
        and module.padding == (padding, padding)
        and (module.stride, module.dilation, module.groups, module.padding_mode) == ((1, 1), (1, 1), 1, "zeros")
    )


def _is_3x3(module: nn.Module) -> bool:
    return _is_conv(module, size=3, padding=1) and module.bias is not None


class InferenceDecoder:
    """The decoder of `vqvae` in `dtype`, channels last. It holds a copy of the weights as they are now.

    A call takes any number of images. The memory for the activations is allocated in the first call, and again only if
    more images come at a time. Calls from several threads (for example, one that displays partial images) wait for one
    another. `backend` serves every op; None means the backend of `vqvae`. With `pack=False` the reference computes the
    convolutions. A layer that is not what the model was built with is called as it is.
    """

    def __init__(
        self, vqvae: VQVAE, dtype: torch.dtype = torch.float32, *, backend: str | None = None, pack: bool = True
    ) -> None:
        backend = vqvae.backend if backend is None else backend
        conv_backend = backends.for_op("winograd_conv", backend) if pack else "reference"
        self.dtype = dtype
        self.group = memory.decoded_at_a_time(vqvae.config, dtype.itemsize)
        self.image_shape = (3, vqvae.config.image_size, vqvae.config.image_size)
        device = vqvae.quantize.embedding.weight.device
        in_our_kernels = backends.resolve("winograd_conv", conv_backend, device.type, dtype) == "cpu"
        self._elements = memory.widest_activation(vqvae.config) if in_our_kernels else 0  # of one image
        self._spaces = Spaces(dtype)
        self._lock = threading.Lock()
        prepare = Preparation(dtype, conv_backend, backends.for_op("group_norm_silu", backend), self._spaces)
        decoder = vqvae.decoder
        self._layers = [*prepare.layers(vqvae.post_quant_conv)]
        if is_plain(decoder, Decoder):
            for module in decoder.layers():
                self._layers += prepare.layers(module)
            self._layers += [prepare.norm(decoder.norm_out).activated, prepare.conv(decoder.conv_out)]
        else:
            self._layers.append(CalledLayer(decoder, dtype))
        self._weight_bytes = prepare.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of the copy of the weights, and of the activations."""
        return self._weight_bytes + self._spaces.nbytes

    def __call__(self, f_hat_BCHW: Tensor) -> Tensor:
        """Images (B, 3, H, W), fp32 in [−1, 1]."""
        images = f_hat_BCHW.new_empty(len(f_hat_BCHW), *self.image_shape, dtype=torch.float32)
        with self._lock:
            self._spaces.reserve(self._elements * min(len(f_hat_BCHW), self.group))
            for f_hat, out in zip(f_hat_BCHW.split(self.group), images.split(self.group), strict=True):
                x = f_hat.to(dtype=self.dtype, memory_format=torch.channels_last)
                for layer in self._layers:
                    x = layer(x)
                out.copy_(x).clamp_(-1, 1)
        return images
