"""Tests of the integers: shapes, folds, groups, specs, layouts and counts."""
