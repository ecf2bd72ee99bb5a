"""multi_scale_quantize and next_scale_input: bad input and torch's transformations."""


import pytest
import torch

from tests.kernels.multi_scale_quantize.contract import NAMES, SMALL, inputs, leaves
from var_kernels import multi_scale_quantize, next_scale_input

# ---- bad input -------------------------------------------------------------------------------------------------------

QUANTIZE = dict(zip((*NAMES, "patch_nums"), (*inputs((2, 3, 5, 4, (1, 2, 4))), (1, 2, 4)), strict=True))
STEP = {
    "f_hat": QUANTIZE["f"],
    "codes": torch.zeros(2, 4, 3),
    "phi_weight": QUANTIZE["phi_weight"],
    "phi_bias": QUANTIZE["phi_bias"],
    "patch_nums": (1, 2, 4),
    "k": 1,
}
BAD = [
    (multi_scale_quantize, {"f": None}, TypeError, "f: expected a torch.Tensor, got NoneType"),
    (multi_scale_quantize, {"f": torch.zeros(3, 4, 4)}, ValueError, r"f: expected 4 dimensions, got shape \(3, 4, 4\)"),
    (multi_scale_quantize, {"f": torch.zeros(2, 3, 4, 4).long()}, TypeError, "f: expected float32.*got torch.int64"),
    (multi_scale_quantize, {"f": torch.zeros(2, 3, 0, 4)}, ValueError, "f: expected non-empty channels, height"),
    (multi_scale_quantize, {"codebook": torch.zeros(5, 4)}, ValueError, r"codebook: expected shape \(V, 3\).*\(5, 4\)"),
    (multi_scale_quantize, {"codebook": torch.zeros(0, 3)}, ValueError, "codebook: expected shape .* with V >= 1"),
    (multi_scale_quantize, {"codebook": torch.zeros(5, 3).double()}, TypeError, "codebook: expected torch.float32 lik"),
    (multi_scale_quantize, {"codebook": torch.zeros(5, 3, device="meta")}, ValueError, "codebook: expected device cpu"),
    (multi_scale_quantize, {"phi_weight": torch.zeros(3, 3, 3, 3)}, ValueError, "phi_weight: expected 5 dimensions"),
    (multi_scale_quantize, {"phi_weight": torch.zeros(0, 3, 3, 3, 3)}, ValueError, "phi_weight: expected .* n >= 1"),
    (multi_scale_quantize, {"phi_weight": torch.zeros(4, 3, 3, 5, 5)}, ValueError, r"phi_weight: expected .*\(n, 3, 3"),
    (multi_scale_quantize, {"phi_bias": torch.zeros(3, 3)}, ValueError, r"phi_bias: expected shape \(4, 3\), got \(3"),
    (multi_scale_quantize, {"patch_nums": (1, 2, 3)}, ValueError, r"patch_nums: expected the last map to be \(4, 4\)"),
    (multi_scale_quantize, {"patch_nums": (0, 4)}, ValueError, "patch_nums: expected sides of at least 1, got 0"),
    (multi_scale_quantize, {"patch_nums": (1, (2, -1), 4)}, ValueError, "patch_nums: expected sides of at least 1"),
    (multi_scale_quantize, {"patch_nums": (1, 2.0, 4)}, ValueError, "patch_nums: expected integers or .* got 2.0"),
    (multi_scale_quantize, {"patch_nums": (1, (1, 2, 3), 4)}, ValueError, "patch_nums: expected integers or"),
    (multi_scale_quantize, {"patch_nums": ()}, ValueError, "patch_nums: expected at least one scale"),
    (multi_scale_quantize, {"patch_nums": 4}, TypeError, "patch_nums: expected a sequence of map sizes, got int"),
    (multi_scale_quantize, {"metric": "dot"}, ValueError, "metric: expected 'l2' or 'cosine', got 'dot'"),
    (multi_scale_quantize, {"backend": "gpu"}, ValueError, "backend: expected one of auto, .*got 'gpu'"),
    (next_scale_input, {"f_hat": torch.zeros(3, 4, 4)}, ValueError, "f_hat: expected 4 dimensions"),
    (next_scale_input, {"f_hat": torch.zeros(2, 0, 4, 4)}, ValueError, "f_hat: expected non-empty channels"),
    (next_scale_input, {"codes": torch.zeros(2, 5, 3)}, ValueError, r"codes: expected shape \(2, 4, 3\), got \(2, 5, "),
    (next_scale_input, {"codes": torch.zeros(2, 4, 3).half()}, TypeError, "codes: expected torch.float32 like f_hat"),
    (next_scale_input, {"phi_bias": torch.zeros(4)}, ValueError, "phi_bias: expected 2 dimensions"),
    (next_scale_input, {"patch_nums": (1, 2, 8)}, ValueError, "patch_nums: expected the last map .* of f_hat"),
    (next_scale_input, {"k": 3}, ValueError, "k: expected a scale from 0 to 2, got 3"),
    (next_scale_input, {"k": -1}, ValueError, "k: expected a scale from 0 to 2, got -1"),
    (next_scale_input, {"k": 1.0}, ValueError, "k: expected a scale from 0 to 2, got 1.0"),
    (next_scale_input, {"backend": "gpu"}, ValueError, "backend: expected one of auto"),
]


