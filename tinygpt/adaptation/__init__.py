"""How a trained model adapts to a new text through edits of it (SEAL, Zweiger et al. 2025).

documents: what is new, cut in what an edit may see and what is scored · edits: directives, from a
policy's logits to training sequences · policies: who proposes them (writers: by a language model;
self_policy, prompted, hf_policy, mlx_policy, file_policy) · inner: a copy of the base trained on
them · trials: an edit of a document → records · records: the file they are kept in.
"""
