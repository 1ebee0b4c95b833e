"""The programs that `detcoll.testing.TransportContract` runs on every rank."""
