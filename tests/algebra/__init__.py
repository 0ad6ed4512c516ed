"""Tests of the array functions on every library, against plain loops."""
