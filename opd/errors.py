"""The one exception that a user's mistake raises."""


class UserError(ValueError):
    """Something the user can put right: says what is wrong, where, and what to do.

    The command line prints it as one line and exits with code 2. Any other exception is a bug.
    """


class NonFiniteError(UserError):
    """A loss, an opinion or a gradient is infinite or NaN; raised on all ranks before the step."""


class OutOfMemoryError(UserError):
    """The memory does not suffice; raised on one rank, where the weights are those of a step."""
