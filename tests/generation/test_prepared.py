"""What `generate` keeps with a model: it is prepared once, is never out of date, and dies with the model."""

import copy
import functools
import gc
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import var
from tests.helpers.models import tiny_var, tiny_vqvae
from var import Generator, edit, generate, release
from var.generation import generator as generator_module
from var.generation import prepared as prepared_module
from var.generation.editing import box_mask
from var_kernels import PackedConv3x3, PackedLinear

LABELS = torch.tensor([0, 4, 2, 1, 3])
OPTIONS = {"seed": 3, "top_k": 9, "top_p": 0.9, "cfg": 2.0}


@pytest.fixture
def preparations(monkeypatch):
    """A list that gets the name of whatever generation prepares: the weights of a transformer, or of a decoder."""
    made = []

    def counted(kind):
        def make(*args, **kwargs):
            made.append(kind.__name__)
            return kind(*args, **kwargs)

        return make

    for kind in (generator_module.TransformerWeights, generator_module.InferenceDecoder):
        monkeypatch.setattr(generator_module, kind.__name__, counted(kind))
    return made


BOTH = ["TransformerWeights", "InferenceDecoder"]


def fresh(transformer, vqvae, labels=LABELS, **options):
    """The result of a generator of copies, which share nothing with the models."""
    copies = copy.deepcopy(transformer), copy.deepcopy(vqvae)
    options = {**OPTIONS, **options}
    precision = options.pop("precision", "fp32")
    return Generator(*copies, batch_size=len(labels), precision=precision)(labels, **options)


def assert_same(one, other):
    assert torch.equal(one.tokens, other.tokens) and torch.equal(one.images, other.images)


# ---- prepared once -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_call_of_generate_prepared_all_weights_anew(preparations, precision):
    transformer, vqvae = tiny_var(), tiny_vqvae()
    expected = fresh(transformer, vqvae, precision=precision)
    preparations.clear()
    for _ in range(3):
        assert_same(generate(transformer, vqvae, LABELS, precision=precision, **OPTIONS), expected)
    assert preparations == BOTH


def test_other_batches_options_and_editing_find_what_is_prepared(preparations):
    transformer, vqvae = tiny_var(), tiny_vqvae()
    for count in (1, 5, 2, 3):
        transformer.generate(vqvae, LABELS[:count], seed=count)
    generate(transformer, vqvae, LABELS, seeds=range(5), more_smooth=True, cfg=0.0)
    images = torch.zeros(2, 3, vqvae.config.image_size, vqvae.config.image_size)
    mask = box_mask(transformer.config.schedule, (0.0, 0.0, 0.5, 1.0), inside=False)
    edit(transformer, vqvae, images, mask)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=False):
        generate(transformer, vqvae, LABELS[:1])
    assert preparations == BOTH
    generate(transformer, vqvae, LABELS, precision="bf16")
    generate(transformer, vqvae, LABELS)
    assert preparations == 2 * BOTH  # one for each precision


def test_generators_of_one_model_share_its_weights(preparations):
    transformer, vqvae = tiny_var(), tiny_vqvae()
    one, other = Generator(transformer, vqvae), Generator(transformer, vqvae, batch_size=5)
    generate(transformer, vqvae, LABELS)
    assert preparations == BOTH
    # They share no state: the calls do not disturb each other.
    expected = fresh(transformer, vqvae, LABELS[:1])
    other(LABELS, seed=1, on_scale=lambda k, partial: assert_same(one(LABELS[:1], **OPTIONS), expected))


def test_a_smaller_batch_after_a_larger_one_leaves_no_trace():
    transformer, vqvae = tiny_var(), tiny_vqvae()
    for count in (5, 1, 3, 5):
        assert_same(generate(transformer, vqvae, LABELS[:count], **OPTIONS), fresh(transformer, vqvae, LABELS[:count]))


def test_a_large_cache_is_not_kept(monkeypatch, preparations):
    transformer, vqvae = tiny_var(), tiny_vqvae()
    one = Generator(transformer, vqvae).nbytes["KV cache"]
    monkeypatch.setattr(generator_module, "_KEPT_CACHE_BYTES", 2 * one)
    preparations.clear()
    for count in (5, 1, 5):
        assert_same(generate(transformer, vqvae, LABELS[:count], **OPTIONS), fresh(transformer, vqvae, LABELS[:count]))
        kept = [generator for _, generator in prepared_module.prepared_from(transformer).generators.values()]
        assert [generator.nbytes["KV cache"] for generator in kept] == [one]
    assert preparations[:2] == BOTH and len(preparations) == 2 + 3 * 2  # the others are those of `fresh`


