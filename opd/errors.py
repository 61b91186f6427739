"""The one exception that a user's mistake raises."""


class UserError(ValueError):
    """Something the user can put right: says what is wrong, where, and what to do.

    The command line prints it as one line and exits with code 2. Any other exception is a bug.
    """


class StoppedBeforeStep(UserError):  # noqa: N818 - what it says is not that something is wrong
    """A step was not taken; raised on all ranks, where the weights are those of the step before."""


class NonFiniteError(StoppedBeforeStep):
    """A loss, an opinion or a gradient is infinite or NaN."""


class LostServer(StoppedBeforeStep):
    """A server that the run depends on has failed it; raised on all ranks, between two steps."""


class OutOfMemoryError(UserError):
    """The memory does not suffice; raised on one rank, where the weights are those of a step."""
