"""``python -m opd.cli``: what torchrun starts."""

import sys

from opd.cli.main import main

sys.exit(main())
