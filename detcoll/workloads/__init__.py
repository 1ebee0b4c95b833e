"""What is trained while others measure. A workload is handed the collectives that it calls, and times itself."""
