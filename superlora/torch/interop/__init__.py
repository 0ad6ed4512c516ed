"""The formats of PEFT and LyCORIS."""
