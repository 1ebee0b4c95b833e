"""Start ranks and recognise how they were started: launcher environments, processes, their output, MPI's launcher."""
