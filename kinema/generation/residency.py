"""Which network is in memory when: all of them, the one whose turn it is, or parts of one."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from kinema.checkpoint.weights import LoadReport, is_declared
from kinema.config.errors import KinemaError
from kinema.generation.offload import blocks_of, streamed
from kinema.generation.parts import Parts, Source
from kinema.models.autoencoder import Autoencoder
from kinema.models.build import build_text_encoder, build_transformer, build_vae
from kinema.models.config import Tiling, VAEConfig
from kinema.models.text import TextEncoder
from kinema.models.transformer import Transformer

Offload = Literal["none", "phase", "layers"]
"""What leaves the device when it is not needed.

`none`: nothing; every network stays where it computes. `phase`: the three phases (text, latents,
decoding) run one after the other over all requests, with one network on the device at a time.
`layers`: as `phase`, and of the transformer only two blocks are there at a time; the text encoder
computes in host memory.
"""

N = TypeVar("N", bound=nn.Module)

OFFLOADS: tuple[Offload, ...] = get_args(Offload)


def check_offload(offload: str) -> Offload:
    """The name, if it is one.

    Raises:
        KinemaError: no such way.
    """
    for known in OFFLOADS:
        if offload == known:
            return known
    raise KinemaError(f"offload is {offload!r}", hint=f"one of {', '.join(OFFLOADS)}")


class Residency:
    """Lends the networks, one phase at a time, each on its device and in its precision.

    On a GPU, what is off-loaded waits in host memory; on the CPU it is dropped and read from its
    file again, which is the only way to give memory back there. Networks that were handed in
    (`Parts`) are their owner's: on the CPU they stay as they are.

    Args:
        parts: the networks, or where they are.
        dtype, vae_dtype: of the weights of the transformer and of the autoencoder; None leaves
            those that were handed in as they are.
        tiling: how the autoencoder saves memory; None leaves one that was handed in as it is.
        compile: compile the transformer's blocks.
        text: a text encoder in place of the one of `parts`.
    """

    def __init__(
        self,
        parts: Parts | Source,
        *,
        device: torch.device,
        offload: Offload,
        dtype: torch.dtype | None,
        vae_dtype: torch.dtype | None,
        tiling: Tiling | None,
        compile: bool,
        text: TextEncoder | None = None,
    ) -> None:
        self._source = parts if isinstance(parts, Source) else None
        self._given = parts if isinstance(parts, Parts) else None
        self._device = device
        self.offload = offload
        self._dtype, self._vae_dtype = dtype, vae_dtype
        self._tiling = tiling
        self._compile = compile
        self._model: Transformer | None = None
        self._vae: Autoencoder | None = None
        self._text = text
        self._text_weights = text.weights_id if text is not None else None
        self._weights_fit = False
        self._fit: LoadReport | None = None
        if offload == "layers" and self._given is not None:
            raise KinemaError(
                "layers are streamed from files, and these networks are in memory",
                where="offload",
                hint="Pipeline.from_pretrained(...), or offload phase",
            )
        if offload == "layers" and compile:
            raise KinemaError(
                "compiled blocks cannot be streamed", where="compile", hint="offload phase or none"
            )

    def load(self) -> Parts:
        """All networks, in memory now.

        Raises:
            KinemaError: they are off-loaded by turns; or weights that do not fit.
        """
        if self.offload != "none":
            raise KinemaError(
                f"with offload {self.offload} the networks are never in memory together",
                where="offload",
                hint="offload none",
            )
        with self.text() as text, self.transformer() as model, self.vae() as vae:
            return Parts(model, vae, text, self.identity())

    def check_weights(self) -> LoadReport | None:
        """Make sure that the weights fit, before time is spent; reads names and shapes only.

        Returns:
            what will become of the transformer's tensors; None for networks that were handed in.

        Raises:
            KinemaError: they do not.
        """
        if self._source is None or self._weights_fit:
            return self._fit
        model = self._empty_transformer()
        self._fit = self._source.fill_model(model, self._device, leave=model.state_dict().keys())
        vae = empty_vae(self._source.config.vae.config, self._vae_dtype)
        self._source.fill_vae(vae, self._device, leave=vae.state_dict().keys())
        self._weights_fit = True
        return self._fit

    @property
    def loaded(self) -> frozenset[str]:
        """Networks that are on the device now (`model`, `vae`, `text`): they take no new memory."""
        if self._given is not None:
            there = next(self._given.model.parameters()).device.type == self._device.type
            return frozenset(("model", "vae", "text")) if there else frozenset()
        held = {"model": self._model, "vae": self._vae, "text": self._text}
        if self.offload != "none":
            return frozenset()
        return frozenset(name for name, network in held.items() if network is not None)

    def identity(self) -> dict[str, object]:
        """Names and hashes of the weights, for the sidecar."""
        if self._given is not None:
            return self._given.identity
        assert self._source is not None
        found = self._source.identity() | self.differences()
        if self._text_weights is not None:
            found["text_weights"] = self._text_weights
        return found

    def differences(self) -> dict[str, list[str]]:
        """What the transformer's weights lack (`new_tensors`) and have besides (`left_out`), where
        that was allowed; empty if they fit, or were not looked at yet."""
        if self._source is None or self._fit is None:
            return {}
        asked = self._source.allowed.unexpected
        found = {
            "new_tensors": list(self._fit.new),
            "left_out": [n for n in self._fit.unexpected if is_declared(n, asked)],
        }
        return {what: names for what, names in found.items() if names}

    def text_encoder(self) -> TextEncoder:
        """The text encoder as a reader of captions; its network is not loaded for this."""
        if self._text is None:
            if self._given is not None:
                self._text = self._given.text
            else:
                assert self._source is not None
                self._text = build_text_encoder(
                    self._source.config.text.config, self._source.text_weights
                )
        return self._text

    @contextmanager
    def text(self) -> Iterator[TextEncoder]:
        """The text encoder, able to encode."""
        encoder = self.text_encoder()
        encoder.to("cpu" if self.offload == "layers" else self._device)
        try:
            yield encoder
        finally:
            if self.offload == "phase" and self._device.type == "cuda":
                encoder.to("cpu")
            elif self.offload != "none" and self._given is None:
                encoder.free()
            self._tidy()

    @contextmanager
    def transformer(self) -> Iterator[Transformer]:
        """The transformer, able to predict."""
        if self.offload == "layers":
            with self._streamed_transformer() as model:
                yield model
            self._tidy()
            return
        if self._model is None:
            self._model = self._given.model if self._given else self._load_transformer()
            if self._dtype is not None:
                self._model.to(self._dtype)
            if self._compile:
                from kinema.parallel.compile import compile_blocks

                compile_blocks(self._model)
        self._model.to(self._device)
        try:
            yield self._model
        finally:
            self._model = self._put_away(self._model)

    @contextmanager
    def vae(self) -> Iterator[Autoencoder]:
        """The autoencoder, able to encode and decode."""
        if self._vae is None:
            self._vae = self._given.vae if self._given else self._load_vae()
            if self._vae_dtype is not None:
                self._vae.to(self._vae_dtype)
            if self._tiling is not None:
                self._vae.tiling = self._tiling
        self._vae.to(self._device)
        try:
            yield self._vae
        finally:
            self._vae = self._put_away(self._vae)

    def _load_transformer(self) -> Transformer:
        assert self._source is not None
        model = self._empty_transformer()
        self._source.fill_model(model, self._device, initial=self._initial_values)
        return model

    def _load_vae(self) -> Autoencoder:
        assert self._source is not None
        vae = empty_vae(self._source.config.vae.config, self._vae_dtype)
        self._source.fill_vae(vae, self._device)
        return vae

    def _empty_transformer(self) -> Transformer:
        assert self._source is not None
        with torch.device("meta"):
            model = build_transformer(self._source.config.model)
        return _ready(model, self._dtype)

    @contextmanager
    def _streamed_transformer(self) -> Iterator[Transformer]:
        assert self._source is not None
        model = self._empty_transformer()
        inside = {place.name for block in blocks_of(model) for place in block.places}
        report = self._source.fill_model(
            model, self._device, leave=inside, initial=self._initial_values
        )
        absent = [name for name in report.new if name in inside]
        initial = self._initial_values(absent) if absent else {}
        with self._source.reader(model) as reader:

            def read(name: str) -> Tensor:
                return initial[name] if name in initial else reader.read(name)

            with streamed(model, read, self._device):
                yield model

    def _initial_values(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Values of tensors that the transformer's weights lack: always the same ones."""
        assert self._source is not None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            state = build_transformer(self._source.config.model).state_dict()
        return {name: state[name].clone() for name in names}

    def _put_away(self, network: N) -> N | None:
        if self.offload == "none":
            return network
        if self._device.type == "cuda":
            network.to("cpu")
            self._tidy()
            return network
        if self._given is not None:
            return network
        del network
        self._tidy()
        return None

    def _tidy(self) -> None:
        """Give memory back that nothing uses, so that the next network finds it."""
        if self.offload != "none":
            gc.collect()
            if self._device.type == "cuda":
                torch.cuda.empty_cache()


def empty_vae(config: VAEConfig, dtype: torch.dtype | None) -> Autoencoder:
    """The autoencoder on the meta device, in its precision."""
    with torch.device("meta"):
        vae = build_vae(config)
    return _ready(vae, dtype)


def _ready(network: N, dtype: torch.dtype | None) -> N:
    network = network.eval().requires_grad_(False)
    # On the meta device this decides what the weights are read as: they are never there twice.
    return network if dtype is None else network.to(dtype)
