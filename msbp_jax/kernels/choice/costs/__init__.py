"""What a traced program takes: its equations as work of a few kinds, and measured seconds for a unit of each."""
