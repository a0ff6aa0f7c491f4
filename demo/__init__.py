"""The embedded "Shapes" demo models: data, weights, training."""
