"""Restoration: a picture that was damaged in a known way guides the sampling."""
