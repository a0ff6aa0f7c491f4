"""Rules that add an update against another prediction."""
