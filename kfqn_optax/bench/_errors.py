"""What the user can put right, as opposed to a bug: shown as one line, without a traceback."""


class UserError(Exception):
    """A wrong option, file or folder. The message says what was found and what to do."""
