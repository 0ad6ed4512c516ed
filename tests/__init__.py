"""The tests: a package, so that a folder never passes for the library it is named after."""
