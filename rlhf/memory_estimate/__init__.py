"""The dry run: what a stage will need in memory, before a weight is loaded."""
