"""``python -m loadtest``: the same program as ``streamserve bench serve``."""

import sys

from streamserve_loadtest.cli import main

if __name__ == "__main__":
    sys.exit(main())
