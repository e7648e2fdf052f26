"""How fast it is here: what is measured, in which processes, and what comes of it.

``turns`` lets processes work one after the other, a configuration each; ``worker`` is such a
process (``training`` the real Trainer in it, ``kernels`` the rest, ``tokens`` the data);
``results`` turns their laps into medians and ``figure`` into a picture.
"""
