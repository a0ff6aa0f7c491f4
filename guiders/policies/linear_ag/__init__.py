"""LinearAG: the unconditional prediction by linear regression."""
