"""The reward model: training, metrics and scoring."""
