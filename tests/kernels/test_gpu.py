"""Every op on a GPU: `pytest -m gpu` runs these tests, which are skipped if there is no GPU.

Arithmetic, masks and addresses, which tests/kernels/*/test_triton.py and test_cuda.py check without a GPU, are tested
here again, at the sizes of the model family. Streams, graphs, inductor and a second device can only be tested on a GPU.
"""

import contextlib
import functools

import pytest
import torch

import var
from var_kernels import (
    adaln_layer_norm,
    backends,
    block_causal_attention,
    gated_residual_adaln,
    multi_scale_quantize,
    nearest_code,
    next_scale_input,
    qk_norm_cache,
    sample_tokens,
)
from var_kernels.testing import (
    SCHEDULES,
    assert_accurate,
    attention_inputs,
    modulation,
    randn,
    scale_lens,
    stated_order,
)

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=backends.GPU_BACKENDS)
def gpu(request):
    """The name of each GPU backend."""
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    for op in backends.GPU_OPS:
        reason = backends.unavailable_reason(request.param, DEVICE, op)
        if reason is not None:
            pytest.skip(f"{op}: {reason}")
    return request.param


def results(call, tensors, backend, dtype=None):
    """Outputs, and the gradient of every tensor for fixed gradients of the outputs, in a list."""
    leaves = [t.detach().to(DEVICE, dtype or t.dtype).requires_grad_() for t in tensors]
    outputs = [out for out in call(*leaves, backend=backend) if out.requires_grad]
    cotangents = [randn(out.numel(), seed=50 + i).to(tensors[0].dtype).to(out).view_as(out)
                  for i, out in enumerate(outputs)]  # fmt: skip
    gradients = torch.autograd.grad(outputs, leaves, cotangents)
    return [t.detach() for t in (*outputs, *gradients)]


def check(call, tensors, backend) -> None:
    """Outputs and gradients are as accurate as plain PyTorch in the same dtype, and the same in a second run."""
    exact = results(call, tensors, "reference", torch.float64)
    with stated_order():
        plain = results(call, tensors, "reference")
    actual, again = results(call, tensors, backend), results(call, tensors, backend)
    for i, (found, repeated, *others) in enumerate(zip(actual, again, plain, exact, strict=True)):
        assert torch.equal(found, repeated), f"result {i} differs between two runs"
        assert_accurate(found, *others, name=f"result {i}")


def attention(lens, **options):
    return lambda q, k, v, backend: [block_causal_attention(q, k, v, lens, backend=backend, **options)]


# ---- accuracy at the sizes of the model family -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 40, 64, 72, 96, 104, 120, 126, 128])
def test_attention_head_dims(gpu, head_dim, dtype):
    lens = scale_lens("256px")
    check(attention(lens), attention_inputs(2, 2, sum(lens), head_dim, seed=1, dtype=dtype), gpu)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("schedule", ["embedded", "512px", "infinity-256px", "infinity-512px"])
def test_attention_schedules(gpu, schedule, dtype):
    lens = scale_lens(schedule)
    check(attention(lens), attention_inputs(1, 3, sum(lens), 64, seed=2, dtype=dtype), gpu)


@pytest.mark.parametrize(("queries", "q_offset"), [(1, None), (256, None), (169, 255), (300, 101)])
def test_attention_against_a_cache(gpu, queries, q_offset):
    lens = scale_lens("256px")
    q, k, v = attention_inputs(2, 8, 680, 128, seed=3, dtype=torch.bfloat16, kv_heads=2, query_length=queries)

    def attend(dtype, backend):
        tensors = (t.to(DEVICE, dtype) for t in (q, k, v))
        return block_causal_attention(*tensors, lens, q_offset=q_offset, backend=backend)

    with torch.no_grad():
        found, exact = attend(None, gpu), attend(torch.float64, "reference")
        with stated_order():
            plain = attend(None, "reference")
    assert_accurate(found, plain, exact, name="out")


def test_attention_of_views(gpu):
    lens = scale_lens("256px")
    packed = randn(2, 680, 3, 4, 64, seed=4, dtype=torch.bfloat16)
    check(lambda qkv, backend: attention(lens)(*qkv.permute(2, 0, 3, 1, 4), backend=backend), [packed], gpu)


