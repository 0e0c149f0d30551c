"""What a run says while it runs: metrics, samples, skipped updates, warnings."""
