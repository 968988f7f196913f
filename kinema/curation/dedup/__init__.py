"""Which clips are the same, or nearly so, and which concepts there are."""

from kinema.curation.dedup.tables import COLUMNS, dedup, dedup_rules

__all__ = ["COLUMNS", "dedup", "dedup_rules"]
