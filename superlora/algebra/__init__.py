"""Arrays of any library, computed through TensorLy."""
