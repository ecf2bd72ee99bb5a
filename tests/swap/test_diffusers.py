"""Tests swapping diffusers' blocks: outputs and gradients as near to exact ones as before the swap."""

import copy
import pickle

import pytest
import torch
from torch import nn

from tests.helpers.rounding import assert_as_near
from var_kernels import swap
from var_kernels.swap import diffusers_norms
from var_kernels.swap.structure import replaced

pytest.importorskip("diffusers")

from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from diffusers.models.transformers import transformer_flux

from tests.helpers.foreign_diffusers import MODELS, check, converted, make, step

CLASSES = {
    "dit": ["AdaLayerNormZero", "BasicTransformerBlock"],
    "pixart": ["BasicTransformerBlock"],
    "sd3": ["AdaLayerNormContinuous", "AdaLayerNormZero", "JointTransformerBlock"],
    "sd3.5": ["AdaLayerNormContinuous", "AdaLayerNormZero", "JointTransformerBlock", "SD35AdaLayerNormZeroX"],
    "flux": ["AdaLayerNormContinuous", "AdaLayerNormZero", "AdaLayerNormZeroSingle", "FluxSingleTransformerBlock",
             "FluxTransformerBlock"],
    "sana": ["SanaTransformerBlock"],
}  # fmt: skip


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


# ---- whole models ------------------------------------------------------------------------------------------------


def test_everything_is_swapped(name):
    model, _ = make(name)
    keys = list(model.state_dict())
    report = swap.apply(model, strict=True)
    assert sorted({entry.cls for entry in report.swapped}) == CLASSES[name]
    assert list(model.state_dict()) == keys


# How often a forward of two blocks of each kind calls our two ops.
OPS = {"dit": (2, 2), "pixart": (4, 0), "sd3": (5, 3), "sd3.5": (6, 3), "flux": (7, 4), "sana": (4, 0)}


@pytest.mark.parametrize("autocast", [False, True])
def test_our_ops_are_called(name, autocast, monkeypatch):
    model, inputs = make(name)
    calls = []
    for op in ("adaln_layer_norm", "gated_residual_adaln"):
        function = getattr(diffusers_norms, op)
        monkeypatch.setattr(
            diffusers_norms,
            op,
            lambda *args, op=op, function=function, **kwargs: calls.append(op) or function(*args, **kwargs),
        )
    with swap.applied(model), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(**inputs)
    assert (calls.count("adaln_layer_norm"), calls.count("gated_residual_adaln")) == OPS[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_and_inference(name, dtype):
    check(*make(name), dtype)


def test_training_and_inference_under_autocast(name):
    check(*make(name), autocast=True)


def test_gradient_checkpointing(name):
    model, inputs = make(name)
    with swap.applied(model):
        expected = step(model, inputs)
        model.enable_gradient_checkpointing()
        found = step(model, inputs)
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(found[1][key], grad) for key, grad in expected[1].items())


def test_copies_are_swapped_and_pickles_and_saved_models_are_not(name, tmp_path):
    model, inputs = make(name)
    report = swap.apply(model)
    expected = step(model, inputs)
    twin = copy.deepcopy(model)
    assert torch.equal(step(twin, inputs)[0], expected[0])
    assert swap.apply(twin).swapped == report.swapped
    loaded = pickle.loads(pickle.dumps(model))
    assert not any(replaced(module, "forward") for module in loaded.modules())
    model.save_pretrained(tmp_path)
    saved = type(model).from_pretrained(tmp_path)
    assert not any(replaced(module, "forward") for module in saved.modules())
    for other in (loaded, saved):
        assert swap.apply(other, strict=True).swapped == report.swapped
        assert torch.equal(step(other.train(), inputs)[0], expected[0])


def test_hooks_of_modules_fire(name):
    model, inputs = make(name)
    report = swap.apply(model)
    left_out = {f"{entry.path}.{norm}" for entry in report.swapped
                for norm in ("norm", "norm1", "norm2", "norm2_context", "norm3")}  # fmt: skip
    report.revert()
    fired = []
    for path, module in model.named_modules():
        if path not in left_out or not isinstance(module, nn.LayerNorm):
            module.register_forward_hook(lambda *args, path=path: fired.append(path))

    def run():
        fired.clear()
        model(**inputs)
        return list(fired)

    expected = run()
    with swap.applied(model, strict=True):
        assert run() == expected


@pytest.mark.parametrize("name", ["dit"])
def test_a_compiled_block_gives_the_same(name):
    model, inputs = make(name)
    with swap.applied(model):
        expected = step(model, inputs)
        model.transformer_blocks[0].compile(fullgraph=True, backend="aot_eager")
        found = step(model, inputs)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)


def test_lora_adapters_work(name):
    peft = pytest.importorskip("peft")
    model, inputs = make(name)
    options = peft.LoraConfig(r=2, target_modules=["linear", "to_q"], init_lora_weights=False)
    peft.inject_adapter_in_model(options, model)
    check(model, inputs)


# ---- blocks ------------------------------------------------------------------------------------------------------


def test_float16(name):
    model, inputs = make(name)
    check(model, inputs, torch.float16)


