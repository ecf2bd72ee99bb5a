"""Reads and writes weights: our safetensors files and the released .pth files. No code is ever unpickled."""

import json
import os
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from var_kernels.native.build import write_atomically

from .config import VARConfig, VQVAEConfig
from .transformer import VAR, scale_of_token
from .vqvae import VQVAE

_CONFIGS = {"VAR": VARConfig, "VQVAE": VQVAEConfig}


def save(path: str | os.PathLike, model: VAR | VQVAE, metadata: dict[str, str] | None = None,
         dtype: torch.dtype | None = None) -> None:
    """Write weights, configuration and `metadata` to one safetensors file, atomically.

    `dtype` (for example torch.float16) is the dtype of the floating-point weights in the file; None keeps theirs.
    Loading converts them to fp32.
    """
    state = {name: tensor.detach().cpu().to(dtype or tensor.dtype).contiguous()
             for name, tensor in model.state_dict().items()}
    header = {"model": type(model).__name__, "config": json.dumps(model.config.to_dict()), **(metadata or {})}
    write_atomically(path, lambda temporary: save_file(state, temporary, metadata=header))


def load_model(path: str | os.PathLike, backend: str = "auto") -> VAR | VQVAE:
    """The model in a file written by `save`, which also holds the configuration."""
    state, header = read_state(path)
    kind = header.get("model")
    if kind not in _CONFIGS:
        raise ValueError(f"{path}: expected a file written by var.save (metadata 'model'), got metadata {header}")
    config = _CONFIGS[kind].from_dict(json.loads(header["config"]))
    model = without_init(VAR if kind == "VAR" else VQVAE, config, backend)
    _load_strictly(model, state, path)
    return model


def load_weights(model: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Load a released .pth or a .safetensors file into a model of known configuration. All names must fit."""
    state, _ = read_state(path)
    _load_strictly(model, state, path)
    return model


def read_state(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """State dict and metadata of a .safetensors or .pth file. Pickles are read with weights_only=True."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
        except SafetensorError as error:
            raise ValueError(f"{path}: expected a safetensors file, got {error}") from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: expected a state dict of tensors only; refused to unpickle it ({error})") from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path}: expected a PyTorch checkpoint, got a broken file ({error})") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: expected a state dict of tensors, got {type(state).__name__}")
    return state, {}


def file_metadata(path: Path) -> dict[str, str]:
    """Metadata in the header of a .safetensors file. Empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file, got {error}") from error


def _load_strictly(model: nn.Module, state: dict[str, Tensor], path: str | os.PathLike) -> None:
    """Load every parameter exactly once, in its shape. The ValueError lists all names that do not fit."""
    try:
        model.load_state_dict({name: value.float() if value.is_floating_point() else value
                               for name, value in state.items()}, strict=True, assign=_is_meta(model))
    except RuntimeError as error:
        raise ValueError(f"{path}: {error}") from error
    if _is_meta(model):
        raise ValueError(f"{path}: left parameters without values")
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def _is_meta(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


def without_init(kind: type, config, backend: str) -> nn.Module:
    """A model whose parameters are loaded next. It is built on the meta device, which computes no random values."""
    with torch.device("meta"):
        return kind(config, backend)


def official_state_dict(model: VAR | VQVAE) -> dict[str, Tensor]:
    """The state dict with the derived buffers that the official implementation expects, so that it loads there too."""
    state = dict(model.state_dict())
    schedule = model.config.schedule
    if isinstance(model, VQVAE):
        weight = model.quantize.embedding.weight
        state["quantize.ema_vocab_hit_SV"] = weight.new_zeros(schedule.num_scales, model.config.vocab_size)
        return state
    levels = scale_of_token(schedule)[None].to(model.pos_1LC.device)
    state["lvl_1L"] = levels
    visible = levels[:, :, None] >= levels[:, None, :]
    bias = model.pos_1LC.new_zeros(1, 1, schedule.length, schedule.length)
    state["attn_bias_for_masking"] = bias.masked_fill(~visible[:, None], -torch.inf)
    for i, block in enumerate(model.blocks):
        state[f"blocks.{i}.attn.zero_k_bias"] = torch.zeros_like(block.attn.q_bias)
    return state
