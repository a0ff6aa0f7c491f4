"""Everything that is drawn, for the nodes and for the demo."""
