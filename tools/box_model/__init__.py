"""Box, the small chat model that ships with streamserve: its data, its training, its tests."""
