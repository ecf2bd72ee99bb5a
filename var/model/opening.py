"""Opens a model: the embedded one, a released one from a folder or the Hub, or one that you have trained."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch

from .checkpoints import file_metadata, load_model, load_weights, without_init
from .config import PRESETS
from .transformer import VAR
from .vqvae import VQVAE

WEIGHTS = Path(__file__).parents[1] / "weights"
EMBEDDED = "fashion"  # the model that ships with the package
RELEASED_VAE = "vae_ch160v4096z32.pth"


class Pipeline(NamedTuple):
    """A tokenizer and its transformer."""

    vqvae: VQVAE
    var: VAR

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes. Their numbers, as text, if the model has no names."""
        return self.var.config.class_names or tuple(str(label) for label in range(self.var.config.num_classes))


def load(name: str = EMBEDDED, *, path: str | os.PathLike | None = None, backend: str = "auto",
         device: str | torch.device = "cpu") -> Pipeline:
    """Load the embedded model (`"fashion"`), or a released one (`"d16"` … `"d36"`) from `path`, ready to generate.

    `path` is a folder with `var_<name>.pth` (or .safetensors) and the tokenizer's `vae_ch160v4096z32.pth` (or
    .safetensors), or a Hub id such as `"FoundationVision/var"`, whose files huggingface_hub downloads once. Or it is
    one file with both networks, such as the checkpoint of the official training; see `checkpoints.load_weights` for
    what is taken from it. It can also be a folder with `var.safetensors` and `vqvae.safetensors`, written by
    `var.save`; `name` is then ignored.

    Raises ValueError for an unknown name, for a file with missing, unexpected or misshaped entries (the message names
    them), and for a pickle that carries code. Raises FileNotFoundError for a missing file.
    """
    if path is None:
        if name != EMBEDDED:
            raise ValueError(f"path: expected a folder, a file or a Hub id with the weights of {name!r}, got None")
        path = WEIGHTS
    path = os.path.expanduser(path)  # which leaves "~" as it is where a user has no home
    folder = Path(path)
    if (folder / "var.safetensors").is_file():
        vqvae, var = load_model(folder / "vqvae.safetensors", backend), load_model(folder / "var.safetensors", backend)
    elif name not in PRESETS:
        raise ValueError(f"name: expected one of {', '.join((EMBEDDED, *PRESETS))}, got {name!r}")
    else:
        vqvae_config, var_config = PRESETS[name]
        vqvae = load_weights(VQVAE(vqvae_config, backend), _locate(path, RELEASED_VAE))
        var = load_weights(without_init(VAR, var_config, backend), _locate(path, f"var_{name}.pth"))
    return Pipeline(vqvae.to(device).eval(), var.to(device).eval())


def _locate(path: str | os.PathLike, filename: str) -> Path:
    """Path of the file `filename` (or the same as .safetensors) in the folder `path`, else downloaded from the Hub.

    If `path` is a file, it is this one.
    """
    folder = Path(path)
    if folder.is_file():
        return folder
    if folder.is_dir():
        for candidate in (folder / filename, (folder / filename).with_suffix(".safetensors")):
            if candidate.is_file():
                return candidate
        raise FileNotFoundError(f"{folder}: expected {filename} (or .safetensors) in this folder")
    if str(path).count("/") != 1 or folder.is_absolute():
        expected = "an existing folder, a file or a Hub id 'owner/name'"
        raise FileNotFoundError(f"path: expected {expected}, got {str(path)!r}")
    from huggingface_hub import hf_hub_download  # imported here because it takes a second and only a download needs it

    return Path(hf_hub_download(repo_id=str(path), filename=filename))


class OpenModel(NamedTuple):
    """A pipeline with its name and the metadata of its file."""

    name: str
    pipeline: Pipeline
    metadata: dict[str, str]  # of the transformer's file


def open_model(model: str, path: str | None = None, backend: str = "auto", device: str = "cpu") -> OpenModel:
    """Open the embedded model, a released one from `path`, or the one in the folder `model`. See `var.load`."""
    if path is None and model in PRESETS:
        raise ValueError(
            f"path: the weights of {model} are not part of this package: name a folder with var_{model}.pth and "
            f"{RELEASED_VAE}, or a Hub id such as FoundationVision/var to download them"
        )
    if path is not None:
        path = os.path.expanduser(path)
        if model not in PRESETS and not (Path(path) / "var.safetensors").is_file():
            raise ValueError(f"model: expected one of {', '.join(PRESETS)} for the files of {path!r}, got {model!r}")
    elif model != EMBEDDED:
        path = str(_saved_folder(model))
    metadata = file_metadata(Path(path or WEIGHTS) / "var.safetensors")
    return OpenModel(model, load(model, path=path, backend=backend, device=device), metadata)


def _saved_folder(model: str) -> Path:
    folder = Path(os.path.expanduser(model))  # Path.expanduser raises an error for a user without a home
    if folder.name == "var.safetensors":
        folder = folder.parent
    if not (folder / "var.safetensors").is_file():
        raise ValueError(f"model: expected one of {', '.join((EMBEDDED, *PRESETS))}, or a folder with "
                         f"var.safetensors and vqvae.safetensors, got {model!r}")
    return folder
