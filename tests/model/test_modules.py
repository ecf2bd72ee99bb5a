"""The networks behave like other modules of PyTorch: hooks, wrapped and replaced layers, dtypes, meta tensors."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.helpers.models import tiny_var, tiny_vqvae
from var import VAR, VQVAE, Generator, generate, official_state_dict
from var.model.modules import is_plain

LABELS = torch.tensor([0, 4, 2, 1, 3])
OPTIONS = {"seed": 3, "top_k": 9, "top_p": 0.9, "cfg": 2.0}


def teacher_forcing_input(model):
    length = model.config.schedule.length - model.config.schedule.lengths[0]
    return torch.randn(len(LABELS), length, model.config.z_channels, generator=torch.Generator().manual_seed(1))


def logits(model):
    return model(LABELS, teacher_forcing_input(model))


class LoRA(nn.Module):
    """A low-rank adapter around a linear layer, as adapter libraries put it into a model."""

    def __init__(self, layer, rank=2):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layer = layer
        self.a = nn.Parameter(torch.randn(rank, layer.in_features, generator=generator))
        self.b = nn.Parameter(torch.randn(layer.out_features, rank, generator=generator) * 0.3)

    def forward(self, x):
        return self.layer(x) + F.linear(F.linear(x, self.a), self.b)

    def merged(self):
        """One linear layer that computes the same."""
        layer = copy.deepcopy(self.layer)
        with torch.no_grad():
            layer.weight += self.b @ self.a
        return layer


class Subclass(nn.Linear):
    def forward(self, x):
        return -3 * super().forward(x)


class Tripled(nn.Module):
    def forward(self, weight):
        return -3 * weight


LINEARS = [
    "blocks.0.attn.mat_qkv", "blocks.1.attn.proj", "blocks.0.ffn.fc1", "blocks.1.ffn.fc2", "blocks.0.ada_lin.1",
    "head_nm.ada_lin.1", "word_embed", "head",
]  # fmt: skip


# ---- layers that were replaced or wrapped --------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*LINEARS, "shared_ada_lin.1"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_adapter_around_a_layer_was_bypassed(name, precision):
    model, vqvae = tiny_var(shared_aln=name.startswith("shared")), tiny_vqvae()
    untouched = logits(model)
    adapter = LoRA(model.get_submodule(name))
    merged = copy.deepcopy(model)
    merged.set_submodule(name, adapter.merged())
    model.set_submodule(name, adapter)
    torch.testing.assert_close(logits(model), logits(merged), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(model), untouched, atol=1e-2)
    options = {**OPTIONS, "precision": precision}
    found, expected = generate(model, vqvae, LABELS, **options), generate(merged, vqvae, LABELS, **options)
    if precision == "fp32":
        assert torch.equal(found.tokens, expected.tokens)
    else:
        assert (found.tokens[:, 0] == expected.tokens[:, 0]).float().mean() >= 0.8
    loss = logits(model).square().mean()
    assert all(gradient.abs().max() > 0 for gradient in torch.autograd.grad(loss, (adapter.a, adapter.b)))


@pytest.mark.parametrize("name", LINEARS)
def test_subclasses_parametrisations_and_hooks_are_called_in_generation(name):
    vqvae = tiny_vqvae()

    def subclassed(layer, parent, key):
        other = Subclass(layer.in_features, layer.out_features, bias=layer.bias is not None)
        other.load_state_dict(layer.state_dict())
        setattr(parent, key, other)

    def parametrised(layer, parent, key):
        nn.utils.parametrize.register_parametrization(layer, "weight", Tripled())

    def hooked(layer, parent, key):
        layer.register_forward_hook(lambda module, inputs, output: output * -4)

    def pre_hooked(layer, parent, key):
        layer.register_forward_pre_hook(lambda module, inputs: (inputs[0] * -3,))

    def with_another_forward(layer, parent, key):
        forward = layer.forward
        layer.forward = lambda x: -5 * forward(x)

    for change in (subclassed, parametrised, hooked, pre_hooked, with_another_forward):
        model = tiny_var()
        before = generate(model, vqvae, LABELS, **OPTIONS)
        layer, (parent, _, key) = model.get_submodule(name), name.rpartition(".")
        with torch.no_grad():
            inputs = torch.randn(4, layer.in_features)
            was = layer(inputs)
            change(layer, model.get_submodule(parent), key)
            layer = model.get_submodule(name)
            assert not torch.allclose(layer(inputs), was)
            equivalent = tiny_var()
            _fit(equivalent.get_submodule(name), layer)
        after = generate(model, vqvae, LABELS, **OPTIONS)
        assert torch.equal(after.tokens, generate(equivalent, vqvae, LABELS, **OPTIONS).tokens), change.__name__
        assert not torch.equal(after.tokens, before.tokens), change.__name__


def _fit(plain, layer):
    """Give the linear layer `plain` the weight and bias with which it computes the affine function `layer`."""
    zero = layer(torch.zeros(1, plain.in_features))[0]
    plain.weight.copy_((layer(torch.eye(plain.in_features)) - zero).T)
    if plain.bias is None:
        plain.bias = nn.Parameter(zero.clone())
    else:
        plain.bias.copy_(zero)


@pytest.mark.filterwarnings("ignore")  # it is deprecated in favour of torchao
def test_dynamic_quantisation_is_called(monkeypatch):
    model, vqvae = tiny_var(), tiny_vqvae()
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    called, forward = set(), torch.ao.nn.quantized.dynamic.Linear.forward
    recorded = lambda layer, x: called.add(layer) or forward(layer, x)  # noqa: E731
    monkeypatch.setattr(torch.ao.nn.quantized.dynamic.Linear, "forward", recorded)
    layers = {module for module in quantised.modules() if type(module) is torch.ao.nn.quantized.dynamic.Linear}
    for precision in ("fp32", "bf16"):
        called.clear()
        generate(quantised, vqvae, LABELS, precision=precision, **OPTIONS)
        assert called == layers and len(layers) == sum(type(module) is nn.Linear for module in model.modules())
    difference = (logits(quantised) - logits(model)).abs().max()
    assert 0 < difference < 0.1 * logits(model).abs().max()


def test_low_rank_adapters_of_peft():
    peft = pytest.importorskip("peft")
    model, vqvae = tiny_var(), tiny_vqvae()
    before = generate(model, vqvae, LABELS, **OPTIONS)
    targets = ["mat_qkv", "proj", "fc1", "fc2"]
    config = peft.LoraConfig(target_modules=targets, init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    adapted.eval()
    inner = adapted.base_model.model
    found = generate(inner, vqvae, LABELS, **OPTIONS)
    assert not torch.equal(found.tokens, before.tokens)
    with adapted.disable_adapter():
        assert torch.equal(generate(inner, vqvae, LABELS, **OPTIONS).tokens, before.tokens)
    merged = copy.deepcopy(adapted).merge_and_unload()
    torch.testing.assert_close(logits(inner), logits(merged), rtol=1e-4, atol=1e-4)
    assert torch.equal(generate(merged, vqvae, LABELS, **OPTIONS).tokens, found.tokens)
    loss = logits(adapted).square().mean()
    loss.backward()
    trained = [p for name, p in adapted.named_parameters() if p.requires_grad]
    assert trained and all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in trained)


@pytest.mark.parametrize("name", ["blocks.1", "blocks.0.attn", "blocks.0.ffn", "head_nm", "blocks.0.ada_lin"])
def test_hooks_of_blocks_fire_in_training_and_generation(name):
    model, vqvae = tiny_var(), tiny_vqvae()
    expected, plain = generate(model, vqvae, LABELS, **OPTIONS), logits(model)
    calls = []
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda module, inputs: calls.append("before")),
        model.get_submodule(name).register_forward_hook(lambda module, inputs, output: calls.append("after")),
    ]
    torch.testing.assert_close(logits(model), plain)
    assert calls == ["before", "after"]
    calls.clear()
    hooked = generate(model, vqvae, LABELS, **OPTIONS)
    assert calls and calls == ["before", "after"] * (len(calls) // 2)
    assert torch.equal(hooked.tokens, expected.tokens)
    for handle in handles:
        handle.remove()
    calls.clear()
    assert torch.equal(generate(model, vqvae, LABELS, **OPTIONS).tokens, expected.tokens) and not calls


def test_hooks_for_all_modules_fire():
    model, vqvae, seen = tiny_var(), tiny_vqvae(), set()
    expected = generate(model, vqvae, LABELS, **OPTIONS)
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: seen.add(module))
    try:
        assert torch.equal(generate(model, vqvae, LABELS, **OPTIONS).tokens, expected.tokens)
        used = {module for name, module in model.named_modules() if not list(module.children())}
        assert used <= seen
    finally:
        handle.remove()


class Flipping(nn.Module):
    """A layer in place of another one, which it uses. No norm behind it undoes what it does."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x).flip(1)


