"""A job: what its ranks agree on, what they open together, and what they know of each other."""
