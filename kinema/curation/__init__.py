"""Raw videos -> clips with captions, scores and a verdict: what `kinema curate` does."""
