"""Tests of the array functions of maps on every library, against plain loops."""
