"""The loop that turns labels into images, scale by scale, with classifier-free guidance and sampling."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import NoReturn

import torch
from torch import Tensor, nn

from var_kernels import backends, sample_tokens
from var_kernels.reference.sample_tokens import restrict

from ..model.modules import dtype_of
from ..model.transformer import VAR
from ..model.vqvae import VQVAE
from . import graphs as graph_capture
from .decoder import InferenceDecoder
from .noise import Noise
from .prepared import prepared_from
from .request import (
    PRECISIONS,
    Generated,
    Kept,
    Labels,
    OnScale,
    Options,
    checked_options,
    checked_seed,
    checked_seeds,
    class_numbers,
)
from .transformer import InferenceTransformer, TransformerWeights

_KEPT_CACHE_BYTES = 1 << 30


def soft_codes(logits_BLV: Tensor, codebook_VC: Tensor, ratio: float, exponential_BLV: Tensor) -> Tensor:
    """The codes of `more_smooth`: averages with Gumbel-softmax weights, sharper at each scale (ratio = k/(K−1))."""
    temperature = max(0.27 * (1 - 0.95 * ratio), 0.005)
    weights = ((logits_BLV * (1 + ratio) - exponential_BLV.log()) / temperature).softmax(dim=-1)
    return weights @ codebook_VC


class Generator:
    """Generates images of a model as fast as the machine allows. Build it once for a precision and a batch size, then
    call it often.

    Building takes the weights as they are now, so later changes of the model have no effect. On a CPU the weights are
    packed for the kernels; generators of one model, and `generate`, share what was packed for one precision. Elsewhere
    the decoder is copied with its channels last, and a projection is copied only if the precision converts it. `nbytes`
    says how much memory the copies and the KV cache take. With `pack=False` or backend "reference" nothing is copied in
    fp32: projections are `F.linear`, and the model's own decoder runs.

    Precision "bf16" holds the weights, the activations of the projections, attention and the decoder in bfloat16. The
    residual stream, the norms, the head and sampling stay fp32. Parameters of any dtype are converted to these.

    A module of the model that is not what the model was built with (an adapter around a layer, a quantised layer, a
    parametrisation, a module with hooks) is called as it is, in the dtype of its parameters.

    `graphs` says whether each scale is captured as a CUDA graph, once for each batch size and set of options, when they
    come for the second time. None means: on GPUs only. Capturing has never been verified on a GPU. If a capture fails,
    a warning says why, and the scales are launched as usual.

    `backend` serves every op that it has kernels for (see `backends.SERVES`). PyTorch's own kernels serve the others.
    None means the backend of `var` for the transformer and sampling, that of `vqvae` for the quantizer and the decoder.

    Threads may share a generator: their calls wait for one another. It cannot be copied or pickled; build another one
    from the model.

    Raises ValueError for an unknown precision, for a backend that is unknown or not available, for a batch size below
    1, for a VQ-VAE whose schedule, vocabulary or width differs from the transformer's, and for weights that are sharded
    over processes.
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
        _refuse_sharded(var=var, vqvae=vqvae)
        self.config, self.batch_size, self.precision = var.config, batch_size, precision
        self.device = var.pos_1LC.device
        self._backend, self._decoding = (model.backend if backend is None else backend for model in (var, vqvae))
        for name in (self._backend, self._decoding):
            _check_backend(name, self.device)
        dtype = PRECISIONS[precision]
        of_var, of_vqvae = prepared_from(var), prepared_from(vqvae)
        with torch.inference_mode(), of_var.lock, of_vqvae.lock:
            self._quantize = copy.deepcopy(vqvae.quantize).float()
            weights = of_var.weights(
                (dtype, self._backend, pack), lambda: TransformerWeights(var, dtype, backend=self._backend, pack=pack)
            )
            own = dtype_of(vqvae) == dtype == torch.float32 and (not pack or self._decoding == "reference")
            self._decoder = None if own else of_vqvae.weights(
                (dtype, self._decoding, pack), lambda: InferenceDecoder(vqvae, dtype, backend=self._decoding, pack=pack)
            )
            self._transformer = InferenceTransformer(weights, 2 * batch_size)
        self.decode = self._decoder or vqvae.decode_features  # features (B, z_channels, h, w) -> images
        self.begin, self.empty_features = self._transformer.begin, self._quantize.empty_features
        on_gpu = self.device.type == "cuda"
        if graphs and not on_gpu:
            raise ValueError(f"graphs: expected a model on a GPU, got one on {self.device}")
        self._capture = graph_capture.capture_cuda if on_gpu and graphs is not False else None
        self._captured: dict[tuple, graph_capture.CapturedGeneration | None] = {}
        self._lock, self._user = threading.Lock(), None

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Generator holds weights that are packed for this machine, and cannot be copied or pickled: "
                        "build another one from a copy of the model")

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes that this object holds in addition to the model: packed weights, the decoder with its activations, and
        the KV cache."""
        return {
            "packed weights": self._transformer.weights.nbytes,
            "decoder": self._decoder.nbytes if self._decoder else 0,
            "KV cache": self._transformer.cache_bytes,
        }

    @property
    def owns_weights(self) -> bool:
        """Whether this object reads copies of all weights, and nothing of the two models."""
        return self._decoder is not None

    def stream(self, labels: Labels, *, seeds: Sequence[int] | Tensor | None = None, **options) -> Iterator[Generated]:
        """Generate any number of images, `batch_size` at a time, and yield each group as soon as it is ready.

        `seeds` has one seed for each label. The other options are those of a call, but a single `seed` is refused:
        every group would draw the same numbers.
        """
        if "seed" in options:
            raise ValueError("seed: expected seeds, one for each image, got one seed for all groups")
        labels = class_numbers(labels, self.config.num_classes)
        if seeds is not None:
            seeds = checked_seeds(seeds, None, len(labels))
        for start in range(0, len(labels), self.batch_size):
            part = slice(start, start + self.batch_size)
            yield self(labels[part], seeds=None if seeds is None else seeds[part], **options)

    def __call__(
        self, labels: Labels, *, cfg: float = 1.5, top_k: int = 0, top_p: float = 0.0, seed: int | None = None,
        seeds: Sequence[int] | Tensor | None = None, more_smooth: bool = False, keep: Kept | None = None,
        on_scale: OnScale | None = None,
    ) -> Generated:
        """Generate one image for each of up to `batch_size` labels. The options are those of `generate`."""
        options = checked_options(cfg, top_k, top_p)
        labels = class_numbers(labels, self.config.num_classes).to(self.device)
        batch, seed = len(labels), checked_seed(seed)
        if batch > self.batch_size:
            raise ValueError(f"labels: expected at most batch_size = {self.batch_size}, got {batch}")
        seeds = checked_seeds(seeds, seed, batch)
        if options.guided:
            labels = torch.cat((labels, torch.full_like(labels, self.config.num_classes)))
        if self.is_used_by_this_thread:
            raise RuntimeError("on_scale: expected a call of another Generator, got one of that which is generating")
        with self._lock, torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            self._user = threading.get_ident()
            try:
                return self._generate(labels, batch, options, seed, seeds, more_smooth, keep, on_scale)
            finally:
                self._user = None

    @property
    def is_used_by_this_thread(self) -> bool:
        """Whether this thread is inside a call: then `on_scale` has been called."""
        return self._user == threading.get_ident()

    def _generate(
        self, labels: Tensor, batch: int, options: Options, seed: int | None, seeds: Tensor | None, more_smooth: bool,
        keep: Kept | None, on_scale: OnScale | None,
    ) -> Generated:
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
        """The graphs for such a call, captured when it comes for the second time: one call does not repay a capture.

        None at the first call, and if this generator captures nothing.
        """
        if self._capture is None:
            return None
        key = (batch, options, seeded)
        if key not in self._captured:
            self._captured[key] = None
        elif self._captured[key] is None:
            try:
                self._captured[key] = graph_capture.CapturedGeneration(self, batch, options, seeded, self._capture)
            except RuntimeError as error:
                warnings.warn(f"the scales could not be captured as CUDA graphs and are launched as usual: {error}",
                              RuntimeWarning, stacklevel=4)  # fmt: skip
                self._capture = None
                return None
        return self._captured[key]


def _refuse_sharded(**models: nn.Module) -> None:
    for argument, model in models.items():
        for name, parameter in model.named_parameters():
            if hasattr(parameter, "device_mesh"):  # a DTensor, as fully_shard makes them
                raise ValueError(f"{argument}: expected all of the weights in this process, got a shard of {name}: "
                                 "load its full state dict into a model of its own")
            if parameter.is_meta:
                raise ValueError(f"{argument}: expected weights, got {name} on the meta device")


def _check_backend(backend: str, device: torch.device) -> None:
    """Raise ValueError if a named backend is not available: here, instead of at the first scale."""
    for op in backends.OPS:
        backends.resolve(op, backends.for_op(op, backend), device.type, torch.float32)


def generate(
    var: VAR, vqvae: VQVAE, labels: Labels, *, cfg: float = 1.5, top_k: int = 0, top_p: float = 0.0,
    seed: int | None = None, seeds: Sequence[int] | Tensor | None = None, more_smooth: bool = False,
    keep: Kept | None = None, on_scale: OnScale | None = None, precision: str | None = None, pack: bool = True,
    backend: str | None = None,
) -> Generated:
    """Sample one image per label, coarse to fine.

    `labels` are class numbers in [0, num_classes]: a tensor, an array or a list of integers, or one integer. Guidance
    grows with the scale: t = cfg·k/(K−1). With cfg = 0 the unconditional half is not computed. `seed` seeds one
    `torch.Generator` (None: from fresh entropy), which is drawn from once per scale, so that a seed gives the tokens of
    the official implementation. With `seeds`, one for each label, an image depends on its own seed and not on its
    neighbours. `more_smooth` feeds Gumbel-softmax mixtures of codes forward, which gives nicer pictures, but no valid
    likelihood. `keep` holds the tokens that editing keeps. `on_scale(k, partial)` is called after each scale;
    `partial()` decodes the images (B, 3, H, W) so far.

    `precision` is "fp32" or "bf16". None means bf16 under bf16 autocast, else fp32. `pack` and `backend` are those of
    `Generator`.

    The first call prepares the weights for its precision and keeps them with the model, so that later calls find them,
    for any batch size. They take about as much memory as the weights in that precision; a KV cache of at most 1 GiB is
    kept too. `var.release(model)` frees this memory, and it is freed with the model. Every call asks whether the model
    has changed (a step of an optimizer, loading, `.to`, another submodule, a hook), and then prepares anew. Changes
    through `.data` are noticed if they change some of 16 elements of a tensor that are compared, and on GPUs not at
    all: call `var.release(model)` after such changes.

    Raises ValueError for labels outside [0, num_classes], for top_p outside [0, 1], for a negative cfg or top_k, for a
    backend that is not available, and for a VQ-VAE of another schedule, vocabulary or width. Raises TypeError for
    labels, seeds or options that are no numbers, or no integers where integers are expected.
    """
    device = var.pos_1LC.device.type
    if precision is None:
        low = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
        precision = "bf16" if low else "fp32"
    labels = class_numbers(labels, var.config.num_classes)
    generator = _kept_generator(var, vqvae, len(labels), precision=precision, pack=pack, backend=backend)
    return generator(
        labels, cfg=cfg, top_k=top_k, top_p=top_p, seed=seed, seeds=seeds, more_smooth=more_smooth, keep=keep,
        on_scale=on_scale,
    )


def _kept_generator(
    var: VAR, vqvae: VQVAE, batch: int, *, precision: str, pack: bool, backend: str | None
) -> Generator:
    """A generator for `batch` images, kept with the transformer for the next call.

    Its KV cache grows with the batch. If the cache is larger than 1 GiB, only the weights are kept: allocating the
    cache again takes about a hundredth of the time that such a batch takes. Where nothing is packed nothing is kept.
    """
    of_var, of_vqvae = prepared_from(var), prepared_from(vqvae)
    key = (precision, pack, backend, var.backend, vqvae.backend)
    with of_var.lock:
        version, kept = of_var.generators.get(key, (None, None))
        if version is not of_vqvae.version:
            kept = None
        usable = kept is not None and kept.batch_size >= batch and not kept.is_used_by_this_thread
        if usable:
            return kept
        generator = Generator(
            var, vqvae, batch_size=max(1, batch), precision=precision, pack=pack, backend=backend
        )
        if generator.nbytes["KV cache"] > _KEPT_CACHE_BYTES:
            kept = kept or Generator(var, vqvae, precision=precision, pack=pack, backend=backend)
        elif kept is None or kept.batch_size < batch:
            kept = generator
        if generator.owns_weights:
            of_var.generators[key] = of_vqvae.version, kept
        return generator
