"""A CUDA device that is not there, to see what a program asks of it: see `device`."""
