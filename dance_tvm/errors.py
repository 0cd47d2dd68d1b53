"""The one exception that means: the user can mend this."""


class DanceError(Exception):
    """Bad input or a missing prerequisite, told in one sentence that names what is wrong and what to do.

    Commands print the message alone and end with exit code 2.
    """
