"""Changes to a recipe on the command line: `optim.lr=3e-4`, or `--optim.lr 3e-4`."""

from __future__ import annotations

FREE = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Context settings of a command that takes them: the recipe's schema knows which keys exist."""
