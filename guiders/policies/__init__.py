"""Rules that decide what is evaluated at each step."""
