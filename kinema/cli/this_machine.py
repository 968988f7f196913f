"""Files and folders that have to be on this machine."""

from __future__ import annotations

import os
import re

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
"""With one slash: `Path` has taken the other."""


def refuse_url(given: str | os.PathLike[str] | None, what: str, *, hint: str) -> None:
    """Refuse the URL of a store, which would become a folder called `s3:` here.

    Raises:
        ConfigError: it is one.
    """
    from kinema.config.errors import ConfigError

    if given is not None and _URL.match(os.fspath(given)):
        url = re.sub("^([^/]+:)/+", r"\1//", os.fspath(given))
        raise ConfigError(f"{what} has to be on this machine", where=url, hint=hint)
