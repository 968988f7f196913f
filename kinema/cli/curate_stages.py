"""`kinema curate STAGE`: one stage alone, over a manifest or over raw videos."""

from __future__ import annotations
