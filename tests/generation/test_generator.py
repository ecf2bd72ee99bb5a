"""The generation engine: accuracy against fp64 and the plain networks, options, memory and reuse."""

import copy
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import var
from tests.helpers.models import inference_transformer, stepwise_logits, tiny_var, tiny_vqvae
from var import Generator, VARConfig, VQVAEConfig, generate
from var.generation import memory
from var.generation.decoder import InferenceDecoder, Spaces
from var.generation.noise import fill_exponential
from var_kernels.inference.packed_linear import PackedLinear
from var_kernels.native import load
from var_kernels.testing import stated_order

LABELS = torch.tensor([0, 4, 2, 1, 3])
OPTIONS = {"top_k": 9, "top_p": 0.9, "cfg": 2.0}


def on_reference(model):
    """A copy of a transformer on the reference backend."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, "backend"):
            module.backend = "reference"
    return model


def rms(error):
    return error.double().square().mean().sqrt()


# ---- the networks --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded():
    """The embedded model, labels, tokens that it generates for them, their input for training, and the fp64 logits."""
    pipeline, labels = var.load(), torch.arange(6)
    tokens = generate(pipeline.var, pipeline.vqvae, labels, seed=0, top_k=900, top_p=0.96).tokens
    inputs = pipeline.vqvae.teacher_forcing_input(tokens)
    with torch.no_grad():
        exact = on_reference(pipeline.var).double()(labels, inputs.double())
    return pipeline, labels, tokens, inputs, exact


@torch.inference_mode()
def test_logits_against_float64(embedded):
    """Errors in fp32 (bf16) are at most twice those of the plain model in fp32 (bf16 autocast) on two images."""
    pipeline, labels, _, inputs, exact = embedded
    plain = on_reference(pipeline.var)
    with stated_order():
        fp32 = plain(labels[:2], inputs[:2])
        with torch.autocast("cpu", torch.bfloat16):
            autocast = plain(labels[:2], inputs[:2])
    for dtype, plain_result in ((torch.float32, fp32), (torch.bfloat16, autocast)):
        logits = stepwise_logits(inference_transformer(pipeline.var, len(labels), dtype), labels, inputs)
        assert logits.dtype == torch.float32
        error, limit = logits - exact, plain_result - exact[:2]
        assert rms(error) <= 2 * rms(limit) and error.abs().max() <= 2 * limit.abs().max(), dtype
        assert rms(error) > 0


@torch.inference_mode()
def test_decoder_against_float64(embedded):
    pipeline, _, tokens, _, _ = embedded
    vqvae = pipeline.vqvae
    f_hat = list(vqvae._scales(tokens))[-1][0]
    exact = copy.deepcopy(vqvae).double().decode_features(f_hat.double())
    with stated_order():
        fp32 = vqvae.decode_features(f_hat[:2])
        with torch.autocast("cpu", torch.bfloat16):
            autocast = vqvae.decode_features(f_hat[:2]).float()
    for dtype, plain_result in ((torch.float32, fp32), (torch.bfloat16, autocast)):
        images = InferenceDecoder(vqvae, dtype)(f_hat)
        assert images.dtype == torch.float32
        assert rms(images - exact) <= 2 * rms(plain_result - exact[:2]), dtype


def test_decoding_in_several_threads(embedded):
    """Partial images may be decoded in other threads, which share the decoder's memory."""
    pipeline, _, tokens, _, _ = embedded
    with torch.inference_mode():
        f_hat = list(pipeline.vqvae._scales(tokens))[-1][0]
        decoder = InferenceDecoder(pipeline.vqvae)
        want = [decoder(part) for part in f_hat.split(1)]

    def decoded(number):
        with torch.inference_mode():
            return decoder(f_hat[number : number + 1])

    numbers = list(range(len(f_hat))) * 8
    with ThreadPoolExecutor(4) as pool:
        for number, image in zip(numbers, pool.map(decoded, numbers), strict=True):
            assert torch.equal(image, want[number])


@torch.inference_mode()
def test_bf16_draws_images_of_the_same_classes(embedded):
    """With the same seeds, bf16 draws nearly the same first tokens as fp32. A token that differs changes later ones."""
    pipeline = embedded[0]
    labels = torch.arange(40) % 10
    fp32, bf16 = (
        Generator(pipeline.var, pipeline.vqvae, batch_size=40, precision=precision)(labels, seeds=range(40))
        for precision in ("fp32", "bf16")
    )
    first = slice(0, pipeline.var.config.schedule.starts[2])
    assert (fp32.tokens[:, first] == bf16.tokens[:, first]).float().mean() > 0.95


