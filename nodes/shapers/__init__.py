"""Nodes of the rules in guiders/shapers."""
