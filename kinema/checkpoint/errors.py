"""What can go wrong with checkpoints and weights, as types."""

from __future__ import annotations

from kinema.config.errors import KinemaError


class CheckpointError(KinemaError):
    """A checkpoint that cannot be written, or is missing, torn or altered."""


class WeightsError(KinemaError):
    """Weights that cannot be read, or do not belong to the model."""


class HubError(KinemaError):
    """Weights that are not on this machine and cannot be fetched."""
