"""A thin VAR: multi-scale VQ-VAE and next-scale transformer on the ops of var_kernels."""

from .generation.editing import edit
from .generation.generator import Generated, Generator, generate
from .model.checkpoints import Pipeline, load, save
from .model.config import PRESETS, ScaleSchedule, VARConfig, VQVAEConfig
from .model.transformer import VAR
from .model.vqvae import VQVAE

__all__ = [
    "PRESETS", "VAR", "VQVAE", "Generated", "Generator", "Pipeline", "ScaleSchedule", "VARConfig", "VQVAEConfig",
    "edit", "generate", "load", "save",
]
