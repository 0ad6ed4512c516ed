"""`superlora demo` and `superlora search`: a real model, real data, adapters compared.

Nothing here is imported by `import superlora`. The demo is fetch, vit, data, methods, train,
report, and run, which joins them; the search adds folders, supernet and search.
"""
