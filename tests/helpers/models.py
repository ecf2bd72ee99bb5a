"""Small networks with random weights, and the logits that the engine computes for given tokens."""

import torch

from var import VAR, VQVAE, VARConfig, VQVAEConfig
from var.generation.transformer import InferenceTransformer, TransformerWeights

PATCH_NUMS = (1, 2, 3)


def tiny_vqvae(**overrides) -> VQVAE:
    torch.manual_seed(0)
    fields = dict(vocab_size=24, z_channels=8, ch=32, ch_mult=(1, 1), num_res_blocks=1, patch_nums=PATCH_NUMS)
    return VQVAE(VQVAEConfig(**{**fields, **overrides})).eval()


def tiny_var(**overrides) -> VAR:
    fields = dict(depth=2, width=32, heads=2, num_classes=5, vocab_size=24, z_channels=8, patch_nums=PATCH_NUMS)
    model = VAR(VARConfig(**{**fields, **overrides})).eval()
    model.init_weights(torch.Generator().manual_seed(0), gamma=0.5, head=1.0)
    return model


def inference_transformer(model: VAR, rows: int, dtype: torch.dtype = torch.float32) -> InferenceTransformer:
    """The engine of a transformer, for `rows` sequences."""
    return InferenceTransformer(TransformerWeights(model, dtype), rows)


def stepwise_logits(transformer: InferenceTransformer, labels, inputs) -> torch.Tensor:
    """The logits of one step for each scale with the KV cache, where `inputs` are those of training."""
    schedule, x, logits = transformer.config.schedule, transformer.begin(labels), []
    first = schedule.lengths[0]
    for k, (start, length) in enumerate(zip(schedule.starts, schedule.lengths, strict=True)):
        if k:
            x = transformer.embed(inputs[:, start - first : start - first + length], k, guided=False)
        logits.append(transformer.step(x, k))
    return torch.cat(logits, dim=1)
