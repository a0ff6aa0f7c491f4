"""Nodes of the rules in guiders/policies."""
