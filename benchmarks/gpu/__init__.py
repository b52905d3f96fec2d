"""The engine at 7-8B scale and up to 128K tokens on one GPU. `python -m benchmarks.gpu`.

One file per section, each a function of `Bench`; `__main__` lists them.
"""
