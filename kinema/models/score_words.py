"""Scores in a caption's own text, as Open-Sora 1.2 was trained and is prompted with."""

from __future__ import annotations


def add_scores(
    text: str,
    aes: float | None = None,
    flow: float | None = None,
    camera_motion: str | None = None,
) -> str:
    """The text with scores in the words of 1.2; none is given twice.

    Training captions and prompts both get them here, so that a model is asked in the words that it
    learned. The sentences are those of 1.2's inference (`append_score_to_prompts`); its report
    writes the same words with commas between them.

    Args:
        aes: aesthetic score, about 1..10.
        flow: motion score.
        camera_motion: `pan left`, `zoom in`, ...
    """
    scored = text
    if aes is not None and "aesthetic score:" not in text:
        scored += f" aesthetic score: {aes:.1f}."
    if flow is not None and "motion score:" not in text:
        scored += f" motion score: {flow:.1f}."
    if camera_motion is not None and "camera motion:" not in text:
        scored += f" camera motion: {camera_motion}."
    return scored
