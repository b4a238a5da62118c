"""Load tests and benchmarks, from a checkout.

The load test itself is the package ``streamserve_loadtest`` in this folder: installed under that
name, for others may have a ``loadtest`` too. Here it is found first, whatever is installed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
