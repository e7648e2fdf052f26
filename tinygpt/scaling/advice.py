"""What to run where a line of the checklist fails."""

# By the name of the line, as ``evidence``, ``analysis`` and ``single`` give it.
ADVICE = {
    "at least two seeds of every setting": "Run every setting again with another `seed`.",
    "equal training tokens for all sizes": "Train every size on the same number of tokens.",
    "no token is seen twice": "Use a larger corpus or fewer tokens, or vary the unique tokens too.",
    "every run decays to its own end": "Let the learning rate of every run decay to its end.",
    "a fair learning rate for every width": (
        "Sweep `optim.learning_rate` for each width, or use `model.parametrization=mup`."
    ),
    "the best learning rate is not at the edge of its sweep": (
        "Extend the sweep of `optim.learning_rate` beyond the edge."
    ),
    "alpha is above zero": "Spread the sizes wider, or repeat them with more seeds.",
    "beta is above zero": "Spread the numbers of tokens wider, or repeat them with more seeds.",
    "E meets the exact floor of the corpus": (
        "Run nearer to the floor; an E far off says that the form or the range is wrong."
    ),
    "at least three runs more than parameters": "Add runs, or ask for a law with fewer terms.",
    "no other law describes these runs clearly better": "Take the better one, or add runs.",
    "the law was put to a test": "Add larger runs to hold out, or a second seed of each.",
    "every row is a run of its own": "Fit final losses alone, or read the intervals with care.",
    "nothing but its variable differs between the runs": "Name the `variable=`, or fit both.",
    "the ways to split a budget agree": "Read none of them alone; add sizes around the best one.",
    "a certified minimum inside its bounds": (
        "Ask for a law with fewer terms (`law=`), or spread the runs wider."
    ),
    "the law explains the losses": (
        "Spread the runs wider, add seeds where they scatter much, or ask for another law."
    ),
    "no single run sets the law": (
        "Run that setting again with other seeds; leave a run out only for a reason that is not "
        "its loss."
    ),
    "runs were not chosen by their loss": (
        "Choose runs by what was set before they were trained; `status` shows which diverged."
    ),
    "one version of the code": "Run the odd ones again with the same version.",
    "all runs came to their end": "Start the same command again: it finishes what is missing.",
    "one training set": "Train all runs on one corpus, or vary its size alone.",
    "one vocabulary, context and text": "Fit each alone (`where=`), or train the odd ones again.",
    "one validation set": "Score all runs on one validation set.",
    "one precision": "Set `train.precision` and run the odd ones again.",
    "D does not go with N": "Vary size and data apart: small models on much, large ones on little.",
    "E is identified": "Run where the loss is near its floor: larger models, more data.",
    "runs of larger compute, held out, are predicted": (
        "Add runs at larger compute: the law does not yet hold there."
    ),
    "runs of larger x, held out, are predicted": "Add larger runs: it does not hold there yet.",
    "the residuals have no structure": (
        "Try another law, or a narrower range: the runs bend away from this one."
    ),
    "the law leaves no more than the seeds scatter": (
        "Try another law; more seeds would not help where the form is wrong."
    ),
    "the prediction lies no further beyond the runs than they span": (
        "Add larger runs, or read only predictions that are nearer."
    ),
}
