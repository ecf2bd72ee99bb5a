"""Checkpoints of trainings: wherever the weights of the model are in them, they are found, and nothing else is."""

import os
import warnings
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file

import var
from tests.helpers.models import tiny_var, tiny_vqvae
from var.model import state_dicts
from var.model.checkpoints import load_weights, official_state_dict
from var.model.config import PRESETS


def same_state(a, b) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def changed(state):
    """Other weights of the same names and shapes, such as those of an average."""
    return {name: tensor + 1 for name, tensor in state.items()}


def optimizer_state(model):
    optimizer = torch.optim.AdamW(model.parameters())
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    return optimizer.state_dict()


def official_training():
    """What FoundationVision/VAR saves: the state of its trainer with both networks, and the arguments."""
    vqvae, transformer = tiny_vqvae(), tiny_var()
    trainer = {"config": {"patch_nums": (1, 2, 3), "label_smooth": 0.0, "prog_it": 0},
               "var_wo_ddp": OrderedDict(official_state_dict(transformer)), "vae_local": official_state_dict(vqvae),
               "var_opt": {"optimizer": optimizer_state(tiny_var()), "scaler": None}}
    arguments = OrderedDict(depth=16, exp_name="text", tblr=1e-4, fp16=1, saln=False, out="local", no=None)
    return vqvae, transformer, {"epoch": 3, "iter": 5, "trainer": trainer, "args": arguments}


