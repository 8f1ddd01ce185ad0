"""Advice that can only be advice: one warning for each message, with a category of ours."""

import warnings


class KfqnWarning(UserWarning):
    """Something that is allowed and probably not wanted; given once, while tracing.

    Each message names the call and the remedy. ``warnings.filterwarnings("ignore",
    category=kfqn.KfqnWarning)`` switches all of them off, ``"error"`` makes them errors.
    """


_given: set[str] = set()


def warn_once(message: str) -> None:
    """Warn, unless this process has been told the same before.

    Python's own register of warnings goes by the line that warns. Here that line is this one for all
    messages, and a loss is traced several times.
    """
    if message not in _given:
        _given.add(message)
        warnings.warn(message, KfqnWarning, stacklevel=2)
