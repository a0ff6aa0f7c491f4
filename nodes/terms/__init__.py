"""Nodes of the rules in guiders/terms."""
