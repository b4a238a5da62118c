"""Other servers: how each is started as its own users would, and kept out of the others' way."""
