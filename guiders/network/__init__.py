"""Reaching into a network: its layers, its attention calls."""
