"""What plain XLA must be told to run the ops well: sums, chunks, layouts, an order."""
