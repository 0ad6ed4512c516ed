"""Integers: what lies where, how it is contracted, and what that costs."""
