"""A sealed benchmark: a public task whose labels stay with who sealed it, and a judge that scores submissions against them.

What is public and what is not:

    TASK/task.toml        what is asked, the rules, the budget, the base model, the scorer's digest, the tree's root
    TASK/index.parquet    one row a chip: an opaque name and region, pixel size, month, place by coarse cells
    TASK/image/NAME.tif   the imagery, without its place on Earth unless the task was sealed with exact positions
    TASK/leaves.txt       the salted hash of every chip's labels: whoever holds the key later can be held to them
    KEY                   labels, salts, exact places, the base model's predictions, fingerprints of the sealed chips

What the judge takes on trust, and what not. A model folder is run by our own code, in a process of its own that can read the
images and nothing else of value; nothing in the folder is executed. The labels are compared with the hashes published before
anybody submitted. What a model was trained on can only be declared; the declaration is compared with the model's contract
and with the sealed ground, pictures, heights and names. A submission that leaves something undeclared, or is caught, gets
the base model's score, with the reasons.

A false declaration that contradicts nothing is not caught by an audit. A program cannot keep its owner from editing it
either: the pinned digest keeps honest judges on the same numbers, and stands in every result for others to recompute.
"""
