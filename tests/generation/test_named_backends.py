"""A backend that is asked for by name computes everything in a model. The tests record which operators are called."""

import importlib
import inspect
import pkgutil

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.models import tiny_var, tiny_vqvae
from var import Generator, edit, generate
from var.generation import memory
from var.generation.editing import box_mask
from var_kernels import reference
from var_kernels.native import load

LABELS = torch.tensor([0, 4, 2])
needs_library = pytest.mark.skipif(not load.native_library().available, reason="no native library")


class Called(TorchDispatchMode):
    """Records the names of our raw operators that are called, of either namespace."""

    def __init__(self):
        super().__init__()
        self.ours = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace.startswith("var_kernels"):
            self.ours.add(function.name().partition("::")[2])
        return function(*args, **(kwargs or {}))


def models(backend):
    """A transformer and a tokenizer on this backend."""
    transformer, vqvae = tiny_var(), tiny_vqvae()
    for module in transformer.modules():
        if hasattr(module, "backend"):
            module.backend = backend
    vqvae.quantize.backend = backend
    return transformer, vqvae


def images(vqvae):
    return torch.rand(3, 3, vqvae.config.image_size, vqvae.config.image_size) * 2 - 1


def edited(transformer, vqvae, **options):
    mask = box_mask(transformer.config.schedule, (0.0, 0.0, 0.5, 1.0), inside=False)
    return edit(transformer, vqvae, images(vqvae), mask, seed=1, **options)


def trained(transformer, vqvae):
    """One training step of each network."""
    output = vqvae(images(vqvae))
    (output.reconstruction.mean() + output.vq_loss).backward()
    transformer(LABELS, vqvae.teacher_forcing_input(output.tokens)).mean().backward()


_GENERATION = {"_adaln_layer_norm", "_gated_residual_adaln", "_block_causal_attention", "_qk_norm_cache",
               "_sample_tokens", "_next_scale_input"}  # fmt: skip
_PACKED = {"_packed_linear", "_pack_linear", "_winograd_conv", "_pack_winograd", "_group_norm_silu"}
_TRAINING = {"_adaln_layer_norm", "_gated_residual_adaln", "_block_causal_attention", "_multi_scale_quantize",
             "_next_scale_input"}  # fmt: skip
_TRAINING |= {f"{name}_backward" for name in _TRAINING - {"_next_scale_input"}}
# Each task, and the raw operators that the backend "cpu" calls for it.
WORK = {
    "generate": (lambda *pair: generate(*pair, LABELS, seed=1), _GENERATION | _PACKED),
    "generate, seeds": (lambda *pair: generate(*pair, LABELS, seeds=[1, 2, 3]), _GENERATION | _PACKED),
    "generate, bf16": (lambda *pair: generate(*pair, LABELS, seed=1, precision="bf16"), _GENERATION | _PACKED),
    "generate, more_smooth": (lambda *pair: generate(*pair, LABELS, seed=1, more_smooth=True), _GENERATION | _PACKED),
    "edit": (edited, _GENERATION | _PACKED | {"_multi_scale_quantize"}),
    "encode": (lambda _, vqvae: vqvae.encode(images(vqvae)), {"_multi_scale_quantize"}),
    "decode": (lambda _, vqvae: vqvae.decode(torch.zeros(3, 14, dtype=torch.int64)), {"_next_scale_input"}),
    "decode scales": (lambda _, vqvae: vqvae.decode_scales(torch.zeros(3, 14, dtype=torch.int64)),
                      {"_next_scale_input"}),
    "reconstruct": (lambda _, vqvae: vqvae.reconstruct(images(vqvae)), {"_multi_scale_quantize"}),
    "train": (trained, _TRAINING),
}  # fmt: skip


def forbid_the_reference(monkeypatch):
    def entered(*args, **kwargs):
        raise AssertionError("the reference was entered")

    for info in pkgutil.iter_modules(reference.__path__):
        module = importlib.import_module(f"{reference.__name__}.{info.name}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__:
                monkeypatch.setattr(module, name, entered)


@pytest.mark.parametrize("work", WORK)
def test_the_reference_calls_no_kernel(work):
    """On "reference", generation once called packed_linear 152 times and each of the decoder's kernels 20 times."""
    with Called() as called:
        WORK[work][0](*models("reference"))
    assert called.ours == set()


@needs_library
@pytest.mark.parametrize("work", WORK)
def test_cpu_never_enters_the_reference(work, monkeypatch):
    function, expected = WORK[work]
    pair = models("cpu")
    forbid_the_reference(monkeypatch)
    with Called() as called:
        function(*pair)
    # Where oneDNN's packed products are faster, this backend uses them.
    onednn = "bf16" in work or load.native_library().isa == "portable"
    optional = {"_packed_linear", "_pack_linear"} if onednn else set()
    assert expected - optional <= called.ours <= expected


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_backend_argument_overrides_that_of_the_model(precision):
    options = {"seed": 1, "precision": precision}
    with Called() as called:
        plain = generate(*models("auto"), LABELS, backend="reference", **options)
        of_edit = edited(*models("auto"), backend="reference", precision=precision)
    assert called.ours == set() and of_edit.images.shape == plain.images.shape
    assert torch.equal(plain.tokens, generate(*models("reference"), LABELS, **options).tokens)


@needs_library
def test_a_model_on_the_reference_generates_with_kernels_if_asked(monkeypatch):
    pair = models("reference")
    forbid_the_reference(monkeypatch)
    with Called() as called:
        generator = Generator(*pair, batch_size=3, backend="cpu")
        generator(LABELS, seed=1)
    assert called.ours >= _GENERATION


@needs_library
def test_without_packing_the_other_ops_keep_their_kernels():
    with Called() as called:
        generate(*models("cpu"), LABELS, seed=1, pack=False)
    assert called.ours == _GENERATION
    with Called() as called:
        generate(*models("cpu"), LABELS, seed=1, pack=False, precision="bf16")
    assert called.ours == _GENERATION | {"_group_norm_silu"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("make", [lambda backend: (*models("auto"), backend), lambda backend: (*models(backend), None)])
def test_a_backend_that_is_not_available_is_refused_at_once(make):
    for name in ("cuda", "triton"):
        *pair, argument = make(name)
        with pytest.raises(ValueError, match=f"backend: '{name}' cannot serve .* expected one of auto, "):
            Generator(*pair, backend=argument)
    *pair, argument = make("best")
    with pytest.raises(ValueError, match="backend: expected one of auto, cpu, cuda, triton, reference, got 'best'"):
        Generator(*pair, backend=argument)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_estimate_of_memory_knows_the_backend(precision):
    transformer, vqvae = models("reference")
    held = Generator(transformer, vqvae, batch_size=2, precision=precision).nbytes
    itemsize = {"fp32": 4, "bf16": 2}[precision]
    fixed = memory.fixed_bytes(transformer.config, vqvae.config, itemsize, backend="reference")
    found = held["packed weights"] + held["decoder"]
    if precision == "fp32":
        assert fixed == found == 0  # nothing is copied
    else:
        assert fixed <= found < fixed * 1.05  # without biases and norms
    assert held["KV cache"] == memory.cache_bytes(transformer.config, 4, itemsize)
