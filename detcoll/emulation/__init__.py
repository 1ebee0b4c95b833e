"""Several sites on one machine: the lab, with namespaces and a router, and the relay, in user space alone."""
