"""Tests the kernel repository with the real `kernels` package: it is built, loaded from its folder, and used."""

import subprocess
import sys

import pytest

from tests.helpers.processes import child_environment
from tests.tiers import ROOT

pytest.importorskip("kernels")

# Each program runs in a process of its own: once beside the package under test, and once where it cannot be imported.
_PROGRAM = """
import sys
from pathlib import Path
folder, alone = Path(sys.argv[1]), sys.argv[2] == "alone"
if alone:
    class Refuse:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "var_kernels":
                raise ImportError(name)
    sys.meta_path.insert(0, Refuse())
else:
    import var_kernels
import torch
from kernels import LocalLayerRepository, Mode, kernelize, register_kernel_mapping, replace_kernel_forward_from_hub
from kernels.layer import use_kernel_mapping
sys.path.insert(0, sys.argv[3])
import foreign

model = foreign.make()
names = {"VarSelfAttention": foreign.SelfAttention, "VarAdaLNSelfAttn": foreign.AdaLNSelfAttn,
         "VarAdaLNBeforeHead": foreign.AdaLNBeforeHead}
for name, cls in names.items():
    replace_kernel_forward_from_hub(cls, name)
mapping = {name: {"cpu": LocalLayerRepository(folder, layer_name=name)} for name in names}
labels = torch.tensor([1, 4])
x = torch.randn(2, 65, 8)
expected = model(labels, x)
expected.square().mean().backward()
gradient = model.blocks[0].attn.mat_qkv.weight.grad.clone()
model.zero_grad()
with use_kernel_mapping(mapping):
    model = kernelize(model, mode=Mode.TRAINING, device="cpu", use_fallback=False)
modules = {type(module).__name__: module.forward.__func__.__module__ for module in model.modules()
           if "forward" in vars(module)}
found = model(labels, x)
found.square().mean().backward()
torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
torch.testing.assert_close(model.blocks[0].attn.mat_qkv.weight.grad, gradient, rtol=1e-3, atol=1e-5)
assert len(modules) == 3 and all(name.startswith("_var_kernels_cpu_") for name in modules.values()), modules
[loaded] = {sys.modules[name].__name__.split(".")[0] for name in modules.values()}
status = sys.modules[loaded + ".native.load"].native_library()
assert status.available and str(folder) in str(status.path), status
print("served by", loaded)
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels") / "var-kernels"
    command = [sys.executable, "-m", "var_kernels.swap", "kernels", str(folder)]
    answer = subprocess.run(command, capture_output=True, text=True, env=child_environment(PYTHONPATH=str(ROOT)))
    assert answer.returncode == 0, answer.stderr
    assert len(answer.stdout.splitlines()) == 2
    return folder


@pytest.mark.parametrize("where", ["alone", "beside"])
def test_kernelize_uses_the_layers_of_the_folder(repository, tmp_path, where):
    # The stand-in of VAR's classes, without what it imports of the package.
    text = (ROOT / "tests" / "helpers" / "foreign_var.py").read_text()
    text = text.replace("from var_kernels.multi_scale_quantize import phi_index\n", "phi_index = None\n")
    (tmp_path / "foreign.py").write_text(text)
    command = [sys.executable, "-c", _PROGRAM, str(repository), where, str(tmp_path)]
    environment = child_environment(PYTHONPATH=str(ROOT) if where == "beside" else "")
    answer = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert "served by _var_kernels_cpu_" in answer.stdout


def test_variants_are_replaced_as_a_whole(repository):
    [variant] = repository.glob("build/torch-stable-abi*")
    (variant / "left_over.py").touch()
    command = [sys.executable, "-m", "var_kernels.swap", "kernels", str(repository)]
    subprocess.run(command, check=True, capture_output=True, env=child_environment(PYTHONPATH=str(ROOT)))
    assert not (variant / "left_over.py").exists()
    assert sorted(path.name for path in (repository / "build").iterdir()) == ["torch-cuda", variant.name]
