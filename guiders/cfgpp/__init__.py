"""CFG++: solvers, the sampler in the host, inversion."""
