"""Text on pictures, for the nodes and for the demo."""
