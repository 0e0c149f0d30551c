"""The model card beside saved weights."""
