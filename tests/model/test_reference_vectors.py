"""The model is compared with vectors recorded once from the official model in fp32 on a CPU (tests/data)."""

import functools

import pytest
import torch

from tests.helpers.models import inference_transformer, stepwise_logits
from tests.model.golden import (
    Golden,
    assert_near,
    check_encode_and_reconstruct,
    check_generate,
    check_logits_loss_and_gradients,
    check_tokenizer_training_forward,
)
from var import edit
from var.generation.editing import box_mask
from var_kernels import backends


@functools.cache
def _golden(name: str, backend: str) -> Golden:
    return Golden(name, backend)


def _request(name: str, backend: str) -> Golden:
    reason = backends.unavailable_reason(backend, "cpu", "block_causal_attention")
    if reason is not None:
        pytest.skip(f"backend {backend}: {reason}")
    return _golden(name, backend)


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    return request.param


@pytest.fixture(params=["tiny", "tiny_shared_aln"])
def golden(request, backend):
    return _request(request.param, backend)


@pytest.fixture
def tiny(backend):
    """The configuration for which edits and the tokenizer's training forward were recorded too."""
    return _request("tiny", backend)


def test_encode_and_reconstruct(golden):
    check_encode_and_reconstruct(golden)


def test_logits_loss_and_gradients(golden):
    check_logits_loss_and_gradients(golden)


@pytest.mark.parametrize("mode", ["greedy", "seeded", "plain", "smooth"])
def test_generate(golden, mode):
    check_generate(golden, mode)


def test_tokenizer_training_forward(tiny):
    check_tokenizer_training_forward(tiny)


@pytest.mark.parametrize("task", ["inpaint", "outpaint", "class_edit"])
def test_edit(tiny, task):
    golden = tiny
    settings = dict(golden.spec["edit"])
    label = settings.pop("label")[task]
    mask = box_mask(golden.var.config.schedule, tuple(settings.pop("box_y0x0y1x1")), inside=task == "outpaint")
    assert torch.equal(mask, golden[f"edit/{task}/mask"])
    image = golden["image"]
    labels = None if label == "unconditional" else torch.full((len(image),), label)
    result = edit(golden.var, golden.vqvae, image, mask, labels, **settings)
    assert torch.equal(result.tokens, golden[f"edit/{task}/tokens"].long())
    assert_near((result.images + 1) / 2, golden[f"edit/{task}/image"])


def test_cached_steps_equal_the_masked_forward(golden):
    """The logits of steps with a KV cache equal those of one forward over all tokens with the block-causal mask."""
    var, labels, inputs = golden.var, golden.labels, golden["teacher_forcing_input"]
    with torch.inference_mode():
        assert_near(stepwise_logits(inference_transformer(var, len(labels)), labels, inputs), var(labels, inputs))