@pytest.mark.parametrize("fields", [{}, {"shared_aln": True}, {"attn_l2_norm": False}, {"heads": 1}], ids=str)
def test_cached_steps_equal_one_forward(fields):
    model, vqvae = tiny_var(**fields), tiny_vqvae()
    tokens = torch.randint(0, 24, (5, 14), generator=torch.Generator().manual_seed(0))
    inputs = vqvae.teacher_forcing_input(tokens)
    with torch.inference_mode():
        logits = stepwise_logits(inference_transformer(model, 7), LABELS, inputs)  # it has room for more rows
        torch.testing.assert_close(logits, on_reference(model)(LABELS, inputs), rtol=1e-4, atol=1e-4)


def test_guidance_before_the_head_equals_guidance_of_the_logits():
    with torch.inference_mode():
        transformer = inference_transformer(tiny_var(), 4)
        x = transformer.begin(torch.tensor([0, 1, 5, 5]))
        conditional, unconditional = transformer.step(x, 0).chunk(2)
        for guidance in (0.0, 0.7, 4.0):
            guided = transformer.step(x, 0, guidance)
            expected = (1 + guidance) * conditional - guidance * unconditional
            torch.testing.assert_close(guided, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(transformer.step(x, 0, 0.0), conditional, rtol=1e-6, atol=1e-6)


# ---- the object ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("pack", [True, False])
def test_reused_for_any_number_of_calls(precision, pack):
    model, vqvae = tiny_var(), tiny_vqvae()
    generator = Generator(model, vqvae, batch_size=5, precision=precision, pack=pack)
    first = generator(LABELS, seed=3, **OPTIONS)
    generator(LABELS[:2], seed=4, cfg=0.0)  # fewer rows and other labels, which must leave no trace
    again = generator(LABELS, seed=3, **OPTIONS)
    assert torch.equal(first.tokens, again.tokens) and torch.equal(first.images, again.images)
    whole = generate(model, vqvae, LABELS, seed=3, precision=precision, pack=pack, **OPTIONS)
    assert torch.equal(whole.tokens, again.tokens) and torch.equal(whole.images, again.images)


def test_an_image_depends_on_its_own_seed_only():
    generator = Generator(tiny_var(), tiny_vqvae(), batch_size=5)
    seeds = [7, -1, 1 << 40, 0, 7]
    everything = generator(LABELS, seeds=seeds, **OPTIONS)
    for part in (slice(2, 3), slice(1, 4)):
        alone = generator(LABELS[part], seeds=seeds[part], **OPTIONS)
        assert torch.equal(alone.tokens, everything.tokens[part])
        torch.testing.assert_close(alone.images, everything.images[part], rtol=0, atol=1e-5)
    smooth = generator(LABELS, seeds=seeds, more_smooth=True, **OPTIONS)
    alone = generator(LABELS[2:3], seeds=seeds[2:3], more_smooth=True, **OPTIONS)
    torch.testing.assert_close(alone.images, smooth.images[2:3], rtol=0, atol=1e-4)
    assert not torch.equal(generator(LABELS, seeds=[1, 2, 3, 4, 5], **OPTIONS).tokens, everything.tokens)


@pytest.mark.parametrize("count", [1, 100, (1 << 17) + 5])
def test_exponential_noise_is_torchs_own(count):
    ours, generators = torch.full((count,), torch.nan), [torch.Generator().manual_seed(3) for _ in range(2)]
    fill_exponential(ours, generators[0])
    assert torch.equal(ours, torch.empty(count).exponential_(generator=generators[1]))
    assert torch.equal(generators[0].get_state(), generators[1].get_state())


def test_stream_equals_one_call_for_all_labels():
    generator = Generator(tiny_var(), tiny_vqvae(), batch_size=2)
    parts = list(generator.stream(LABELS, seeds=[1, 2, 3, 4, 5], **OPTIONS))
    assert [len(part.images) for part in parts] == [2, 2, 1]
    whole = Generator(tiny_var(), tiny_vqvae(), batch_size=5)(LABELS, seeds=[1, 2, 3, 4, 5], **OPTIONS)
    assert torch.equal(torch.cat([part.tokens for part in parts]), whole.tokens)
    assert all(torch.is_tensor(part.images) for part in generator.stream(LABELS))
    with pytest.raises(ValueError, match="seed: expected seeds"):
        next(generator.stream(LABELS, seed=1))


def test_a_generator_keeps_its_weights_and_the_model_stays_trainable():
    model, vqvae = tiny_var(), tiny_vqvae()
    generator = Generator(model, vqvae, batch_size=5)
    before = generator(LABELS, seed=0)
    with torch.no_grad():
        model.head.weight.neg_()
    assert torch.equal(generator(LABELS, seed=0).tokens, before.tokens)
    assert not torch.equal(generate(model, vqvae, LABELS, seed=0).tokens, before.tokens)
    tokens = before.tokens.clone()
    loss = torch.nn.functional.cross_entropy(
        model(LABELS, vqvae.teacher_forcing_input(tokens)).flatten(0, 1), tokens.flatten()
    )
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_autocast_outside_changes_nothing():
    generator = Generator(tiny_var(), tiny_vqvae(), batch_size=5)
    plain = generator(LABELS, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(generator(LABELS, seed=1).images, plain.images)
        low = generate(tiny_var(), tiny_vqvae(), LABELS, seed=1)
    assert torch.equal(low.images, generate(tiny_var(), tiny_vqvae(), LABELS, seed=1, precision="bf16").images)
    assert not torch.equal(low.images, plain.images)


def test_memory_does_not_grow_from_call_to_call(peak_growth):
    preparation = """
import torch, var
pipeline = var.load()
generator = var.Generator(pipeline.var, pipeline.vqvae, batch_size=16)
labels = torch.arange(16) % 10
for _ in range(3):
    generator(labels, seed=0)"""
    measured = "for seed in range(8): generator(labels, seed=seed)"  # 1.5 MiB of images
    assert peak_growth(preparation, measured, mmap_threshold=64 << 10) < 1 << 20


def test_an_empty_batch_finds_an_empty_space():
    """Empty spaces and empty images both have the address 0. Without the library, an empty batch found no space."""
    empty = torch.zeros(0, 8, 3, 3)
    spaces = Spaces(torch.float32)
    spaces.reserve(0)
    assert spaces.beside(empty.shape, empty) is None
    spaces.reserve(8)
    assert spaces.beside(empty.shape, empty).shape == empty.shape
    assert spaces.beside(torch.Size((1, 9, 1, 1)), empty) is None


@pytest.mark.skipif(sys.platform != "linux", reason="counts page faults as Linux does")
@pytest.mark.skipif(not load.native_library().available, reason="without our kernels, malloc allocates the activations")
def test_the_decoder_reuses_its_memory_after_the_first_call():
    """With malloc's default settings, activations of 40 MiB and more were returned to the system after each use."""
    program = """
import resource, torch, var
from var.generation.decoder import InferenceDecoder
with torch.inference_mode():
    vqvae = var.VQVAE(var.VQVAEConfig(ch=64, z_channels=8, ch_mult=(1,) * 6, num_res_blocks=1, patch_nums=(1, 16)))
    decoder, f_hat = InferenceDecoder(vqvae), torch.zeros(1, 8, 16, 16)
    decoder(f_hat)
    assert max(space.nbytes for space in decoder._spaces._flat) > 40 << 20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        decoder(f_hat)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"""
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    answer = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert int(answer.stdout) < 3 * 4000  # the 5 MB of the images, and small allocations


def test_bytes_are_what_the_tensors_take():
    pipeline = var.Pipeline(tiny_vqvae(), tiny_var())
    generator = Generator(pipeline.var, pipeline.vqvae, batch_size=3)
    config = pipeline.var.config
    held = generator.nbytes
    assert held["KV cache"] == 2 * 6 * config.schedule.length * config.width * config.depth * 4
    linears = sum(
        PackedLinear(module.weight).nbytes for name, module in pipeline.var.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "word_embed"
    )  # fmt: skip
    assert held["packed weights"] == linears
    assert Generator(pipeline.var, pipeline.vqvae, pack=False).nbytes["packed weights"] == 0
    if held["packed weights"]:
        fixed = memory.fixed_bytes(config, pipeline.vqvae.config, 4)
        assert fixed <= held["packed weights"] + held["decoder"] < fixed * 1.05  # without biases and norms


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"precision": "fp8"}, "precision: expected one of fp32, bf16"),
        ({"batch_size": 0}, "batch_size: expected at least 1"),
    ],
)
def test_refuses_bad_construction(arguments, match):
    with pytest.raises(ValueError, match=match):
        Generator(tiny_var(), tiny_vqvae(), **arguments)


