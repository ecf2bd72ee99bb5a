"""The loop that turns labels into images, scale by scale, with classifier-free guidance and sampling."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from var_kernels import backends, sample_tokens
from var_kernels.reference.sample_tokens import restrict

from ..model.transformer import VAR
from ..model.vqvae import VQVAE
from . import graphs as graph_capture
from .decoder import InferenceDecoder
from .noise import Noise
from .request import PRECISIONS, Generated, Kept, OnScale, Options, check_options, checked_seeds
from .transformer import InferenceTransformer


def soft_codes(logits_BLV: Tensor, codebook_VC: Tensor, ratio: float, exponential_BLV: Tensor) -> Tensor:
    """The codes of `more_smooth`: averages with Gumbel-softmax weights, sharper at each scale (ratio = k/(K−1))."""
    temperature = max(0.27 * (1 - 0.95 * ratio), 0.005)
    weights = ((logits_BLV * (1 + ratio) - exponential_BLV.log()) / temperature).softmax(dim=-1)
    return weights @ codebook_VC


class Generator:
    """Generates images of a model as fast as the machine allows. Build it once for a precision and a batch size, then
    call it often.

    Building copies the weights as they are now, so later changes of the model have no effect. On a CPU the weights
    are packed for the kernels. Elsewhere the decoder is copied with its channels last, and a projection is copied only
    if the precision converts it. `nbytes` says how much memory the copies and the KV cache take. With `pack=False` or
    backend "reference" nothing is copied in fp32: projections are `F.linear`, and the model's own decoder runs.

    Precision "bf16" holds the weights, the activations of the projections, attention and the decoder in bfloat16. The
    residual stream, the norms, the head and sampling stay fp32.

    `graphs` says whether each scale is captured as a CUDA graph, once for each batch size and set of options. None
    means: on GPUs only. Capturing has never been verified on a GPU. If a capture fails, a warning says why, and the
    scales are launched as usual.

    `backend` serves every op that it has kernels for (see `backends.SERVES`). PyTorch's own kernels serve the others.
    None means the backend of `var` for the transformer and sampling, that of `vqvae` for the quantizer and the decoder.

    Raises ValueError for an unknown precision, for a backend that is unknown or not available, for a batch size below
    1, and for a VQ-VAE whose schedule, vocabulary or width differs from the transformer's.
    """

    def __init__(
        self, var: VAR, vqvae: VQVAE, *, batch_size: int = 1, precision: str = "fp32", pack: bool = True,
        graphs: bool | None = None, backend: str | None = None,
    ) -> None:
        for name in ("patch_nums", "vocab_size", "z_channels"):
            ours, theirs = getattr(var.config, name), getattr(vqvae.config, name)
            if ours != theirs:
                raise ValueError(f"vqvae: expected {name} {ours} like the transformer, got {theirs}")
        if precision not in PRECISIONS:
            raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        self.config, self.batch_size, self.precision = var.config, batch_size, precision
        self.device = var.pos_1LC.device
        self._backend, self._decoding = (model.backend if backend is None else backend for model in (var, vqvae))
        for name in (self._backend, self._decoding):
            _check_backend(name, self.device)
        self._condition = var.condition
        self._quantize = vqvae.quantize
        with torch.inference_mode():
            self._transformer = InferenceTransformer(
                var, 2 * batch_size, PRECISIONS[precision], backend=self._backend, pack=pack
            )
            in_place = precision == "fp32" and (not pack or self._decoding == "reference")
            self._decoder = None if in_place else InferenceDecoder(
                vqvae, PRECISIONS[precision], batch_size=batch_size, backend=self._decoding, pack=pack
            )
        self.decode = self._decoder or vqvae.decode_features  # features (B, z_channels, h, w) -> images
        self.begin, self.empty_features = self._transformer.begin, vqvae.quantize.empty_features
        on_gpu = self.device.type == "cuda"
        if graphs and not on_gpu:
            raise ValueError(f"graphs: expected a model on a GPU, got one on {self.device}")
        self._capture = graph_capture.capture_cuda if on_gpu and graphs is not False else None
        self._captured: dict[tuple, graph_capture.CapturedGeneration] = {}

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes that this object holds in addition to the model: packed weights, the decoder with its activations, and
        the KV cache."""
        return {
            "packed weights": self._transformer.packed_bytes,
            "decoder": self._decoder.nbytes if self._decoder else 0,
            "KV cache": self._transformer.cache_bytes,
        }

    def stream(self, labels: Tensor, *, seeds: Sequence[int] | Tensor | None = None, **options) -> Iterator[Generated]:
        """Generate any number of images, `batch_size` at a time, and yield each group as soon as it is ready.

        `seeds` has one seed for each label. The other options are those of a call, but a single `seed` is refused:
        every group would draw the same numbers.
        """
        if "seed" in options:
            raise ValueError("seed: expected seeds, one for each image, got one seed for all groups")
        for start in range(0, len(labels), self.batch_size):
            part = slice(start, start + self.batch_size)
            yield self(labels[part], seeds=None if seeds is None else seeds[part], **options)

    @torch.inference_mode()
    def __call__(
        self, labels: Tensor, *, cfg: float = 1.5, top_k: int = 0, top_p: float = 0.0, seed: int | None = None,
        seeds: Sequence[int] | Tensor | None = None, more_smooth: bool = False, keep: Kept | None = None,
        on_scale: OnScale | None = None,
    ) -> Generated:
        """Generate one image for each of up to `batch_size` labels. The options are those of `generate`."""
        check_options(cfg, top_k, top_p)
        options, batch = Options(cfg, top_k, top_p), len(labels)
        labels = labels.to(self.device)
        if batch > self.batch_size:
            raise ValueError(f"labels: expected at most batch_size = {self.batch_size}, got {batch}")
        seeds = checked_seeds(seeds, seed, batch)
        self._condition(labels)  # raises ValueError for bad labels
        if options.guided:
            labels = torch.cat((labels, torch.full_like(labels, self.config.num_classes)))
        with torch.autocast(self.device.type, enabled=False):
            if batch == 0:
                return Generated(labels.new_zeros(0, self.config.schedule.length), self.decode(self.empty_features(0)))
            # With seeds the kernel draws its own random numbers, but `more_smooth` needs the numbers here.
            from_noise = seeds is None or more_smooth
            noise = Noise(batch, self.config.vocab_size, self.device, seed, seeds) if from_noise else None
            seeds = None if from_noise else seeds.to(self.device)
            if keep is None and not more_smooth and (captured := self._captured_for(batch, options, seeds is not None)):
                return captured(labels, noise, seeds, on_scale)
            return self._run(labels, batch, options, noise, seeds, more_smooth, keep, on_scale)

    def _run(
        self, labels: Tensor, batch: int, options: Options, noise: Noise | None, seeds: Tensor | None,
        more_smooth: bool, keep: Kept | None, on_scale: OnScale | None,
    ) -> Generated:
        x_BLC, f_hat, sampled = self.begin(labels), self.empty_features(batch), []
        schedule = self.config.schedule
        for k, (start, length) in enumerate(zip(schedule.starts, schedule.lengths, strict=True)):
            drawn = None if noise is None else noise.draw(length)
            gumbel = noise.draw(length) if more_smooth else None
            given = None if keep is None else (keep.tokens[:, start : start + length], keep.masks[k])
            tokens, f_hat, x_BLC = self.scale(
                k, x_BLC, f_hat, options, noise=drawn, seeds=seeds, gumbel=gumbel, given=given
            )
            sampled.append(tokens)
            if on_scale is not None:
                on_scale(k, lambda features=f_hat: self.decode(features))
        return Generated(torch.cat(sampled, dim=1), self.decode(f_hat))

    def scale(
        self, k: int, x_BLC: Tensor, f_hat: Tensor, options: Options, *, noise: Tensor | None = None,
        seeds: Tensor | None = None, gumbel: Tensor | None = None, given: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Compute scale k from its input and the features so far: its tokens, the new features and the input of the
        next scale, None after the last one.

        This is what a CUDA graph captures, so it takes and returns tensors and reads none of them back to the host.
        `gumbel` makes the soft codes of `more_smooth`. `given` is a pair: tokens (B, l_k), and a mask (l_k,) that is
        True where they replace the sampled ones.
        """
        schedule = self.config.schedule
        ratio = k / (schedule.num_scales - 1) if schedule.num_scales > 1 else 0.0
        logits = self._transformer.step(x_BLC, k, options.cfg * ratio if options.guided else None)
        tokens = sample_tokens(
            logits, top_k=options.top_k, top_p=options.top_p, noise=noise, seeds=seeds,
            offset=0 if seeds is None else schedule.starts[k], backend=self._backend,
        )
        codebook = self._quantize.embedding
        codes = codebook(tokens)
        if gumbel is not None:
            codes = soft_codes(restrict(logits, options.top_k, options.top_p), codebook.weight, ratio, gumbel)
        if given is not None:
            codes = torch.where(given[1].view(1, -1, 1), codebook(given[0]), codes)
        f_hat, following = self._quantize.accumulate(f_hat, codes, k, self._decoding)
        last = following is None
        return tokens, f_hat, None if last else self._transformer.embed(following, k + 1, options.guided)

    def _captured_for(
        self, batch: int, options: Options, seeded: bool
    ) -> graph_capture.CapturedGeneration | None:
        """The graphs for such a call, captured at the first one. None if this generator captures nothing."""
        if self._capture is None:
            return None
        key = (batch, options, seeded)
        if key not in self._captured:
            try:
                self._captured[key] = graph_capture.CapturedGeneration(self, batch, options, seeded, self._capture)
            except RuntimeError as error:
                warnings.warn(f"the scales could not be captured as CUDA graphs and are launched as usual: {error}",
                              RuntimeWarning, stacklevel=4)  # fmt: skip
                self._capture = None
                return None
        return self._captured[key]


def _check_backend(backend: str, device: torch.device) -> None:
    """Raise ValueError if a named backend is not available: here, instead of at the first scale."""
    for op in backends.OPS:
        backends.resolve(op, backends.for_op(op, backend), device.type, torch.float32)


def generate(
    var: VAR, vqvae: VQVAE, labels: Tensor, *, cfg: float = 1.5, top_k: int = 0, top_p: float = 0.0,
    seed: int | None = None, seeds: Sequence[int] | Tensor | None = None, more_smooth: bool = False,
    keep: Kept | None = None, on_scale: OnScale | None = None, precision: str | None = None, pack: bool = True,
    backend: str | None = None,
) -> Generated:
    """Sample one image per label, coarse to fine. Every call builds a `Generator`: for many calls, build one yourself.

    Guidance grows with the scale: t = cfg·k/(K−1). With cfg = 0 the unconditional half is not computed. `seed` seeds
    one `torch.Generator` (None: from fresh entropy), which is drawn from once per scale, so that a seed gives the
    tokens of the official implementation. With `seeds`, one for each label, an image depends on its own seed and not
    on its neighbours. `more_smooth` feeds Gumbel-softmax mixtures of codes forward, which gives nicer pictures, but no
    valid likelihood. `keep` holds the tokens that editing keeps. `on_scale(k, partial)` is called after each scale;
    `partial()` decodes the images (B, 3, H, W) so far.

    `precision` is "fp32" or "bf16". None means bf16 under bf16 autocast, else fp32. `pack` and `backend` are those of
    `Generator`.

    Raises ValueError for labels outside [0, num_classes], for top_p outside [0, 1], for a negative cfg or top_k, for a
    backend that is not available, and for a VQ-VAE of another schedule, vocabulary or width.
    """
    device = var.pos_1LC.device.type
    if precision is None:
        low = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
        precision = "bf16" if low else "fp32"
    generator = Generator(
        var, vqvae, batch_size=max(1, len(labels)), precision=precision, pack=pack, backend=backend
    )
    return generator(
        labels, cfg=cfg, top_k=top_k, top_p=top_p, seed=seed, seeds=seeds, more_smooth=more_smooth, keep=keep,
        on_scale=on_scale,
    )
