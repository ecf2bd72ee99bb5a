"""A hash that identifies the weights of a network."""

import hashlib

import torch
from torch import nn


def weights_hash(*modules: nn.Module) -> str:
    """First 16 hex digits of the SHA-256 of all parameters and buffers: names, shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
