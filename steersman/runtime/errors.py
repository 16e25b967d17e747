"""The one exception for what a user got wrong. The command line prints its sentence and exits with 2."""


class UserError(ValueError):
    """Bad input. The message is one sentence that says what is wrong, where, and what to do."""
