"""Study how a trained model adapts to new text through edits of it (SEAL, Zweiger et al. 2025).

config: keys · records: files · documents: new text · edits: how to train on it · inner: train a
copy of the base on an edit · policies, prompted: propose edits · loop: run all methods of a study ·
analysis, report, plots: evaluate the records, without torch.
"""