# ---- never out of date ---------------------------------------------------------------------------------------------


def stepped(optimizer, **options):
    def change(model):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.3)
        optimizer(model.parameters(), lr=0.5, **options).step()
        model.zero_grad()

    return change


def doubled(model):
    return {name: tensor * 2 if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()}


def in_place(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1.5)


def through_data(model):
    for parameter in model.parameters():
        parameter.data.mul_(-1.5)


def assigned_to_data(model):
    for parameter in model.parameters():
        parameter.data = parameter.data * -1.5


def with_counters_restored(model):
    for parameter in model.parameters():
        with torch.autograd._unsafe_preserve_version_counter(parameter), torch.no_grad():
            parameter.mul_(-1.5)


CHANGES = {
    "SGD": stepped(torch.optim.SGD),
    "AdamW, foreach": stepped(torch.optim.AdamW, foreach=True),
    "AdamW, fused": stepped(torch.optim.AdamW, fused=True),
    "load_state_dict": lambda model: model.load_state_dict(doubled(model)),
    "load_state_dict, assign": lambda model: model.load_state_dict(doubled(model), assign=True),
    "in place": in_place,
    ".data": through_data,
    ".data =": assigned_to_data,
    "counters restored": with_counters_restored,
    ".to(dtype)": lambda model: model.to(torch.float8_e4m3fn).float(),
    "vector_to_parameters": lambda model: nn.utils.vector_to_parameters(
        nn.utils.parameters_to_vector(model.parameters()) * -1.5, model.parameters()
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("which", ["transformer", "vqvae"])
def test_a_change_of_the_weights_is_never_ignored(change, which):
    models = {"transformer": tiny_var(), "vqvae": tiny_vqvae()}
    before = generate(*models.values(), LABELS, **OPTIONS)
    CHANGES[change](models[which])
    after = generate(*models.values(), LABELS, **OPTIONS)
    assert_same(after, fresh(*models.values()))
    assert not torch.equal(before.images, after.images)


def replaced_head(transformer, vqvae):
    transformer.head = nn.Linear(transformer.head.in_features, transformer.head.out_features)


def replaced_block(transformer, vqvae):
    transformer.blocks[0] = copy.deepcopy(transformer.blocks[1])


def replaced_codebook(transformer, vqvae):
    vqvae.quantize.embedding = nn.Embedding(*vqvae.quantize.embedding.weight.shape)


def replaced_weight(transformer, vqvae):
    transformer.head.weight = nn.Parameter(-transformer.head.weight.detach())


def hooked_block(transformer, vqvae):
    transformer.blocks[0].ffn.register_forward_hook(lambda module, inputs, output: -output)


def one_element(transformer, vqvae):
    with torch.no_grad():
        transformer.head.bias[-3] += 100


@pytest.mark.parametrize(
    "change", [replaced_head, replaced_block, replaced_codebook, replaced_weight, hooked_block, one_element]
)
def test_another_module_parameter_or_hook_is_noticed(change):
    pair = tiny_var(), tiny_vqvae()
    before = generate(*pair, LABELS, **OPTIONS)
    change(*pair)
    after = generate(*pair, LABELS, **OPTIONS)
    assert_same(after, fresh(*pair))
    assert not torch.equal(before.images, after.images)


def test_weights_without_a_counter_of_changes():
    """Tensors that were made in inference mode have no version."""
    with torch.inference_mode():
        pair = tiny_var(), tiny_vqvae()
        first = generate(*pair, LABELS, **OPTIONS)
        assert_same(generate(*pair, LABELS, **OPTIONS), first)
        pair[0].head.bias[-3] += 100
        after = generate(*pair, LABELS, **OPTIONS)
        assert_same(after, fresh(*pair))
        assert not torch.equal(after.tokens, first.tokens)


def test_another_vqvae_is_not_decoded_with_the_first():
    transformer, one = tiny_var(), tiny_vqvae()
    other = copy.deepcopy(one)
    in_place(other)
    for vqvae in (one, other, one):
        assert_same(generate(transformer, vqvae, LABELS, **OPTIONS), fresh(transformer, vqvae))


def test_another_number_of_threads_or_backend_changes_no_result():
    pair = tiny_var(), tiny_vqvae()
    expected = generate(*pair, LABELS, **OPTIONS)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(generate(*pair, LABELS, **OPTIONS).tokens, expected.tokens)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(generate(*pair, LABELS, backend="reference", **OPTIONS).tokens, expected.tokens)


# ---- no leak, no copies --------------------------------------------------------------------------------------------


def kept_weights(transformer):
    (kept,) = (generator for _, generator in prepared_module.prepared_from(transformer).generators.values())
    return weakref.ref(kept._transformer.weights), weakref.ref(kept._decoder)


def _nothing(*_):
    return None


def test_what_is_prepared_dies_with_the_model():
    transformer, vqvae = tiny_var(), tiny_vqvae()
    transformer.blocks[0].register_forward_hook(functools.partial(_nothing, transformer))  # a cycle through a hook
    generate(transformer, vqvae, LABELS)
    weights = kept_weights(transformer)
    del transformer, vqvae
    gc.collect()
    assert [reference() for reference in weights] == [None, None]


def test_what_is_prepared_dies_when_the_model_changes_or_is_released():
    transformer, vqvae = tiny_var(), tiny_vqvae()
    for change in (lambda: in_place(transformer), lambda: release(transformer, vqvae)):
        generate(transformer, vqvae, LABELS[:2])
        weights = kept_weights(transformer)
        change()
        expected = fresh(transformer, vqvae)
        assert_same(generate(transformer, vqvae, LABELS, **OPTIONS), expected)
        gc.collect()
        assert [weights[0]()] == [None]
    release(transformer)  # nothing to release is fine
    release(transformer, vqvae)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_model_hold_nothing_that_was_prepared(copied):
    transformer, vqvae = tiny_var(), tiny_vqvae()
    empty = len(pickle.dumps(transformer))
    expected = generate(transformer, vqvae, LABELS, **OPTIONS)
    assert len(pickle.dumps(transformer)) < empty + 500
    assert transformer.state_dict().keys() == tiny_var().state_dict().keys()
    other = copied(transformer)
    assert_same(generate(other, vqvae, LABELS, **OPTIONS), expected)
    in_place(other)
    assert_same(generate(transformer, vqvae, LABELS, **OPTIONS), expected)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_generator_says_why_it_cannot_be_copied(copied):
    with pytest.raises(TypeError, match="Generator holds weights that are packed for this machine"):
        copied(Generator(tiny_var(), tiny_vqvae()))


@pytest.mark.parametrize(
    "layer", [lambda: PackedLinear(torch.randn(33, 20)), lambda: PackedConv3x3(torch.randn(5, 4, 3, 3), torch.zeros(5))]
)
def test_packed_layers_are_shared_by_copies_and_not_pickled(layer):
    """A pickle would carry the order of this processor to another one."""
    layer = layer()
    assert copy.deepcopy(layer) is layer and copy.copy(layer) is layer
    with pytest.raises(TypeError, match="made for the processor that it was built on"):
        pickle.dumps(layer)


# ---- threads -------------------------------------------------------------------------------------------------------


def test_threads_that_share_a_generator_got_tokens_of_each_other():
    pipeline = var.load()
    shared = Generator(pipeline.var, pipeline.vqvae, batch_size=4)
    requests = [(torch.arange(number, number + 1 + number % 4) % 10, number) for number in range(16)]
    expected = [shared(labels, seed=seed) for labels, seed in requests]
    calls = (lambda labels, seed: shared(labels, seed=seed),
             lambda labels, seed: generate(pipeline.var, pipeline.vqvae, labels, seed=seed))  # fmt: skip
    for call in calls:
        with ThreadPoolExecutor(4) as pool:
            for result, wanted in zip(pool.map(call, *zip(*requests, strict=True)), expected, strict=True):
                assert torch.equal(result.tokens, wanted.tokens)


def test_first_calls_in_several_threads_prepare_once(preparations):
    pair, barrier = (tiny_var(), tiny_vqvae()), threading.Barrier(4)

    def call(seed):
        barrier.wait()
        return generate(*pair, LABELS, seed=seed)

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(call, range(4)))
    assert preparations == BOTH
    for seed, result in enumerate(results):
        assert_same(result, fresh(*pair, seed=seed, top_k=0, top_p=0.0, cfg=1.5))


def test_a_call_within_a_call():
    """`on_scale` may generate too; the state of the outer call must survive. It would wait for itself for ever."""
    pair = tiny_var(), tiny_vqvae()
    expected, inner = fresh(*pair), []
    nested = generate(*pair, LABELS, on_scale=lambda k, _: inner.append(generate(*pair, LABELS, **OPTIONS)), **OPTIONS)
    for result in (nested, *inner):
        assert_same(result, expected)
    generator = Generator(*pair, batch_size=5)
    with pytest.raises(RuntimeError, match="on_scale: expected a call of another Generator"):
        generator(LABELS, on_scale=lambda k, _: generator(LABELS))
    assert_same(generator(LABELS, **OPTIONS), expected)  # the error leaves it usable
