"""Loading and saving weights: our safetensors files, released .pth files, Hub repositories. No code is unpickled."""

import json
import os
import pickle
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .config import PRESETS, VARConfig, VQVAEConfig
from .transformer import VAR, scale_of_token
from .vqvae import VQVAE

WEIGHTS = Path(__file__).parents[1] / "weights"
EMBEDDED = "fashion"  # the model that ships with the package
RELEASED_VAE = "vae_ch160v4096z32.pth"
_CONFIGS = {"VAR": VARConfig, "VQVAE": VQVAEConfig}


class Pipeline(NamedTuple):
    """A tokenizer and its transformer."""

    vqvae: VQVAE
    var: VAR

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes; their numbers where the model carries none."""
        return self.var.config.class_names or tuple(str(label) for label in range(self.var.config.num_classes))


def load(name: str = EMBEDDED, *, path: str | os.PathLike | None = None, backend: str = "auto",
         device: str | torch.device = "cpu") -> Pipeline:
    """The embedded model (`"fashion"`), or a released one (`"d16"` … `"d36"`) from `path`, ready to generate.

    `path`: a folder with `var_<name>.pth` (or .safetensors) and the tokenizer's `vae_ch160v4096z32.pth` (or
    .safetensors), or a Hub id such as `"FoundationVision/var"`, whose files are downloaded once by huggingface_hub.
    Models saved by `var.save` are a folder with `var.safetensors` and `vqvae.safetensors`; `name` is then ignored.

    Raises ValueError for an unknown name, a file with missing, unexpected or misshaped entries (they are named), or a
    pickle that carries code; FileNotFoundError for a missing file.
    """
    if path is None:
        if name != EMBEDDED:
            raise ValueError(f"path: expected a folder or a Hub id with the files of {name!r}, got None")
        path = WEIGHTS
    folder = Path(path)
    if (folder / "var.safetensors").is_file():
        vqvae, var = load_model(folder / "vqvae.safetensors", backend), load_model(folder / "var.safetensors", backend)
    elif name not in PRESETS:
        raise ValueError(f"name: expected one of {', '.join((EMBEDDED, *PRESETS))}, got {name!r}")
    else:
        vqvae_config, var_config = PRESETS[name]
        vqvae = load_weights(VQVAE(vqvae_config, backend), _locate(path, RELEASED_VAE))
        var = load_weights(_without_init(VAR, var_config, backend), _locate(path, f"var_{name}.pth"))
    return Pipeline(vqvae.to(device).eval(), var.to(device).eval())


def save(path: str | os.PathLike, model: VAR | VQVAE, metadata: dict[str, str] | None = None,
         dtype: torch.dtype | None = None) -> None:
    """Write weights, configuration and `metadata` to one safetensors file, atomically.

    `dtype` (e.g. torch.float16) stores floating-point weights narrower; loading widens them to fp32 again.
    """
    state = {name: tensor.detach().cpu().to(dtype or tensor.dtype).contiguous()
             for name, tensor in model.state_dict().items()}
    header = {"model": type(model).__name__, "config": json.dumps(model.config.to_dict()), **(metadata or {})}
    write_atomically(path, lambda temporary: save_file(state, temporary, metadata=header))


def write_atomically(path: str | os.PathLike, write) -> None:
    """Call `write(temporary_path)`, then rename onto `path`: readers see the old file or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    try:
        write(temporary)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def load_model(path: str | os.PathLike, backend: str = "auto") -> VAR | VQVAE:
    """The model of one file written by `save`; its configuration is in the file."""
    state, header = read_state(path)
    kind = header.get("model")
    if kind not in _CONFIGS:
        raise ValueError(f"{path}: expected a file written by var.save (metadata 'model'), got metadata {header}")
    config = _CONFIGS[kind].from_dict(json.loads(header["config"]))
    model = _without_init(VAR if kind == "VAR" else VQVAE, config, backend)
    _load_strictly(model, state, path)
    return model


def load_weights(model: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Load a released .pth or a .safetensors file into a model of known configuration, strictly."""
    state, _ = read_state(path)
    _load_strictly(model, state, path)
    return model


def read_state(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """State dict and metadata of a .safetensors or .pth file; pickles are read with weights_only=True."""
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


def _load_strictly(model: nn.Module, state: dict[str, Tensor], path: str | os.PathLike) -> None:
    """Every parameter exactly once, in its shape; the error lists all names that do not fit."""
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


def _without_init(kind: type, config, backend: str) -> nn.Module:
    """A model whose parameters are about to be loaded: built on the meta device, so no time goes into random values."""
    with torch.device("meta"):
        model = kind(config, backend)
    if isinstance(model, VAR):
        model.levels = scale_of_token(config.schedule)
    return model


def _locate(path: str | os.PathLike, filename: str) -> Path:
    """The file in a folder (as .pth or .safetensors), else from the Hub repository of that id."""
    folder = Path(path)
    if folder.is_dir():
        for candidate in (folder / filename, (folder / filename).with_suffix(".safetensors")):
            if candidate.is_file():
                return candidate
        raise FileNotFoundError(f"{folder}: expected {filename} (or .safetensors) in this folder")
    if str(path).count("/") != 1 or folder.is_absolute():
        raise FileNotFoundError(f"path: expected an existing folder or a Hub id 'owner/name', got {str(path)!r}")
    from huggingface_hub import hf_hub_download  # only a download needs it, and importing it costs a second

    return Path(hf_hub_download(repo_id=str(path), filename=filename))


def official_state_dict(model: VAR | VQVAE) -> dict[str, Tensor]:
    """The state dict with the derived buffers that the official implementation expects, so that it loads there too."""
    state = dict(model.state_dict())
    schedule = model.config.schedule
    if isinstance(model, VQVAE):
        weight = model.quantize.embedding.weight
        state["quantize.ema_vocab_hit_SV"] = weight.new_zeros(schedule.num_scales, model.config.vocab_size)
        return state
    levels = model.levels[None]
    state["lvl_1L"] = levels
    visible = levels[:, :, None] >= levels[:, None, :]
    bias = model.pos_1LC.new_zeros(1, 1, schedule.length, schedule.length)
    state["attn_bias_for_masking"] = bias.masked_fill(~visible[:, None], -torch.inf)
    for i, block in enumerate(model.blocks):
        state[f"blocks.{i}.attn.zero_k_bias"] = torch.zeros_like(block.attn.q_bias)
    return state
