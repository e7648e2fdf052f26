"""How a trained model adapts to a new text through edits of it (SEAL, Zweiger et al. 2025).

config: what can be asked for · documents: what is new, cut in what an edit may see and what is
scored · edits: directives and the sequences they train on · inner: a copy of the base trained on
an edit → records · policies, prompted: who proposes edits · loop: all methods of a study ·
analysis, report, plots: what the records say, without torch.
"""
