"""Changes of the traced graph, each on its own."""
