"""The two ways a command can end badly, each one line long.

``InputError`` is wrong use or bad input (exit code 2); ``CheckFailed`` is a check that did not hold: a budget, a
verification, a baseline (exit code 1). Messages say what, where and what to do; the command line prints them
without a traceback.
"""


class TinyvadError(Exception):
    """Base of the errors that a user can act on."""

    exit_code = 2


class InputError(TinyvadError):
    """Wrong use or bad input: exit code 2."""

    exit_code = 2


class CheckFailed(TinyvadError):
    """A budget, verification or baseline check did not hold: exit code 1."""

    exit_code = 1
