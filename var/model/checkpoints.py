"""Reads and writes weights: our safetensors files and the released .pth files. No code is ever unpickled."""

import json
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from var_kernels.native.build import write_atomically

from . import state_dicts
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
    contents, header = read_state(path)
    kind = header.get("model")
    if kind not in _CONFIGS:
        raise ValueError(f"{path}: expected a file written by var.save (metadata 'model'), got metadata {header}")
    try:
        config = _CONFIGS[kind].from_dict(json.loads(header["config"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        expected = f"the configuration of a {kind} in its metadata"
        raise ValueError(f"{path}: expected {expected}, got {header.get('config')} ({error})") from error
    model = without_init(VAR if kind == "VAR" else VQVAE, config, backend)
    _load_strictly(model, contents, path)
    return model


def load_weights(model: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Load a .pth or a .safetensors file into a model of known configuration. All names must fit.

    The file holds the state dict as released, or the checkpoint of a training: the part of it is loaded that fits the
    model, at any depth and below any prefix (`trainer.var_wo_ddp`, `state_dict`, `module.` …). If several parts fit, a
    warning names them. Averaged weights are taken first (a name on the way to them has the word "ema", "swa" or
    "averaged"), then what is less deep, then what comes first in the file. The state of optimizers is passed over.
    """
    contents, _ = read_state(path)
    _load_strictly(model, contents, path)
    return model


def read_state(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, str]]:
    """Contents and metadata of a .safetensors or .pth file. Pickles are read with weights_only=True, so the contents
    are tensors, plain values, and containers of them."""
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
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: expected tensors and plain values only; refused to unpickle it ({error})") from error
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle may raise any error
        raise ValueError(f"{path}: expected a PyTorch checkpoint, got a broken file ({error})") from error
    if not isinstance(contents, dict):
        raise ValueError(f"{path}: expected a dictionary with a state dict, got {type(contents).__name__}")
    return contents, {}


def file_metadata(path: Path) -> dict[str, str]:
    """Metadata in the header of a .safetensors file. Empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file, got {error}") from error


def _load_strictly(model: nn.Module, contents: dict[str, Any], path: str | os.PathLike) -> None:
    """Load every parameter exactly once, in its shape, from the part of `contents` that fits.

    The ValueError lists all names that do not fit, or what the file holds if none of it resembles the model.
    """
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    fitting, closest = state_dicts.find(contents, shapes)
    if not fitting and closest is None:
        expected = f"the weights of a {type(model).__name__} (such as {next(iter(shapes))})"
        raise ValueError(f"{path}: expected {expected}, got {state_dicts.outline(contents)}")
    refused: list[Exception] = []
    for candidate in fitting or [closest]:
        try:
            model.load_state_dict({name: value.float() if value.is_floating_point() else value
                                   for name, value in candidate.state.items()}, strict=True, assign=_is_meta(model))
        except (RuntimeError, ValueError) as error:
            refused.append(error)
            continue
        if len(fitting) > 1:
            places = ", ".join(repr(one.place) for one in fitting)
            warnings.warn(f"{path}: the weights at {places} fit: those at {candidate.place!r} are taken", stacklevel=4)
        break
    else:
        raise ValueError(f"{path}: {refused[0]}") from refused[0]
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
