"""Adapters of other libraries, in and out, against those libraries themselves."""
