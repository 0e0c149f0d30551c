"""What a pass needs, and what this machine can do."""