DECODER = [
    "post_quant_conv", "decoder.conv_in", "decoder.mid", "decoder.mid.block_1", "decoder.mid.block_1.norm1",
    "decoder.mid.block_1.conv1", "decoder.mid.block_2.conv2", "decoder.mid.attn_1", "decoder.mid.attn_1.norm",
    "decoder.mid.attn_1.qkv", "decoder.mid.attn_1.proj_out", "decoder.up.1", "decoder.up.1.upsample",
    "decoder.up.1.upsample.conv", "decoder.up.0.block.0.nin_shortcut", "decoder.norm_out", "decoder.conv_out",
]  # fmt: skip


@pytest.mark.parametrize("name", DECODER)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_replaced_layer_of_the_decoder_is_called(name, precision):
    model, vqvae = tiny_var(), tiny_vqvae(ch_mult=(1, 2))
    before = generate(model, vqvae, LABELS, precision=precision, **OPTIONS)
    vqvae.set_submodule(name, Flipping(vqvae.get_submodule(name)))
    after = generate(model, vqvae, LABELS, precision=precision, **OPTIONS)
    plain = vqvae.decode(after.tokens)
    tolerance = 1e-4 if precision == "fp32" else 0.1
    torch.testing.assert_close(after.images, plain, rtol=0, atol=tolerance)
    assert not torch.allclose(after.images, before.images, atol=1e-3)


