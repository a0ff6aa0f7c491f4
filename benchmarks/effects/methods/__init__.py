"""One file per method: which pictures it needs, and what its paper claims of them, as its METHOD."""
