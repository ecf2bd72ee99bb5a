"""Small data sets, and options with which a training takes a second, for the tests of data and training."""

import gzip
import struct
from pathlib import Path

import numpy as np
from PIL import Image

from var.model.config import VARConfig, VQVAEConfig
from var.training.tokenizer import TokenizerTraining
from var.training.transformer import TransformerTraining

PATCH_NUMS = (1, 2, 8)
VQVAE_CONFIG = VQVAEConfig(
    vocab_size=24, z_channels=8, ch=32, ch_mult=(1, 1, 1), patch_nums=PATCH_NUMS, num_res_blocks=1
)
VAR_CONFIG = VARConfig(
    depth=2, width=32, heads=2, num_classes=10, vocab_size=24, z_channels=8, patch_nums=PATCH_NUMS
)


def idx_bytes(array: np.ndarray) -> bytes:
    """`array` (uint8) in IDX format."""
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes((0, 0, 8, array.ndim)) + sizes + array.astype(np.uint8).tobytes()


def write_fashion_mnist(directory: Path, train: int = 40, test: int = 12, compressed: bool = True) -> None:
    """Writes IDX files in the layout of Fashion-MNIST. The images are bars, placed by class, with noise."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for prefix, count in (("train", train), ("t10k", test)):
        labels = np.arange(count) % 10
        pixels = rng.integers(0, 60, (count, 28, 28))
        for row, label in enumerate(labels):
            pixels[row, 2 * label : 2 * label + 6, 4:24] += 150
        for kind, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            data = idx_bytes(array)
            path = directory / f"{prefix}-{kind}-ubyte{'.gz' if compressed else ''}"
            path.write_bytes(gzip.compress(data) if compressed else data)


def write_image_folder(root: Path, classes: dict[str, int], size: tuple[int, int] = (20, 16)) -> None:
    """Writes root/<class>/<number>.png with random pixels; `size` is (width, height)."""
    rng = np.random.default_rng(0)
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")


# The loops are tested on the reference ops, so that a fault here is a fault of the loops.
_COMMON = {
    "max_steps": 8, "batch_size": 4, "lr": 2e-3, "warmup_steps": 2, "log_every": 1, "val_images": 4, "val_every": 4,
    "checkpoint_minutes": 1e9, "backend": "reference",
}  # fmt: skip


def tokenizer_options(output: Path, data: Path, **changes) -> TokenizerTraining:
    options = {"model": VQVAE_CONFIG, "restart_every": 2, "init_images": 8, **_COMMON, **changes}
    return TokenizerTraining(output=output, data=data, **options)


def transformer_options(output: Path, data: Path, tokenizer: Path, **changes) -> TransformerTraining:
    options = {"model": VAR_CONFIG, **_COMMON, **changes}
    return TransformerTraining(output=output, data=data, tokenizer=tokenizer, **options)
