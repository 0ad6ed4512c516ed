"""Tests of the torch binding: attach, train, merge, detach, save and load."""
