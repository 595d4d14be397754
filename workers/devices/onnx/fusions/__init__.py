"""Fusions of our own: parts of a graph that become one faster operator."""
