"""Does Quest at a budget hurt this model on this task? ``quest-compile eval MODEL`` answers.

Contexts are prefilled once, densely; question and answer go through the decode path, token by
token, for every method and budget from the same cache. Answers are compared with those of dense
decoding on the same samples. `docs/accuracy.md` explains what the results mean.
"""
