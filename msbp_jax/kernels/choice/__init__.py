"""Which backend runs: for which device, in what order, and what to say of it."""
