"""Trained runs, scored: the text and the tasks they are scored on, and what is said of them.

machine  → the device, the precision and the threads that a run was trained with
text     → what is scored: a split of the run's own corpus, or any other text
scoring  → loss, accuracy, loss by position; shrinking: the same of a smaller model
tasks    → files of questions; facts: those of the embedded corpus; samples: text of the model
runs     → all of it for every run, a row each; results, table, figures: how it is told
"""
