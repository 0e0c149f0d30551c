"""The same work through this trainer and through TRL 1.12's, in processes of their own."""
