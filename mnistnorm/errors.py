"""The errors that the programs report, in one line each."""

import textwrap


class UserError(Exception):
    """Something the user can fix: ends a program with one line that says what is wrong and what to do.

    Args:
        message: the line.
        exit_code: 1 for a failure, 2 for wrong usage.
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def one_line(error: Exception) -> str:
    """What `error` says, without line breaks and of a line's length."""
    return textwrap.shorten(str(error), width=200, placeholder=" ...")
