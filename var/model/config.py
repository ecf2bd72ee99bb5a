"""Configurations of the two networks: frozen dataclasses with the presets of the released models."""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PATCH_NUMS_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
PATCH_NUMS_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)


def _require(condition: bool, argument: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{argument}: expected {expected}, got {got}")


@dataclass(frozen=True)
class ScaleSchedule:
    """The sides of the K square token maps, coarse to fine. They define the scales of a model."""

    patch_nums: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_nums", tuple(int(side) for side in self.patch_nums))
        _require(
            len(self.patch_nums) > 0 and all(side > 0 for side in self.patch_nums),
            "patch_nums", "at least one positive side", self.patch_nums,
        )

    @property
    def num_scales(self) -> int:
        """K, the number of scales."""
        return len(self.patch_nums)

    @property
    def side(self) -> int:
        """Side of the last map, which is also the side of the latent feature map."""
        return self.patch_nums[-1]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Number of tokens of each scale: the `scale_lens` of block-causal attention."""
        return tuple(side * side for side in self.patch_nums)

    @property
    def starts(self) -> tuple[int, ...]:
        """Index of the first token of every scale."""
        return tuple(itertools.accumulate(self.lengths, initial=0))[:-1]

    @property
    def length(self) -> int:
        """L, the number of tokens of an image."""
        return sum(self.lengths)


class _Serializable:
    """Converts a configuration to a dictionary and back, for the metadata of checkpoints."""

    def to_dict(self) -> dict[str, Any]:
        """All fields, as values that JSON can hold."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]):
        """Inverse of `to_dict`. Missing names keep their defaults; unknown names raise a ValueError that lists them."""
        names = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(values) - names)
        _require(not unknown, cls.__name__, f"fields among {sorted(names)}", unknown)
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


@dataclass(frozen=True)
class VQVAEConfig(_Serializable):
    """Configuration of the multi-scale residual VQ-VAE. The defaults are the released tokenizer `vae_ch160v4096z32`.

    The side of an image is `2**(len(ch_mult) - 1)` times the last patch number.
    """

    vocab_size: int = 4096
    z_channels: int = 32
    ch: int = 160
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    patch_nums: tuple[int, ...] = PATCH_NUMS_256
    num_res_blocks: int = 2
    num_phi: int = 4  # number of φ convolutions, which the scales share
    phi_ratio: float = 0.5
    beta: float = 0.25  # weight of the commitment loss
    using_znorm: bool = False  # find the nearest code by cosine instead of squared distance

    def __post_init__(self) -> None:
        for name in ("vocab_size", "z_channels", "num_res_blocks", "num_phi"):
            _require(getattr(self, name) > 0, name, "a positive integer", getattr(self, name))
        _require(self.ch > 0 and self.ch % 32 == 0, "ch", "a positive multiple of 32, the groups of GroupNorm", self.ch)
        _require(len(self.ch_mult) > 0 and min(self.ch_mult) > 0, "ch_mult", "positive integers", self.ch_mult)
        _ = self.schedule

    @property
    def schedule(self) -> ScaleSchedule:
        """The token maps."""
        return ScaleSchedule(self.patch_nums)

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return self.schedule.side * 2 ** (len(self.ch_mult) - 1)


@dataclass(frozen=True)
class VARConfig(_Serializable):
    """Configuration of the next-scale transformer. By default width is 64·depth and heads is width / 64."""

    depth: int = 16
    num_classes: int = 1000
    patch_nums: tuple[int, ...] = PATCH_NUMS_256
    vocab_size: int = 4096
    z_channels: int = 32
    shared_aln: bool = False
    attn_l2_norm: bool = True
    width: int | None = None
    heads: int | None = None
    mlp_ratio: float = 4.0
    class_names: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        object.__setattr__(self, "width", 64 * self.depth if self.width is None else self.width)
        object.__setattr__(self, "heads", self.width // 64 if self.heads is None else self.heads)
        for name in ("depth", "num_classes", "vocab_size", "z_channels", "width", "heads"):
            _require(getattr(self, name) > 0, name, "a positive integer", getattr(self, name))
        _require(self.width % self.heads == 0, "heads", f"a divisor of the width {self.width}", self.heads)
        _require(
            len(self.class_names) in (0, self.num_classes),
            "class_names", f"none or {self.num_classes} names", len(self.class_names),
        )
        _ = self.schedule

    @property
    def schedule(self) -> ScaleSchedule:
        """The token maps."""
        return ScaleSchedule(self.patch_nums)

    @property
    def head_dim(self) -> int:
        """Channels per attention head."""
        return self.width // self.heads

    @property
    def softmax_scale(self) -> float:
        """1 if q and k are L2-normalised: a learned factor per head replaces it. Else 0.25/sqrt(D), as released."""
        return 1.0 if self.attn_l2_norm else 0.25 / math.sqrt(self.head_dim)


PRESETS: dict[str, tuple[VQVAEConfig, VARConfig]] = {
    **{f"d{depth}": (VQVAEConfig(), VARConfig(depth=depth)) for depth in (16, 20, 24, 30)},
    "d36": (
        VQVAEConfig(patch_nums=PATCH_NUMS_512),
        VARConfig(depth=36, patch_nums=PATCH_NUMS_512, shared_aln=True),
    ),
}
