"""The front door, ``opd``: commands, the run folder, exit codes.

Of all of ``opd/`` only this folder imports from the folders beside it: it puts the parts together.
"""

from opd.cli.main import COMMANDS, main

__all__ = ["COMMANDS", "main"]
