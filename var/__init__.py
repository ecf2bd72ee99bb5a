"""A thin VAR: multi-scale VQ-VAE and next-scale transformer on the ops of var_kernels."""

from .generation import memory
from .generation.editing import edit
from .generation.generator import Generator, generate
from .generation.memory import keep_freed_memory
from .generation.request import Generated
from .model import checkpoints
from .model.checkpoints import official_state_dict, save
from .model.config import PRESETS, ScaleSchedule, VARConfig, VQVAEConfig
from .model.opening import Pipeline, load
from .model.transformer import VAR
from .model.vqvae import VQVAE

# The networks know nothing of generation, so the method is the function itself, which takes the transformer first.
VAR.generate = generate

__all__ = [
    "PRESETS", "VAR", "VQVAE", "Generated", "Generator", "Pipeline", "ScaleSchedule", "VARConfig", "VQVAEConfig",
    "checkpoints", "edit", "generate", "keep_freed_memory", "load", "memory", "official_state_dict", "save",
]
