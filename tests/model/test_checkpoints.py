"""Loading and saving: the released format, which the tests write, our own files, and files that must be refused."""

import os
import pickle
import stat

import pytest
import torch

import var
from tests.helpers.models import tiny_var, tiny_vqvae
from var.model.checkpoints import load_model, load_weights, official_state_dict, read_state, save
from var.model.config import PRESETS
from var_kernels.native.build import write_atomically


def same_state(a, b) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("make", [tiny_var, tiny_vqvae, lambda: tiny_var(shared_aln=True, attn_l2_norm=False)])
def test_save_and_load(make, tmp_path):
    model = make()
    save(tmp_path / "model.safetensors", model, {"note": "kept"})
    loaded = load_model(tmp_path / "model.safetensors")
    assert loaded.config == model.config and same_state(loaded, model)
    assert read_state(tmp_path / "model.safetensors")[1]["note"] == "kept"
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in loaded.parameters())


def test_narrow_storage_is_widened_again(tmp_path):
    model = tiny_var()
    save(tmp_path / "model.safetensors", model, dtype=torch.float16)
    loaded = load_model(tmp_path / "model.safetensors")
    assert all(parameter.dtype == torch.float32 for parameter in loaded.parameters())
    torch.testing.assert_close(loaded.head.weight, model.head.weight.half().float(), rtol=0, atol=0)


@pytest.mark.parametrize("make", [tiny_var, tiny_vqvae, lambda: tiny_var(shared_aln=True)])
def test_official_file_round_trip(make, tmp_path):
    """A .pth with the derived buffers of the official implementation loads strictly and is written back the same."""
    model = make()
    state = official_state_dict(model)
    assert len(state) > len(model.state_dict())
    torch.save(state, tmp_path / "model.pth")
    fresh = load_weights(type(model)(model.config), tmp_path / "model.pth")
    assert same_state(fresh, model)
    written = official_state_dict(fresh)
    assert written.keys() == state.keys() and all(torch.equal(written[key], state[key]) for key in state)


def test_official_buffers_are_the_block_causal_mask():
    state = official_state_dict(tiny_var())
    assert state["lvl_1L"].tolist() == [[0] + [1] * 4 + [2] * 9]
    bias = state["attn_bias_for_masking"][0, 0]
    assert bias[0, 0] == 0 and bias[0, 1] == -torch.inf and (bias[1:5, :5] == 0).all() and (bias[5:] == 0).all()
    assert not state["blocks.0.attn.zero_k_bias"].any()


def test_load_from_a_folder_of_released_files(tmp_path, monkeypatch):
    vqvae, transformer = tiny_vqvae(), tiny_var()
    monkeypatch.setitem(PRESETS, "d16", (vqvae.config, transformer.config))
    torch.save(official_state_dict(vqvae), tmp_path / "vae_ch160v4096z32.pth")
    torch.save(official_state_dict(transformer), tmp_path / "var_d16.pth")
    pipeline = var.load("d16", path=tmp_path)
    assert same_state(pipeline.vqvae, vqvae) and same_state(pipeline.var, transformer)
    assert not pipeline.var.training and pipeline.class_names == ("0", "1", "2", "3", "4")
    assert torch.equal(pipeline.var.positions(), transformer.positions())


@pytest.mark.parametrize("damage", ["missing", "unexpected", "misshaped"])
def test_ill_fitting_files_are_refused_with_the_names(damage, tmp_path):
    model = tiny_var()
    state = official_state_dict(model)
    if damage == "missing":
        del state["head.bias"]
    elif damage == "unexpected":
        state["head.extra"] = torch.zeros(1)
    else:
        state["head.bias"] = torch.zeros(3)
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"model\.pth.*head\.(bias|extra)|head\.(bias|extra)"):
        load_weights(tiny_var(), tmp_path / "model.pth")


def test_a_file_for_another_schedule_is_refused(tmp_path):
    state = official_state_dict(tiny_var())
    state["lvl_1L"] = state["lvl_1L"].flip(1)
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="lvl_1L"):
        load_weights(tiny_var(), tmp_path / "model.pth")


class Payload:
    """An object as in a malicious checkpoint: unpickling it would run os.mkdir."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_carries_code_is_refused(tmp_path):
    for name, write in (("a.pth", lambda f: pickle.dump({"x": Payload(tmp_path / "owned")}, f)),
                        ("b.pth", lambda f: torch.save({"x": Payload(tmp_path / "owned")}, f))):
        with open(tmp_path / name, "wb") as file:
            write(file)
        with pytest.raises(ValueError, match=name):
            load_weights(tiny_var(), tmp_path / name)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("name", ["broken.pth", "broken.safetensors"])
def test_broken_and_missing_files(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=name):
        read_state(tmp_path / name)
    (tmp_path / name).write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=name):
        read_state(tmp_path / name)


def test_load_refuses_unknown_names_and_paths(tmp_path):
    with pytest.raises(ValueError, match="path"):
        var.load("d16")
    with pytest.raises(ValueError, match="name: expected one of fashion, d16"):
        var.load("d17", path=tmp_path)
    with pytest.raises(FileNotFoundError, match="vae_ch160v4096z32"):
        var.load("d16", path=tmp_path)
    with pytest.raises(FileNotFoundError, match="path"):
        var.load("d16", path=tmp_path / "absent")


def test_hub_ids_are_downloaded(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download",
                        lambda repo_id, filename: asked.append((repo_id, filename)) or str(tmp_path / filename))
    with pytest.raises(FileNotFoundError):
        var.load("d16", path="FoundationVision/var")
    assert asked == [("FoundationVision/var", "vae_ch160v4096z32.pth")]


def test_write_atomically_leaves_nothing_behind(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")

    def fail(temporary):
        with open(temporary, "w") as file:
            file.write("half")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        write_atomically(target, fail)
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]
    write_atomically(target, lambda temporary: open(temporary, "w").write("new"))
    assert target.read_text() == "new" and stat.S_IMODE(target.stat().st_mode) & stat.S_IRUSR
