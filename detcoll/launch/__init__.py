"""How ranks are recognised and started: launchers' environments, processes, their output, and MPI's launcher."""
