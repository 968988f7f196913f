"""Errors meant for the person at the keyboard: what, where, and the next move."""

from __future__ import annotations


class KinemaError(ValueError):
    """A mistake of input or environment, not of the code: shown without a traceback.

    Args:
        what: what is wrong, with the value and the limit.
        where: the file, row or key it was found in.
        hint: what to do next.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.what = what
        self.where = where
        self.hint = hint
        text = f"{where}: {what}" if where else what
        super().__init__(f"{text}\n  try: {hint}" if hint else text)

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process boundaries (decode workers, ranks); keyword-only fields need help.
        return (_rebuild, (type(self), self.what, self.where, self.hint))


def _rebuild(
    kind: type[KinemaError], what: str, where: str | None, hint: str | None
) -> KinemaError:
    return kind(what, where=where, hint=hint)


class ConfigError(KinemaError):
    """A recipe, setting or override that is not valid."""

    exit_code = 2