def test_what_a_hook_of_the_decoder_saw_is_not_overwritten():
    model, vqvae, seen = tiny_var(), tiny_vqvae(), []
    for name in DECODER[2:5]:
        vqvae.get_submodule(name).register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    with torch.inference_mode():
        tokens = generate(model, vqvae, LABELS, **OPTIONS).tokens
        kept = [tensor.clone() for pair in seen for tensor in pair]
        found = [tensor for pair in seen for tensor in pair]
        seen.clear()
        vqvae.decode(tokens)
    expected = [tensor for pair in seen for tensor in pair]
    for one, other, copied in zip(found, expected, kept, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
        assert torch.equal(one, copied)


# ---- what is built on blocks ---------------------------------------------------------------------------------------


def gradients(model, loss):
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("fields", [{}, {"shared_aln": True}], ids=str)
def test_checkpointed_blocks_have_the_same_gradients(fields):
    plain, saving = tiny_var(**fields), tiny_var(**fields)
    for block in saving.blocks:
        forward = block.forward
        block.forward = lambda *args, forward=forward: checkpoint(forward, *args, use_reentrant=False)
    one, other = (gradients(model, logits(model).square().mean()) for model in (plain, saving))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_checkpoint_wrappers_and_compiled_blocks_generate():
    wrapper = pytest.importorskip("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")
    model, vqvae = tiny_var(), tiny_vqvae()
    expected, plain = generate(model, vqvae, LABELS, **OPTIONS), logits(model)
    model.blocks[0] = wrapper.checkpoint_wrapper(model.blocks[0])
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager", fullgraph=True)
    assert torch.equal(generate(model, vqvae, LABELS, **OPTIONS).tokens, expected.tokens)
    torch.testing.assert_close(logits(model), plain)


def test_a_block_compiles_whole():
    model = tiny_var()
    expected = logits(model)
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(model), expected)


