"""What a design is made of, as integers."""
