"""How a trained model adapts to a new text through edits of it (SEAL, Zweiger et al. 2025).

config: the keys · records: the files · documents: what is new · edits: how it is learned, and who
proposes that · inner: train a copy of the base on an edit · policies, prompted: propose edits ·
loop: all methods of a study · analysis, report, plots: what the records say, without torch.
"""
