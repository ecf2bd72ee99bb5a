"""torch.compile(dynamic=True) of the transformer's training forward."""

import torch
from torch._dynamo.eval_frame import _debug_get_cache_entry_list

from tests.helpers.models import tiny_var


def test_one_compilation_for_all_batches(cpu):
    torch._dynamo.reset()

    def training_forward(model, labels, inputs):
        return model(labels, inputs)

    compiled = torch.compile(training_forward, fullgraph=True, dynamic=True, backend="aot_eager")
    model = tiny_var()
    for batch in (2, 3, 5, 8):
        labels = torch.arange(batch) % 5
        inputs = torch.randn(batch, 13, 8, generator=torch.Generator().manual_seed(batch))
        found, expected = compiled(model, labels, inputs), model(labels, inputs)
        torch.testing.assert_close(found, expected)
        weight = model.blocks[0].attn.mat_qkv.weight
        gradients = [torch.autograd.grad(logits.square().sum(), weight)[0] for logits in (found, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
    assert len(_debug_get_cache_entry_list(training_forward)) == 1
