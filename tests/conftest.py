"""What holds for every test: nothing spins for long, nothing reaches the network."""

import os

# Read by libgomp when torch is imported. Its default lets each process of a busy machine spin for
# milliseconds at every barrier: the suite takes six times as long.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ["HF_HUB_OFFLINE"] = "1"
