"""The multi-scale residual VQ-VAE of VAR: image ↔ K token maps. Parameters have the names of the released files."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from var_kernels import multi_scale_quantize, next_scale_input

from .config import VQVAEConfig


class VQVAEOutput(NamedTuple):
    """Result of the forward pass for training."""

    reconstruction: Tensor  # (B, 3, H, W), not clamped
    vq_loss: Tensor  # scalar: β·commitment + codebook loss, mean over scales
    tokens: Tensor  # (B, L) int64


class Norm(nn.GroupNorm):
    """GroupNorm over 32 groups."""

    def __init__(self, channels: int) -> None:
        super().__init__(32, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """x + conv(SiLU(norm(conv(SiLU(norm(x))))))."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = Norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = Norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x_BCHW)))
        return self.nin_shortcut(x_BCHW) + self.conv2(F.silu(self.norm2(h)))


class AttnBlock(nn.Module):
    """Single-head self-attention over the pixels of a small map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = Norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        # The one head has all channels of the map, up to 640: too many for our attention kernel. This is no hot spot.
        q, k, v = self.qkv(self.norm(x_BCHW)).flatten(2).transpose(1, 2).chunk(3, dim=-1)
        h_BLC = F.scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous())
        return x_BCHW + self.proj_out(h_BLC.transpose(1, 2).reshape(x_BCHW.shape))


class Downsample(nn.Module):
    """Halves the side by a strided convolution, which is padded at the right and at the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the side by nearest neighbour, then applies a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Level(nn.Module):
    """One resolution of the encoder or decoder: residual blocks, attention (at the coarsest one), then resampling."""

    def __init__(self, in_channels: int, channels: int, blocks: int, attention: bool, **resample: nn.Module) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(in_channels if i == 0 else channels, channels) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(channels) for _ in range(blocks if attention else 0))
        for name, module in resample.items():
            self.add_module(name, module)
        self.resample = tuple(resample)

    def layers(self) -> list[nn.Module]:
        """The modules in the order of their application."""
        attention = [(attn,) for attn in self.attn] or [()] * len(self.block)
        blocks = [layer for pair in zip(self.block, attention, strict=True) for layer in (pair[0], *pair[1])]
        return blocks + [getattr(self, name) for name in self.resample]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers():
            x = layer(x)
        return x


