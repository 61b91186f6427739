"""``opd study``: methods x learning rates x seeds, each a run of ``opd fit``, compared by seed."""
