"""Names that users import stay where they are, wherever the code behind them lies."""

import importlib

import pytest

NAMES = {
    "var_kernels": (
        "PackedConv3x3", "PackedLinear", "adaln_layer_norm", "block_causal_attention", "gated_residual_adaln",
        "group_norm_silu", "multi_scale_quantize", "nearest_code", "next_scale_input", "packed_linear.PackedLinear",
        "qk_norm_cache", "sample_tokens", "winograd_conv.PackedConv3x3",
    ),
    "var_kernels.testing": ("SCHEDULES", "SHAPES", "assert_accurate", "attention_inputs", "modulation", "randn"),
    "var_kernels.backends": ("BACKENDS", "OPS", "resolve", "unavailable_reason"),
    "var": (
        "PRESETS", "VAR", "VQVAE", "Generated", "Generator", "Pipeline", "ScaleSchedule", "VARConfig", "VQVAEConfig",
        "VAR.generate", "checkpoints.official_state_dict", "edit", "generate", "keep_freed_memory", "load",
        "memory.keep_freed_memory", "official_state_dict", "save",
    ),
    "var.data": ("DataError", "FashionMNIST", "ImageData", "ImageFolder", "open_dataset"),
}  # fmt: skip


@pytest.mark.parametrize("module", NAMES)
def test_public_names_are_importable(module):
    for name in NAMES[module]:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)


@pytest.mark.parametrize("module", ["var", "var_kernels"])
def test_everything_that_a_package_exports_is_there(module):
    package = importlib.import_module(module)
    assert [name for name in package.__all__ if not hasattr(package, name)] == []
