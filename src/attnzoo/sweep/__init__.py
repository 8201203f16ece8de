"""Sweeps: a grid of configurations as cells, each trained by a process of its own in its own run folder.

`plan` turns a command line into a `Manifest`, which never changes but for cells that a learning-rate search
adds; what happened to a cell is read from its folder. So a sweep can be killed anywhere and resumed.
"""