@pytest.mark.parametrize(
    ("labels", "options", "match"),
    [
        (LABELS, {}, "labels: expected at most batch_size = 3, got 5"),
        (LABELS[:2], {"seeds": [1]}, "seeds: expected 2 integers, one for each label, got shape"),
        (LABELS[:2], {"seeds": [1, 2], "seed": 1}, "seed: expected one of seed and seeds"),
        (torch.tensor([6]), {}, "labels: expected values in"),
        (LABELS[:2], {"cfg": -1.0}, "cfg"),
        (LABELS[:2], {"top_p": 2.0}, "top_p"),
    ],
)
def test_refuses_bad_calls(labels, options, match):
    with pytest.raises(ValueError, match=match):
        Generator(tiny_var(), tiny_vqvae(), batch_size=3)(labels, **options)


# ---- memory --------------------------------------------------------------------------------------------------------


def test_weights_that_are_not_packed_count_as_a_copy_in_another_dtype_only():
    # On a GPU, fp32 projections use the model's own weights. Their bytes were counted as those of a second copy.
    vqvae, transformer = VQVAEConfig(), VARConfig(depth=16)
    fp32, bf16 = (memory.fixed_bytes(transformer, vqvae, itemsize, "cuda") for itemsize in (4, 2))
    assert fp32 == memory.fixed_bytes(VARConfig(depth=30), vqvae, 4, "cuda")  # the decoder alone
    with torch.device("meta"):
        modules = var.VAR(transformer).modules()
    linears = sum(module.weight.numel() for module in modules if isinstance(module, torch.nn.Linear))
    kept = transformer.width * (vqvae.z_channels + transformer.vocab_size)  # word_embed and head stay fp32
    assert bf16 == fp32 // 2 + 2 * (linears - kept)


