"""Quality classifiers, perplexity and domains: training, evaluation, and the stage that uses them."""
