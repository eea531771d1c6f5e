"""Gradients of a Graph in NumPy: what trains the students, adaptors and discriminators of the trained detectors."""
