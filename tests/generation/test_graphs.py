"""The capture of generations as CUDA graphs, with a recorder in place of a GPU.

The recorder keeps every operator of a captured function with its arguments. A replay calls the same operators on the
same tensors and writes to the same memory; it repeats no decision of Python code. Three kinds of faults therefore show
as wrong results: a value that is read on the host, an input that is no tensor of the capture, and memory that the
capture does not own. What a GPU may refuse to capture, a synchronisation or an allocation outside of the pool, does not
show here.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.helpers.models import tiny_var, tiny_vqvae
from var import Generator
from var.generation import graphs

LABELS = torch.tensor([0, 4, 2, 1, 3])
OPTIONS = {"top_k": 9, "top_p": 0.9, "cfg": 2.0}


def storable(leaf):
    """Whether `leaf` is a tensor with a storage. Packed weights of oneDNN have none, and nothing writes to them."""
    return torch.is_tensor(leaf) and not leaf.is_mkldnn


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, results))
        return results

    def replay(self):
        for function, args, kwargs, results in self.calls:
            given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if storable(leaf)}
            pairs = zip(tree_leaves(results), tree_leaves(function(*args, **kwargs)), strict=True)
            for old, new in pairs:
                # Results in the memory of an argument are views of it, or it was changed in place.
                if storable(old) and old.untyped_storage().data_ptr() not in given:
                    old.copy_(new)


class Captures:
    """Takes the place of `_capture` of a Generator, and counts the captures."""

    def __init__(self):
        self.count = 0

    def __call__(self, function):
        self.count += 1
        recorder = Recorder()
        with recorder:
            outputs = function()
        for tensor in tree_leaves(outputs):
            if storable(tensor):
                tensor.zero_()  # a capture computes nothing
        return outputs, recorder.replay


def generators(**options):
    """Two equal generators, of which the second one captures graphs, and its captures."""
    model, vqvae = tiny_var(), tiny_vqvae()
    eager, captured = (Generator(model, vqvae, batch_size=5, **options) for _ in range(2))
    captured._capture = captures = Captures()
    return eager, captured, captures


def twice(generator, labels, **options):
    """The result of the second of two calls, which captures."""
    generator(labels, **options)
    return generator(labels, **options)


def assert_same(one, other):
    assert torch.equal(one.tokens, other.tokens) and torch.equal(one.images, other.images)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_replays_generate_what_launches_do(precision):
    eager, captured, captures = generators(precision=precision)
    for labels, seed in ((LABELS, 1), (LABELS.flip(0), 2), (LABELS, 1)):
        assert_same(captured(labels, seed=seed, **OPTIONS), eager(labels, seed=seed, **OPTIONS))
    for seeds in ([1, 2, 3, 4, 5], [9, 8, 7, 6, 5]):
        assert_same(captured(LABELS, seeds=seeds, **OPTIONS), eager(LABELS, seeds=seeds, **OPTIONS))
    assert captures.count == 2 * (1 + 3 + 1)  # begin, three scales and the decoder; with noise and with seeds


def test_what_a_graph_cannot_vary_is_captured_again():
    eager, captured, captures = generators()
    for labels, options in ((LABELS, OPTIONS), (LABELS[:2], OPTIONS), (LABELS, {**OPTIONS, "cfg": 0.0}),
                            (LABELS, {**OPTIONS, "cfg": 1.0}), (LABELS, {**OPTIONS, "top_k": 3})):  # fmt: skip
        for seed in (3, 4):
            assert_same(captured(labels, seed=seed, **options), eager(labels, seed=seed, **options))
    assert captures.count == 5 * 5


def test_the_next_replay_does_not_change_earlier_results():
    _, captured, _ = generators()
    first = twice(captured, LABELS, seed=1, **OPTIONS)
    tokens, images = first.tokens.clone(), first.images.clone()
    captured(LABELS, seed=2, **OPTIONS)
    assert torch.equal(first.tokens, tokens) and torch.equal(first.images, images)


def test_callbacks_see_each_scale():
    eager, captured, _ = generators()
    captured(LABELS, seed=1, **OPTIONS)
    seen = [[], []]
    for generator, images in zip((eager, captured), seen, strict=True):
        generator(LABELS, seed=1, on_scale=lambda k, partial, images=images: images.append(partial()), **OPTIONS)
    assert len(seen[0]) == 3
    for one, other in zip(*seen, strict=True):
        assert torch.equal(one, other)


def test_one_call_captures_nothing():
    """A capture costs several generations, and the call that people write was captured for one image."""
    eager, captured, captures = generators()
    assert_same(captured(LABELS, seed=1, **OPTIONS), eager(LABELS, seed=1, **OPTIONS))
    assert captures.count == 0
    captured(LABELS, seed=2, **OPTIONS)
    assert captures.count == 5


def test_editing_and_smooth_codes_are_not_captured():
    eager, captured, captures = generators()
    assert_same(twice(captured, LABELS, seed=1, more_smooth=True), eager(LABELS, seed=1, more_smooth=True))
    assert captures.count == 0


def test_the_recorder_fixes_a_value_that_is_read_on_the_host():
    """A check of the recorder itself: a value read on the host is fixed in the recording."""
    value, captures = torch.tensor([2.0]), Captures()
    outputs, replay = captures(lambda: (value * float(value), value * value))
    value.fill_(3.0)
    replay()
    assert outputs[0].item() == 6.0 and outputs[1].item() == 9.0


def test_a_failed_capture_warns_once_and_runs_without_graphs():
    eager, captured, _ = generators()

    def refuse(function):
        raise RuntimeError("operation not permitted when stream is capturing")

    captured._capture = refuse
    with pytest.warns(RuntimeWarning, match="not permitted when stream is capturing"):
        first = twice(captured, LABELS, seed=1, **OPTIONS)
    assert_same(first, eager(LABELS, seed=1, **OPTIONS))
    assert_same(captured(LABELS, seed=2, **OPTIONS), eager(LABELS, seed=2, **OPTIONS))  # no second warning


def test_graphs_need_a_gpu():
    with pytest.raises(ValueError, match="graphs: expected a model on a GPU"):
        Generator(tiny_var(), tiny_vqvae(), graphs=True)
    assert Generator(tiny_var(), tiny_vqvae())._capture is None and graphs.capture_cuda