class Middle(nn.Module):
    """A residual block, attention and another residual block at the latent resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def layers(self) -> list[nn.Module]:
        """The modules in the order of their application."""
        return [self.block_1, self.attn_1, self.block_2]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers():
            x = layer(x)
        return x


class Encoder(nn.Module):
    """Turns images (B, 3, H, W) into features (B, z_channels, H/f, W/f)."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        widths = [config.ch * mult for mult in config.ch_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, config.ch, 3, padding=1)
        self.down = nn.ModuleList(
            Level(
                config.ch if i == 0 else widths[i - 1], width, config.num_res_blocks, i == last,
                **({} if i == last else {"downsample": Downsample(width)}),
            )
            for i, width in enumerate(widths)
        )
        self.mid = Middle(widths[-1])
        self.norm_out = Norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Turns features (B, z_channels, h, w) into images (B, 3, H, W), not clamped."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        widths = [config.ch * mult for mult in config.ch_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList(
            Level(
                widths[min(i + 1, last)], width, config.num_res_blocks + 1, i == last,
                **({} if i == 0 else {"upsample": Upsample(width)}),
            )
            for i, width in enumerate(widths)
        )
        self.norm_out = Norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def layers(self) -> list[nn.Module]:
        """The modules in the order of their application, up to the last norm."""
        return [self.conv_in, self.mid, *reversed(self.up)]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers():
            x = layer(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class QuantResi(nn.Module):
    """Holds the φ convolutions, which the kernels of the quantizer apply."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.qresi_ls = nn.ModuleList(
            nn.Conv2d(config.z_channels, config.z_channels, 3, padding=1) for _ in range(config.num_phi)
        )


class Quantizer(nn.Module):
    """The codebook and the φ convolutions. It quantizes features, and it adds the codes of a scale to features."""

    def __init__(self, config: VQVAEConfig, backend: str) -> None:
        super().__init__()
        self.config = config
        self.backend = backend
        self.embedding = nn.Embedding(config.vocab_size, config.z_channels)
        self.quant_resi = QuantResi(config)

    def phi(self) -> tuple[Tensor, Tensor]:
        """Weights (Φ, C, C, 3, 3) and biases (Φ, C) of the φ convolutions."""
        convs = self.quant_resi.qresi_ls
        return torch.stack([conv.weight for conv in convs]), torch.stack([conv.bias for conv in convs])

    def forward(self, f_BCHW: Tensor, backend: str | None = None):
        """Multi-scale residual quantization: tokens, straight-through features and loss.

        `backend` None means the backend of this module.
        """
        config = self.config
        weight, bias = self.phi()
        return multi_scale_quantize(
            f_BCHW, self.embedding.weight, weight, bias, config.patch_nums, phi_ratio=config.phi_ratio,
            metric="cosine" if config.using_znorm else "l2", beta=config.beta, backend=backend or self.backend,
        )

    @torch.no_grad()
    def accumulate(
        self, f_hat_BCHW: Tensor, codes_BLC: Tensor, k: int, backend: str | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """f_hat with the codes of scale k added, and that pooled to the next map, (B, l_{k+1}, C): None at the last."""
        weight, bias = self.phi()
        return next_scale_input(
            f_hat_BCHW, codes_BLC, weight, bias, self.config.patch_nums, k,
            phi_ratio=self.config.phi_ratio, backend=backend or self.backend,
        )

    def empty_features(self, batch: int) -> Tensor:
        """The features f_hat before the first scale: zeros."""
        side = self.config.schedule.side
        return self.embedding.weight.new_zeros(batch, self.config.z_channels, side, side)


class VQVAE(nn.Module):
    """Multi-scale residual VQ-VAE (arXiv 2404.02905, algorithms 1 and 2).

    Images are (B, 3, H, W) in [−1, 1] with H = W = config.image_size. Tokens are (B, L) int64: the scales concatenated
    from coarse to fine, row-major within a scale. `backend` is passed to every op of var_kernels.
    """

    def __init__(self, config: VQVAEConfig, backend: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Quantizer(config, backend)
        self.quant_conv = nn.Conv2d(config.z_channels, config.z_channels, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(config.z_channels, config.z_channels, 3, padding=1)
        self.register_load_state_dict_pre_hook(_drop_usage_buffer)

    @property
    def backend(self) -> str:
        """The backend of the quantizer: only the quantizer calls ops of var_kernels."""
        return self.quantize.backend

    def forward(self, images: Tensor) -> VQVAEOutput:
        """Forward pass for training: reconstruction (not clamped), loss of the quantizer, and tokens."""
        quantized = self.quantize(self.features(images))
        return VQVAEOutput(self._decode(quantized.f_hat), quantized.vq_loss, quantized.tokens)

    def features(self, images: Tensor) -> Tensor:
        """The continuous features (B, z_channels, h, w) of images, before quantization."""
        size = self.config.image_size
        if images.dim() != 4 or tuple(images.shape[1:]) != (3, size, size):
            raise ValueError(f"images: expected shape (B, 3, {size}, {size}), got {tuple(images.shape)}")
        return self.quant_conv(self.encoder(images))

    @torch.no_grad()
    def encode(self, images: Tensor, backend: str | None = None) -> Tensor:
        """Tokens (B, L) of the images. `backend` None means the backend of the model."""
        return self.quantize(self.features(images), backend).tokens

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Images in [−1, 1], decoded from the tokens of all scales."""
        *_, (f_hat, _) = self._scales(tokens)
        return self.decode_features(f_hat)

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Images after the way through the tokenizer and back: decode(encode(images))."""
        return self.decode_features(self.quantize(self.features(images)).f_hat)

    @torch.no_grad()
    def decode_scales(self, tokens: Tensor) -> list[Tensor]:
        """K batches of images: the image decoded after each scale, coarse to fine."""
        return [self.decode_features(f_hat) for f_hat, _ in self._scales(tokens)]

    @torch.no_grad()
    def teacher_forcing_input(self, tokens: Tensor) -> Tensor:
        """(B, L − l_1, z_channels): for every scale after the first, the sum of all earlier scales, pooled to it."""
        maps = [following for _, following in self._scales(tokens) if following is not None]
        if not maps:
            return self.quantize.embedding.weight.new_zeros(len(tokens), 0, self.config.z_channels)
        return torch.cat(maps, dim=1)

    @torch.no_grad()
    def decode_features(self, f_hat_BCHW: Tensor) -> Tensor:
        """Images in [−1, 1], decoded from accumulated features."""
        return self._decode(f_hat_BCHW).clamp_(-1, 1)

    def _decode(self, f_hat_BCHW: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(f_hat_BCHW))

    def _scales(self, tokens: Tensor):
        """Yield (f_hat after scale k, pooled input of scale k+1 or None) for every scale."""
        config = self.config
        length = config.schedule.length
        if tokens.dim() != 2 or tokens.shape[1] != length:
            raise ValueError(f"tokens: expected shape (B, {length}), got {tuple(tokens.shape)}")
        if tokens.numel() and not (0 <= int(tokens.min()) and int(tokens.max()) < config.vocab_size):
            raise ValueError(
                f"tokens: expected values in [0, {config.vocab_size}), got [{int(tokens.min())}, {int(tokens.max())}]"
            )
        f_hat = self.quantize.empty_features(len(tokens))
        for k, scale_tokens in enumerate(tokens.split(config.schedule.lengths, dim=1)):
            f_hat, following = self.quantize.accumulate(f_hat, self.quantize.embedding(scale_tokens), k)
            yield f_hat, following


def _drop_usage_buffer(module: VQVAE, state_dict: dict, prefix: str, *_: object) -> None:
    """Remove the usage statistics of training, which released files carry, after checking their shape."""
    name = f"{prefix}quantize.ema_vocab_hit_SV"
    buffer = state_dict.pop(name, None)
    expected = (module.config.schedule.num_scales, module.config.vocab_size)
    if buffer is not None and tuple(buffer.shape) != expected:
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(buffer.shape)}")
