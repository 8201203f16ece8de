"""Comparisons one can believe: runs are read, grouped into arms, and judged pair by pair over their seeds.

runs        a run folder, read        select       named folders, or the cells of a sweep
arms        which runs are one arm    comparable   what must agree
metrics     what is compared          statistics   paired differences, corrected
results     the verdicts              notes        what a reader must know before believing one
profile     scores over tasks         claims       what the papers promise
comparison  all of it as one JSON object, which terminal, export and page show
"""
