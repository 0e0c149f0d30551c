"""Loading models, LoRA on query and value projections, the actor-critic."""
