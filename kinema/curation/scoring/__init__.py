"""Scores of clips by models that look at their frames: aesthetics, match with the caption,
embeddings, classifiers, text on screen. Decoding is done: they read the clips' JPEG strips."""