@pytest.mark.parametrize("shape", [(4, 680, 1024), (3, 37, 203)])
def test_gated_residual_with_a_branch_of_another_dtype(gpu, shape):
    x, branch = (randn(*shape, seed=seed) for seed in range(2))
    parts = modulation(shape[0], shape[2], seed=7, parts=3)
    check(
        lambda *tensors, backend: gated_residual_adaln(*tensors, backend=backend), [x, branch.bfloat16(), *parts], gpu
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4, 680, 1024), (2, 680, 1920), (2, 2240, 2304), (1, 521, 3584), (3, 37, 203)])
@pytest.mark.parametrize("gated", [False, True])
def test_adaln(gpu, gated, shape, dtype):
    batch, _, channels = shape
    streams = [randn(*shape, seed=seed, dtype=dtype) for seed in range(2 if gated else 1)]
    parts = modulation(batch, channels, seed=7, dtype=dtype, parts=3 if gated else 2)
    if gated:
        check(lambda *tensors, backend: gated_residual_adaln(*tensors, backend=backend), [*streams, *parts], gpu)
    else:
        check(lambda *tensors, backend: [adaln_layer_norm(*tensors, backend=backend)], [*streams, *parts], gpu)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize(("rows", "codes", "channels"), [(5440, 4096, 32), (1, 4096, 32), (1000, 16384, 64)])
