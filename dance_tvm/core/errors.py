"""The one exception that means: the user can mend this; and the one warning."""


class DanceError(Exception):
    """Bad input or a missing prerequisite, told in one sentence that names what is wrong and what to do.

    Commands print the message alone and end with exit code 2.
    """


class DanceWarning(UserWarning):
    """The figures may mislead: one sentence that says why and what to do; commands print it on standard error."""
