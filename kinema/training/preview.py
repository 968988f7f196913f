"""Videos made while training, from the averaged weights, by the same path as `kinema generate`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from kinema.generation.config import GenerateRequest, PipelineConfig
from kinema.generation.parts import Parts
from kinema.generation.pipeline import Pipeline
from kinema.models.build import build_text_encoder, build_transformer
from kinema.models.transformer import Transformer
from kinema.telemetry.run_log import RunLog
from kinema.training.config import PreviewConfig
from kinema.training.parts import Frozen


class Previewer:
    """Makes the recipe's previews.

    Args:
        config: of the pipeline that makes them.
        frozen: the networks of the run. The text encoder is read besides, and let go after each
            preview, where the run has a cache in its place.

    Raises:
        KinemaError: a preview that could not be made, known before the first step.
    """

    def __init__(
        self, wanted: PreviewConfig, config: PipelineConfig, frozen: Frozen, device: torch.device
    ) -> None:
        self._config = config
        assert frozen.vae is not None, "loaded where there are previews"
        self._vae = frozen.vae
        self._shared = frozen.text.encoder is not None
        weights = config.text.weights
        self._text = frozen.text.encoder or build_text_encoder(
            config.text.config, None if weights is None else Path(weights)
        )
        self._device = device
        self._requests = self._checked(wanted)

    def _pipeline(self, model: Transformer) -> Pipeline:
        return Pipeline(self._config, Parts(model, self._vae, self._text), device=self._device)

    def _checked(self, wanted: PreviewConfig) -> list[GenerateRequest]:
        with torch.device("meta"):
            pipeline = self._pipeline(build_transformer(self._config.model))
        width, height = wanted.size or (None, None)
        return [
            pipeline.request(
                prompt,
                width=width,
                height=height,
                num_frames=wanted.num_frames,
                num_sampling_steps=wanted.num_sampling_steps,
                cfg_scale=wanted.cfg_scale,
                seed=wanted.seed,
            )
            for prompt in wanted.prompts
        ]

    def make(self, weights: Mapping[str, Tensor], step: int, run: Path, log: RunLog) -> None:
        """Write the videos of a step to `preview/stepS/` of the run folder, and show them.

        Args:
            weights: whole, on the device.
        """
        with torch.device("meta"):
            model = build_transformer(self._config.model)
        # The tensors themselves, not copies: sampling only reads them.
        model.load_state_dict(dict(weights), assign=True)
        model.requires_grad_(False).eval()
        folder = run / "preview" / f"step{step}"
        for number, clip in enumerate(self._pipeline(model).generate_all(self._requests)):
            path = clip.save(folder / f"{number:02d}{clip.suffix}", overwrite=True)
            log.video(
                f"preview/{number:02d}",
                path,
                frames=clip.frames,
                fps=clip.request.fps,
                step=step,
            )
        if not self._shared:
            self._text.free()
        log.event("preview", step=step, path=folder.relative_to(run))
