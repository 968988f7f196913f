"""The data of a run as the loop takes it: micro-batches by position."""

from __future__ import annotations
