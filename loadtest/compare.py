"""``python -m loadtest.compare``: the same program as ``streamserve bench compare``."""

import sys

from streamserve_loadtest.compare import main

if __name__ == "__main__":
    sys.exit(main())
