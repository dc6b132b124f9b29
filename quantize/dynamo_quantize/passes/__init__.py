"""Changes that make a graph smaller, each on its own."""
