"""Learning product after product: streams of tasks, methods that learn them, and what they forget."""