def test_float16_is_clipped_as_before():
    model, inputs = make("flux")
    model.half()
    with torch.no_grad():
        for block in (*model.transformer_blocks, *model.single_transformer_blocks):
            for layer in (getattr(block, "ff_context", None), getattr(block, "proj_out", None)):
                for parameter in () if layer is None else layer.parameters():
                    parameter.mul_(300)
        expected = model(**converted(inputs, torch.float16)).sample
        seen = []
        with swap.applied(model):
            model.single_transformer_blocks[0].register_forward_hook(lambda _, args, out: seen.extend(out))
            found = model(**converted(inputs, torch.float16)).sample
    assert max(tensor.abs().max() for tensor in seen) == 65504
    assert torch.equal(found.isfinite(), expected.isfinite())


def test_a_residual_of_another_dtype_than_its_table():
    """PixArt under autocast: the first block gets a narrow residual and wide modulations."""
    block = BasicTransformerBlock(24, 2, 12, norm_type="ada_norm_single", norm_elementwise_affine=False)
    x, timestep = torch.randn(2, 7, 24).bfloat16(), torch.randn(2, 6 * 24)
    with torch.autocast("cpu", torch.bfloat16):
        expected = block(x, timestep=timestep)
        with swap.applied(block, strict=True):
            found = block(x, timestep=timestep)
    assert found.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_image_adapters_of_flux():
    model, inputs = make("flux")
    torch.manual_seed(1)
    for block in model.transformer_blocks:
        processor = transformer_flux.FluxIPAdapterAttnProcessor(hidden_size=32, cross_attention_dim=16)
        block.attn.set_processor(processor)
    block, adapter = model.transformer_blocks[0], [torch.randn(2, 4, 16)]
    hidden = {
        "hidden_states": torch.randn(2, 6, 32), "encoder_hidden_states": torch.randn(2, 4, 32),
        "temb": torch.randn(2, 32), "joint_attention_kwargs": {"ip_hidden_states": adapter},
    }  # fmt: skip
    exact_kwargs = {"joint_attention_kwargs": {"ip_hidden_states": [adapter[0].double()]}}
    exact = step(copy.deepcopy(block).double(), {**converted(hidden, torch.float64), **exact_kwargs})
    plain = step(block, hidden)
    with swap.applied(model, strict=True):
        assert_as_near(step(block, hidden), plain, exact)


def calls_of(block, *calls):
    """Results of the calls before and after the swap, and the reasons of calls that were left to the original."""
    before = [call(block) for call in calls]
    with swap.applied(block, strict=True) as report:
        after = [call(block) for call in calls]
        return before, after, {reason for _, reason in report.left_to_the_original}


def test_feed_forward_in_chunks_is_left_to_the_original():
    joint = JointTransformerBlock(24, 2, 12)
    joint.set_chunk_feed_forward(2, dim=1)
    x, context, temb = torch.randn(2, 6, 24), torch.randn(2, 4, 24), torch.randn(2, 24)
    before, after, reasons = calls_of(joint, lambda block: block(x, context, temb))
    for found, right in zip(after[0], before[0], strict=True):  # the norms inside are ours
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)
    assert reasons == {"feed-forward in chunks"}
    basic = BasicTransformerBlock(24, 2, 12, norm_type="ada_norm_single", norm_elementwise_affine=False)
    basic.set_chunk_feed_forward(2, dim=1)
    before, after, reasons = calls_of(basic, lambda block: block(x, timestep=torch.ones(2, 144)))
    assert torch.equal(after[0], before[0])
    assert reasons == {"feed-forward in chunks"}


def test_gligen_and_scales_are_left_to_the_original():
    block = BasicTransformerBlock(
        24, 2, 12, norm_type="ada_norm_single", norm_elementwise_affine=False, attention_type="gated",
        cross_attention_dim=24,
    ).eval()  # fmt: skip
    block.fuser.alpha_attn.data.fill_(1.0)
    x, timestep, text, boxes = torch.randn(2, 6, 24), torch.randn(2, 144), torch.randn(2, 3, 24), torch.randn(2, 3, 24)

    def call(**kwargs):
        return lambda block: block(x, encoder_hidden_states=text, timestep=timestep, cross_attention_kwargs=kwargs)

    before, after, reasons = calls_of(block, call(gligen={"objs": boxes}))
    assert torch.equal(after[0], before[0]) and not torch.allclose(after[0], call()(block))
    assert reasons == {"GLIGEN"}
    before, after, reasons = calls_of(block, call(scale=0.5))
    assert torch.equal(after[0], before[0])
    assert reasons == {"a deprecated scale of LoRA layers"}


def test_blocks_without_adaptive_norms_are_not_mentioned():
    with pytest.warns(UserWarning, match="nothing to swap"):
        assert not swap.apply(BasicTransformerBlock(24, 2, 12)).skipped


def test_a_second_attention_beside_ada_norm_zero_is_skipped():
    block = BasicTransformerBlock(
        24, 2, 12, norm_type="ada_norm_zero", num_embeds_ada_norm=10, cross_attention_dim=24,
        norm_elementwise_affine=False,
    )  # fmt: skip
    [skipped] = swap.apply(block).skipped
    assert skipped == ("", "BasicTransformerBlock", "a second attention with norm_type ada_norm_zero")


@pytest.mark.parametrize("path", ["transformer_blocks.1", "transformer_blocks.1.norm2"])
def test_blocks_with_other_code_are_skipped_by_name(name, path):
    model, inputs = make(name)
    path = path.replace("norm2", "norm3") if name == "dit" else path
    module = model.get_submodule(path)

    class Other(type(module)):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    module.__class__ = Other
    [skipped] = swap.apply(model).skipped
    assert skipped.path == "transformer_blocks.1"
    assert "its forward takes ()" in skipped.reason or "expected an nn.LayerNorm" in skipped.reason
