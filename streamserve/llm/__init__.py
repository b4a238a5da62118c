"""The engine in a Python program, without a server, with vLLM's names."""
