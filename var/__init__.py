"""A thin VAR: multi-scale VQ-VAE and next-scale transformer on the ops of var_kernels."""

from .generation import memory
from .generation.editing import edit
from .generation.generator import Generator, generate
from .generation.memory import keep_freed_memory
from .generation.prepared import release
from .generation.request import Generated
from .model import checkpoints
from .model.checkpoints import official_state_dict, save
from .model.config import PRESETS, ScaleSchedule, VARConfig, VQVAEConfig
from .model.opening import Pipeline, load
from .model.transformer import VAR
from .model.vqvae import VQVAE

# The module of the networks does not import generation. So the method `VAR.generate` is set here: it is the function
# `generate`, whose first argument is the transformer.
VAR.generate = generate

__all__ = [
    "PRESETS", "VAR", "VQVAE", "Generated", "Generator", "Pipeline", "ScaleSchedule", "VARConfig", "VQVAEConfig",
    "checkpoints", "edit", "generate", "keep_freed_memory", "load", "memory", "official_state_dict", "release", "save",
]
