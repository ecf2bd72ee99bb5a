"""Tests swapping diffusers' adaptive norms: outputs and gradients as near to exact ones as before the swap."""

import pytest
import torch
from torch import nn

from var_kernels import swap
from var_kernels.swap import diffusers_norms

pytest.importorskip("diffusers")

from diffusers.models.normalization import (
    AdaLayerNormContinuous,
    AdaLayerNormZero,
    AdaLayerNormZeroSingle,
    FP32LayerNorm,
    LuminaRMSNormZero,
    SD35AdaLayerNormZeroX,
)

from tests.helpers.foreign_diffusers import UNITS, check, tensors_in

NORMS = {
    "zero": lambda: AdaLayerNormZero(24),
    "zero-fp32": lambda: AdaLayerNormZero(24, norm_type="fp32_layer_norm", bias=False),
    "single": lambda: AdaLayerNormZeroSingle(24),
    "x": lambda: SD35AdaLayerNormZeroX(24),
    "continuous": lambda: AdaLayerNormContinuous(24, 24, elementwise_affine=False, eps=1e-6),
}


def norm_inputs(norm, batch=2, conditions=2):
    torch.manual_seed(0)
    x, condition = torch.randn(batch, 7, 24), torch.randn(conditions, 24)
    if isinstance(norm, AdaLayerNormContinuous):
        return {"x": x, "conditioning_embedding": condition}
    return {"hidden_states" if isinstance(norm, SD35AdaLayerNormZeroX) else "x": x, "emb": condition}


@pytest.mark.parametrize("dtype", UNITS, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_norms(norm, dtype):
    norm = NORMS[norm]()
    check(norm, norm_inputs(norm), dtype)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(["batch", "conditions"], [(3, 1), (1, 3), (0, 1)])
def test_batches_are_broadcast_as_before(norm, batch, conditions):
    norm = NORMS[norm]()
    inputs = norm_inputs(norm, batch, conditions)
    expected = tensors_in(norm(**inputs))
    with swap.applied(norm, strict=True):
        for found, right in zip(tensors_in(norm(**inputs)), expected, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("wide", ["x", "condition"])
def test_dtypes_of_mixed_inputs_are_those_of_before(norm, wide):
    norm = NORMS[norm]()
    inputs = norm_inputs(norm)
    if wide == "x":
        norm, narrow = norm.bfloat16(), {"emb", "conditioning_embedding"}
        if isinstance(norm, AdaLayerNormContinuous):  # it converts the condition to the dtype of x
            norm = norm.float()
    else:
        narrow = {"x", "hidden_states"}
        if isinstance(norm, AdaLayerNormContinuous):
            norm = norm.bfloat16()
    inputs = {key: value.bfloat16() if key in narrow else value for key, value in inputs.items()}
    expected = tensors_in(norm(**inputs))
    with swap.applied(norm, strict=True):
        found = tensors_in(norm(**inputs))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ["options", "reason"],
    [
        ({}, "norm: expected an nn.LayerNorm over the channels without weights, got LayerNorm"),
        ({"elementwise_affine": False, "norm_type": "rms_norm"}, "without weights, got RMSNorm"),
    ],
)
def test_norms_that_our_op_is_not_are_skipped(options, reason):
    with pytest.warns(UserWarning):
        [skipped] = swap.apply(AdaLayerNormContinuous(24, 24, **options)).skipped
    assert reason in skipped.reason


def test_norms_of_other_structures_are_not_mistaken():
    for norm in (LuminaRMSNormZero(24, 1e-5, True), FP32LayerNorm(24), nn.LayerNorm(24)):
        with pytest.warns(UserWarning, match="nothing to swap"):
            assert not swap.apply(norm).skipped


def test_a_new_signature_is_named():
    class Later(AdaLayerNormZero):
        def forward(self, x, timestep=None, class_labels=None, hidden_dtype=None, emb=None, mask=None):
            return super().forward(x, timestep, class_labels, hidden_dtype, emb)

    with pytest.warns(UserWarning):
        [skipped] = swap.apply(Later(24)).skipped
    assert "its forward takes (x, timestep, class_labels, hidden_dtype, emb, mask), expected" in skipped.reason


def test_chunks_in_another_order_are_skipped():
    class Other(AdaLayerNormZeroSingle):
        def forward(self, x, emb=None):
            scale_msa, shift_msa, gate_msa = self.linear(self.silu(emb)).chunk(3, dim=1)
            return self.norm(x) * (1 + scale_msa[:, None]) + shift_msa[:, None], gate_msa

    with pytest.warns(UserWarning):
        [skipped] = swap.apply(Other(24)).skipped
    assert "in another order" in skipped.reason


def test_code_that_leaves_a_module_out_is_skipped_by_name():
    class Other(AdaLayerNormContinuous):
        def forward(self, x, conditioning_embedding):
            scale, shift = torch.chunk(self.linear(conditioning_embedding.to(x.dtype)), 2, dim=1)
            return self.norm(x) * (1 + scale)[:, None, :] + shift[:, None, :]

    with pytest.warns(UserWarning):
        [skipped] = swap.apply(Other(24, 24, elementwise_affine=False)).skipped
    assert skipped.reason == "its forward does not use silu, which the known one does"


def test_a_hook_on_a_norm_is_a_reason_before_the_swap_and_fires_after_it():
    norm = AdaLayerNormZero(24)
    inputs = norm_inputs(norm)
    expected = norm(**inputs)
    fired = []
    with swap.applied(norm, strict=True):
        norm.norm.register_forward_hook(lambda *args: fired.append(1))
        for found, right in zip(norm(**inputs), expected, strict=True):
            assert torch.equal(found, right)
    assert fired
    with pytest.warns(UserWarning):
        [skipped] = swap.apply(norm).skipped
    assert skipped.reason == "norm has hooks, which would not be called"


def test_derivatives_in_forward_mode_are_those_of_before():
    norm = AdaLayerNormZero(24)
    inputs = norm_inputs(norm)
    direction = torch.ones_like(inputs["x"])

    def tangent():
        return torch.func.jvp(lambda x: norm(x, emb=inputs["emb"])[0], (inputs["x"],), (direction,))[1]

    expected = tangent()
    with swap.applied(norm, strict=True):
        assert torch.equal(tangent(), expected)


def test_fp32_norms_are_recognised_by_their_code():
    assert diffusers_norms._is_fp32_norm(FP32LayerNorm)
    assert not diffusers_norms._is_fp32_norm(nn.LayerNorm)