def test_blocks_sharded_over_processes(tmp_path):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        plain, sharded, vqvae = tiny_var(), tiny_var(), tiny_vqvae()
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for block in sharded.blocks:
            fsdp.fully_shard(block, mesh=mesh)
        fsdp.fully_shard(sharded, mesh=mesh)
        one, other = (gradients(model, logits(model).square().mean()) for model in (plain, sharded))
        for name, gradient in one.items():
            torch.testing.assert_close(other[name].full_tensor(), gradient, msg=name)
        with pytest.raises(ValueError, match="var: expected all of the weights in this process, got a shard of"):
            generate(sharded, vqvae, LABELS)
    finally:
        torch.distributed.destroy_process_group()


# ---- dtypes, meta tensors, copies ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("fields", [{}, {"shared_aln": True, "attn_l2_norm": False}], ids=str)
@pytest.mark.parametrize("options", [{}, {"precision": "bf16"}, {"backend": "reference"}, {"pack": False}], ids=str)
def test_models_of_other_dtypes_generate(dtype, fields, options):
    model, vqvae = tiny_var(**fields).to(dtype), tiny_vqvae().to(dtype)
    result = generate(model, vqvae, LABELS, **options, **OPTIONS)
    widened = generate(copy.deepcopy(model).float(), copy.deepcopy(vqvae).float(), LABELS, **options, **OPTIONS)
    assert result.images.dtype == torch.float32
    assert torch.equal(result.tokens, widened.tokens)
    torch.testing.assert_close(result.images, widened.images, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_forward_in_another_dtype(dtype):
    model = tiny_var().to(dtype)
    found = model(LABELS, teacher_forcing_input(model).to(dtype))
    widened = copy.deepcopy(model).float()
    torch.testing.assert_close(found.float(), logits(widened), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("fields", [{}, {"shared_aln": True}, {"attn_l2_norm": False}], ids=str)
@pytest.mark.parametrize("assign", [False, True])
def test_what_follows_from_the_configuration_was_left_uninitialised(fields, assign):
    """`to_empty` fills buffers with whatever lies in memory; the levels of the tokens were such a buffer."""
    for source, vqvae in ((tiny_var(**fields), None), (None, tiny_vqvae())):
        model = source or vqvae
        with torch.device("meta"):
            other = type(model)(model.config)
        if not assign:
            other.to_empty(device="cpu")
            for tensor in (*other.parameters(), *other.buffers()):
                (tensor.data if tensor.is_floating_point() else tensor).fill_(77)
        other.load_state_dict(copy.deepcopy(model.state_dict()), strict=True, assign=assign)
        if source:
            assert torch.equal(logits(other.eval()), logits(model))
        else:
            images = torch.rand(2, 3, model.config.image_size, model.config.image_size) * 2 - 1
            assert torch.equal(other.eval()(images).reconstruction, model(images).reconstruction)


@pytest.mark.parametrize("fields", [{}, {"shared_aln": True}, {"attn_l2_norm": False}], ids=str)
def test_init_weights_initialises_everything(fields):
    """Biases of queries and values and the factors of heads had values from the constructor only."""
    expected = tiny_var(**fields)
    with torch.device("meta"):
        model = VAR(expected.config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(77)
    model.init_weights(torch.Generator().manual_seed(0), gamma=0.5, head=1.0)
    for name, parameter in expected.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name


def test_a_model_on_the_meta_device_is_refused():
    with torch.device("meta"):
        model = VAR(tiny_var().config)
    with pytest.raises(ValueError, match="var: expected weights, got .* on the meta device"):
        Generator(model, tiny_vqvae())


@pytest.mark.parametrize("make", [tiny_var, tiny_vqvae])
def test_models_are_copied_and_pickled(make):
    model = make()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.config == model.config and type(other) is type(model) in (VAR, VQVAE)
        for name, tensor in model.state_dict().items():
            assert torch.equal(other.state_dict()[name], tensor) and other.state_dict()[name] is not tensor
        other.load_state_dict(official_state_dict(model))  # the hooks are there too


def test_plain_modules():
    layer = nn.Linear(3, 3)
    assert is_plain(layer, nn.Linear) and not is_plain(layer, nn.Module) and not is_plain(Subclass(3, 3), nn.Linear)
    handle = layer.register_full_backward_hook(lambda *_: None)
    assert not is_plain(layer, nn.Linear)
    handle.remove()
    assert is_plain(layer, nn.Linear)
