"""Comparisons one can believe: runs are read, grouped into arms, and judged pair by pair over their seeds.

runs        a run folder, read        arms         which runs are one arm; labels; what differs
comparable  what must agree           metrics      the table of metrics, curves
statistics  paired differences        results      verdict by setting, arm and metric
profile     scores over tasks         claims       what the papers promise
comparison  all of it as one JSON object, which terminal, export and page show
"""
