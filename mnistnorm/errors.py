"""The errors that the programs report in one line."""

import textwrap


class UserError(Exception):
    """An error that the user can fix; the program prints its message and exits.

    Args:
        message: one line that says what is wrong and what to do.
        exit_code: 1 for a failure, 2 for wrong usage.
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def one_line(error: Exception) -> str:
    """The message of `error` without line breaks, shortened to 200 characters."""
    return textwrap.shorten(str(error), width=200, placeholder=" ...")
