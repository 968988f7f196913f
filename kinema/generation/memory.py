"""How much memory a batch of requests takes, estimated from the settings alone."""

from __future__ import annotations

from dataclasses import dataclass

from kinema.generation.config import GenerateRequest, PipelineConfig

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by what needs them; sampling and decoding do not happen at once."""

    weights: int
    sampling: int
    decoding: int
    video: int

    @property
    def total(self) -> int:
        return self.weights + max(self.sampling, self.decoding) + self.video

    def describe(self) -> str:
        parts = {
            "weights": self.weights,
            "sampling": self.sampling,
            "decoding": self.decoding,
            "pixels": self.video,
        }
        return ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items())


def estimate_memory(
    request: GenerateRequest, config: PipelineConfig, *, batch: int, weight_bytes: int, dtype: str
) -> MemoryEstimate:
    """Memory for `batch` requests of one shape.

    Args:
        weight_bytes: of the networks, which stay float32 whatever `dtype`.

    Activations are counted at their widest place. In the transformer: the MLP's hidden layer in
    `dtype`, and beside it the residual, its norm and the four vectors of attention, which are
    float32 also under autocast. In the autoencoder's decoder, always float32: six maps of the
    widest full-resolution level for one micro-batch of frames (decoding 17 frames of 128x128 on
    a CPU took 411 MB; this says 403).
    """
    size = BYTES[dtype]
    model, vae = config.model, config.vae.config
    rows = batch * (2 if request.cfg_scale != 1 else 1)
    latent = vae.latent_size(request.num_frames, request.height, request.width)
    tokens = model.num_tokens(latent)
    sampling = rows * tokens * (model.hidden_size * 6 * 4 + model.mlp_size * 2 * size)

    chunk = min(request.num_frames, vae.micro_batch_size or vae.micro_frame_size or 10**9)
    # The decoder's last upsampling leaves the second level's width at full resolution.
    widest = max(vae.vae_2d.block_out_channels[:2])
    decoding = chunk * request.height * request.width * widest * 6 * 4

    pixels = request.num_frames * request.height * request.width * 3
    return MemoryEstimate(
        weights=weight_bytes,
        sampling=sampling,
        decoding=decoding,
        # float32 of the batch as it comes out of the decoder, and its bytes.
        video=batch * pixels * 5,
    )