def test_a_batch_that_does_not_fit_is_refused_before_it_is_tried(monkeypatch):
    vqvae, transformer = VQVAEConfig(), VARConfig(depth=16)
    fixed = memory.fixed_bytes(transformer, vqvae, 4)
    needed = [fixed + memory.batch_bytes(transformer, vqvae, n, 4) for n in (1, 8, 200)]
    assert 1 << 30 < needed[0] < 4 << 30 < needed[2]
    monkeypatch.setattr(memory, "available_bytes", lambda device: needed[1])
    memory.check_batch(transformer, vqvae, 8, 4, "cpu")
    with pytest.raises(ValueError, match="at most 8: 200 images at a time need"):
        memory.check_batch(transformer, vqvae, 200, 4, "cpu")
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1 << 20)
    with pytest.raises(ValueError, match="a smaller model"):
        memory.check_batch(transformer, vqvae, 1, 4, "cpu")
    monkeypatch.setattr(memory, "available_bytes", lambda device: None)
    memory.check_batch(transformer, vqvae, 10**6, 4, "cpu")


def test_available_memory_is_the_smaller_of_machine_and_container(monkeypatch, tmp_path):
    free = memory.available_bytes()
    assert free is None or 1 << 20 < free < 1 << 50
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    assert memory.available_bytes() == 600000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_bytes() != 600000


def test_keeping_freed_memory_avoids_page_faults():
    """Counts the page faults of calls whose activations are larger than what malloc keeps by itself."""
    program = """
import resource, sys, torch
from var.generation.memory import keep_freed_memory
if "keep" in sys.argv:
    print(keep_freed_memory(), end=" ")
conv = torch.nn.Conv2d(8, 8, 3, padding=1).requires_grad_(False)
x = torch.zeros(1, 8, 1100, 1100)
def call():
    y = x
    for _ in range(3):
        y = torch.nn.functional.silu(conv(y)) + y
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    answers = [
        subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True).stdout
        for arguments in ([], ["keep"])
    ]
    kept, faults = answers[1].split()[0] == "True", [int(answer.split()[-1]) for answer in answers]
    assert not kept or 10 * faults[1] < faults[0], faults
