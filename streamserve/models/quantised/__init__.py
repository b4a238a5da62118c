"""Checkpoints that somebody else quantised: one reader for each format."""