def load(contents, path, model=None):
    """A fresh model with the weights that are found in `contents`. A warning is an error."""
    torch.save(contents, path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_weights(model or tiny_var(), path)


def test_a_checkpoint_of_the_official_training_is_no_dictionary_of_tensors(tmp_path, monkeypatch):
    vqvae, transformer, contents = official_training()
    monkeypatch.setitem(PRESETS, "d16", (vqvae.config, transformer.config))
    torch.save(contents, tmp_path / "ar-ckpt-last.pth")
    pipeline = var.load("d16", path=tmp_path / "ar-ckpt-last.pth")
    assert same_state(pipeline.vqvae, vqvae) and same_state(pipeline.var, transformer)
    for name in ("vae_ch160v4096z32.pth", "var_d16.pth"):  # the same file by the names of the released ones
        torch.save(contents, tmp_path / name)
    assert same_state(var.load("d16", path=tmp_path).var, transformer)


@pytest.mark.parametrize(
    "wrap",
    [
        *(lambda state, key=key: {"epoch": 1, key: state, "lr": [0.1, 0.2]}
          for key in ("state_dict", "model", "model_state_dict", "ema", "module", "net")),
        *(lambda state, prefix=prefix: prefixed(prefix, state)
          for prefix in ("module.", "_orig_mod.", "model.", "module._orig_mod.", "model.module.", "a.b.c.d.")),
        lambda state: {"state_dict": prefixed("model.", state), "hyper_parameters": {"width": 32}},
        lambda state: {"a": [{"b": (1, prefixed("module.", state))}]},
        lambda state: {name.replace("blocks.0.", "blocks.0._orig_mod."): value for name, value in state.items()},
        lambda state: {f"module.{name}".replace("blocks.", "blocks.module._checkpoint_wrapped_module."): value
                       for name, value in state.items()},
        lambda state: {"step": 7, "note": None, **state},
        lambda state: {"ema": {**prefixed("module.", state), "n_averaged": torch.tensor(3)}},
        lambda state: {"decay": torch.tensor(0.99), **state},
        lambda state: {**prefixed("var.", state), **prefixed("vae.", tiny_vqvae().state_dict())},
        lambda state: {"model": state, "again": state},
    ],
)  # fmt: skip
def test_weights_are_found_in_whatever_wraps_them(wrap, tmp_path):
    model = tiny_var()
    assert same_state(load(wrap(official_state_dict(model)), tmp_path / "model.pth"), model)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod."])
def test_prefixes_in_a_safetensors_file(prefix, tmp_path):
    model = tiny_vqvae()
    save_file(prefixed(prefix, model.state_dict()), tmp_path / "model.safetensors")
    fresh = tiny_vqvae()
    torch.nn.init.zeros_(fresh.quant_conv.weight)
    assert same_state(load_weights(fresh, tmp_path / "model.safetensors"), model)


@pytest.mark.parametrize(
    ("wrap", "taken"),
    [
        (lambda state, other: {"model": other, "ema": state}, "ema"),
        (lambda state, other: {"model": other, "model_ema": prefixed("module.", state)}, "model_ema.module"),
        (lambda state, other: {"state_dict": prefixed("model.", other) | prefixed("ema.", state)}, "state_dict.ema"),
        (lambda state, other: {**other, **prefixed("ema.", state)}, "ema"),
        (lambda state, other: {"deep": {"er": other}, "flat": state}, "flat"),
        (lambda state, other: {"student": state, "teacher": other}, "student"),
    ],
)  # fmt: skip
def test_of_several_weights_that_fit_a_rule_takes_one_and_a_warning_says_which(wrap, taken, tmp_path):
    model = tiny_var()
    state = model.state_dict()
    torch.save(wrap(state, changed(state)), tmp_path / "model.pth")
    with pytest.warns(UserWarning, match=f"those at '{taken}' are taken"):
        assert same_state(load_weights(tiny_var(), tmp_path / "model.pth"), model)


def test_an_average_with_tensors_of_its_own_gives_way_to_weights_that_fit(tmp_path):
    model = tiny_var()
    contents = {"ema": {**changed(model.state_dict()), "head.extra": torch.zeros(2)}, "model": model.state_dict()}
    torch.save(contents, tmp_path / "model.pth")
    with pytest.warns(UserWarning, match="those at 'model' are taken"):
        assert same_state(load_weights(tiny_var(), tmp_path / "model.pth"), model)


@pytest.mark.parametrize("key", ["optimizer", "var_opt", "optimizer_states", "optim"])
def test_moments_of_an_optimizer_are_not_taken_for_weights(key, tmp_path):
    model = tiny_var()
    moments = {key: {"exp_avg": changed(model.state_dict())}}
    assert same_state(load(moments | {"model": model.state_dict()}, tmp_path / "model.pth"), model)
    torch.save(moments, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=rf"got {key} \(dict\)"):
        load_weights(tiny_var(), tmp_path / "model.pth")


def test_a_file_without_the_weights_is_refused_with_the_keys_that_it_has(tmp_path):
    contents = official_training()[2]
    del contents["trainer"]["var_wo_ddp"]
    contents |= {f"key {number} {'x' * 100}": number for number in range(50)}
    torch.save(contents, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="expected the weights of a VAR") as error:
        load_weights(tiny_var(), tmp_path / "model.pth")
    message = str(error.value)
    for part in ("model.pth", "trainer.vae_local (", "tensors: ", "epoch (int)", "args (OrderedDict)", "and 4"):
        assert part in message, part
    assert len(message) < 1000


@pytest.mark.parametrize("damage", ["missing", "unexpected", "misshaped"])
def test_names_that_do_not_fit_are_listed_for_wrapped_weights_as_well(damage, tmp_path):
    state = official_state_dict(tiny_var())
    if damage == "missing":
        del state["head.bias"]
    else:
        state["head.extra" if damage == "unexpected" else "head.bias"] = torch.zeros(3)
    torch.save({"trainer": {"var_wo_ddp": prefixed("module.", state)}, "epoch": 3}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"head\.(bias|extra)") as error:
        load_weights(tiny_var(), tmp_path / "model.pth")
    assert "blocks.0" not in str(error.value) and "model.pth" in str(error.value)


@pytest.mark.parametrize("contents", [{}, {"a": 1}, {1: {2: 3}}, {"a": torch.zeros(2)}, {"a": [torch.zeros(1)]}])
def test_contents_without_a_state_dict_are_refused(contents, tmp_path):
    torch.save(contents, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"model\.pth: expected the weights of a VAR .*, got "):
        load_weights(tiny_var(), tmp_path / "model.pth")


@pytest.mark.parametrize("contents", [torch.zeros(2), [1, 2], 3, None])
def test_contents_that_are_no_dictionary_are_refused(contents, tmp_path):
    torch.save(contents, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"model\.pth: expected a dictionary"):
        load_weights(tiny_var(), tmp_path / "model.pth")


def test_a_dictionary_that_contains_itself_has_an_end():
    contents = {"epoch": 1}
    contents["self"] = [contents]
    contents["model"] = tiny_var().state_dict()
    shapes = {name: tensor.shape for name, tensor in contents["model"].items()}
    assert [candidate.place for candidate in state_dicts.find(contents, shapes).fitting] == ["model"]


class Payload:
    """An object as in a malicious checkpoint: unpickling it would run os.mkdir."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_beside_the_weights_is_refused_and_does_not_run(tmp_path):
    contents = {"state_dict": tiny_var().state_dict(), "args": Payload(tmp_path / "owned")}
    torch.save(contents, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"model\.pth.*refused to unpickle"):
        load_weights(tiny_var(), tmp_path / "model.pth")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("config", [None, "[]", "{", '{"depth": "x"}', '{"unknown": 1}', "null"])
def test_a_damaged_configuration_names_the_file(config, tmp_path):
    metadata = {"model": "VAR"} | ({} if config is None else {"config": config})
    save_file(tiny_var().state_dict(), tmp_path / "var.safetensors", metadata)
    with pytest.raises(ValueError, match=r"var\.safetensors: expected the configuration of a VAR"):
        var.checkpoints.load_model(tmp_path / "var.safetensors")
