"""A page to look at a manifest: `kinema data browse`."""
