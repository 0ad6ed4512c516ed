"""The papers' claims on real models: one runner, a configuration for each experiment."""
