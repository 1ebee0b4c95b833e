"""A job: the settings that its ranks agree on, the endpoints they open, and the failures they report to each other."""