def test_nearest_code(gpu, rows, codes, channels, metric):
    z, codebook = randn(rows, channels, seed=0).to(DEVICE), randn(codes, channels, seed=1).to(DEVICE)
    codebook[codes // 2] = codebook[3]  # the first of equal codes must be chosen
    found = nearest_code(z, codebook, metric=metric, backend=gpu)
    wide = z.double(), codebook.double()
    if metric == "cosine":
        wide = wide[0], torch.nn.functional.normalize(wide[1], dim=-1)
        scores = wide[0] @ wide[1].T
    else:
        scores = wide[0] @ wide[1].T - wide[1].square().sum(-1) / 2
    best = scores.max(-1).values
    # Scores in fp32 are sums of C products, each rounded. The chosen code is the nearest one within that rounding.
    band = 4 * channels**0.5 * torch.finfo(torch.float32).eps * (z.norm(dim=-1) * codebook.norm(dim=-1).max()).double()
    assert (best - scores.gather(-1, found[:, None])[:, 0] <= band).all()
    assert not (found == codes // 2).any()


@pytest.mark.parametrize("batch", [1, 8])
def test_multi_scale_quantize(gpu, batch):
    patch_nums = SCHEDULES["256px"]
    tensors = [
        randn(batch, 32, 16, 16, seed=0),
        randn(4096, 32, seed=1) * torch.linspace(0.1, 1, 4096)[:, None],
        randn(4, 32, 32, 3, 3, seed=2, std=(9 * 32) ** -0.5),
        randn(4, 32, seed=3, std=0.01),
    ]
    on_gpu = [tensor.to(DEVICE) for tensor in tensors]
    tokens = multi_scale_quantize(*on_gpu, patch_nums, backend=gpu).tokens
    assert torch.equal(tokens, multi_scale_quantize(*(t.double() for t in on_gpu), patch_nums).tokens)
    check(lambda *ts, backend: multi_scale_quantize(*ts, patch_nums, backend=backend)[1:], tensors, gpu)
    f_hat, codes = torch.zeros_like(on_gpu[0]), on_gpu[1][tokens[:, 5:14]]
    found = next_scale_input(f_hat, codes, *on_gpu[2:], patch_nums, 2, backend=gpu)
    with stated_order():
        plain = next_scale_input(f_hat, codes, *on_gpu[2:], patch_nums, 2, backend="reference")
    exact = next_scale_input(*(t.double() for t in (f_hat, codes, *on_gpu[2:])), patch_nums, 2, backend="reference")
    for name, *parts in zip(("f_hat", "next map"), found, plain, exact, strict=True):
        assert_accurate(*parts, name=name)


# ---- what only a GPU can show ----------------------------------------------------------------------------------------


def gated_attention(q, k, v, x, gate, scale, shift, backend):
    out = block_causal_attention(q, k, v, scale_lens("256px"), backend=backend)
    return gated_residual_adaln(x, out.transpose(1, 2).flatten(2), gate, scale, shift, backend=backend)


def block(q, k, v, x, gate, scale, shift, backend):
    """Each op of a transformer block, once."""
    residual, y = gated_attention(q, k, v, x, gate, scale, shift, backend)
    return residual, adaln_layer_norm(y, scale, shift, backend=backend)


def block_inputs(dtype=torch.bfloat16, seed=0):
    heads = attention_inputs(2, 4, 680, 64, seed=seed, dtype=dtype)
    parts = modulation(2, 256, seed=seed + 5, dtype=dtype, parts=3)
    return [tensor.to(DEVICE) for tensor in (*heads, randn(2, 680, 256, seed=seed + 6, dtype=dtype), *parts)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inductor(gpu, dtype):
    torch._dynamo.reset()
    inputs = block_inputs(dtype)
    compiled = torch.compile(functools.partial(block, backend=gpu), fullgraph=True)
    for found, expected in zip(compiled(*inputs), block(*inputs, backend=gpu), strict=True):
        assert torch.equal(found, expected)
    leaves = [[t.detach().clone().requires_grad_() for t in inputs] for _ in range(2)]
    for function, tensors in zip((compiled, functools.partial(block, backend=gpu)), leaves, strict=True):
        sum(out.float().square().sum() for out in function(*tensors)).backward()
    for a, b in zip(*leaves, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_cuda_graphs_of_inductor(gpu):
    """The graphs own the memory that is allocated in their warm-up. The tables of schedules must not be there."""
    torch._dynamo.reset()
    compiled = torch.compile(functools.partial(block, backend=gpu), fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for seed in range(4):
            inputs = block_inputs(seed=seed)
            found = [out.clone() for out in compiled(*inputs)]
            for a, b in zip(found, block(*inputs, backend=gpu), strict=True):
                assert torch.equal(a, b)


def captured(step, inputs, fresh) -> tuple:
    """Captures `step(*inputs)` as a graph, writes `fresh` into the inputs, and returns the results of a replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step(*inputs)
    with torch.no_grad():
        for static, new in zip(inputs, fresh, strict=True):
            static.copy_(new)
    graph.replay()
    return outputs


def with_gradients(call, cotangents):
    """A function that returns the outputs of `call`, and the gradients of its arguments for these `cotangents`."""

    def step(*tensors):
        outputs = call(*tensors)
        return *outputs, *torch.autograd.grad(outputs, [t for t in tensors if t.requires_grad], cotangents)

    return step


def leaves(tensors):
    return [tensor.detach().requires_grad_() for tensor in tensors]


def test_graph_capture(gpu):
    fresh = block_inputs(seed=100)
    call = functools.partial(block, backend=gpu)
    with torch.no_grad():
        for found, expected in zip(captured(call, block_inputs(), fresh), call(*fresh), strict=True):
            assert torch.equal(found, expected)


def test_graph_capture_of_a_training_step(gpu):
    cotangents = [randn(2, 680, 256, seed=60 + i, dtype=torch.bfloat16).to(DEVICE) for i in range(2)]
    step = with_gradients(functools.partial(block, backend=gpu), cotangents)
    fresh = leaves(block_inputs(seed=100))
    for found, expected in zip(captured(step, leaves(block_inputs()), fresh), step(*fresh), strict=True):
        assert torch.equal(found, expected)


def quantizer_inputs(seed=0):
    tensors = (randn(2, 32, 16, 16, seed=seed), randn(512, 32, seed=seed + 1),
               randn(4, 32, 32, 3, 3, seed=seed + 2, std=0.05), randn(4, 32, seed=seed + 3, std=0.01))  # fmt: skip
    return [tensor.to(DEVICE) for tensor in tensors]


def test_graph_capture_of_the_quantizer(gpu):
    def encode(*tensors):
        return multi_scale_quantize(*tensors, SCHEDULES["256px"], backend=gpu)[:2]

    fresh = quantizer_inputs(seed=100)
    with torch.no_grad():
        for found, expected in zip(captured(encode, quantizer_inputs(), fresh), encode(*fresh), strict=True):
            assert torch.equal(found, expected)


def test_graph_capture_of_a_training_step_of_the_quantizer(gpu):
    def encode(*tensors):
        return multi_scale_quantize(*tensors, SCHEDULES["256px"], backend=gpu)[1:]

    step = with_gradients(encode, [randn(2, 32, 16, 16, seed=60).to(DEVICE), torch.tensor(0.5, device=DEVICE)])
    fresh = leaves(quantizer_inputs(seed=100))
    for found, expected in zip(captured(step, leaves(quantizer_inputs()), fresh), step(*fresh), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(gpu, dtype):
    """Results and gradients equal those of inputs that are cast by hand. Gradients have the dtypes of the inputs."""
    q, k, v, x, *modulations = leaves(t.to(DEVICE) for t in block_inputs(torch.float32))
    x = x.detach().to(dtype).requires_grad_()
    inputs = (q, k, v, x, *modulations)

    def by_hand(*tensors):
        return gated_attention(*(tensor.to(dtype) for tensor in tensors), backend=gpu)

    cotangents = [randn(2, 680, 256, seed=60 + i, dtype=dtype).to(DEVICE) for i in range(2)]
    expected = with_gradients(by_hand, cotangents)(*inputs)
    with torch.autocast(DEVICE, dtype=dtype):
        found = with_gradients(functools.partial(gated_attention, backend=gpu), cotangents)(*inputs)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_autocast_never_lowers_a_search(gpu):
    f, codebook, weight, bias = quantizer_inputs()
    z = f.movedim(1, -1)
    low = [tensor.bfloat16() for tensor in (f, codebook)]
    with torch.no_grad(), torch.autocast(DEVICE, dtype=torch.bfloat16):
        tokens = nearest_code(z.bfloat16(), codebook, backend=gpu)
        quantized = multi_scale_quantize(low[0], low[1], weight, bias, SCHEDULES["256px"], backend=gpu)
    assert torch.equal(tokens, nearest_code(z.bfloat16().float(), codebook, backend=gpu))
    wide = multi_scale_quantize(*(t.float() for t in low), weight, bias, SCHEDULES["256px"], backend=gpu)
    assert all(torch.equal(a, b) for a, b in zip(quantized, wide, strict=True))


def test_side_stream(gpu):
    """Kernels run on the current stream, here behind a long wait, and not on the default stream."""
    inputs = block_inputs()
    with torch.no_grad():
        expected = block(*inputs, backend=gpu)
        late = [torch.zeros_like(t) for t in inputs]
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(100_000_000)
            for target, source in zip(late, inputs, strict=True):
                target.copy_(source)
            found = block(*late, backend=gpu)
            torch.cuda.current_stream().synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_second_device(gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    inputs = block_inputs()
    with torch.no_grad():
        expected = block(*inputs, backend=gpu)
        found = block(*(t.to("cuda:1") for t in inputs), backend=gpu)  # the current device stays cuda:0
    assert all(torch.equal(a, b.to(DEVICE)) for a, b in zip(expected, found, strict=True))


def test_auto_is_a_kernel(gpu):
    for op in backends.GPU_OPS:
        for dtype in DTYPES:
            assert backends.resolve(op, "auto", "cuda", dtype) in backends.GPU_BACKENDS


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 126])
def test_qk_norm_cache(gpu, head_dim, dtype):
    qkv, q_factor = randn(2, 256, 3, 16, head_dim, seed=1, dtype=dtype), randn(16, seed=2).exp()
    outputs = []
    plain, exact = ("reference", "cpu", dtype), ("reference", "cpu", torch.float64)
    for backend, device, kind in ((gpu, DEVICE, dtype), plain, exact):
        caches = [torch.zeros(2, 16, 680, head_dim, dtype=kind, device=device) for _ in range(2)]
        with stated_order() if backend == "reference" else contextlib.nullcontext():
            q = qk_norm_cache(qkv.to(device, kind), *caches, 424, q_factor=q_factor.to(device), backend=backend)
        outputs.append([tensor.cpu() for tensor in (q, *caches)])
    for name, found, *others in zip(("q", "k", "v"), *outputs, strict=True):
        assert_accurate(found, *others, name=name)


@pytest.mark.parametrize("vocab", [512, 4096, 16384])
def test_sample_tokens(gpu, vocab):
    """Draws may differ where scores are equal within rounding, which is at most one in a thousand here."""
    conditional, unconditional = (3 * randn(4, 256, vocab, seed=seed) for seed in (1, 2))
    options = {"guidance": 1.5, "top_k": 300, "top_p": 0.96, "offset": 424}
    seeds = torch.arange(4)
    expected = sample_tokens(conditional, unconditional, seeds=seeds, **options, backend="reference")
    found = sample_tokens(
        conditional.to(DEVICE), unconditional.to(DEVICE), seeds=seeds.to(DEVICE), **options, backend=gpu
    )
    assert (found.cpu() != expected).float().mean() <= 1e-3


def test_captured_generation(gpu):
    """With each scale as a CUDA graph, tokens equal those of launches, also for other labels, seeds and options."""
    pipeline = var.load(backend=gpu)
    vqvae, transformer = pipeline.vqvae.to(DEVICE), pipeline.var.to(DEVICE)
    captured, launched = (var.Generator(transformer, vqvae, batch_size=4, graphs=graphs) for graphs in (True, False))
    for labels, seeds, cfg in (([0, 1, 2, 3], [1, 2, 3, 4], 2.0), ([9, 8, 7, 6], [5, 6, 7, 8], 2.0),
                               ([3], [1], 1.0), ([4], [2], 1.0)):
        one, other = (generator(torch.tensor(labels), seeds=seeds, cfg=cfg, top_k=100, top_p=0.95)
                      for generator in (captured, launched))  # fmt: skip
        assert torch.equal(one.tokens, other.tokens)
    assert all(captured._captured.values()), "a capture failed"


def test_generation_with_the_embedded_model(gpu):
    """With the same seed, the pictures are those of plain PyTorch."""
    labels = torch.arange(10)
    images = []
    for backend in (gpu, "reference"):
        pipeline = var.load(backend=backend)
        vqvae, transformer = pipeline.vqvae.to(DEVICE), pipeline.var.to(DEVICE)
        images.append(transformer.generate(vqvae, labels, cfg=2.0, top_k=1, seed=0))
    same = (images[0].tokens == images[1].tokens).float().mean().item()
    assert same > 0.99, f"{same:.1%} of the tokens agree"  # a near-tie may differ, which changes what follows
