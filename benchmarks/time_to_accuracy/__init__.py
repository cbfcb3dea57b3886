"""Time to the dense run's accuracy against the best dense batch size, all costs counted: the judge of every method."""
