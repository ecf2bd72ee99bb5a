"""The model on the CUDA kernels, which the emulation executes on the CPU; nothing runs on a GPU.

The tests compare it with the vectors recorded from the official model, and with an image of the embedded model.
"""

import contextlib

import pytest
import torch

import var
from tests.model import golden as vectors
from tools.gpu_emulation.cuda import build, kernel_sources, load, serving

if build.unavailable_reason() is not None:
    pytest.skip(build.unavailable_reason(), allow_module_level=True)


def emulation():
    """A context in which backend="cuda" is the emulation of all CUDA files; raises EmulationError with its findings."""
    return serving(load("fast", kernel_sources()))


@pytest.mark.parametrize("name", ["tiny", "tiny_shared_aln"])
def test_reference_vectors(name):
    with emulation() as record:
        golden = vectors.Golden(name, "cuda")
        vectors.check_encode_and_reconstruct(golden)
        vectors.check_logits_loss_and_gradients(golden)
        for mode in ("greedy", "seeded"):
            vectors.check_generate(golden, mode)
        if name == "tiny":
            vectors.check_tokenizer_training_forward(golden)
    assert record.counters["launches"] > 150  # of all ops, forward and backward


def test_an_image_of_the_embedded_model():
    labels = torch.tensor([7])
    results = []
    for backend in ("cuda", "reference"):
        with emulation() if backend == "cuda" else contextlib.nullcontext():
            pipeline = var.load(backend=backend)
            results.append(pipeline.var.generate(pipeline.vqvae, labels, cfg=2.0, top_k=100, top_p=0.95, seed=3))
    found, expected = results
    assert torch.equal(found.tokens, expected.tokens)
    vectors.assert_near(found.images, expected.images)