@pytest.mark.parametrize("function, change, error, message", BAD)
def test_bad_input(function, change, error, message):
    arguments = QUANTIZE if function is multi_scale_quantize else STEP
    function(**arguments)  # this also fills the cache of schedules, which must not take 2.0 for 2
    with pytest.raises(error, match=message):
        function(**arguments | change)


def test_float64_is_served_by_the_reference(cpu):
    tensors = [tensor.double() for tensor in inputs(SMALL)]
    assert multi_scale_quantize(*tensors, SMALL[-1]).f_hat.dtype == torch.float64
    with pytest.raises(ValueError, match="'cpu' cannot serve multi_scale_quantize.*does not take torch.float64"):
        multi_scale_quantize(*tensors, SMALL[-1], backend="cpu")


def test_raw_ops_check_their_arguments(cpu):
    tensors, schedule = raw_inputs()
    ops = torch.ops.var_kernels
    forward, backward = ops._multi_scale_quantize, ops._multi_scale_quantize_backward
    tokens, derrors = torch.zeros(2, 21, dtype=torch.int64), torch.ones(2, 3)
    for wrong in (-1, 5):
        with pytest.raises(RuntimeError, match=f"tokens: expected indices of the codebook, got {wrong}"):
            backward(*tensors, torch.full_like(tokens, wrong), derrors, *schedule, 0.5)
    with pytest.raises(RuntimeError, match=r"tokens: expected shape \(2, 21\), got shape \(2, 20\)"):
        backward(*tensors, tokens[:, :20], derrors, *schedule, 0.5)
    with pytest.raises(RuntimeError, match=r"derrors: expected shape \(2, 3\), got shape \(2, 2\)"):
        backward(*tensors, tokens, derrors[:, :2], *schedule, 0.5)
    with pytest.raises(RuntimeError, match="phi_index: expected an index of phi_weight, got 4"):
        forward(*tensors, *schedule[:2], [0, 1, 4], 0.5, False)
    with pytest.raises(RuntimeError, match="phi_index: expected 3, got 2 entries"):
        forward(*tensors, *schedule[:2], [0, 1], 0.5, False)
    with pytest.raises(RuntimeError, match="heights, widths: expected the full size as last entry"):
        forward(*tensors, [1, 2, 3], *schedule[1:], 0.5, False)
    with pytest.raises(RuntimeError, match="f: expected float32"):
        forward(tensors[0].double(), *tensors[1:], *schedule, 0.5, False)
    with pytest.raises(RuntimeError, match=r"codes: expected shape \(2, 4, 3\), got shape \(2, 3, 3\)"):
        ops._next_scale_input(tensors[0], torch.zeros(2, 3, 3), *tensors[2:], 0, 2, 2, 4, 4, 0.5)


