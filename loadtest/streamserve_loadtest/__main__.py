"""``python -m streamserve_loadtest``."""

import sys

from streamserve_loadtest.cli import main

sys.exit(main())
