"""The `superlora demo` command: a real model, real data, adapters compared at their size.

Nothing here is imported by `import superlora`. The files are the stages of the demo:
fetch, vit, data, points, train, report, and run, which joins them.
"""