# ---- torch's tools, ISA levels ---------------------------------------------------------------------------------------


def raw_inputs():
    shape = (2, 3, 5, 4, (1, 2, 4))
    return inputs(shape), ([1, 2, 4], [1, 2, 4], [0, 1, 3])


def test_opcheck(cpu):
    tensors, schedule = raw_inputs()
    ops = torch.ops.var_kernels
    torch.library.opcheck(ops._multi_scale_quantize.default, (*tensors, *schedule, 0.5, False))
    channels_last = tensors[0].contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(ops._multi_scale_quantize.default, (channels_last, *tensors[1:], *schedule, 0.3, True))
    tokens = ops._multi_scale_quantize(*tensors, *schedule, 0.5, False)[0]
    for f in (tensors[0], channels_last):
        arguments = (f, *tensors[1:], tokens, torch.ones(()).expand(2, 3), *schedule, 0.5)
        torch.library.opcheck(ops._multi_scale_quantize_backward.default, arguments)
        for following in ((4, 4), (0, 0)):
            arguments = (f, torch.zeros(2, 4, 3), *tensors[2:], 1, 2, 2, *following, 0.5)
            torch.library.opcheck(ops._next_scale_input.default, arguments)


class Quantizer(torch.nn.Module):
    def forward(self, f, codebook, phi_weight, phi_bias):
        result = multi_scale_quantize(f, codebook, phi_weight, phi_bias, SMALL[-1])
        codes = codebook[result.tokens[:, :4]]
        return *result, *next_scale_input(result.f_hat, codes, phi_weight, phi_bias, SMALL[-1], 0)


def test_compile(backend, monkeypatch):
    if backend == "reference":
        monkeypatch.setattr("var_kernels.backends.BACKENDS", ("reference",))
    compiled = torch.compile(Quantizer(), fullgraph=True, backend="aot_eager")
    tensors = inputs(SMALL)
    with torch.no_grad():
        for part, expected in zip(compiled(*tensors), Quantizer()(*tensors), strict=True):
            torch.testing.assert_close(part, expected)
    results = []
    for module in (compiled, Quantizer()):
        arguments = leaves(tensors)
        _, f_hat, loss, *_ = module(*arguments)
        results.append(torch.autograd.grad((f_hat * f_hat.detach()).sum() + loss, arguments))
    for part, expected in zip(*results, strict=True):
        torch.testing.assert_close(part, expected)


def test_export(cpu):
    tensors = tuple(inputs(SMALL))
    exported = torch.export.export(Quantizer(), tensors)
    assert any("_multi_scale_quantize" in str(node.target) for node in exported.graph.nodes)
    for part, expected in zip(exported.module()(*tensors), Quantizer()(*tensors), strict=True):
        assert torch.equal(part, expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_and_functional_gradients(backend):
    f, *others = inputs((3, 5, 20, 4, (1, 2, 3)))

    def quantize(f):
        return tuple(multi_scale_quantize(f, *others, (1, 2, 3), backend=backend))

    def step(f):
        return next_scale_input(f, f.flatten(2).mT, *others[1:], (1, 3, 3), 1, backend=backend)

    images = f.unsqueeze(1)
    for function in (quantize, step):
        expected = [function(image) for image in images]
        for part, *parts in zip(torch.vmap(function)(images), *expected, strict=True):
            torch.testing.assert_close(part, torch.stack(parts))

    def loss(*arguments):
        result = multi_scale_quantize(*arguments, (1, 2, 3), backend=backend)
        return result.vq_loss + (result.f_hat * result.f_hat.detach()).sum()

    def gradient(f):
        return torch.func.grad(loss, argnums=(0, 1, 2, 3))(f, *others)

    for part, *parts in zip(torch.vmap(gradient)(images), *map(gradient, images), strict=True):
        torch.testing.assert_close(part, torch.stack(parts))
    arguments = leaves([images[0], *others])
    for part, expected in zip(gradient(images[0]), torch.autograd.grad(loss(*arguments), arguments), strict=True):
        torch.testing.assert_close(part, expected)
