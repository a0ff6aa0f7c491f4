"""The nodes: schemas, tooltips, and one call each into the guiders."""
